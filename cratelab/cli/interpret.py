"""`cratelab interpret`: every neuron of a trained model, explained and scored."""

from dataclasses import asdict
from pathlib import Path

from cratelab.cli.checks import (
    check_different,
    check_writable,
    model_folder,
)
from cratelab.cli.options import Interpret
from cratelab.cli.runs import load_run
from cratelab.cli.shared import defined
from cratelab.interpret.concepts import text_concepts, tinyworld_concepts
from cratelab.interpret.evaluation import collect_for_protocols, evaluate, untrained
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.provenance import provenance
from cratelab.storage import read_json, write_json
from cratelab.terminal import say


def check(options: Interpret) -> None:
    check_different("--protocols", options.protocols)
    model_folder(options.model)
    out = options.out or options.model / "interpret.json"
    if out.is_dir():
        raise IsADirectoryError(f"--out must be a file to write; {out} is a folder")
    if options.out and out.is_file() and "rows" not in read_json(out):
        raise ValueError(f"--out: {out} is there and holds something else than scores: choose another name")
    check_writable("--out", out)


def run(options: Interpret) -> None:
    model, corpus = load_run(options)
    text, world = corpus.validation, corpus.world
    concepts = tinyworld_concepts(world) if world else text_concepts(text, corpus.tokenizer)
    explainers = {"token": TokenExplainer(), "suffix": SuffixExplainer(), "concept": ConceptExplainer(concepts)}
    rows = []
    say(f"{'':10}{'protocol':16}{'explainer':11}{'mean':>10}{'95 % interval':>16}{'control':>10}{'undefined':>11}")
    for name, each in ("trained", model), ("untrained", untrained(model, options.seed)):
        strict = not options.official
        records = collect_for_protocols(each, text, options.protocols, strict, options.n_tokens, options.seed)
        for evaluation in evaluate(records, explainers, strict):
            row = {"model": name} | evaluation.row()
            rows.append(row)
            mean, control, low, high = map(defined, (row["mean"], row["control"], *row["interval"]))
            interval = "undefined" if "undefined" in (low, high) else f"{low} to {high}"
            say(
                f"{name:10}{row['protocol']:16}{row['explainer']:11}{mean:>10}{interval:>16}"
                f"{control:>10}{row['undefined']:11.0%}"
            )
    out = options.out or options.model / "interpret.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"provenance": provenance(corpus=text.facts(), options=_plain(asdict(options))), "rows": rows})
    say(f"{out} has them layer by layer")


def _plain(options: dict) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
