import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import VOCAB, corpus, new_model
from torch import nn

import cratelab as cl
from cratelab.reading import watch_neurons
from cratelab.sae import Sae, SaeConfig, splice
from cratelab.steering import Edit, atoms, direct_effect, effects, full_effect, neuron_maxima, steer, steered_logits

H = 64  # neurons of a layer of `new_model`
BY = "set", "add", "scale"


def shaken(kind, **overrides):
    model = new_model(kind, n_layers=2, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=[cl.Crate, cl.Gpt2])
def model(request):
    return shaken(request.param)


def some_tokens(b: int = 3, n: int = 7):
    return torch.randint(VOCAB, (b, n))


class ByHand(nn.Module):
    """Stands in the place of a site and edits by plain loops."""

    def __init__(self, neurons, values, by, places):
        super().__init__()
        self.neurons, self.values, self.by, self.places = neurons, values, by, places

    def forward(self, code):
        code = code.clone()
        for b, n in self.places(code):
            for neuron, value in zip(self.neurons, self.values, strict=True):
                old = float(code[b, n, neuron])
                code[b, n, neuron] = {"set": value, "add": old + value, "scale": old * value}[self.by]
        return code


def everywhere(code):
    return [(b, n) for b in range(code.shape[0]) for n in range(code.shape[1])]


def at_the_end(code):
    return [(b, code.shape[1] - 1) for b in range(code.shape[0])]


@torch.no_grad()
def by_hand(model, tokens, layer, neurons, values, by="set", places=everywhere):
    changed = copy.deepcopy(model)
    changed.blocks[layer].neurons = ByHand(neurons, values, by, places)
    return changed(tokens)


@torch.no_grad()
def steered(model, tokens, *edits, **edit):
    with steer(model, *edits, **edit):
        return model(tokens)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_edit_is_what_a_loop_makes_of_it(data):
    model = shaken(data.draw(st.sampled_from([cl.Crate, cl.Gpt2])))
    b, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    layer, by = data.draw(st.integers(0, 1)), data.draw(st.sampled_from(BY))
    neurons = data.draw(st.lists(st.integers(0, H - 1), min_size=1, max_size=5, unique=True))
    values = data.draw(st.lists(st.floats(-3, 3, width=32), min_size=len(neurons), max_size=len(neurons)))
    mask = torch.rand(b, n) < 0.5
    where, places = data.draw(
        st.sampled_from([("all", everywhere), ("last", at_the_end), (mask, lambda code: mask.nonzero().tolist())])
    )
    tokens = some_tokens(b, n)
    found = steered(model, tokens, layer=layer, neuron=neurons, by=by, value=values, where=where)
    torch.testing.assert_close(found, by_hand(model, tokens, layer, neurons, values, by, places))


def test_one_value_serves_all_neurons_and_an_integer_is_one_neuron(model):
    tokens = some_tokens()
    both = steered(model, tokens, layer=0, neuron=[3, 9], value=2)
    torch.testing.assert_close(both, by_hand(model, tokens, 0, [3, 9], [2.0, 2.0]))
    one = steered(model, tokens, Edit(layer=1, neuron=3, value=2.0, by="add"))
    torch.testing.assert_close(one, by_hand(model, tokens, 1, [3], [2.0], "add"))


def test_activations_are_edited_in_a_copy_through_which_gradients_flow():
    code = torch.rand(2, 3, 8, requires_grad=True)
    before = code.detach().clone()
    edited = Edit(layer=0, neuron=[1, 4], by="scale", value=3.0)(code)
    edited.sum().backward()
    assert code.detach().equal(before) and not edited.equal(before)
    assert code.grad[..., [1, 4]].eq(3).all() and code.grad[..., [0, 2, 3, 5, 6, 7]].eq(1).all()


