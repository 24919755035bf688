"""Model and data on different devices, and a device without float64, such as Apple's MPS.

There is none here, so one is pretended: tensors that are computed on the CPU but say that they are elsewhere. What a
real device refuses is refused: an operation on tensors of two devices, float64, and to be read as a NumPy array. It is
called "meta", the one device that every PyTorch can name without a driver.
Where there is a real accelerator, the same tests run there too.
"""

import sys
import textwrap

import numpy as np
import pytest
import torch
from many_processes import launch
from test_sae import random_sae, some_tokens, talkative
from test_sae_training import config, recipe
from test_steering import shaken
from test_training import VOCAB, corpus
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cratelab as cl
from cratelab import devices
from cratelab.coding_rate import coding_rate_gradient
from cratelab.devices import all_finite, best_device, exact, exact_sum, single
from cratelab.interpret.concepts import Concepts
from cratelab.interpret.ground_truth import match_concepts
from cratelab.interpret.records import collect_records
from cratelab.layerwise import layer_statistics
from cratelab.losses import document_log_probs, next_token_loss, validation_loss
from cratelab.sae import cross_entropy, evaluate_sae, splice, train_saes
from cratelab.steering import (
    Edit,
    atoms,
    control_tokens,
    direct_effect,
    draw_live,
    frontier,
    full_effect,
    generate_when_set,
    most_raised,
    neuron_maxima,
    steer,
    steered_logits,
    token_counts,
)

PRETENDED = "meta"
WIDE = torch.float64, torch.complex64, torch.complex128


class Elsewhere(Tensor):
    """A tensor of the pretended device; `held` has its numbers."""

    is_meta = False  # to be loaded as any other

    @staticmethod
    def __new__(cls, held: Tensor):
        where = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=PRETENDED)
        return Tensor._make_wrapper_subclass(cls, held.shape, **where)

    def __init__(self, held: Tensor):
        if held.dtype in WIDE:
            raise TypeError(f"the pretended device has no {held.dtype}")
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self) -> list:
        return self.held.tolist()

    def numpy(self, **options):
        raise TypeError("can't convert a tensor of the pretended device to numpy: use Tensor.cpu() first")


class Pretending(TorchDispatchMode):
    """Inside, "meta" is a device that computes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Making(TorchFunctionMode):
    """Makes tensors of lists there, which a dispatch mode does not see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        asked = (kwargs or {}).pop("device", None) if function in (torch.tensor, torch.as_tensor) else None
        if function is torch.as_tensor and isinstance(args[0], Elsewhere) and asked is None:
            return args[0].to((kwargs or {}).get("dtype"))  # where it is
        made = function(*args, **kwargs or {})
        return made if asked is None else made.to(asked)


def compute(function, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    asked = kwargs.get("device")
    stays_there = bool(there) if asked is None else torch.device(asked).type == PRETENDED
    if there and function not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
        if isinstance(args[0], Elsewhere) and function.name().startswith("aten::index"):
            here = [tensor for tensor in here if tensor.is_floating_point()]  # indices may be on the CPU
        if here:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found two")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held_args, held_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    result = function(*held_args, **held_kwargs)

    def back(leaf):
        if not isinstance(leaf, Tensor) or not stays_there:
            return leaf
        return there[id(leaf)] if id(leaf) in there else Elsewhere(leaf)  # changed in place: the same object

    return tree_map(back, result)


@pytest.fixture(params=["pretended", "real"])
def device(request, monkeypatch):
    """Where models are, while data is on the CPU."""
    with torch.device("cpu"):
        if request.param == "real":
            if best_device().type == "cpu":
                pytest.skip("there is no accelerator here")
            yield best_device()
            return
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", (*devices.WITHOUT_FLOAT64, PRETENDED))
        is_enabled = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: kind != PRETENDED and is_enabled("cpu"))
        optimizer = sys.modules["torch.optim.optimizer"]
        monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", PRETENDED])
        generator = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda where: generator("cpu"))
        with Making(), Pretending():
            yield torch.device(PRETENDED)


def pair(device: torch.device, kind=cl.Gpt2, make=shaken) -> tuple[cl.LanguageModel, cl.LanguageModel]:
    """The same model on the CPU and on the device."""
    return make(kind).cpu(), make(kind).to(device)


