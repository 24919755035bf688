"""CRATE against GPT-2, neuron by neuron: the runs and the measurements of chapter 9.

On TinyWorld, where it is known what every token means, models of width 64 are trained anew: both at one to three
layers, for half and for all of the steps, so that they can be compared at equal loss too; CRATE with larger λ; and
GPT-2 with a limit to its active neurons. On Python's documentation the reference models are measured.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cratelab.arguments import check_whole
from cratelab.corpora import tinyworld
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import fingerprint
from cratelab.experiments.comparison import check_ladder
from cratelab.experiments.reference_models import PRESETS, train_on_documentation
from cratelab.interpret.concepts import Concepts, text_concepts, tinyworld_concepts
from cratelab.interpret.evaluation import collect_for_protocols, evaluate
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.ground_truth import match_concepts, separate_senses
from cratelab.interpret.records import Records
from cratelab.interpret.scores import ScoringProtocol
from cratelab.language_model import LanguageModel
from cratelab.losses import document_log_probs
from cratelab.models import MODELS, load, new_model, untrained
from cratelab.provenance import provenance
from cratelab.recipe import Recipe
from cratelab.storage import cached_json, digest_of_file, write_json
from cratelab.training import train

DEPTHS = 1, 2, 3
LAMBDAS = 0.3, 1.0, 3.0  # CRATE's is 0.1; with 10 no neuron is active to begin with, and none ever is
TOP_KS = 64, 16, 4  # of 256 neurons
CONTEXT = 64  # TinyWorld's documents are as long, and one token to predict
N_TOKENS = 800_000


@dataclass(frozen=True)
class Setting:
    """One kind of run on TinyWorld.

    Attributes:
        model: "crate" or "gpt2".
        n_layers: of them.
        steps: of 8 windows of 64 tokens.
        lam: CRATE's λ.
        top_k: GPT-2's neurons of a token that may be active; None for all.
    """

    model: str
    n_layers: int
    steps: int
    lam: float = 0.1
    top_k: int | None = None

    @property
    def name(self) -> str:
        changed = (f"-lam{self.lam:g}" if self.lam != 0.1 else "") + (f"-top{self.top_k}" if self.top_k else "")
        return f"{self.model}-{self.n_layers}L-{self.steps}{changed}"

    def new(self, n_vocab: int, seed: int) -> LanguageModel:
        """The model with fresh weights."""
        own = {"lam": self.lam} if self.model == "crate" else {"top_k": self.top_k}
        return new_model(self.model, "toy", n_vocab, seed, CONTEXT, n_layers=self.n_layers, **own)

    def recipe(self, seed: int) -> Recipe:
        """How it is trained."""
        rates = {"peak_rate": 1e-2, "final_rate": 1e-3}
        return Recipe.preset("toy", steps=self.steps, batch=8, seed=seed, validate_every=self.steps, **rates)


def settings(steps: int) -> list[Setting]:
    """What is compared: the main ladder first, then less training, λ, and the limit to active neurons."""
    ladder = [Setting(model, n, each) for each in (steps, steps // 2) for n in DEPTHS for model in MODELS]
    sparser = [Setting("crate", 2, steps, lam=lam) for lam in LAMBDAS]
    return ladder + sparser + [Setting("gpt2", 2, steps, top_k=k) for k in TOP_KS]


def compare_on_tinyworld(
    folder: str | Path,
    seeds: Iterable[int] = (0, 1, 2),
    steps: int = 2000,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train and measure every setting under every seed; what is done is read, a killed call goes on.

    Args:
        folder: each run gets a folder in it, with its findings in findings.json.
        seeds: of weights, windows, and random excerpts; the outer loop.
        steps: of the longest runs.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        One dict a run, with the setting, seed, parameters (without positions), gap (nats a token above the floor of the
        validation text), and as `measure` gives them trained and, for the longest runs, untrained.

    Raises:
        ValueError: no seeds, fewer than 2 steps, or `folder` holds runs of other arguments.
    """
    _, seeds = check_ladder(["toy"], seeds)
    check_whole("steps", steps, 2)  # some runs take half of them
    world = tinyworld.generate(N_TOKENS, context=CONTEXT + 1)
    training, held_out = world.part("train").corpus(), world.part("validation")
    text, concepts = held_out.corpus(), tinyworld_concepts(held_out)
    runs = []
    for seed in seeds:
        for setting in settings(steps):
            run_dir = Path(folder) / f"{setting.name}-{seed}"
            if on_run:
                on_run(run_dir.name)
            model = setting.new(text.n_vocab, seed)
            train(model, training, text, setting.recipe(seed), run_dir, on_step)  # a run that is done is read
            longest = setting.steps == steps
            find = partial(_findings_on_tinyworld, setting, seed, model.eval(), held_out, concepts, longest)
            weights = digest_of_file(run_dir / "model" / "model.safetensors")
            made_from = [asdict(setting), seed, longest, text.facts(), weights]
            runs.append(cached_json(run_dir / "findings.json", made_from, find))
    return runs


def _findings_on_tinyworld(
    setting: Setting, seed: int, model: LanguageModel, held_out: tinyworld.World, concepts: Concepts, longest: bool
) -> dict:
    text = held_out.corpus()
    gap = held_out.log_prob - document_log_probs(model, text)
    found = asdict(setting) | {
        "seed": seed,
        "parameters": model.count_parameters(positions=False),
        "gap": float(np.nanmean(gap)),
        "trained": measure(model, text, concepts, seed, truth=True, ladder=longest),
    }
    if longest:
        found["untrained"] = measure(untrained(model, seed), text, concepts, seed, truth=True)
    return found


