"""TransformerLens caches, hooks and continues an exported CRATE, by the adapter that the page prints."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import cratelab as cl
from cratelab.experiments.reference_models import load_reference, load_reference_tokenizer
from cratelab.reading import hooked

TEXT, SITE = "Return the number of", "blocks.1.neurons.hook_out"


@pytest.fixture
def names(printed):
    return printed("TransformerLens")


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_what_is_cached_is_what_our_own_model_computes(crate, names):
    bridge, seen, tokens = names["bridge"], {}, names["bridge"].to_tokens(TEXT)

    def note(name):
        return lambda module, inputs, output: seen.update({name: output})

    def note_input(name):
        return lambda module, inputs, output: seen.update({name: inputs[0]})

    block = crate.blocks[1]
    with hooked(
        (block.neurons, note(SITE)),
        (block, note("blocks.1.hook_resid_post")),
        (block.attention_norm, note_input("blocks.1.hook_resid_pre")),
        (block.ista_norm, note_input("blocks.1.hook_resid_mid")),
        (block.attention, note("blocks.1.hook_attn_out")),
        (block.attention.projection, note("blocks.1.attn.hook_q")),
    ):
        close(names["logits"], crate(tokens))
    assert len(seen) == 6
    for name, tensor in seen.items():
        close(names["cache"][name].flatten(2), tensor)
    assert names["code"] is names["cache"][SITE] and (names["code"] > 0).any()
    w = names["cache"]["blocks.1.attn.hook_q"].transpose(1, 2)
    maps = (w @ w.mT / w.shape[-1] ** 0.5).masked_fill(~torch.ones(5, 5, dtype=bool).tril(), -torch.inf).softmax(-1)
    close(names["cache"]["blocks.1.attn.hook_pattern"], maps)
    assert bridge.cfg.n_layers == 2 and bridge.cfg.d_mlp == crate.config.n_neurons


def test_hooks_and_text_are_those_of_our_own_model(crate, names):
    bridge = names["bridge"]
    tokens = bridge.to_tokens(TEXT)
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: torch.zeros_like(neurons))):
        silenced, silent_text = crate(tokens), crate.generate(tokens, 10, temperature=0)
    close(names["silenced"], silenced)
    assert (silenced - names["logits"]).abs().max() > 1
    assert names["text"] == bridge.to_string(silent_text[0, 1:])
    text = bridge.generate(TEXT, max_new_tokens=10, do_sample=False)
    assert text == bridge.to_string(crate.generate(tokens, 10, temperature=0)[0, 1:])
    with bridge.hooks(fwd_hooks=[(SITE, lambda code, hook: -code)]):
        edited = bridge.generate(TEXT, max_new_tokens=10, do_sample=False)
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: -neurons)):
        assert edited == bridge.to_string(crate.generate(tokens, 10, temperature=0)[0, 1:]) != text


def test_gradients_by_the_code(crate, names):
    bridge, found = names["bridge"], {}
    tokens = bridge.to_tokens(TEXT)
    with bridge.hooks(bwd_hooks=[(SITE, lambda gradient, hook: found.update(theirs=gradient.clone()))]):
        bridge(tokens)[0, -1, 7].backward()
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: found.update(ours=neurons))):
        (ours,) = torch.autograd.grad(crate(tokens)[0, -1, 7], found["ours"])
    close(found["theirs"], ours)


def test_what_the_page_says_does_not_hold(names):
    assert "blocks.1.hook_mlp_out" not in names["cache"]
    with pytest.raises(KeyError):
        names["cache"].decompose_resid()
    with pytest.raises(AssertionError):
        names["bridge"].enable_compatibility_mode()


def test_the_factory_alone_is_not_enough(names, monkeypatch):
    monkeypatch.delitem(names["known"].SUPPORTED_ARCHITECTURES, "CrateForCausalLM")
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        names["TransformerBridge"].boot_transformers("crate-hf", trust_remote_code=True, device="cpu")


def test_an_exported_gpt2_needs_no_adapter(tmp_path):
    gpt2 = load_reference("gpt2", "2L")
    cl.to_huggingface(gpt2, tmp_path / "gpt2", load_reference_tokenizer())
    bridge, seen = TransformerBridge.boot_transformers(str(tmp_path / "gpt2"), device="cpu"), []
    logits, cache = bridge.run_with_cache(TEXT)
    with hooked((gpt2.blocks[1].neurons, lambda module, inputs, neurons: seen.append(neurons))):
        close(logits, gpt2(bridge.to_tokens(TEXT)))
    close(cache["blocks.1.mlp.hook_post"], seen[0])
