"""nnsight reads, edits and differentiates by the neurons, of cratelab's own class and of the exported model."""

import pytest
import torch
from nnsight import LanguageModel, NNsight

from cratelab.reading import hooked

TEXT = "Return the number of"


@pytest.fixture(scope="module")
def exported_lm(exported):
    return LanguageModel(str(exported), trust_remote_code=True, dispatch=True)


@pytest.fixture(scope="module")
def tokens(exported_lm):
    return exported_lm.tokenizer(TEXT, return_tensors="pt").input_ids


def by_hooks(crate, tokens, silent=False):
    """What nnsight should find: the last layer's code, the logits, and the first layer's gradient of the largest."""
    seen = []

    def note(module, inputs, neurons):
        seen.append(neurons)
        neurons.retain_grad()

    def silence(module, inputs, neurons):
        return torch.zeros_like(neurons)

    sites = [(block.neurons, note) for block in crate.blocks] + [(crate.blocks[1].neurons, silence)] * silent
    with hooked(*sites):
        logits = crate(tokens)
    logits[0, -1].max().backward()
    return seen[1], logits, seen[0].grad


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_what_the_page_prints(crate, printed, tokens):
    names = printed("nnsight")
    code, logits, gradient = by_hooks(crate, tokens)
    close(names["code"], code)
    close(names["logits"], logits)
    close(names["gradient"], gradient)
    assert gradient.abs().sum() > 1
    _, silenced, _ = by_hooks(crate, tokens[:, :1], silent=True)
    close(names["silenced"][:, -1:], silenced)
    assert (silenced - crate(tokens[:, :1])).abs().max() > 1

    text = crate.generate(tokens, 10, temperature=0)
    assert torch.cat(names["codes"], 1).shape == (1, text.shape[1] - 1, crate.config.n_neurons)
    code, _, _ = by_hooks(crate, text[:, :-1])
    close(torch.cat(names["codes"], 1), code)


def test_our_own_class(crate, tokens):
    model = NNsight(crate)
    code, logits, gradient = by_hooks(crate, tokens)
    _, silenced, _ = by_hooks(crate, tokens, silent=True)
    with model.trace(tokens):
        early, read = model.blocks[0].neurons.output, model.blocks[1].neurons.output.save()
        plain = model.output.save()
        with model.output[0, -1].max().backward():
            slope = early.grad.save()
    with model.trace(tokens):
        model.blocks[1].neurons.output[:] = 0
        edited = model.output.save()
    for ours, theirs in (code, read), (logits, plain), (gradient, slope), (silenced, edited):
        close(theirs, ours)
    with pytest.raises(NotImplementedError, match="batching multiple invokes"), model.trace() as tracer:
        with tracer.invoke(tokens):
            model.output.save()
        with tracer.invoke(tokens):
            model.output.save()


def test_an_edit_of_every_step_of_generation(crate, exported_lm, tokens):
    with exported_lm.generate(TEXT, max_new_tokens=10) as tracer:
        for _ in tracer.iter[:10]:  # with [:] what follows would not run
            exported_lm.model.blocks[1].neurons.output[:] *= -1
        edited = tracer.result.save()
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: -neurons)):
        expected = crate.generate(tokens, 10, temperature=0)
    assert edited.equal(expected) and not edited.equal(crate.generate(tokens, 10, temperature=0))
