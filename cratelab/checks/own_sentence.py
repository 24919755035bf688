"""Check of exercise 8.F: a reader's sentence about a neuron of a packaged model, scored on text that nobody has seen.

The score is Pearson's (eq-08-3), with all of a text of some 20,000 tokens as V. Beside it stand what tables of words
reach, and the same sentence said of other neurons and of an untrained network.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cratelab.checks.grading import CheckFailed, answering, call, number
from cratelab.corpora import tinyworld
from cratelab.corpora.tinyworld.world import World
from cratelab.experiments.reference_models import load_reference
from cratelab.interpret.evaluation import untrained
from cratelab.interpret.scores import correlation, within_token_correlation
from cratelab.reading import watch_neurons

LAYER, NEURON = 1, 152  # of the toy CRATE of seed 1
BAR = 0.55  # above every table of words (0.51), and below what plain sentences reach (0.59, 0.64, 0.73)
SHOWN, FRESH = 1, 2  # seeds of the texts
LENGTH = 4, 60  # words of a sentence


@cache
def text(seed: int) -> World:
    """Some 20,000 tokens of TinyWorld, in documents that the packaged toys were not trained on."""
    world = tinyworld.generate(200_000, seed=seed, context=128)
    world.split[world.split != "train"] = "validation"
    return world.part("validation")


def activation(function: Callable[[list[str], str], float], sentence: Callable[[], str]) -> None:
    """Exercise 8.F: on the text shown first, and on fresh text only once the sentence holds there."""
    said = _sentence(sentence)
    simulated = _simulated(function, text(SHOWN))
    neuron = _activations(SHOWN)[:, LAYER, NEURON]
    _refuse(function.__name__, simulated, neuron)
    fresh = _simulated(function, text(FRESH))
    found = _correlation(_activations(FRESH)[:, LAYER, NEURON], fresh)
    if not found >= BAR:  # NaN is not right
        raise CheckFailed(
            f"{function.__name__}: {_correlation(neuron, simulated):z.2f} on the text shown, but {found:z.2f} on fresh "
            "text: some of it held of the examples alone. Say something simpler, or what more of them have in common"
        )
    print(f"{function.__name__}: right. “{said}” foretells fresh text with {found:z.2f}; {BAR} was asked for.")
    _print(fresh, LAYER, NEURON)


def scores(function: Callable[[list[str], str], float], layer: int, neuron: int) -> None:
    """Print what a reader's function is worth on fresh text as a simulation of any neuron, with its controls."""
    _print(_simulated(function, text(FRESH)), layer, neuron)


def _sentence(sentence: Callable[[], str]) -> str:
    least, most = LENGTH
    said = call(sentence, expected=f"a sentence of {least} to {most} words")
    words = said.split() if isinstance(said, str) else []
    if not least <= len(words) <= most or len(set(words)) < least:
        what = f"{len(words)} words, {len(set(words))} of them different" if words else f"{said!r:.60}"
        raise CheckFailed(
            f"{sentence.__name__} should return a sentence of {least} to {most} words that says when the neuron is "
            f"active; it returns {what}"
        )
    return said.strip()


def _simulated(function: Callable[[list[str], str], float], world: World) -> Tensor:
    """(n,) what the function says at every token, from the words of its document up to there."""
    words, said = [world.vocabulary[token] for token in world.tokens], []
    expected = "a number from 0 to 10"
    start = 0
    for i, word in enumerate(words):
        if world.document[i] != world.document[start]:
            start = i
        before, place = words[start:i], f"at {word!r} after {i - start} words"
        where = f"{function.__name__}, {place}"
        with answering(function, place, expected):
            value = call(function, before, word, expected=expected) if i == 0 else function(before, word)
        said.append(number(value, where, true=10))  # `and 10` gives False for 0
        if not 0 <= said[-1] <= 10:  # NaN is none
            raise CheckFailed(f"{where}: {expected} is needed; got {said[-1]:g}")
    return torch.tensor(said, dtype=torch.float64, device="cpu")


@cache
def _activations(seed: int, trained: bool = True) -> Tensor:
    """(n, l, h) of the packaged toy, or of one that has read nothing, on a text."""
    model = load_reference("crate", "toy", 1)
    read = watch_neurons(model if trained else untrained(model), text(seed).corpus(), 64)
    return torch.cat([torch.stack(layers, 2)[piece.present].cpu() for piece, layers in read])