def close(found, expected, tolerance: float = 1e-4):
    """Equal up to rounding, wherever they are; also NumPy arrays and numbers."""
    found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


# What is pretended


def test_the_pretended_device_refuses_what_a_real_one_does(device):
    if device.type != PRETENDED:
        pytest.skip("a real one")
    x = torch.arange(4.0).to(device)
    assert x.device.type == PRETENDED and (2 * x).device.type == PRETENDED and (2 * x).cpu().tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([3, 1])].cpu().tolist() == [3, 1] and float(x.sum()) == 6
    for mixed in (lambda: x + torch.ones(4), lambda: torch.ones(4, 4) @ x, lambda: torch.ones(4)[x.long()]):
        with pytest.raises(RuntimeError, match="two"):
            mixed()
    for wide in (
        x.double,
        lambda: x.sum(dtype=torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=device),
    ):
        with pytest.raises(TypeError, match=r"has no torch\.float64"):
            wide()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    weight = torch.nn.Parameter(x.clone())
    (weight * weight).sum().backward()
    close(weight.grad, 2 * x)


def test_double_precision_is_had_where_there_is_some(device):
    x = torch.rand(3, 4)
    assert exact(x.to(device)).dtype == torch.float64 and exact(x.to(device)).cpu().equal(x.double())
    close(exact_sum(x.to(device), 1), x.double().sum(1), 1e-15)
    assert exact_sum(x.to(device)).dtype == torch.float64
    if device.type == PRETENDED:
        assert exact(x.to(device)).device.type == exact_sum(x.to(device)).device.type == "cpu"
    assert single(x.half()).dtype == torch.float32 and single(x.double()).dtype == torch.float64


def test_weights_cast_to_integers_are_refused_by_name():
    def as_integers(module):
        for parameter in module.requires_grad_(False).parameters():
            parameter.data = parameter.data.int()
        return module

    text, tokens, neurons = corpus(100), some_tokens(2, 3), torch.tensor([1])
    cast, sae = as_integers(shaken(cl.Gpt2)), random_sae()
    for use in (
        lambda: full_effect(cast, tokens, 0, neurons, torch.ones(1)),
        lambda: direct_effect(cast, 0, neurons),
        lambda: neuron_maxima(cast, text),
        lambda: layer_statistics(cast, [tokens]),
        lambda: steer(cast, layer=0, neuron=1, value=1.0).__enter__(),
        lambda: splice(cast, {0: sae}).__enter__(),
        lambda: evaluate_sae(cast, text, {0: sae}),
        lambda: cross_entropy(cast, text),
        lambda: train_saes(cast, text, text, config(), recipe=recipe()),
        lambda: splice(shaken(cl.Gpt2), {0: as_integers(random_sae())}).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"weights must be floating point; .* of (Gpt2|Sae) are not"):
            use()


# Rates, losses


def test_rates_and_their_gradients_come_back_to_where_the_tokens_are(device):
    z, U = torch.randn(3, 10, 8), torch.randn(4, 8, 2)
    for scale in 1.0, 1e6:
        for rate in cl.coding_rate, coding_rate_gradient:
            found = rate(scale * z.to(device))
            assert found.device.type == device.type and found.dtype == torch.float32
            close(found, rate(scale * z))
        for rate in cl.subspace_rate, cl.subspace_rate_gradient, cl.rate_reduction, cl.sparse_rate_reduction:
            found = rate(scale * z.to(device), U.to(device))
            assert found.device.type == device.type and found.dtype == torch.float32
            close(found, rate(scale * z, U), 1e-3)
    moved = z.to(device).requires_grad_()
    cl.coding_rate(moved).sum().backward()
    close(moved.grad, coding_rate_gradient(z))


@pytest.mark.parametrize("kind", [cl.Crate, cl.Gpt2])
def test_losses_are_those_of_the_cpu(device, kind):
    here, there = pair(device, kind)
    windows, text = some_tokens(5, 8), corpus(200)
    close(next_token_loss(there, windows), next_token_loss(here, windows))
    close(validation_loss(there, windows, 2), validation_loss(here, windows, 2))
    close(document_log_probs(there, text), document_log_probs(here, text))


