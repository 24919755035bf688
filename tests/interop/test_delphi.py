"""delphi's caches of an exported CRATE's neurons hold what cratelab reads, and its explainers take them."""

import asyncio
import sys
from unittest.mock import MagicMock

import pytest
import torch
from delphi.latents import LatentCache
from delphi.sparse_coders.load_sparsify import load_sparsify_hooks
from sparsify import SparseCoder, SparseCoderConfig
from transformers import AutoModelForCausalLM

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.reading import watch_neurons
from cratelab.sae import Sae

SITE = "model.blocks.1.neurons"


def codes_of(crate, tokens: torch.Tensor) -> torch.Tensor:
    """What layer 1's neurons do, (b, n, h)."""
    documents = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1]).numpy()
    text = TokenizedCorpus.from_arrays(tokens.flatten().numpy(), documents, ["text"] * len(tokens), 4096)
    return torch.cat([layers[1].clone() for _, layers in watch_neurons(crate, text)])


def cached(cache: LatentCache, n_latents: int) -> torch.Tensor:
    """All that the cache holds, (b, n, m)."""
    held = cache.cache
    dense = torch.zeros(*held.tokens[SITE].shape, n_latents)
    dense[tuple(held.latent_locations[SITE].T)] = held.latent_activations[SITE]
    return dense


@pytest.fixture
def model(exported):
    return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)


def test_what_the_page_caches_is_what_the_neurons_do(crate, printed):
    names = printed("delphi")
    codes = codes_of(crate, names["tokens"])
    expected = torch.where(codes > 0.3, codes, 0.0)
    found = cached(names["cache"], 512)
    near = (codes - 0.3).abs() < 1e-4  # where rounding decides
    torch.testing.assert_close(found[~near], expected[~near], rtol=1e-4, atol=1e-5)
    assert 0.01 < (expected > 0).float().mean() < 0.2
    assert len(names["records"]) > 5
    for record in names["records"]:
        share = (expected[..., record.latent.latent_index] > 0).double().mean()
        assert record.per_token_frequency == pytest.approx(float(share), abs=1e-4)
        top = expected[..., record.latent.latent_index].max()
        assert 0.3 < record.max_activation <= float(top) + 1e-3 and len(record.not_active) in (0, 50)


def test_without_a_threshold_every_code_is_cached(crate, model):
    tokens = torch.randint(4095, (8, 128))
    cache = LatentCache(model, {SITE: lambda codes: codes}, batch_size=4)
    cache.run(tokens.numel(), tokens)
    torch.testing.assert_close(cached(cache, 512), codes_of(crate, tokens), rtol=1e-4, atol=2e-5)  # it drops below 1e-5
    assert (cached(cache, 512) > 0).float().mean() > 0.2


def test_the_code_of_an_auto_encoder_of_sparsify_is_cached(crate, model, tmp_path):
    SparseCoder(512, SparseCoderConfig(expansion_factor=2, k=8)).save_to_disk(tmp_path / "blocks.1.neurons")
    encoders, transcode = load_sparsify_hooks(model, str(tmp_path), ["blocks.1.neurons"])
    assert list(encoders) == [SITE] and not transcode
    tokens = torch.randint(4095, (4, 64))
    cache = LatentCache(model, encoders, batch_size=4)
    cache.run(tokens.numel(), tokens)
    expected = Sae.from_sparsify(tmp_path / "blocks.1.neurons").encode(codes_of(crate, tokens))
    torch.testing.assert_close(cached(cache, 1024), expected.detach(), rtol=1e-4, atol=2e-5)
    assert (expected > 0).sum() == 4 * 64 * 8


def test_its_explainer_is_shown_where_the_neuron_is_active(printed, monkeypatch):
    for name in "vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs":
        monkeypatch.setitem(sys.modules, name, MagicMock())
    from delphi.clients.client import Client, Response
    from delphi.explainers import DefaultExplainer

    asked = []

    class Echo(Client):
        async def generate(self, prompt, **_):
            asked.append(prompt[-1]["content"])
            return Response("[EXPLANATION]: the first")

    record = printed("delphi")["records"][0]
    explained = asyncio.run(DefaultExplainer(Echo("none"))(record))
    assert explained.explanation == "the first"
    for example in record.train:
        words, codes = example.str_tokens, example.activations.tolist()
        assert len(words) == len(codes) == 32
        marked = "".join(
            f"<<{word}>>" if code > 0.3 * max(codes) else word for word, code in zip(words, codes, strict=True)
        )
        assert marked.replace(">><<", "") in asked[0] and "<<" in marked
