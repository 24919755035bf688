"""Every loader against damaged and foreign files, and the mathematical core against shapes, types and scales.

What else was tried stands with the module it concerns; CONTRIBUTING has the table.
"""

import pickle
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sae import write_as_sparsify
from test_training import corpus, new_model

import cratelab as cl
from cratelab.corpora import tokenizers
from cratelab.corpora.documents import Document
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.token_writer import tokenize
from cratelab.interpret.language_models import TextExplanations
from cratelab.interpret.openai_records import read_neuron_record, write_neuron_record
from cratelab.interpret.records import Records, collect_records
from cratelab.run_directory import read_metrics
from cratelab.sae import Sae, SaeConfig

WORDS = tokenizers.WordEncoding([f"w{i}" for i in range(19)])


def official(folder):
    model = new_model()
    names = dict(n_layer="n_layers", n_head="n_heads", n_embd="width", vocab_size="vocab_size", block_size="context")
    args = {theirs: getattr(model.config, ours) for theirs, ours in names.items()}
    torch.save({"model": {}, "model_args": args | {"dropout": 0.0, "bias": False}}, folder / "checkpoint.pt")


def exported(folder):
    cl.to_huggingface(new_model(), folder / "whole")
    for name in "config.json", "model.safetensors":  # what `load` reads of it
        (folder / "whole" / name).rename(folder / name)
    shutil.rmtree(folder / "whole")


def collected() -> Records:
    return collect_records(new_model(context=64), corpus(), n_top=3, n_random=2)


def write_corpus(folder):
    documents = [Document(f"the bank of river {i}", {}) for i in range(40)]
    tokenize(documents, folder / "corpus", tokenizers.byte_encoding())


def write_explanations(folder):
    TextExplanations((1, 1), ["fires on days"], [None]).save(folder / "explanations.json", [(0, 1)])


# What writes it, and what reads it.
FORMATS = {
    "model": (lambda folder: new_model().save(folder), cl.load),
    "official checkpoint": (official, lambda folder: cl.Crate.from_official(folder / "checkpoint.pt")),
    "auto-encoder": (lambda folder: Sae(SaeConfig(6, 2)).save(folder), Sae.load),
    "auto-encoder of sparsify": (write_as_sparsify, Sae.from_sparsify),
    "exported model": (exported, cl.load),
    "records": (lambda folder: collected().save(folder), Records.load),
    "NeuronRecord": (
        lambda folder: write_neuron_record(collected(), 0, 1, WORDS, folder / "neuron.json"),
        lambda folder: read_neuron_record(folder / "neuron.json", WORDS),
    ),
    "tokenizer": (
        lambda folder: tokenizers.save(tokenizers.byte_encoding(), folder / "tokenizer.json"),
        lambda folder: tokenizers.load(folder / "tokenizer.json"),
    ),
    "corpus": (write_corpus, lambda folder: TokenizedCorpus.open(folder / "corpus")),
    "explanations": (write_explanations, lambda folder: TextExplanations.load(folder / "explanations.json")),
}
FOREIGN = [b"", b"\x00" * 64, b"[]", b"{}", b"null", b"<html></html>", b'{"a": ' * 2000, "naïve".encode("latin1")]


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_and_foreign_files_are_refused_by_name(name, tmp_path):
    """Each file of a format cut short at random places, emptied, and replaced by something else."""
    write, read = FORMATS[name]
    write(tmp_path)
    draw = random.Random(0)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]
    assert files
    for file in files:
        whole = file.read_bytes()
        cuts = [whole[: draw.randrange(len(whole) - 2)] for _ in range(6)]
        for damaged in [*cuts, *FOREIGN]:
            file.write_bytes(damaged)
            with pytest.raises((ValueError, FileNotFoundError)) as raised:
                read(tmp_path)
            assert str(tmp_path) in str(raised.value), f"{file.name}: {raised.value}"
        file.write_bytes(whole)
    if name != "official checkpoint":
        read(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_nothing_is_unpickled(protocol, tmp_path):
    file = tmp_path / "checkpoint.pt"
    for content in (pickle.dumps(Bomb(), protocol), None):
        if content is None:
            torch.save({"model": Bomb(), "model_args": {}}, file, pickle_protocol=protocol)
        else:
            file.write_bytes(content)
        with pytest.raises(ValueError, match="nothing else is ever unpickled"):
            cl.Crate.from_official(file)


NOT_OURS = "official checkpoint", "auto-encoder of sparsify"  # to write


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("corpus", *NOT_OURS)])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(name, tmp_path, monkeypatch):
    """The second writing stops at its first replacement; what was there is whole and reads as before."""
    write, read = FORMATS[name]
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    read(tmp_path)


def test_metrics_cut_off_in_a_line_are_read_up_to_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


shapes = dict(n=st.integers(1, 9), k=st.integers(1, 3), p=st.integers(1, 4), batch=st.integers(1, 3))
kinds = dict(dtype=st.sampled_from([torch.float32, torch.float64]), scale=st.integers(-6, 6), seed=st.integers(0, 999))


@settings(max_examples=40, deadline=None)
@given(**shapes, **kinds)
def test_rates_and_their_gradients_over_shapes_types_and_scales(n, k, p, batch, dtype, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, n, k * p, generator=draw, dtype=torch.float64) * 10.0**scale
    U = torch.linalg.qr(torch.randn(k, k * p, p, generator=draw, dtype=torch.float64)).Q
    z, U = z.to(dtype), U.to(dtype)
    rate, within = cl.coding_rate(z), cl.subspace_rate(z, U)
    for found in rate, within, cl.rate_reduction(z, U), cl.sparse_rate_reduction(z, U, 0.1):
        assert found.shape == (batch,) and found.dtype == dtype and found.isfinite().all()
    assert (rate >= 0).all() and (within >= 0).all()
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(cl.coding_rate(z.flip(1)), rate, **tolerance)
    torch.testing.assert_close(cl.coding_rate(z[0]), rate[0], **tolerance)
    slope = cl.subspace_rate_gradient(z, U)
    assert slope.shape == z.shape and slope.dtype == dtype and slope.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(causal=st.booleans(), **shapes, **kinds)
def test_mssa_and_ista_over_shapes_types_and_scales(n, k, p, batch, causal, dtype, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    z = (torch.randn(batch, n, k * p, generator=draw, dtype=torch.float64) * 10.0**scale).to(dtype)
    U = torch.randn(k, k * p, p, generator=draw, dtype=torch.float64).to(dtype)
    attended = cl.mssa(z, U, causal=causal)
    assert attended.shape == z.shape and attended.dtype == dtype and attended.isfinite().all()
    D = torch.randn(k * p, 2 * k * p, generator=draw, dtype=torch.float64).to(dtype)
    code = cl.ista(z, D / torch.linalg.matrix_norm(D, 2))
    assert code.shape == (batch, n, 2 * k * p) and code.dtype == dtype
    assert code.isfinite().all() and (code >= 0).all()
    torch.testing.assert_close(cl.ista(z[0], D / torch.linalg.matrix_norm(D, 2)), code[0], rtol=1e-4, atol=1e-4)