def _correlation(a: Tensor, s: Tensor) -> float:
    return float(correlation(a, s, torch.ones_like(a, dtype=torch.bool)))


def _word_means(a: Tensor, words: Tensor, size: int) -> Tensor:
    """(size,) the mean activation on each word: of all tables the one that correlates best with this text."""
    sums = torch.zeros(size, dtype=torch.float64, device="cpu").index_add_(0, words, a.double())
    return sums / words.bincount(minlength=size).clamp(min=1)


def _refuse(name: str, s: Tensor, a: Tensor) -> None:
    """Say what is wrong with a simulation of the text shown, from that text alone."""
    world, found = text(SHOWN), _correlation(a, s)
    if found >= BAR:
        return
    if s.max() == s.min():
        raise CheckFailed(f"{name} says {s[0]:zg} everywhere, and a constant has no score: when is the neuron silent?")
    if found <= -0.1:
        raise CheckFailed(
            f"{name} is turned round: its score on the text shown is {found:z.2f}. 0 is for where the neuron is silent"
        )
    words, size = torch.from_numpy(world.tokens).long(), len(world.vocabulary)
    if torch.allclose(_word_means(s, words, size)[words], s):
        best = _correlation(a, _word_means(a, words, size)[words])
        raise CheckFailed(
            f"{name} gives a word the same number wherever it stands: {found:z.2f} on the text shown, where no list of "
            f"words, however long, gets more than {best:z.2f}. "
            + ("What has to stand before it?" if found > 0.8 * best else "On which word are the neuron's large values?")
        )
    strong, yes = a > 0.3 * a.max(), s >= 5
    kept = float(a[yes].sum() / a.sum())
    hit = float((strong & yes).sum() / yes.sum().clamp(min=1))
    narrow = kept < hit
    worst = int((a * ~yes).argmax() if narrow else (~strong & yes).nonzero()[0])
    start = int((world.document == world.document[worst]).argmax())
    shown = world.tokens[max(start, worst - 12) : worst + 1]
    before = " ".join(world.vocabulary[token] for token in shown).replace("\n", "\\n")
    raise CheckFailed(
        f"{name}: {found:z.2f} on the text shown; {BAR} is asked for. {100 * kept:.0f} % of the neuron's activity is "
        f"where it says 5 or more, and of these places {100 * hit:.0f} % have the neuron above three tenths of its "
        f"maximum. It is {'too narrow' if narrow else 'too wide'}, as at the last of these words: {before}"
    )


def _print(s: Tensor, layer: int, neuron: int) -> None:
    """The score on fresh text, and what it is to be compared with."""
    world = text(FRESH)
    words, seen = (torch.from_numpy(each.tokens).long() for each in (world, text(SHOWN)))
    every, size = _activations(FRESH), len(world.vocabulary)
    a, table = every[:, layer, neuron], _word_means(_activations(SHOWN)[:, layer, neuron], seen, size)
    here = torch.zeros(every.shape[1:], dtype=torch.bool, device="cpu")
    here[layer, neuron] = True
    others, never = _of_each(every[:, ~here], s), _of_each(_activations(FRESH, trained=False).flatten(1), s)
    rows = {
        "your sentence": _correlation(a, s),
        "the same, within tokens": float(within_token_correlation(a, s, torch.ones_like(a, dtype=torch.bool), words)),
        "a table of all words of the text shown": _correlation(a, table[words]),
        "the best table of words for this text": _correlation(a, _word_means(a, words, size)[words]),
        "how frequent a word is": _correlation(a, words.bincount().double()[words]),
        "your sentence, of other neurons, on average": float(others.mean()),
        "your sentence, of the other it fits best": float(others.max()),
        "your sentence, of untrained neurons, on average": float(never.mean()),
        "your sentence, of the untrained it fits best": float(never.max()),
    }
    for what, value in rows.items():
        print(f"{what:48}{'none' if value != value else format(value, 'z.2f'):>6}")


def _of_each(neurons: Tensor, s: Tensor) -> Tensor:
    """(h,) the score of one simulation for each column of (n, h); 0 for a silent neuron."""
    every = neurons.T.contiguous()
    return correlation(every, s.expand_as(every), torch.ones_like(every, dtype=torch.bool)).nan_to_num(0)
