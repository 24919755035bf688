"""`cratelab interpret`: neurons of a trained model, explained and scored."""

from collections import Counter
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch

from cratelab.cli.checks import check_different, check_results, check_writable, model_folder
from cratelab.cli.options import Interpret, dashed
from cratelab.cli.runs import load_run
from cratelab.cli.shared import as_facts, defined, results_file
from cratelab.corpora.prepare import PreparedCorpus
from cratelab.devices import processes
from cratelab.interpret.asking.answers import AnswerCache
from cratelab.interpret.asking.endpoints import Endpoint, OpenAIEndpoint, without_user
from cratelab.interpret.asking.local_endpoint import HuggingFaceEndpoint, is_gguf_file
from cratelab.interpret.asking.simulator import LanguageModelSimulator
from cratelab.interpret.concepts import text_concepts, tinyworld_concepts
from cratelab.interpret.evaluation import Evaluation, collect_for_protocols, evaluate
from cratelab.interpret.explainers import ConceptExplainer, Explainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.language_models import NEVER_ACTIVE, LanguageModelExplainer, TextExplanations
from cratelab.interpret.scores import split
from cratelab.language_model import LanguageModel
from cratelab.models import untrained
from cratelab.provenance import provenance
from cratelab.shared_pass import forget
from cratelab.storage import write_json
from cratelab.terminal import say

ASKED = "language-model"


def check(options: Interpret) -> None:
    check_different("--protocols", options.protocols)
    check_different("--explainer", options.explainer)
    model_folder(options.model)
    check_results(_out(options), "rows")
    _check_asking(options)


def run(options: Interpret) -> None:
    main = processes().is_main_process  # which scores and writes; the others help to read
    scores = main or _is_shared(options)
    endpoint = _endpoint(options) if scores else None
    model, corpus = load_run(options, lambda model: _draw(options, model))
    text, neurons = corpus.validation, _draw(options, model)
    explainers = {name: _explainer(name, options, corpus, endpoint) for name in options.explainer if scores}
    asking, rows = explainers.get(ASKED), []
    wide = max(11, *(len(name) + 1 for name in options.explainer))
    asked = dict(as_published=options.official, n_tokens=options.n_tokens, seed=options.seed, folder=_passes(options))
    columns = f"{'mean':>10}{'95 % interval':>16}{'control':>10}{'undefined':>11}"
    columns += f"{'no number':>11}" if ASKED in options.explainer else ""
    head = f"{'':10}{'protocol':16}{'explainer':{wide}}{columns}"
    if not asking:
        say(head)
    for name, each in ("trained", model), ("untrained", untrained(model, options.seed)):
        records = collect_for_protocols(each, text, options.protocols, **asked)
        if not scores:
            continue
        if neurons:
            records = {protocol: held.neurons(*neurons) for protocol, held in records.items()}
        if asking:
            parts = (split(held, protocol, as_published=options.official) for protocol, held in records.items())
            say(f"{name}: at most {reduce(add, (asking.estimate_cost(*part) for part in parts))}")
        if options.dry_run:
            continue
        for evaluation in evaluate(records, explainers, as_published=options.official):
            row = {"model": name} | evaluation.row()
            if row["explainer"] == ASKED:
                row |= _said(evaluation)
            if asking and not rows:
                say(head)  # below the cost, and no sooner than there is something to put under it
            rows.append(row)
            _say_row(row, wide, asking=bool(asking))
    if not main:
        return
    if options.dry_run:
        forget(_passes(options))
        return
    if asking and (problems := asking.simulator.problems):
        often = "; ".join(f"{reason} ({n:,})" for reason, n in problems.most_common(3))
        say(f"{problems.total():,} tokens have no number and count as 0: {often}")
    endpoint_shown = options.endpoint and without_user(options.endpoint)
    facts = provenance(corpus=text.facts(), options=as_facts(options) | {"endpoint": endpoint_shown})
    out = _out(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"provenance": facts, "rows": rows} | ({"neurons": neurons[1].tolist()} if neurons else {}))
    forget(_passes(options))
    say(f"{out} has them layer by layer")


def _said(evaluation: Evaluation) -> dict:
    """The sentences, and why there is none; and the share of places where no number came, of those that are judged.

    Raises:
        ValueError: no neuron has one, though some were asked for.
    """
    explanations: TextExplanations = evaluation.explanations
    failed = Counter(reason for reason in explanations.reasons if reason not in (None, NEVER_ACTIVE))
    if failed:
        often = "; ".join(f"{reason} ({n:,})" for reason, n in failed.most_common(3))
        lost = f"{failed.total()} of {len(explanations.texts)} neurons have no explanation: {often}"
        if not any(explanations.texts):
            raise ValueError(f"{lost}. Does the endpoint answer as it should?")
        say(lost)
    explained = torch.tensor([text is not None for text in explanations.texts], device="cpu")
    judged = explained & ~evaluation.scores.dead.flatten()  # those have no place, or nothing to tell at any
    no_number = 1 - float(evaluation.scores.coverage.flatten()[judged].mean()) if judged.any() else None
    return {"texts": explanations.texts, "reasons": explanations.reasons, "no_number": no_number}


