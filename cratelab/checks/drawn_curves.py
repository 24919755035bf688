"""Check of exercise 9.E: curves that a reader draws before they are measured, on networks that the package carries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor

from cratelab.checks.grading import CheckFailed, number, predict
from cratelab.checks.hunting import judge
from cratelab.checks.own_sentence import SHOWN, text
from cratelab.experiments.reference_models import load_reference
from cratelab.interpret.evaluation import untrained
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import SuffixExplanations, TokenExplainer, shuffle
from cratelab.interpret.records import collect_records
from cratelab.interpret.scores import score, split

N_WORDS = 1, 2, 4, 8, 16, 32
CURVES = "trained", "random-only", "untrained", "another", "within"
ABOUT_ZERO = 8.0  # points of a score that count as none

Curves = Mapping[str, list[float]]


@dataclass
class Shortened:
    """The tables of all neurons, of which only the n words with the highest means are kept."""

    table: SuffixExplanations
    n: int
    n_vocab: int

    def simulate(self, excerpts: Excerpts) -> tuple[Tensor, Tensor]:
        """As the tables' own, and 0 at every other word."""
        simulated, coverage = self.table.simulate(excerpts)
        n_layers, h = excerpts.tokens.shape[:2]
        neurons = torch.arange(h, device="cpu")
        kept = torch.stack([self.table.named_tokens(layer, neurons, self.n, self.n_vocab) for layer in range(n_layers)])
        layer, neuron = torch.arange(n_layers, device="cpu")[:, None, None, None], neurons[:, None, None]
        return simulated * kept[layer, neuron, excerpts.tokens.clamp(min=0).long()], coverage


@cache
def measured(model: str = "crate") -> dict[str, list[float]]:
    """Mean scores × 100 of all neurons, by how many words their tables keep; neurons without a score count as 0.

    Args:
        model: the toy "crate" or "gpt2" that has read TinyWorld.

    Returns:
        Each of `CURVES`, a score for each of `N_WORDS`: "trained", "another" (the table of another neuron of the layer)
        and "within" (tokens, eq-09-5) under top-and-random; "random-only"; and "untrained" under top-and-random.
    """
    corpus = text(SHOWN).corpus()
    network = load_reference(model, "toy")
    records = {
        who: collect_records(each, corpus, n_random=5)
        for who, each in (("trained", network), ("untrained", untrained(network)))
    }
    found = {name: [] for name in CURVES}
    for name in ("trained", "random-only", "untrained"):
        protocol = "random-only" if name == "random-only" else "top-and-random"
        explain, validate = split(records["untrained" if name == "untrained" else "trained"], protocol)
        whole = TokenExplainer().explain(explain)
        for n in N_WORDS:
            table = Shortened(whole, n, corpus.n_vocab)
            own = score(table.simulate(validate)[0], validate)
            found[name].append(_mean(own.correlation))
            if name == "trained":
                found["within"].append(_mean(own.within_token))
                found["another"].append(_mean(score(shuffle(table, validate)[0], validate).correlation))
    return found


def _mean(scores: Tensor) -> float:
    return 100 * float(scores.nan_to_num(0).mean())


def _rises(curve: list[float]) -> bool:
    return curve[-1] > curve[0] + 3 and all(b > a - 2 for a, b in pairwise(curve))


def _below(low: list[float], high: list[float]) -> bool:
    return all(a < b for a, b in zip(low, high, strict=True))


def _about_zero(curve: list[float]) -> bool:
    return max(map(abs, curve)) < ABOUT_ZERO


# What is asked of a drawing, how it is answered, and why: each is true of what is measured, by far.
FEATURES: dict[str, tuple[Callable[[Curves], bool], str]] = {
    "direction": (
        lambda c: all(_rises(c[name]) for name in ("trained", "random-only", "untrained")),
        "the first three curves rise and never fall: each further word replaces zeros by what the neuron does there",
    ),
    "bend": (
        lambda c: all(c[who][2] - c[who][0] > c[who][5] - c[who][3] for who in ("trained", "untrained")),
        "words come by falling strength, and squares make little of what is weak: two doublings at the beginning (1 to "
        "4 words) bring more than the last two (8 to 32)",
    ),
    "ceiling": (
        lambda c: 30 < c["trained"][-1] < 90,
        "the trained curve ends well below 100: words that were not in E are missing, and one number a word cannot "
        "follow what the context does (chapter 8 has 65 for whole tables, not 90 and not 30)",
    ),
    "order": (
        lambda c: _below(c["random-only"], c["trained"]),
        "with the same explanations random-only is below top-and-random throughout: the strong excerpts, where "
        "words of the table stand, have left V",
    ),
    "control": (
        lambda c: _below(c["untrained"], c["trained"]) and c["untrained"][-1] > 0.5 * c["trained"][-1],
        "an untrained network is below the trained one, and still ends above half of it: a random function of the "
        "token is a function of the token, and it has more words to name",
    ),
    "chance": (
        lambda c: _about_zero(c["another"]),
        "the table of another neuron is at 0 for every number of words: explanations are specific, at any length",
    ),
    "context": (
        lambda c: _about_zero(c["within"]),
        "within tokens every table of words has 0 and always will have: it says the same wherever a word stands",
    ),
}


def curves(function: Callable[[], Curves], reasons: bool = False) -> None:
    """Exercise 9.E: what can be reasoned out about curves drawn by a reader, against the measured ones."""
    answer, drawn = predict(function, keys=CURVES), {}
    for name, values in answer.items():
        try:
            listed = list(values)
        except TypeError:
            listed = []
        if len(listed) != len(N_WORDS) or isinstance(values, str | dict | set):
            raise CheckFailed(
                f"{function.__name__}: {name} is to be a list of {len(N_WORDS)} numbers, for "
                f"{', '.join(map(str, N_WORDS))} words"
            )
        drawn[name] = [number(value, f"{function.__name__}: {name}") for value in listed]
        if not all(isfinite(value) and -100 <= value <= 100 for value in drawn[name]):
            raise CheckFailed(f"{function.__name__}: {name}: a score × 100 lies between -100 and 100")
    if 0 < max(abs(value) for curve in drawn.values() for value in curve) <= 1:
        raise CheckFailed(f"{function.__name__}: scores are drawn × 100, from -100 to 100, and not from -1 to 1")
    found = measured()
    wrong = {
        feature: None if holds(drawn) == holds(found) else f": {why}" for feature, (holds, why) in FEATURES.items()
    }
    judge(function, wrong, reasons, {feature: why for feature, (_, why) in FEATURES.items()})
    print(f"{function.__name__}: right in all {len(FEATURES)}, as measured on a packaged CRATE.")
    for name in CURVES:
        far = sum(abs(a - b) for a, b in zip(drawn[name], found[name], strict=True)) / len(N_WORDS)
        print(f"{name}: {far:.0f} points from what is measured, on average (not graded)")
