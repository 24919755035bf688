import json
from functools import partial

import numpy as np
import pytest
import torch
from test_training import corpus

import cratelab as cl
from cratelab.cli import main
from cratelab.corpora import tinyworld
from cratelab.corpora.prepare import PreparedCorpus
from cratelab.corpora.tokenizers import byte_encoding
from cratelab.experiments import chapter_9, comparison, reference_models
from cratelab.experiments.chapter_9 import (
    compare_on_documentation,
    compare_on_tinyworld,
    measure,
    settings,
)
from cratelab.interpret.concepts import tinyworld_concepts
from cratelab.interpret.records import collect_records
from cratelab.models import new_model


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(N_TOKENS=40_000, DEPTHS=(1,), LAMBDAS=(1.0,), TOP_KS=(4,)).items():
        monkeypatch.setattr(chapter_9, name, value)


@pytest.fixture
def brief(monkeypatch):
    """Measures little: what is measured has a test of its own."""

    def measure(model, text, concepts, seed=0, **options):
        return {"density": collect_records(model, text, n_tokens=500, n_random=0).density.mean(1).tolist()}

    monkeypatch.setattr(chapter_9, "measure", measure)


def test_a_run_on_tinyworld_is_trained_and_measured_once(small, brief, tmp_path):
    steps = []
    runs = compare_on_tinyworld(tmp_path, (0, 1), 4, on_step=steps.append)
    assert len(runs) == 2 * len(settings(4)) == 2 * (2 * 2 + 1 + 1)
    assert len(steps) == 2 * (4 * 4 + 2 * 2)
    limited = next(run for run in runs if run["top_k"] == 4)
    assert max(limited["trained"]["density"]) <= 4 / 256
    assert all(("untrained" in run) == (run["steps"] == 4) for run in runs)
    kept = cl.load(tmp_path / "crate-2L-4-lam1-1" / "model")
    assert kept.config.lam == 1.0 and kept.config.n_layers == 2
    (tmp_path / "gpt2-1L-4-0" / "findings.json").unlink()
    assert compare_on_tinyworld(tmp_path, (0, 1), 4) == runs


def test_findings_of_other_arguments_or_weights_are_made_anew(small, brief, tmp_path, monkeypatch):
    """Four steps are the half of eight and the whole of four, and the halves are measured less."""
    for name in "LAMBDAS", "TOP_KS":
        monkeypatch.setattr(chapter_9, name, ())
    halves = {run["model"]: run for run in compare_on_tinyworld(tmp_path, (0,), 8) if run["steps"] == 4}
    whole = [run for run in compare_on_tinyworld(tmp_path, (0,), 4) if run["steps"] == 4]
    assert whole and all("untrained" in run and "untrained" not in halves[run["model"]] for run in whole)
    again = [run for run in compare_on_tinyworld(tmp_path, (0,), 8) if run["steps"] == 4]
    assert again == list(halves.values())
    monkeypatch.setattr(chapter_9, "N_TOKENS", 41_000)
    with pytest.raises(ValueError, match=r"crate-1L-8-0 holds a run with another training"):
        compare_on_tinyworld(tmp_path, (0,), 8)


@pytest.mark.parametrize(
    ("seeds", "steps", "message"), [((), 4, "seeds must be"), ((0, 0), 4, "each once"), ((0,), 1, "steps must be")]
)
def test_nothing_to_compare_is_refused_before_any_work(tmp_path, monkeypatch, seeds, steps, message):
    monkeypatch.setattr(tinyworld, "generate", lambda *a, **options: pytest.fail("a world was made"))
    with pytest.raises(ValueError, match=message):
        compare_on_tinyworld(tmp_path, seeds, steps)


