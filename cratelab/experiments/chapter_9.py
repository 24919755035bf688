"""CRATE against GPT-2, neuron by neuron: the runs and the measurements of chapter 9.

On TinyWorld, where it is known what every token means, models of width 64 are trained anew, each at its own learning
rate: both at one to three layers; both with attention that looks back over few tokens or none, which is the control for
whatever is said of context; CRATE with larger λ; and GPT-2 with a limit to its active neurons.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cratelab.arguments import check_whole
from cratelab.corpora import tinyworld
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.experiments.comparison import check_ladder
from cratelab.experiments.rates import DEPTHS, PEAKS, TUNED
from cratelab.experiments.tinyworld_runs import Setting, fresh_text, gap, new_world
from cratelab.gpt2 import Gpt2
from cratelab.interpret.concepts import Concepts, tinyworld_concepts, uses_within_domains
from cratelab.interpret.current_token import share_explained
from cratelab.interpret.evaluation import collect_for_protocols, evaluate
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.ground_truth import match_concepts, separate_senses
from cratelab.interpret.records import collect_records
from cratelab.language_model import LanguageModel
from cratelab.models import MODELS, load, untrained
from cratelab.provenance import code_of, library_code, provenance
from cratelab.storage import cached_json, digest_of_file, read_json, write_json

SPANS = 0, 1, 2, 4
RUNNER_UP = 1e-2
LAMBDAS = 0.3, 1.0, 3.0  # CRATE's is 0.1; with 10 no neuron is active to begin with, and none ever is
TOP_KS = 64, 16, 4  # of 256 neurons
SEEN = 3  # seeds under which all of these were compared first


def ladder(steps: int) -> list[Setting]:
    """What is compared: both models at every depth."""
    return [Setting(model, n, steps, TUNED[model, n]) for n in DEPTHS for model in MODELS]


def runner_up(steps: int) -> list[Setting]:
    """CRATE of three layers at a rate whose loss cannot be told from that of the best."""
    return [Setting("crate", 3, steps, RUNNER_UP)]


def spans(steps: int) -> list[Setting]:
    """Both models with two layers that look back over few tokens or none."""
    return [Setting(model, 2, steps, TUNED[model, 2], span=span) for span in SPANS for model in MODELS]


def sparser(steps: int) -> list[Setting]:
    """Two layers with fewer active neurons: CRATE by a larger λ, GPT-2 by a limit."""
    larger = [Setting("crate", 2, steps, TUNED["crate", 2], lam=lam) for lam in LAMBDAS]
    return larger + [Setting("gpt2", 2, steps, TUNED["gpt2", 2], top_k=k) for k in TOP_KS]


def to_confirm(steps: int) -> list[Setting]:
    """Both networks as they are and the sparsest that work: three seeds have suggested what others have to confirm."""
    as_they_are = [setting for setting in ladder(steps) if setting.n_layers == 2]
    return as_they_are + [each for each in sparser(steps) if each.lam == 1.0 or each.top_k == 16]


def other_rates(steps: int) -> list[Setting]:
    """The sparse ones of these at the rates next to theirs, which were found best for the networks as they are."""
    found = []
    for setting in to_confirm(steps)[2:]:
        at = PEAKS.index(setting.peak_rate)
        found += [replace(setting, peak_rate=rate) for rate in PEAKS[at - 1 : at + 2 : 2]]
    return found


def compare_on_tinyworld(
    folder: str | Path,
    settings: Iterable[Setting],
    seeds: Iterable[int],
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train and measure every setting under every seed; what is done is read, a killed call goes on.

    Args:
        folder: each run gets a folder in it, with its findings in findings.json.
        settings: which; see `ladder` and `variations`.
        seeds: of weights, windows, and random excerpts; the outer loop.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        One dict a run, with the setting, seed, parameters (without positions), gap (nats a token above the floor of the
        validation text), library (the code that trained and measured), and as `measure` gives them trained and, for
        the ladder and what is to be confirmed, untrained.

    Raises:
        ValueError: no seeds, or `folder` holds runs of other arguments.
    """
    _, seeds = check_ladder(["toy"], seeds)
    settings = list(settings)
    world, runs = new_world(), []
    for seed in seeds:
        text = fresh_text(seed)
        for setting in settings:
            if on_run:
                on_run(f"{setting.name}-{seed}")
            model, run_dir = setting.train(world, seed, folder, on_step)
            find = partial(_findings, setting, seed, model, text, run_dir)
            weights = digest_of_file(run_dir / "model" / "model.safetensors")
            made_from = [asdict(setting), seed, text.corpus().facts(), weights]
            runs.append(cached_json(run_dir / "findings.json", made_from, find))
    return runs