def test_prompts_on_the_cpu_are_continued(device):
    here, there = pair(device)
    prompts = some_tokens(2, 4)
    assert there.generate(prompts, 5, temperature=0).cpu().equal(here.generate(prompts, 5, temperature=0))
    sampled = there.generate(prompts, 8, seed=3, top_k=4, stop=2)
    assert sampled.device.type == device.type and ((sampled.cpu() >= 0) & (sampled.cpu() < VOCAB)).all()


@pytest.mark.parametrize("kind, lasso_steps", [(cl.Crate, 5), (cl.Gpt2, 0)])
def test_layers_are_measured(device, kind, lasso_steps):
    here, there = pair(device, kind)
    batches = [some_tokens(3, 9), some_tokens(2, 9)]
    found, expected = (layer_statistics(model, batches, lasso_steps=lasso_steps) for model in (there, here))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.device.type == "cpu" and values.dtype == torch.float64
        close(values, expected[name], 1e-3)


# Neurons


def test_records_and_matches_are_those_of_the_cpu(device):
    here, there = pair(device)
    text, concepts = corpus(300), Concepts(list("abc"), torch.rand(300, 3) < 0.3)
    given = dict(window=6, n_top=3, n_random=2, n_active=4)
    found, expected = (collect_records(model, text, **given) for model in (there, here))
    for name in "mean", "variance", "density", "maximum":
        values = getattr(found, name)
        assert values.device.type == "cpu" and values.dtype == torch.float64
        close(values, getattr(expected, name))
    close(found.top.strength, expected.top.strength)
    found, expected = (match_concepts(model, text, concepts) for model in (there, here))
    close(found.purity, expected.purity)
    close(found.base_rate, expected.base_rate)


# Steering


@pytest.mark.parametrize("kind", [cl.Crate, cl.Gpt2])
def test_neurons_are_edited_and_their_effects_found(device, kind):
    here, there = pair(device, kind)
    tokens, neurons, values = some_tokens(3, 5), torch.tensor([4, 33, 60]), torch.tensor([1.0, 2.0, 0.5])
    for where in "all", "last", torch.rand(3, 5) < 0.5:
        edit = Edit(0, neurons, values, where=where)
        with steer(here, edit), steer(there, edit), torch.no_grad():
            close(there(tokens.to(device)), here(tokens))
    for measured in atoms, direct_effect:
        close(measured(there, 1, neurons), measured(here, 1, neurons))
    found = full_effect(there, tokens, 0, neurons, values, "add", batch=2)
    assert found.device.type == "cpu" and found.dtype == torch.float64
    close(found, full_effect(here, tokens, 0, neurons, values, "add", batch=2))
    logits = [
        torch.cat([part.cpu() for _, part in steered_logits(model, tokens, 0, neurons, values[None])], 1)
        for model in (there, here)
    ]
    close(*logits)
    for found, expected in zip(neuron_maxima(there, corpus()), neuron_maxima(here, corpus()), strict=True):
        close(found, expected)
    greedy = dict(n_new=4, temperature=0)
    found, expected = (generate_when_set(model, tokens, 0, neurons, values, **greedy) for model in (there, here))
    assert found.cpu().equal(expected)


@pytest.mark.parametrize("sae", [False, True])
@pytest.mark.parametrize("on_the_cpu", [False, True])
def test_the_frontier_is_that_of_the_cpu(device, sae, on_the_cpu):
    """With neurons, maxima and targets where the model is, or on the CPU, or some of either."""
    here, there = pair(device)
    contexts, text, arm = some_tokens(4, 6), corpus(), {1: random_sae()} if sae else {}
    with splice(here, arm):
        maxima = neuron_maxima(here, text)[1]
    neurons = draw_live(maxima, 5)
    effects = torch.randn(5, VOCAB)
    targets = most_raised(effects, 3, VOCAB)
    controls = control_tokens(targets, token_counts(text, VOCAB), n_bins=3)
    given = contexts, 1, neurons, maxima[neurons], targets, controls
    expected = frontier(here, *given, within=lambda: splice(here, arm))
    moved = given if on_the_cpu else (contexts, 1, neurons, given[3].to(device), targets.to(device), controls)
    found = frontier(there, *moved, within=lambda: splice(there, arm))
    for name in "lift", "control_lift", "off_target", "loss_penalty", "kl_penalty":
        close(getattr(found, name), getattr(expected, name), 1e-3)
    assert found.lift.device.type == "cpu" and found.mean_cost(0.01).shape == (5,)