def test_several_edits_and_nested_blocks_act_in_their_order(model):
    tokens = some_tokens()
    first, second = Edit(layer=1, neuron=5, value=1.0), Edit(layer=1, neuron=5, value=3.0, by="scale")
    below = Edit(layer=0, neuron=2, value=4.0)
    listed = steered(model, tokens, below, first, second)
    with steer(model, below, first):
        nested = steered(model, tokens, second)
    changed = copy.deepcopy(model)
    changed.blocks[0].neurons = ByHand([2], [4.0], "set", everywhere)
    changed.blocks[1].neurons = ByHand([5], [3.0], "set", everywhere)
    with torch.no_grad():
        expected = changed(tokens)
    torch.testing.assert_close(listed, expected)
    assert nested.equal(listed)
    assert not steered(model, tokens, below, second, first).allclose(expected, atol=1e-3)


@pytest.mark.parametrize("nothing", [dict(by="add", value=0.0), dict(by="scale", value=1.0)])
def test_to_edit_nothing_changes_no_bit(model, nothing):
    tokens = some_tokens()
    with torch.no_grad():
        clean = model(tokens)
    assert steered(model, tokens, layer=0, neuron=list(range(H)), **nothing).equal(clean)


def test_the_model_is_as_before_whatever_happens(model):
    tokens = some_tokens()
    with torch.no_grad():
        clean = model(tokens)
    with pytest.raises(KeyError), steer(model, layer=0, neuron=1, value=9.0):
        raise KeyError
    with pytest.raises(ValueError, match="has neurons 0 to 63; got"):
        steered(model, tokens, Edit(layer=0, neuron=1, value=9.0), Edit(layer=1, neuron=64, value=9.0))
    with torch.no_grad():
        assert model(tokens).equal(clean)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dict(layer=2), "layers 0 to 1; got 2"),
        (dict(layer=-1), "layers 0 to 1; got -1"),
        (dict(neuron=64), r"layer 0 has neurons 0 to 63; got \[64\]"),
        (dict(neuron=[3, -1]), r"got \[3, -1\]"),
        (dict(neuron=[3, 3]), "several different ones"),
        (dict(neuron=[]), "one integer or several"),
        (dict(neuron=1.5), "one integer or several"),
        (dict(neuron=torch.tensor([True, False])), "one integer or several"),
        (dict(layer="0"), "layers 0 to 1; got 0"),
        (dict(by="multiply"), 'by must be "set", "add" or "scale"; got \'multiply\''),
        (dict(value=float("nan")), "value must be finite"),
        (dict(value=float("inf")), "value must be finite"),
        (dict(value=1j), "value must be finite"),
        (dict(value=None), "neuron and value must be numbers"),
        (dict(value=10**30), "neuron and value must be numbers"),
        (dict(neuron="a"), "neuron and value must be numbers"),
        (dict(layer=1.0), r"layers 0 to 1; got 1\.0"),
        (dict(value=1e39), "value must be finite"),
        (dict(value=1e38), r"value must be finite, at most 1e\+15 in size.*got 1e\+38|9.99"),
        (dict(value=-1e30, by="add"), r"at most 1e\+15 in size"),
        (dict(value=1e20, by="scale"), r"at most 1e\+15 in size"),
        (dict(neuron=[1, 2], value=[1.0, 2.0, 3.0]), "one for each of 2 neurons"),
        (dict(where="first"), 'where must be "all", "last" or'),
        (dict(where=torch.ones(2, 3)), r"mask of bool; got 'torch.float32 \(2, 3\)'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(edit, message):
    model, runs = shaken(cl.Crate), []
    model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=message), steer(model, **dict(layer=0, neuron=1, value=1.0) | edit):
        runs.append(1)
    assert not runs


def test_a_mask_of_another_shape_is_refused_also_with_the_cache(model):
    mask = torch.ones(2, 4, dtype=torch.bool)
    with steer(model, layer=0, neuron=1, value=1.0, where=mask):
        model(some_tokens(2, 4))
        with pytest.raises(ValueError, match=r"steer \(2, 4\) tokens, but the model is given \(2, 5\)"):
            model(some_tokens(2, 5))
        with pytest.raises(ValueError, match=r'\(2, 1\): take where="all" or "last" to generate'):
            model.generate(some_tokens(2, 4), n_new=2)
        with steer(model, layer=0, neuron=2, value=1.0):  # entered although the mask fits no single token
            model(some_tokens(2, 4))


