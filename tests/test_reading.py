import numpy as np
import pytest
import torch
from torch import nn

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.reading import check_layer, hooked, texts


def test_hooks_see_and_replace_what_a_module_gives_and_are_gone_afterwards():
    module, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    plain = module(x)
    module.register_forward_hook(lambda module, inputs, output: seen.append(("own", inputs[0], output)))
    hooks = (module, lambda m, inputs, output: 2 * output), (module, lambda m, inputs, output: output + 1)
    with hooked(*hooks):
        torch.testing.assert_close(module(x), 2 * plain + 1)
    with hooked(*hooks, prepend=True):
        torch.testing.assert_close(module(x), 2 * (plain + 1))
    torch.testing.assert_close(module(x), plain)
    assert all(torch.equal(inputs, x) for _, inputs, _ in seen)
    for (_, _, output), expected in zip(seen, (plain, 2 * (plain + 1), plain), strict=True):
        torch.testing.assert_close(output, expected)


def test_hooks_are_removed_whatever_happens():
    module = nn.Identity()
    with pytest.raises(ZeroDivisionError), hooked((module, lambda m, inputs, output: 1 / 0)):
        module(torch.zeros(1))
    with pytest.raises(AttributeError), hooked((module, lambda *_: None), ("no module", print)):
        pass
    assert not module._forward_hooks


def model_and_corpus() -> tuple[cl.Crate, TokenizedCorpus]:
    model = cl.Crate(cl.CrateConfig(vocab_size=9, context=5, n_layers=2, width=8, n_heads=2))
    document = np.repeat(np.arange(5), [3, 12, 1, 5, 2])
    return model, TokenizedCorpus.from_arrays(np.arange(23) % 9, document, list("abcde"), 9)


@pytest.mark.parametrize("n_tokens", [None, 14])
def test_every_token_is_read_once_and_sorting_reaches_as_far_ahead_as_asked(n_tokens):
    model, corpus = model_and_corpus()
    lengths = {}
    for ahead in 1, 2, None:
        read = list(texts(model, corpus, 2, n_tokens=n_tokens, ahead=ahead))
        pieces = [piece for text in read for piece in text.pieces]
        assert sorted(place for piece in pieces for place in range(*piece)) == list(range(n_tokens or 23))
        assert torch.equal(
            torch.cat([text.tokens[text.present] for text in read]),
            torch.from_numpy(np.concatenate([corpus[start:stop] for start, stop in pieces])).long(),
        )
        lengths[ahead] = [stop - start for start, stop in pieces]
    if n_tokens is None:
        assert lengths == {1: [3, 5, 5, 2, 1, 5, 2], 2: [5, 5, 3, 2, 5, 2, 1], None: [5, 5, 5, 3, 2, 2, 1]}


@pytest.mark.parametrize("layer", [-1, 2, 1.0, "0", None])
def test_a_layer_that_is_none_of_the_models_is_named(layer):
    model, _ = model_and_corpus()
    check_layer(model, np.int64(1))
    with pytest.raises(ValueError, match=rf"layers 0 to 1; got {layer}"):
        check_layer(model, layer)
