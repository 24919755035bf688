import numpy as np
import pytest
import torch
from test_training import corpus

from cratelab.interpret.current_token import share_explained
from cratelab.models import new_model


def share_by_hand(model, text, layer):
    """One-way analysis of variance with the current token as the factor, document by document."""
    seen, tokens = [], []
    hook = model.blocks[layer].neurons.register_forward_hook(lambda module, inputs, a: seen.append(a[0].double()))
    for document in range(text.n_documents):
        start, stop = text.document_span(document)
        for first in range(start, stop, model.config.context):
            piece = text[first : min(first + model.config.context, stop)].astype(np.int64)
            with torch.no_grad():
                model(torch.from_numpy(piece)[None])
            tokens.append(piece)
    hook.remove()
    a, tokens = torch.cat(seen).numpy(), np.concatenate(tokens)
    between = sum((tokens == t).sum() * (a[tokens == t].mean(0) - a.mean(0)) ** 2 for t in np.unique(tokens))
    return between / ((a - a.mean(0)) ** 2).sum(0), tokens


def test_the_share_is_that_of_an_analysis_of_variance():
    text, model = corpus(n=1500, n_documents=40), new_model("gpt2", "toy", 256, 0, 16, width=16)
    share, chance = share_explained(model, text)
    for layer in range(2):
        expected, tokens = share_by_hand(model, text, layer)
        np.testing.assert_allclose(share[layer], expected, rtol=1e-4)
    assert chance == pytest.approx((len(np.unique(tokens)) - 1) / (len(tokens) - 1))


def test_a_context_free_network_without_places_is_explained_whole_and_noise_by_chance():
    text = corpus(n=3000, n_documents=40)
    model = new_model("crate", "toy", 256, 0, 16, width=16, span=0)
    model.position_embedding.weight.data.zero_()
    share, chance = share_explained(model, text)
    assert float(share[~share.isnan()].min()) > 1 - 1e-6
    draw = torch.Generator().manual_seed(0)
    for block in model.blocks:
        block.neurons.register_forward_hook(lambda _, inputs, a: torch.randn(a.shape, generator=draw))
    noise, _ = share_explained(model, text)
    assert float(noise.mean()) == pytest.approx(chance, rel=0.15)


def test_the_share_is_taken_wherever_torch_puts_new_tensors():
    text, model = corpus(n=900, n_documents=9), new_model("gpt2", "toy", 256, 0, 16, width=16)
    expected, _ = share_explained(model, text)
    with torch.device("meta"):  # as a GPU that is torch's default, but everywhere
        share, _ = share_explained(model, text)
    assert share.device.type == "cpu" and torch.equal(share, expected.cpu())


def test_a_constant_neuron_has_no_share():
    model = new_model("gpt2", "toy", 256, 0, 16, width=16)
    model.blocks[0].neurons.register_forward_hook(lambda _, inputs, a: torch.full_like(a, 0.3))
    share, _ = share_explained(model, corpus(n=900, n_documents=9))
    assert share[0].isnan().all() and not share[1].isnan().any()