def test_targets_and_controls_are_chosen_where_the_effects_are(device):
    effects, counts = torch.randn(4, VOCAB), torch.randint(100, (VOCAB,))
    targets = most_raised(effects.to(device), 3, VOCAB)
    assert targets.cpu().equal(most_raised(effects, 3, VOCAB))
    assert control_tokens(targets, counts, 3).cpu().equal(control_tokens(targets.cpu(), counts, 3))
    maxima = torch.rand(50) - 0.3
    assert draw_live(maxima.to(device), 9).cpu().equal(draw_live(maxima, 9))


# Auto-encoders


@pytest.mark.parametrize("moved", [False, True])
def test_auto_encoders_are_spliced_and_scored(device, moved):
    here, there = pair(device, make=talkative)
    tokens, text = some_tokens(), corpus(150)
    saes = {0: random_sae(), 1: random_sae(kind="jumprelu")}
    with splice(here, saes, error_term=True), torch.no_grad():
        expected = here(tokens)
    scores = evaluate_sae(here, text, saes)
    priced = cross_entropy(here, text)
    if moved:
        saes = {layer: sae.to(device) for layer, sae in saes.items()}
    with splice(there, saes, error_term=True), torch.no_grad():
        close(there(tokens.to(device)), expected)
    assert {sae.b_dec.device.type for sae in saes.values()} == {device.type if moved else "cpu"}
    for layer, found in evaluate_sae(there, text, saes).items():
        for name, value in vars(scores[layer]).items():
            close(getattr(found, name), value, 1e-2)
        assert found.density.device.type == "cpu" and len(found.histogram()) == 2
    close(cross_entropy(there, text), priced)


@pytest.mark.parametrize("kind", ["relu", "batchtopk"])
def test_auto_encoders_are_trained_where_the_model_is(device, kind, tmp_path):
    there = talkative().to(device)
    plan = recipe(max_tokens=600, evaluations=2, resample_at=(0.3,))
    found = train_saes(there, corpus(), corpus(100), config(kind), None, plan, tmp_path)
    assert found.saes[0].W_enc.device.type == device.type
    assert all(np.isfinite(row["loss"]) for row in found.curve)
    again = train_saes(there, corpus(), corpus(100), config(kind), None, plan, tmp_path)
    assert again.curve == found.curve and again.saes[1].W_enc.cpu().equal(found.saes[1].W_enc.cpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_found(dtype):
    assert all_finite(torch.full((300, 70), 60000.0, dtype=dtype)) and all_finite(torch.zeros(0, dtype=dtype))
    for wrong in torch.inf, -torch.inf, torch.nan:
        numbers = torch.ones(30, 7, dtype=dtype)
        numbers[3, 5] = wrong
        assert not all_finite(numbers)
    assert not all_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))


@pytest.mark.parametrize("start", ["devices.processes()", "training.train(model, text, text, recipe(steps=1))"])
def test_processes_leave_their_group_before_the_interpreter_ends(start):
    """Gloo's threads must not outlive it (torch 2.13): one in some thirty processes then aborts at its end."""
    script = f"""
        import atexit, sys, torch
        tell = sys.stdout.write  # whole lines, which two processes do not tear apart
        atexit.register(lambda: tell(f"left {{not torch.distributed.is_initialized()}}\\n"))  # called last
        from test_training import corpus, new_model, recipe
        from cratelab import devices, training
        model, text = new_model(), corpus()
        {start}
        tell(f"joined {{torch.distributed.get_world_size()}}\\n")
    """
    done = launch(2, textwrap.dedent(script))
    assert sorted(done.stdout.split("\n")) == ["", "joined 2", "joined 2", "left True", "left True"], done.stderr
