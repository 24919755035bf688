"""inseq attributes an exported CRATE; gradients of cratelab's own model say what it must find."""

import captum.attr
import inseq
import pytest
import torch
from torch import nn

import cratelab as cl
from cratelab.experiments.reference_models import load_reference, load_reference_tokenizer
from cratelab.ista import Ista

TRUST = {"model_kwargs": {"trust_remote_code": True}, "tokenizer_kwargs": {"trust_remote_code": True}}
ASKED = {"input_texts": "Return a list of", "generated_texts": "Return a list of the", "attributed_fn": "logit"}


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([load_reference_tokenizer().encode_ordinary("Return a list of")])


@pytest.fixture
def the() -> int:
    (token,) = load_reference_tokenizer().encode_ordinary(" the")
    return token


def rise_of(model, prompt, the) -> float:
    """How much higher the logit of " the" is after the prompt than after end-of-text tokens."""
    nothing = torch.full_like(prompt, load_reference_tokenizer().eot_token)
    with torch.no_grad():
        return float((model(prompt) - model(nothing))[0, -1, the])


def test_what_the_page_prints(crate, prompt, the, printed):
    names, rise = printed("inseq"), rise_of(crate, prompt, the)
    assert names["tokens"].shape == (4,) and float(names["tokens"].sum()) == pytest.approx(rise, abs=0.05)
    assert abs(rise) > 5
    seen = []
    handle = crate.blocks[1].neurons.register_forward_hook(lambda module, inputs, codes: seen.append(codes))
    logit = crate(prompt)[0, -1, the]
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, seen)
    torch.testing.assert_close(names["neurons"], (gradient * seen[0])[0, -1].detach(), rtol=1e-4, atol=1e-5)


def test_attention_is_the_softmax_of_the_subspaces_inner_products(crate, prompt, exported):
    found = inseq.load_model(str(exported), "attention", **TRUST).attribute(
        ASKED["input_texts"], ASKED["generated_texts"], show_progress=False
    )
    block = crate.blocks[0]
    with torch.no_grad():
        z = block.attention_norm(crate.token_embedding(prompt) + crate.position_embedding.weight[: prompt.shape[1]])
        w = block.attention.projection(z).unflatten(-1, (crate.config.n_heads, -1))[0]  # (n, k, p)
        expected = (torch.einsum("nkp,kp->nk", w, w[-1]) / w.shape[-1] ** 0.5).softmax(0)
    torch.testing.assert_close(found[0].target_attributions[:4, 0, 0], expected, rtol=1e-4, atol=1e-6)


def test_deeplift_does_not_add_up(crate, exported, prompt, the, tmp_path):
    """Nor does it for GPT-2: the page says by how much."""
    gpt2 = load_reference("gpt2", "2L")
    cl.to_huggingface(gpt2, tmp_path / "gpt2", load_reference_tokenizer())
    for model, folder, sum_of_parts, rises in (crate, exported, -2.1, 8.6), (gpt2, tmp_path / "gpt2", -0.3, 6.7):
        found = inseq.load_model(str(folder), "deeplift", **TRUST).attribute(**ASKED, show_progress=False)
        assert float(found[0].target_attributions.nansum()) == pytest.approx(sum_of_parts, abs=0.06)
        assert rise_of(model, prompt, the) == pytest.approx(rises, abs=0.06)


@pytest.mark.parametrize("kind, site", [("crate", "model.blocks.1.neurons"), ("gpt2", "transformer.h.1.mlp.act")])
def test_integrated_gradients_of_a_layer_are_0_in_this_version(kind, site, tmp_path):
    cl.to_huggingface(load_reference(kind, "2L"), tmp_path / kind, load_reference_tokenizer())
    asked = inseq.load_model(str(tmp_path / kind), "layer_integrated_gradients", target_layer=site, **TRUST)
    assert (asked.attribute(**ASKED, show_progress=False)[0].target_attributions.nan_to_num() == 0).all()


class Modules(nn.Module):
    """Two steps of ISTA whose ReLUs are modules."""

    def __init__(self, ista: Ista):
        super().__init__()
        self.D, self.relus = ista.D, nn.ModuleList(nn.ReLU() for _ in range(2))

    def forward(self, z):
        code = self.relus[0](0.1 * z @ self.D - 0.01)
        code = self.relus[1](code + 0.1 * (z - code @ self.D.T) @ self.D - 0.01)
        return code @ self.D.T


def test_deeplift_misses_relus_that_are_no_modules():
    ista = Ista(16)
    z, baseline = torch.randn(2, 1, 16)
    rise = float((ista(z) - ista(baseline))[0, 3].detach())
    function, modules = (
        float(captum.attr.DeepLift(each).attribute(z, baseline, target=3).sum()) for each in (ista, Modules(ista))
    )
    assert modules == pytest.approx(rise, rel=1e-4) and abs(function - rise) > 0.1


def test_zeroing_the_code_moves_what_is_attributed(exported):
    asked = inseq.load_model(str(exported), "integrated_gradients", **TRUST)
    asked.model.model.blocks[1].neurons.register_forward_hook(lambda module, inputs, codes: 0 * codes)
    found = asked.attribute(**ASKED, show_progress=False)
    assert float(found[0].target_attributions.nansum()) == pytest.approx(0, abs=1e-4)