def _findings(setting: Setting, seed: int, model: LanguageModel, text: tinyworld.World, run_dir: Path) -> dict:
    training = read_json(run_dir / "run.json")["provenance"]
    controlled = ladder(setting.steps) + to_confirm(setting.steps)
    return (
        asdict(setting)
        | {
            "seed": seed,
            "parameters": model.count_parameters(positions=False),
            "gap": gap(model, text),
            "library": code_of([training, {"library": library_code()}]),
            "trained": measure(model, text, seed),
        }
        | ({"untrained": measure(untrained(model, seed), text, seed)} if setting in controlled else {})
    )


@torch.no_grad()
def measure(model: LanguageModel, world: tinyworld.World, seed: int = 0) -> dict:
    """All that chapter 9 asks of a model's neurons.

    Args:
        model: on any device.
        world: text that it was not trained on.
        seed: of the random excerpts.

    Returns:
        A dict with rows, as `Evaluation.row` gives them; uses, the areas for each use told apart within a domain, as
        `separate_senses` gives them; and of each layer density and dead, the share of positive activations and of
        neurons that have none; token_share, the mean share of a neuron's variance that the current token explains;
        all and grammar, of all concepts and of those that are no single word: f1 and purity, means over neurons,
        named, the share of neurons whose F1 is 0.7 or more, log_lift, the mean of log(purity / base rate) over neurons
        with any purity, and word, the share whose best concept is a single word.
    """
    text, concepts = world.corpus(), tinyworld_concepts(world)
    chosen = {"token": TokenExplainer(), "suffix": SuffixExplainer(), "concept": ConceptExplainer(concepts)}
    records = collect_for_protocols(model, text, seed=seed)
    held = next(iter(records.values()))
    share, _ = share_explained(model, text)
    areas = separate_senses(model, text, uses_within_domains(world))
    return {
        "density": held.density.mean(1).tolist(),
        "dead": (held.density == 0).double().mean(1).tolist(),
        "token_share": share.nanmean(1).tolist(),
        "rows": [each.row() for each in evaluate(records, chosen)],
        "uses": {use: area for use, (area, *_) in areas.items()},
        "all": _truth(model, text, concepts),
        "grammar": _truth(model, text, concepts.only(~concepts.is_word)),
    }


def _truth(model: LanguageModel, text: TokenizedCorpus, concepts: Concepts) -> dict:
    known = match_concepts(model, text, concepts, max_concepts=0)
    of_neurons = {
        "f1": known.f1,
        "purity": known.purity,
        "named": (known.f1 >= 0.7).double(),
        "log_lift": known.log_lift.masked_fill(known.purity == 0, torch.nan),
        "word": (concepts.is_word[known.best] & (known.best >= 0)).double(),
    }
    return {name: values.nanmean(1).tolist() for name, values in of_neurons.items()}


def turned_afterwards(model: LanguageModel, text: TokenizedCorpus, density: float) -> LanguageModel:
    """The same weights with fewer active neurons: the control for what it does to be trained so.

    Args:
        model: CRATE, which gets the λ, up to a hundred times its own, that leaves as many active; or GPT-2, which gets
            a limit.
        text: on 5,000 tokens of which they are counted.
        density: share of neurons to be active, mean over layers.
    """

    def turned(**knob) -> LanguageModel:
        found = type(model)(replace(model.config, **knob)).to(model.token_embedding.weight)
        found.load_state_dict(model.state_dict())
        return found.eval()

    if isinstance(model, Gpt2):
        return turned(top_k=round(density * model.config.n_neurons))
    low, high = model.config.lam, 100 * model.config.lam
    for _ in range(12):
        middle = (low * high) ** 0.5
        records = collect_records(turned(lam=middle), text, n_top=0, n_random=0, n_tokens=5000)
        low, high = (middle, high) if float(records.density.mean()) > density else (low, middle)
    return turned(lam=high)


