import pytest
import torch
from test_training import weights

import cratelab as cl
from cratelab.models import new_model, untrained


def test_models_hold_the_vocabulary_padded_and_depend_on_the_seed_alone():
    torch.manual_seed(5)
    a = new_model("crate", "toy", 19, seed=1)
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    b = new_model("crate", "toy", 19, seed=1)
    assert torch.random.get_rng_state().equal(state)
    assert isinstance(a, cl.Crate) and isinstance(new_model("gpt2", "toy", 19, 0), cl.Gpt2)
    assert a.config.vocab_size == 64
    assert all(tensor.equal(weights(b)[name]) for name, tensor in weights(a).items())
    other = new_model("crate", "toy", 19, seed=2)
    assert not other.token_embedding.weight.equal(a.token_embedding.weight)
    assert new_model("crate", "toy", 19, 0, context=9).config.context == 9
    with pytest.raises(ValueError, match="no model 'bert'; there are crate, gpt2"):
        new_model("bert", "toy", 19, 0)


def test_an_untrained_model_is_as_the_given_one_was_before_training():
    model = new_model("gpt2", "toy", 19, 3, context=9, top_k=5).double()
    given = {name: tensor.clone() for name, tensor in weights(model).items()}
    state = torch.random.get_rng_state()
    same, other = untrained(model, 3), untrained(model)
    assert torch.random.get_rng_state().equal(state)
    assert same.config == other.config == model.config and not same.training
    assert all(tensor.equal(given[name]) for name, tensor in weights(same).items())
    assert not other.token_embedding.weight.equal(model.token_embedding.weight)
    assert all(tensor.equal(given[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 0.0, True, None, "0"])
def test_a_seed_that_torch_would_take_for_another_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be from 0 to 4294967295, a whole number; got"):
        new_model("crate", "toy", 19, seed)
    with pytest.raises(ValueError, match="seed must be from 0 to 4294967295, a whole number; got"):
        untrained(new_model("crate", "toy", 19, 0), seed)


@pytest.mark.parametrize(
    ("context", "message"),
    [(0, "context must be at least 1"), (10**9, "this machine has"), (10**12, "context must be at least 1 and below")],
)
def test_a_context_out_of_range_is_refused(context, message):
    with pytest.raises(ValueError, match=message):
        new_model("crate", "toy", 19, 0, context)