def compare_on_documentation(
    folder: str | Path,
    seeds: int = 3,
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    n_tokens: int = 60_000,
) -> list[dict]:
    """Measure the reference models that read documentation, and both of one layer after a third of the steps.

    Those that are missing are trained first.

    Args:
        folder: as for `reference_models.make_reference_models`; the findings of a run go beside its model.
        seeds: 0 up to this many.
        steps: of the reference models.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.
        n_tokens: of validation text to read.

    Returns:
        One dict a run, with model, n_layers, steps, seed, parameters, validation_loss, and as `measure` gives them
        trained and untrained.

    Raises:
        ValueError: no seeds, fewer than 3 steps, fewer than one token, or `folder` holds runs of other arguments.
    """
    check_whole("steps", steps, 3)  # some runs take a third of them
    check_whole("n_tokens", n_tokens)
    found = []
    for each, presets, name in (steps, PRESETS, "runs"), (steps // 3, PRESETS[:1], f"runs-{steps // 3}"):
        documentation, runs = train_on_documentation(folder, seeds, (), each, on_run, on_step, presets, name)
        text = documentation.validation
        concepts = text_concepts(text, documentation.tokenizer)
        for run in runs:
            run_dir = Path(folder) / name / f"{run['model']}-{run['preset']}-{run['seed']}"
            if on_run:
                on_run(f"{run_dir.name}: its neurons")
            facts = {key: run[key] for key in ("model", "seed", "parameters", "validation_loss")}

            find = partial(_findings_on_documentation, run_dir / "model", facts, each, text, concepts, n_tokens)
            made_from = [facts, each, n_tokens, text.facts(), fingerprint(documentation.tokenizer)]
            weights = digest_of_file(run_dir / "model" / "model.safetensors")
            found.append(cached_json(run_dir / "findings.json", [*made_from, weights], find))
    return found


def _findings_on_documentation(
    folder: Path, facts: dict, steps: int, text: TokenizedCorpus, concepts: Concepts, n_tokens: int
) -> dict:
    model, seed = load(folder), facts["seed"]
    return facts | {
        "n_layers": model.config.n_layers,
        "steps": steps,
        "trained": measure(model, text, concepts, seed, n_tokens=n_tokens),
        "untrained": measure(untrained(model, seed), text, concepts, seed, n_tokens=n_tokens),
    }


@torch.no_grad()
def measure(
    model: LanguageModel,
    text: TokenizedCorpus,
    concepts: Concepts,
    seed: int = 0,
    truth: bool = False,
    ladder: bool = True,
    n_tokens: int | None = None,
) -> dict:
    """All that chapter 9 asks of a model's neurons.

    Args:
        model: on any device.
        text: that it was not trained on.
        concepts: of that text.
        seed: of the random excerpts.
        truth: whether `concepts` are what there is to find, so that neurons can be judged without explanations.
        ladder: with the suffix and the concept explainer besides the token explainer.
        n_tokens: to read at most.

    Returns:
        A dict with density and dead, of each layer the share of positive activations and of neurons that have none;
        rows, as `Evaluation.row` gives them, with strict, false where excerpts are as published; and with `truth` of
        each layer f1 and purity, means over neurons, named, the share of neurons whose F1 is 0.7 or more, and senses,
        the area for each word of two senses.
    """
    token, longer = {"token": TokenExplainer()}, {"suffix": SuffixExplainer(), "concept": ConceptExplainer(concepts)}
    found: dict = {"rows": []}
    for as_published, chosen in ((False, token | longer if ladder else token), (True, token)):
        records = collect_for_protocols(model, text, as_published=as_published, n_tokens=n_tokens, seed=seed)
        if not as_published:
            found |= _statistics(records)
        evaluations = evaluate(records, chosen, as_published=as_published)
        found["rows"] += [{"strict": not as_published} | each.row() for each in evaluations]
    if truth:
        known = match_concepts(model, text, concepts, max_concepts=0)
        found |= {"f1": known.f1.mean(1).tolist(), "purity": known.purity.mean(1).tolist()}
        found["named"] = (known.f1 >= 0.7).double().mean(1).tolist()
        found["senses"] = {word: area for word, (area, *_) in separate_senses(model, text, concepts).items()}
    return found


def _statistics(records: dict[ScoringProtocol, Records]) -> dict:
    held = next(iter(records.values()))
    return {"density": held.density.mean(1).tolist(), "dead": (held.density == 0).double().mean(1).tolist()}


def reproduce_chapter_9(
    folder: str | Path,
    reference: str | Path,
    seeds: int = 3,
    steps: tuple[int, int] = (2000, 1500),
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> Path:
    """Make chapter 9's table anew: hours on a CPU, and what is done is not done again.

    Args:
        folder: for the runs on TinyWorld and the table.
        reference: for the reference models; see `cratelab.experiments.reference_models.make_reference_models`.
        seeds: 0 up to this many.
        steps: on TinyWorld and on documentation; fewer only to try it out.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The file, to be copied to cratelab/reference.

    Raises:
        ValueError: no seeds, too few steps, or a folder holds runs of other arguments.
    """
    for given, least in zip(steps, (2, 3), strict=True):
        check_whole("steps", given, least)
    findings = {
        "tinyworld": compare_on_tinyworld(Path(folder) / "runs", range(seeds), steps[0], on_run, on_step),
        "documentation": compare_on_documentation(reference, seeds, steps[1], on_run, on_step),
    }
    table = Path(folder) / "crate_against_gpt2.json"
    write_json(table, {"provenance": provenance(seeds=list(range(seeds)), steps=list(steps)), "findings": findings})
    return table