def _afterwards(folder: str | Path, sparse: dict, on_run: Callable[[str], None] | None) -> dict:
    """The network as it is, made as sparse as the finding's after training under the same seed, and measured."""
    seed, density = sparse["seed"], float(np.mean(sparse["trained"]["density"]))
    as_it_is = Setting(*(sparse[key] for key in ("model", "n_layers", "steps", "peak_rate")))
    run_dir = Path(folder) / f"{as_it_is.name}-{seed}"
    if on_run:
        on_run(f"{as_it_is.name}-{seed}, turned afterwards")

    def find() -> dict:
        text = fresh_text(seed)
        model = turned_afterwards(load(run_dir / "model"), text.corpus(), density)
        knob = {key: getattr(model.config, key) for key in ("lam", "top_k") if hasattr(model.config, key)}
        found = {"model": sparse["model"], **knob, "seed": seed, "gap": gap(model, text), "library": library_code()}
        return found | {"trained": measure(model, text, seed)}

    made_from = [density, seed, digest_of_file(run_dir / "model" / "model.safetensors")]
    return cached_json(run_dir / "afterwards.json", made_from, find)


def reproduce_sparser(
    folder: str | Path,
    seeds: int = 10,
    steps: int = 2000,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> Path:
    """Test on new seeds what the three seeds of `sparser` suggested; an hour and a half on one core.

    Said before any of them was run: the endpoint is the score within tokens of the concept explainer under
    top-and-random, mean over layers: the sparser network less the network as it is, under the same seed, for CRATE and
    for GPT-2, two tests. Secondary are, for each, the token table's score, the share of neurons named by any concept
    and by grammar, the mean F1 with grammar and the mean log lift, ten tests. The rates next to the one that is used
    are tried under seeds 0 to 2, by the loss. Said after the runs: as a control the networks as they are, made as
    sparse after their training (`turned_afterwards`).

    Args:
        folder: for the runs and the table.
        seeds: of the test, from 3 on: not those that it was thought of from.
        steps: of every run; fewer only to try it out.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The file, to be copied to cratelab/reference.

    Raises:
        ValueError: no seeds or steps, or `folder` holds runs of other arguments.
    """
    check_whole("seeds", seeds)
    new = range(SEEN, SEEN + seeds)
    findings = compare_on_tinyworld(folder, to_confirm(steps), new, on_run, on_step)
    afterwards = [_afterwards(folder, run, on_run) for run in findings if run["lam"] == 1.0 or run["top_k"]]
    for run in compare_on_tinyworld(folder, other_rates(steps), range(SEEN), on_run, on_step):
        findings.append({key: value for key, value in run.items() if key != "trained"})  # their loss is all that counts
    lists = {"findings": findings, "afterwards": afterwards}
    return _write_table(Path(folder) / "sparser_networks.json", lists, seeds=list(new), steps=steps)


def reproduce_chapter_9(
    folder: str | Path,
    seeds: int = 10,
    steps: int = 2000,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> Path:
    """Make chapter 9's table anew: hours on a CPU, and what is done is not done again.

    Args:
        folder: for the runs and the table; runs that `cratelab.experiments.rates` left there are read.
        seeds: of the ladder, 0 up to this many; of runner-up and spans half as many, of λ and the limit a third.
        steps: of every run; fewer only to try it out.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The file, to be copied to cratelab/reference.

    Raises:
        ValueError: no seeds or steps, or `folder` holds runs of other arguments.
    """
    check_whole("seeds", seeds)
    findings = compare_on_tinyworld(folder, ladder(steps), range(seeds), on_run, on_step)
    for settings in runner_up(steps), spans(steps):
        findings += compare_on_tinyworld(folder, settings, range(-(-seeds // 2)), on_run, on_step)
    findings += compare_on_tinyworld(folder, sparser(steps), range(max(1, seeds // 3)), on_run, on_step)
    lists = {"findings": findings}
    return _write_table(Path(folder) / "crate_against_gpt2.json", lists, seeds=list(range(seeds)), steps=steps)


def _write_table(table: Path, lists: dict[str, list[dict]], **facts) -> Path:
    every = [each for findings in lists.values() for each in findings]
    about = provenance(**facts, library=code_of(every))
    for each in every:
        each.pop("library", None)  # said once, of all
    write_json(table, {"provenance": about, **lists})
    return table
