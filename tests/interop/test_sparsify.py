"""sparsify trains auto-encoders on an exported CRATE, and cratelab reads and scores them."""

import subprocess
import sys
from itertools import islice

import pytest
import torch
from datasets import Dataset
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from transformers import AutoModelForCausalLM

from cratelab.corpora.pydocs import standard_library
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.reading import hooked
from cratelab.sae import Sae, evaluate_sae
from cratelab.sae import SaeConfig as OurConfig

HOOKPOINT = "blocks.1.neurons"

# What sparsify 1.3.3 does on its command line, but for its `device_map={"": "cuda:0"}`.
ON_THE_CPU = """
import transformers
load = transformers.AutoModel.from_pretrained.__func__
on_the_cpu = lambda cls, name, **how: load(cls, name, **how | {"device_map": "cpu"})
transformers.AutoModel.from_pretrained = classmethod(on_the_cpu)
from sparsify.__main__ import run
run()
"""


def corpus(tokens: torch.Tensor) -> TokenizedCorpus:
    """Rows (b, n) of tokens, each a document."""
    documents = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    return TokenizedCorpus.from_arrays(tokens.flatten().numpy(), documents.numpy(), ["text"] * len(tokens), 4096)


@torch.no_grad()
def codes_of(crate, tokens: torch.Tensor) -> torch.Tensor:
    """What layer 1's neurons do, (b, n, h)."""
    seen = []
    with hooked((crate.blocks[1].neurons, lambda module, inputs, codes: seen.append(codes))):
        crate(tokens)
    return seen[0]


def test_what_the_page_trains_is_read_and_explains_as_much_by_both_measures(crate, printed):
    names = printed("sparsify")
    ours, theirs = names["sae"], SparseCoder.load_from_disk(f"checkpoints/sae/{HOOKPOINT}")
    tokens = torch.stack([row["input_ids"] for row in islice(names["tokens"], 16)])
    x = codes_of(crate, tokens).flatten(0, 1)
    for factor in 1.0, 100.0:
        with hooked((crate.blocks[1].neurons, lambda module, inputs, codes, factor=factor: factor * codes)):
            (scores,) = evaluate_sae(crate, corpus(tokens), {1: ours}).values()
        with torch.no_grad():
            encoded, output = theirs.encode(factor * x), theirs(factor * x)
        dense = torch.zeros(len(x), ours.config.n_features).scatter(-1, encoded.top_indices, encoded.top_acts)
        torch.testing.assert_close(ours.encode(factor * x), dense, rtol=1e-4, atol=1e-4 * factor)
        torch.testing.assert_close(ours(factor * x), output.sae_out, rtol=1e-4, atol=1e-4 * factor)
        assert scores.explained_variance == pytest.approx(1 - float(output.fvu), abs=1e-4)
        assert scores.l0 == pytest.approx(float((dense > 0).sum(-1).float().mean()), rel=1e-3)
        if factor == 1:
            assert scores.explained_variance > 0.3 and scores.ce_clean < scores.ce_zero


def test_the_mean_explains_nothing(crate, tmp_path):
    tokens = torch.randint(4095, (4, 256))
    x = codes_of(crate, tokens).flatten(0, 1)
    theirs = SparseCoder(512, SaeConfig(expansion_factor=1, k=4))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.zero_()
        theirs.b_dec.copy_(x.mean(0))
    theirs.save_to_disk(tmp_path)
    ours = Sae.from_sparsify(tmp_path)
    assert ours.config == OurConfig(512, 1, "topk", k=4)
    assert evaluate_sae(crate, corpus(tokens), {1: ours})[1].explained_variance == pytest.approx(0, abs=1e-5)
    assert theirs(x).fvu.item() == pytest.approx(1, abs=1e-5)


def test_end_to_end_the_reconstruction_stands_in_the_models_loss(crate, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokens, losses = torch.randint(4095, (4, 256)), []
    data = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    config = TrainConfig(SaeConfig(expansion_factor=1, k=4), batch_size=4, hookpoints=[HOOKPOINT], loss_fn="ce")
    config.log_to_wandb = False
    trainer = Trainer(config, data, model)
    with torch.no_grad():
        trainer.saes[HOOKPOINT].encoder.weight.zero_()  # so that it gives the mean of its first batch
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    trainer.fit()
    mean = Sae(OurConfig(512, 1))
    with torch.no_grad():
        mean.W_enc.zero_()
        mean.b_dec.copy_(codes_of(crate, tokens).mean((0, 1)))
    scores = evaluate_sae(crate, corpus(tokens), {1: mean})[1]
    assert losses == pytest.approx([scores.ce_clean, scores.ce_spliced], rel=1e-5)
    assert abs(scores.ce_spliced - scores.ce_clean) > 0.5


def test_the_command_line_trains_too(exported, tmp_path):
    Dataset.from_dict({"text": [each.text for each in islice(standard_library(), 8)]}).save_to_disk(tmp_path / "data")
    command = [sys.executable, "-c", ON_THE_CPU, str(exported), "data", "--hookpoints", HOOKPOINT, "--ctx_len", "256"]
    command += ["--expansion_factor", "1", "-k", "8", "--batch_size", "8", "--data_preprocessing_num_proc", "1"]
    command += ["--log_to_wandb", "False", "--run_name", "sae"]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, input="y\n" * 9, text=True)
    sae = Sae.from_sparsify(tmp_path / "checkpoints/sae" / HOOKPOINT)
    assert sae.config == OurConfig(512, 1, "topk", k=8) and sae.W_dec.norm(dim=1).max() < 2