def test_neurons_are_measured_anew_with_other_tokens_and_only_then(brief, tmp_path, monkeypatch):
    text = [PreparedCorpus(corpus(n=4000), corpus(n=1500, seed=1), byte_encoding())]
    monkeypatch.setattr(reference_models, "prepare", lambda name, tokenizer=None, **options: text[0])
    monkeypatch.setattr(reference_models, "CONTEXT", 64)
    monkeypatch.setattr(chapter_9, "PRESETS", ("toy",))
    measured, brief_measure = [], chapter_9.measure

    def counted(model, text, concepts, seed=0, n_tokens=None):
        measured.append(n_tokens)
        return brief_measure(model, text, concepts, seed) | {"n_tokens": n_tokens}

    monkeypatch.setattr(chapter_9, "measure", counted)
    first = compare_on_documentation(tmp_path, 1, 3, n_tokens=100)
    assert compare_on_documentation(tmp_path, 1, 3, n_tokens=100) == first and measured == [100] * 8
    assert compare_on_documentation(tmp_path, 1, 3, n_tokens=200)[0]["trained"]["n_tokens"] == 200
    assert measured == [100] * 8 + [200] * 8
    for wrong in (1, 2), (1, 3, None, None, 0):
        with pytest.raises(ValueError, match="must be at least"):
            compare_on_documentation(tmp_path, *wrong)
    text[0] = PreparedCorpus(corpus(n=4000), corpus(n=1500, seed=2), byte_encoding())
    with pytest.raises(ValueError, match="holds a run with another validation"):
        compare_on_documentation(tmp_path, 1, 3, n_tokens=100)


def test_gaps_lie_above_the_floor_and_fall_with_training(small, brief, tmp_path, monkeypatch):
    for name, value in dict(MODELS=["gpt2"], LAMBDAS=(), TOP_KS=()).items():
        monkeypatch.setattr(chapter_9, name, value)
    gaps = {run["steps"]: run["gap"] for run in compare_on_tinyworld(tmp_path, (0,), 60)}
    assert gaps[30] > gaps[60] > 0


def test_what_is_measured_is_there():
    """Density, dead neurons and named neurons, counted again on the activations themselves."""
    world = tinyworld.generate(3000, context=65)
    text, concepts = world.corpus(), tinyworld_concepts(world)
    torch.manual_seed(0)
    model = cl.Gpt2(cl.Gpt2Config.preset("toy", n_layers=1, vocab_size=512, context=64, top_k=6)).eval()
    found = measure(model, text, concepts, truth=True, ladder=False)
    seen = []
    model.blocks[0].neurons.register_forward_hook(lambda module, inputs, a: seen.append(a[0]))
    for document in range(text.n_documents):
        start, stop = text.document_span(document)
        for first in range(start, stop, 64):
            model(torch.from_numpy(text[first : min(first + 64, stop)].astype(np.int64))[None])
    a = torch.cat(seen)
    assert found["density"] == pytest.approx([float((a > 0).double().mean())])
    assert found["dead"] == pytest.approx([float((a.amax(0) <= 0).double().mean())])
    assert 0 < found["named"][0] < 1
    assert [(row["protocol"], row["strict"], row["explainer"]) for row in found["rows"]] == [
        (protocol, strict, "token")
        for strict in (True, False)
        for protocol in ("top-and-random", "random-only", "anthropic")
    ]


def test_one_command_makes_the_table_of_the_chapter(small, tmp_path, monkeypatch, capsys):
    whole = PreparedCorpus(corpus(n=4000), corpus(n=1500, seed=1), byte_encoding())
    monkeypatch.setattr(reference_models, "prepare", lambda name, tokenizer=None, **options: whole)
    monkeypatch.setattr(reference_models, "CONTEXT", 64)
    monkeypatch.setattr(chapter_9, "PRESETS", ("toy",))
    monkeypatch.setattr(chapter_9, "compare_on_tinyworld", lambda *arguments: ["the runs"])
    monkeypatch.setattr(comparison, "new_model", partial(new_model, expansion=1))  # a quarter of the neurons
    out, reference = tmp_path / "out", tmp_path / "reference"
    out.mkdir()
    main(["reproduce", "chapter-9", "--out", str(out), "--reference", str(reference), "--seeds", "1", "--steps", "4"])
    held = json.loads((out / "crate_against_gpt2.json").read_text())
    assert held["provenance"]["seeds"] == [0] and held["findings"]["tinyworld"] == ["the runs"]
    on_text = held["findings"]["documentation"]
    assert [(run["model"], run["n_layers"], run["steps"]) for run in on_text] == [
        ("crate", 2, 4),
        ("gpt2", 2, 4),
        ("crate", 2, 1),
        ("gpt2", 2, 1),
    ]
    assert on_text[0]["validation_loss"] != on_text[2]["validation_loss"]
    for run in on_text:
        assert len(run["trained"]["density"]) == 2 and "named" not in run["trained"]
        assert len(run["untrained"]["rows"]) == 3 * 3 + 3
    assert "crate_against_gpt2.json is what cratelab/reference holds" in capsys.readouterr().out