def _say_row(row: dict, wide: int, asking: bool) -> None:
    mean, control, low, high = map(defined, (row["mean"], row["control"], *row["interval"]))
    no_number = "" if row.get("no_number") is None else f"{row['no_number']:.0%}"
    interval = "undefined" if "undefined" in (low, high) else f"{low} to {high}"
    say(
        f"{row['model']:10}{row['protocol']:16}{row['explainer']:{wide}}{mean:>10}{interval:>16}"
        f"{control:>10}{row['undefined']:11.0%}{no_number:>{11 * asking}}"
    )


def _out(options: Interpret) -> Path:
    return results_file(options, "interpret.json")


def _passes(options: Interpret) -> Path:
    return _out(options).with_name(f"{_out(options).name}.passes")


def _cache(options: Interpret) -> Path:
    return options.cache or _out(options).with_suffix(".answers.sqlite")


def _check_asking(options: Interpret) -> None:
    """Raises ValueError or OSError unless the options about a language model go together."""
    if ASKED not in options.explainer:
        names = ("endpoint", "language_model", "completions", "cache", "dry_run")
        if given := [dashed(name) for name in names if getattr(options, name)]:
            raise ValueError(f"{', '.join(given)}: only with --explainer {ASKED}")
        return
    if not options.endpoint:
        raise ValueError(
            f"--explainer {ASKED} needs --endpoint, a server such as http://localhost:8000/v1, a folder or a .gguf"
        )
    if _is_server(options.endpoint):
        if not options.language_model:
            raise ValueError("--endpoint is a server: say by --language-model which of its models shall be asked")
    elif not Path(options.endpoint).is_dir() and not is_gguf_file(options.endpoint):
        raise FileNotFoundError(
            f"--endpoint: {options.endpoint} is no folder, no .gguf file, and no address that begins with http"
        )
    elif options.language_model or options.completions:
        raise ValueError("--language-model and --completions are for a server, and --endpoint is a folder or a file")
    cache = _cache(options)
    if cache == _out(options):
        raise ValueError("--cache and --out must be different files")
    check_writable("--cache", cache)
    if cache.exists():
        AnswerCache(cache).close()  # says if it is something else


def _is_server(endpoint: str) -> bool:
    return endpoint.startswith(("http://", "https://"))


def _is_shared(options: Interpret) -> bool:
    """Whether each process has a language model of its own, and answers its share of the questions."""
    return options.endpoint is not None and not _is_server(options.endpoint)


def _endpoint(options: Interpret) -> Endpoint | None:
    if options.endpoint is None:
        return None
    if not _is_server(options.endpoint):
        return HuggingFaceEndpoint(options.endpoint)
    # the trial whether a server repeats prompts is a question too
    return OpenAIEndpoint(
        options.endpoint, options.language_model, chat=not options.completions, echo=not options.dry_run
    )


def _explainer(name: str, options: Interpret, corpus: PreparedCorpus, endpoint: Endpoint) -> Explainer:
    if name == "concept":
        world, text = corpus.world, corpus.validation
        return ConceptExplainer(tinyworld_concepts(world) if world else text_concepts(text, corpus.tokenizer))
    if name == ASKED:
        # the sum is said before
        asking = dict(cache=_cache(options), announce=lambda cost: None, share=_is_shared(options))
        simulator = LanguageModelSimulator(endpoint, **asking)
        return LanguageModelExplainer(endpoint, corpus.tokenizer, simulator, **asking)
    return {"token": TokenExplainer, "suffix": SuffixExplainer}[name]()


def _draw(options: Interpret, model: LanguageModel) -> tuple[np.ndarray, np.ndarray] | None:
    """Layers (l, 1) and their neurons (l, n); None for all.

    Raises:
        ValueError: a layer has not so many.
    """
    h = model.config.n_neurons
    n = options.neurons or (min(10, h) if ASKED in options.explainer else None)
    if n is None:
        return None
    if n > h:
        raise ValueError(f"--neurons must be at most {h}, a layer's; got {n}")
    draw, n_layers = np.random.default_rng(options.seed), model.config.n_layers
    return np.arange(n_layers)[:, None], np.stack([np.sort(draw.choice(h, n, replace=False)) for _ in range(n_layers)])
