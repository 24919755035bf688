from dataclasses import replace

import pytest
import torch

import cratelab as cl
from cratelab import budget
from cratelab.budget import duration, estimate, measure_matmul_rate
from cratelab.recipe import Recipe


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(budget, "measure_matmul_rate", lambda device: 1e12)


@pytest.mark.parametrize(
    ("model", "products"),
    [(cl.Crate, 18), (cl.Gpt2, 12)],
)
def test_arithmetic_is_18_or_12_d_squared_multiply_adds_a_layer(model, products):
    """By hand: products of a forward pass, three times them with the backward pass, and attention's two."""
    d, n, v, layers = 64, 32, 128, 3
    config = model.config_class(n_layers=layers, n_heads=4, width=d, vocab_size=v, context=n)
    found = estimate(model, config, Recipe(steps=10, batch=4))
    by_hand = 3 * 2 * (layers * products * d**2 + v * d)
    scores = layers * 2 * 2 * n * d  # forward, without causality; the backward pass has 2 to 2.5 times as much
    # CRATE's backward pass makes one of its codes again
    recomputed = layers * 2 * 4 * d**2 if model is cl.Crate else 0
    assert by_hand + 3 * scores <= found.flops_per_token <= by_hand + 3.5 * scores + recomputed


def test_counts_parameters_tokens_and_memory():
    config = cl.CrateConfig.preset("1L")
    found = estimate(cl.Crate, config, Recipe(steps=100, batch=512, accumulate=8), processes=4)
    model = cl.Crate(config)
    assert found.parameters == model.count_parameters()
    assert found.state_bytes == 4 * 4 * found.parameters and found.windows == 16
    assert found.tokens == 100 * 512 * 1024
    assert found.memory_bytes == found.state_bytes + 16 * found.activation_bytes
    assert found.seconds == pytest.approx(found.tokens * found.flops_per_token / 0.4e12)
    logits = 1024 * 50_304 * 4
    assert logits < found.activation_bytes < 4 * logits


def test_saved_activations_are_those_of_the_real_pass():
    config = cl.Gpt2Config.preset("toy")
    found = estimate(cl.Gpt2, config, Recipe(steps=1, batch=1))
    model, sizes = cl.Gpt2(config), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(1, config.context + 1, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])
    assert loss.requires_grad
    assert found.activation_bytes == pytest.approx(sum(sizes.values()), rel=0.05)


def test_layers_are_counted_without_being_built():
    config, recipe = cl.CrateConfig.preset("toy"), Recipe(steps=1, batch=1)
    found = [estimate(cl.Crate, replace(config, n_layers=n), recipe) for n in (1, 3, 10**6)]
    assert found[1].parameters == cl.Crate(replace(config, n_layers=3)).count_parameters()
    for name in "parameters", "flops_per_token", "activation_bytes":
        one, three, million = (getattr(each, name) for each in found)
        assert million - one == pytest.approx((three - one) / 2 * (10**6 - 1))


def test_reads_as_a_table_with_units():
    text = str(estimate(cl.Crate, cl.CrateConfig.preset("B"), Recipe()))
    assert "parameters    81,934,848" in text and "GiB a process" in text
    assert (
        "tokens        314,572,800,000" in text
        and "time          about 29 years on one" in text
        and "1.00 TFLOP/s" in text
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "a second or two"),
        (2, "about 2 seconds"),
        (119, "about 119 seconds"),
        (120, "about 2 minutes"),
        (100 * 60, "about 100 minutes"),
        (36 * 3600, "about 36 hours"),
        (30 * 86400, "about 30 days"),
        (365 * 86400, "about 12 months"),
        (217_182.4 * 86400, "about 595 years"),
        (2e6 * 365.25 * 86400, "about 2,000,000 years"),
    ],
)
def test_durations_are_told_in_a_unit_that_one_can_picture(seconds, said):
    assert duration(seconds) == said


def test_measures_a_rate():
    assert 1e8 < measure_matmul_rate(torch.device("cpu"), size=128, seconds=0.02) < 1e15


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 0), (1, 3), (2, 8)])
def test_a_batch_that_cannot_be_divided_is_refused(accumulate, processes):
    config = cl.CrateConfig.preset("toy")
    with pytest.raises(ValueError, match=f"multiple of processes × accumulate; got 8, {processes} and {accumulate}"):
        estimate(cl.Crate, config, Recipe(batch=8, accumulate=accumulate), processes)