@pytest.mark.parametrize("where", ["all", "last"])
def test_generation_with_the_cache_is_a_loop_over_full_passes(model, where):
    prompt = some_tokens(2, 3)
    with steer(model, layer=0, neuron=[4, 11], value=[2.0, 5.0], where=where):
        generated = model.generate(prompt, n_new=6, temperature=0)
    tokens = prompt
    for _ in range(6):
        n = tokens.shape[1]
        first = 0 if where == "all" else 2  # with the cache: the prompt's last position and each new token
        places = [(b, i) for b in range(2) for i in range(first, n)]
        logits = by_hand(model, tokens, 0, [4, 11], [2.0, 5.0], places=lambda code, places=places: places)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert generated.equal(tokens)
    assert not generated.equal(model.generate(prompt, n_new=6, temperature=0))


def a_sae(model, m: int = 96, seed: int = 5):
    torch.manual_seed(seed)
    sae = Sae(SaeConfig(d_in=H, expansion=m / H))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sae


def test_features_of_a_spliced_auto_encoder_are_steered_as_neurons_are(model):
    sae, tokens = a_sae(model), some_tokens()
    changed = copy.deepcopy(model)

    class Features(nn.Module):
        def forward(self, x):
            code = sae.encode(x)
            code[..., 90] = 3.0
            return sae.decode(code)

    changed.blocks[0].neurons = Features()
    with torch.no_grad():
        expected = changed(tokens)
        with splice(model, {0: sae}):
            torch.testing.assert_close(steered(model, tokens, layer=0, neuron=90, value=3.0), expected)
            with pytest.raises(ValueError, match="has neurons 0 to 95; got"):
                steered(model, tokens, layer=0, neuron=96, value=3.0)
            with pytest.raises(ValueError, match="has neurons 0 to 63; got"):
                steered(model, tokens, layer=1, neuron=64, value=3.0)


def test_maxima_are_those_over_all_activations(model):
    text = corpus()
    seen = [[], []]
    for read, layers in watch_neurons(model, text, batch=3):
        for each, activations in zip(seen, layers, strict=True):
            each.append(activations[read.present])
    for found, each in zip(neuron_maxima(model, text), seen, strict=True):  # read in other batches: rounding differs
        torch.testing.assert_close(found, torch.cat(each).max(0).values, atol=1e-5, rtol=1e-5)


def test_atoms_are_columns_of_the_output_matrix(model):
    neurons = torch.tensor([3, 60, 8])
    for layer, block in enumerate(model.blocks):
        matrix = block.ista.D if isinstance(model, cl.Crate) else block.mlp_out.weight
        torch.testing.assert_close(atoms(model, layer, neurons), matrix[:, neurons].mT.detach(), atol=1e-5, rtol=1e-5)
        sae = a_sae(model)
        for error_term in False, True:
            with splice(model, {layer: sae}, error_term):
                expected = (matrix @ sae.W_dec.mT)[:, neurons].mT.detach()
                torch.testing.assert_close(atoms(model, layer, neurons), expected, atol=1e-5, rtol=1e-5)


class FrozenNorm(nn.Module):
    def __init__(self, norm, sigma):
        super().__init__()
        self.norm, self.sigma = norm, sigma

    def forward(self, x):
        y = (x - x.mean(-1, keepdim=True)) / self.sigma * self.norm.weight
        return y if self.norm.bias is None else y + self.norm.bias


