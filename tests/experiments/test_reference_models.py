import json

import numpy as np
import pytest
import torch
from test_training import corpus

import cratelab as cl
from cratelab.corpora import tinyworld
from cratelab.corpora.prepare import PreparedCorpus
from cratelab.corpora.tokenizers import byte_encoding
from cratelab.experiments import reference_models
from cratelab.experiments.rates import TOY_RATE
from cratelab.experiments.reference_models import (
    load_reference,
    load_reference_tokenizer,
    make_reference_models,
    make_toys,
)
from cratelab.losses import document_log_probs
from cratelab.provenance import changed_since


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder, both tables, and what was prepared."""
    folder, asked = tmp_path_factory.mktemp("made"), []
    with pytest.MonkeyPatch.context() as patch:
        as_if_small(patch, asked)
        table = make_reference_models(folder, seeds=2, text=("novels",), steps=2)
        return folder, table, make_toys(folder, seeds=2, steps=2), asked


@pytest.fixture
def made(once, monkeypatch):
    """The same, while the package carries what was made."""
    as_if_small(monkeypatch, [])
    monkeypatch.setattr(reference_models, "REFERENCE", once[0] / "packed")
    return once


def as_if_small(patch: pytest.MonkeyPatch, asked: list) -> None:
    def prepare(name, tokenizer=None, **options):
        asked.append((name, tokenizer))
        return PreparedCorpus(corpus(n=4000), corpus(n=900, seed=1), byte_encoding())

    for name, value in dict(prepare=prepare, CONTEXT=16, TOY_CONTEXT=12).items():
        patch.setattr(reference_models, name, value)


def test_all_sizes_are_trained_and_the_first_seed_packed_in_half_precision(made):
    folder, table, toys, asked = made
    assert asked == [("pydocs+packages+novels", "bpe-4096"), ("tinyworld", None)]
    assert [(row["model"], row["preset"], row["seeds"]) for row in table] == [
        (model, preset, 2) for preset in ("1L", "2L", "3L") for model in ("crate", "gpt2")
    ]
    assert [(row["model"], row["preset"], row["seeds"]) for row in toys] == [("crate", "toy", 2), ("gpt2", "toy", 2)]
    for model in "crate", "gpt2":
        for preset in "1L", "2L", "3L":
            packed = load_reference(model, preset)
            trained = cl.load(folder / "runs" / f"{model}-{preset}-0" / "model")
            assert packed.config == trained.config and packed.config.context == 16 and not packed.training
            for name, tensor in trained.state_dict().items():
                torch.testing.assert_close(packed.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
    held = json.loads((folder / "packed" / "reference_models.json").read_text())
    assert len(held["findings"]) == 12 and held["table"] == table
    assert held["provenance"]["documentation"]["n_tokens"] == 4000
    read = str(held["findings"][0]["tokens"])
    assert [len(losses) for losses in held["provenance"]["ngrams"].values()] == [4, 4]
    assert held["provenance"]["ngrams"].keys() == {"4000", read}
    held = json.loads((folder / "packed" / "toys.json").read_text())
    assert len(held["findings"]) == 4 and held["table"] == toys
    for model, rate in TOY_RATE.items():
        run = json.loads((folder / f"toys-{rate:g}" / f"{model}-toy-1" / "run.json").read_text())
        assert run["recipe"]["peak_rate"] == rate
    assert load_reference("gpt2", "toy", seed=1).config.context == 12


def test_runs_that_other_code_has_trained_are_told_of(made):
    """The folder's runs are read again; one of them was begun by another library."""
    folder, *_ = made
    makers = {"reference_models": lambda: make_reference_models(folder, 2, ("novels",), 2)}
    makers |= {"toys": lambda: make_toys(folder, 2, 2)}
    for run, table in ("runs/gpt2-2L-1", "reference_models"), (f"toys-{TOY_RATE['crate']:g}/crate-toy-1", "toys"):
        file = folder / run / "run.json"
        before = file.read_text()
        facts = json.loads(before)
        facts["provenance"]["library"]["mssa"] = "0" * 12
        for text, changed in (json.dumps(facts), ["mssa"]), (before, []):
            file.write_text(text)
            makers[table]()
            held = json.loads((folder / "packed" / f"{table}.json").read_text())
            assert changed_since(held["provenance"]) == changed


def test_weights_too_large_for_half_precision_are_not_packed(made, monkeypatch):
    folder, *_ = made
    load = reference_models.load

    def huge(path):
        model = load(path)
        model.norm.weight.data[0] = 1e6
        return model

    monkeypatch.setattr(reference_models, "load", huge)
    before = (folder / "packed" / "crate-1L-0" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"crate-1L-0/model has weights too large for half precision"):
        make_reference_models(folder, seeds=2, text=("novels",), steps=2)
    assert (folder / "packed" / "crate-1L-0" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("wrong", "message"), [(dict(seeds=0), "seeds must be"), (dict(steps=0), "steps must be")])
def test_nothing_to_train_is_refused_before_any_work(tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(reference_models, "prepare", lambda *a, **options: pytest.fail("a corpus was made"))
    for make in make_reference_models, make_toys:
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_travels_with_them(made):
    assert load_reference_tokenizer().decode(load_reference_tokenizer().encode_ordinary("naïve")) == "naïve"


def test_what_the_package_lacks_is_named(made):
    with pytest.raises(FileNotFoundError, match="no model crate-1L-1; there are crate-1L-0, crate-2L-0, crate-3L-0"):
        load_reference("crate", "1L", seed=1)


CARRIED = sorted(entry for entry in reference_models.REFERENCE.iterdir() if entry.is_dir())


@pytest.mark.parametrize("folder", CARRIED, ids=[folder.name for folder in CARRIED])
def test_what_the_package_carries_is_small_and_trained(folder):
    name, preset, seed = folder.name.split("-")
    model = load_reference(name, preset, int(seed))
    assert (folder / "model.safetensors").stat().st_size < 2.5e6
    table = "toys" if preset == "toy" else "reference_models"
    held = json.loads((reference_models.REFERENCE / f"{table}.json").read_text())
    (run,) = [r for r in held["findings"] if (r["model"], r["preset"], r["seed"]) == (name, preset, int(seed))]
    assert model.count_parameters(positions=False) == run["parameters"]
    if preset == "toy":
        world = tinyworld.generate(30_000, seed=4, context=128)
        log_probs = document_log_probs(model, world.corpus())
        told = ~np.isnan(log_probs)
        assert -world.log_prob[told].mean() < -log_probs[told].mean() < 1.1


def test_the_package_stays_under_sixteen_megabytes():
    files = [file for folder in CARRIED for file in folder.iterdir()]
    assert len(CARRIED) >= 8 and sum(file.stat().st_size for file in files) < 16e6