def test_direct_effect_is_the_jacobian_of_the_last_layer_with_the_norm_frozen(model):
    model, sigma = model.double(), 1.7
    direct = direct_effect(model, 1, torch.arange(H))
    model.norm = FrozenNorm(model.norm, sigma)
    held = {}
    site = model.blocks[1].neurons
    site.register_forward_hook(lambda m, i, code: held.update(code=code.detach().requires_grad_()) or held["code"])
    logits = model(some_tokens(1, 4))[0, -1]
    rows = [torch.autograd.grad(logit, held["code"], retain_graph=True)[0][0, -1] for logit in logits]
    torch.testing.assert_close(direct, sigma * torch.stack(rows, 1))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_many_neurons_at_once_are_each_as_under_steer(data):
    model = shaken(data.draw(st.sampled_from([cl.Crate, cl.Gpt2])))
    layer, s, m = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    tokens = some_tokens(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)))
    kind = data.draw(st.sampled_from(["own", "spliced", "error term"]))
    neurons, values, by = torch.randperm(H)[:m], 3 * torch.rand(s, m), data.draw(st.sampled_from(BY))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(effects, "CHUNK", data.draw(st.sampled_from([1, 2000, 10**6])))
        with splice(model, {layer: a_sae(model)} if kind != "own" else {}, kind == "error term"):
            found = torch.cat([part for _, part in steered_logits(model, tokens, layer, neurons, values, by)], 1)
            assert found.shape == (s, m, *tokens.shape, VOCAB)
            for i in range(s):
                for j in range(m):
                    expected = steered(model, tokens, layer=layer, neuron=neurons[j], value=values[i, j], by=by)
                    torch.testing.assert_close(found[i, j], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("by", BY)
def test_full_effect_is_the_mean_change_of_log_probabilities(model, by):
    contexts, neurons, values = some_tokens(5, 6), torch.tensor([7, 40]), torch.tensor([2.0, 0.5])
    found = full_effect(model, contexts, 0, neurons, values, by, batch=2)
    with torch.no_grad():
        clean = F.log_softmax(model(contexts).double(), -1)
        for row, neuron, value in zip(found, neurons, values, strict=True):
            changed = F.log_softmax(by_hand(model, contexts, 0, [int(neuron)], [float(value)], by).double(), -1)
            torch.testing.assert_close(row, (changed - clean).mean((0, 1)).cpu(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("value", [6e4, 7e4, 1e9, 3e38])
def test_values_beyond_a_models_precision_are_an_error_and_never_nonsense(by, value):
    model, tokens, neurons, runs = shaken(cl.Crate).half(), some_tokens(), torch.arange(8), []
    model.register_forward_hook(lambda *_: runs.append(1))
    if value < 65504:  # float16's largest
        try:
            assert full_effect(model, tokens, 0, neurons, torch.full((8,), value), by).isfinite().all()
        except ValueError as error:
            assert "finite" in str(error)
        return
    with pytest.raises(ValueError, match="finite"):
        full_effect(model, tokens, 0, neurons, torch.full((8,), value), by)
    with pytest.raises(ValueError, match="finite"), steer(model, layer=0, neuron=neurons, value=value, by=by):
        runs.append(1)
    assert not runs


def test_an_output_that_overflows_is_named():
    model = shaken(cl.Crate).half()
    with torch.no_grad():
        model.blocks[0].ista.weight.fill_(2)
    with pytest.raises(ValueError, match=r"layer 0: after set 60000\.0 of neurons \[3\] its output is not finite in"):
        steered(model, some_tokens(), layer=0, neuron=3, value=6e4)


def test_a_product_that_overflows_is_named():
    code = torch.full((1, 2, 3), 5e4).half()
    with pytest.raises(ValueError, match=r"layer 4: scale 2\.0 makes of neurons \[1\] activations of inf in"):
        Edit(4, 1, 2.0, by="scale")(code)
    with pytest.raises(ValueError, match=r"activations of 4\.9984e\+17 in torch\.float32; 1e\+15 is"):
        Edit(4, 1, 1e13, by="scale")(code.float())


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", [cl.Crate, cl.Gpt2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.04)])
def test_models_of_every_precision_are_steered_alike(kind, dtype, tolerance, by):
    exact, rounded = shaken(kind), shaken(kind).to(dtype)
    tokens, neurons, values = some_tokens(), torch.tensor([7, 40, 3]), torch.tensor([2.0, 0.5, 1.0])
    close = dict(atol=tolerance, rtol=tolerance, check_dtype=False)
    for measured in atoms, direct_effect:
        found = measured(rounded, 1, neurons)
        assert found.dtype == dtype
        torch.testing.assert_close(found, measured(exact, 1, neurons), **close)
    found = full_effect(rounded, tokens, 0, neurons, values, by)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, full_effect(exact, tokens, 0, neurons, values, by), **close)
    found, expected = (
        torch.cat([part for _, part in steered_logits(model, tokens, 0, neurons, values[None], by)], 1)
        for model in (rounded, exact)
    )
    torch.testing.assert_close(found, expected, **close)
    for j in range(3):
        alone = steered(rounded, tokens, layer=0, neuron=neurons[j], value=values[j], by=by)
        torch.testing.assert_close(found[0, j], alone, **close)
    with splice(rounded, {0: a_sae(exact)}), splice(exact, {0: a_sae(exact)}):
        found, expected = (full_effect(model, tokens, 0, neurons, values, by) for model in (rounded, exact))
    torch.testing.assert_close(found, expected, **close)
    for found, expected in zip(neuron_maxima(rounded, corpus()), neuron_maxima(exact, corpus()), strict=True):
        torch.testing.assert_close(found, expected, **close)


NOTHING = torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(neurons=NOTHING, values=torch.zeros(0)), "m at least 1"),
        (dict(neurons=torch.tensor([1.0, 2.0])), "m at least 1"),
        (dict(neurons=[1, 2]), "a tensor"),
        (dict(neurons=torch.tensor([1, H])), "layer 0 has neurons 0 to 63"),
        (dict(layer=2), "layers 0 to 1; got 2"),
        (dict(layer=-1), "layers 0 to 1; got -1"),
        (dict(values=torch.ones(3)), "2 neurons need as many values"),
        (dict(values=torch.tensor([1.0, torch.nan])), "values must be finite"),
        (dict(values=torch.tensor([1.0, 1e38])), r"at most 1e\+15"),
        (dict(by="multiply"), "by must be"),
        (dict(contexts=torch.zeros(0, 4, dtype=torch.long)), r"contexts must be \(c, n\)"),
        (dict(contexts=torch.zeros(2, 0, dtype=torch.long)), r"contexts must be \(c, n\)"),
        (dict(contexts=torch.zeros(4, dtype=torch.long)), r"contexts must be \(c, n\)"),
        (dict(contexts=torch.full((2, 3), VOCAB)), f"integers from 0 to {VOCAB - 1}; got torch.int64, {VOCAB} to"),
        (dict(contexts=torch.full((2, 3), -1)), "got torch.int64, -1 to -1"),
        (dict(contexts=torch.zeros(2, 3)), "got torch.float32"),
        (dict(batch=0), "batch must be at least 1"),
    ],
)
def test_effects_that_cannot_be_measured_are_refused_before_anything_runs(change, message):
    model, runs = shaken(cl.Gpt2), []
    model.register_forward_hook(lambda *_: runs.append(1))
    usual = dict(contexts=some_tokens(), layer=0, neurons=torch.tensor([1, 2]), values=torch.ones(2))
    with pytest.raises(ValueError, match=message):
        full_effect(model, **usual | change)
    assert not runs


def test_maxima_of_no_text_or_of_a_damaged_model_are_refused():
    model = shaken(cl.Gpt2)
    for n_tokens in 0, -5, float("nan"), 1.5:
        with pytest.raises(ValueError, match=f"n_tokens must be at least 1, a whole number; got {n_tokens}"):
            neuron_maxima(model, corpus(), n_tokens)
    with torch.no_grad():
        model.blocks[1].mlp_in.weight[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1.*(not finite|NaN or infinite)"):
        neuron_maxima(model, corpus())


def test_a_damaged_model_is_not_blamed_on_the_values():
    model = shaken(cl.Crate)
    with torch.no_grad():
        model.blocks[0].attention.output.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1 .* before anything is edited: is the model damaged"):
        full_effect(model, some_tokens(), 1, torch.tensor([0, 3]), torch.ones(2))


def test_a_place_that_is_no_mask_is_named():
    with pytest.raises(ValueError, match='where must be "all", "last" or a'):
        Edit(0, 1, 1.0, where=np.ones((2, 3), bool))
