"""The layer's own gradient and what it saves, against autograd through `cl.ista` and the official block."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import cratelab as cl
from cratelab.ista_gradient import _Encode

from conftest import tokens


def layer(n_steps=2, dtype=torch.float64, **options):
    return cl.Ista(8, n_steps=n_steps, step_size=0.2, lam=0.3, **options).to(dtype)


def gradients(encode, z, weight, grad):
    """Code, ∂z and ∂weight; None where a gradient is not asked for."""
    z, weight = (tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in (z, weight))
    code = encode(z, weight)
    code.backward(grad)
    return code.detach(), z.grad, weight.grad


def by_layer(module):
    """`encode` as a function of the weight."""
    encoder = torch.nn.Module()
    encoder.layer, encoder.forward = module, module.encode
    return lambda z, weight: torch.func.functional_call(encoder, {"layer.weight": weight}, (z,))


def by_autograd(module):
    return lambda z, weight: cl.ista(z, weight.mT, module.step_size, module.lam, module.n_steps)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_gradient_by_finite_differences(n_steps, batch):
    module, z = layer(n_steps, expansion=2), tokens(*batch, n=3).requires_grad_()
    assert torch.autograd.gradcheck(by_layer(module), (z, module.weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 6])
def test_code_and_gradients_are_those_of_plain_ista(n_steps, dtype, tolerance):
    module, z = layer(n_steps, dtype), tokens(2, 3, dtype=dtype).requires_grad_()
    grad = torch.randn(2, 3, 10, 32, dtype=dtype)
    ours, plain = (gradients(way(module), z, module.weight, grad) for way in (by_layer, by_autograd))
    assert 0.05 < float((ours[0] > 0).double().mean()) < 0.95
    assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_tokens_may_be_strided_single_or_none():
    module, grad = layer(), torch.randn(10, 3, 32, dtype=torch.float64)
    z = tokens(3).transpose(0, 1).requires_grad_()
    assert_close(*(gradients(way(module), z, module.weight, grad) for way in (by_layer, by_autograd)))
    assert_close(module.encode(z[0, 0]), by_autograd(module)(z[0, 0], module.weight))
    for shape in (0, 8), (2, 0, 3, 8):
        code = module(torch.zeros(shape, dtype=torch.float64, requires_grad=True))
        code.sum().backward()
        assert code.shape == shape


@pytest.mark.parametrize("frozen", ["z", "weight"])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_what_is_frozen_costs_no_products(n_steps, frozen):
    module, z = layer(n_steps), tokens(2).requires_grad_(frozen != "z")
    module.weight.requires_grad_(frozen != "weight")
    grad = torch.randn(2, 10, 32, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        ours = gradients(by_layer(module), z, module.weight, grad)
    plain = gradients(by_autograd(module), z, module.weight, grad)
    assert (ours[1] is None) == (frozen == "z") and (ours[2] is None) == (frozen == "weight")
    assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    forward, recomputed, chain, of_weight = 2 * n_steps - 1, n_steps - 1, 2 * n_steps - 1, 2 * n_steps - 1
    products = forward + recomputed + (chain - 1 + of_weight if frozen == "z" else chain)
    assert counter.get_total_flops() == products * (2 * 2 * 10 * 8 * 32)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_products_of_a_training_step(n_steps):
    """2T forward with the decoding, twice that backward, and T − 1 to recompute codes."""
    torch.compiler.reset()
    module, z = layer(n_steps), tokens(2).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        module(z).sum().backward()
    assert counter.get_total_flops() == (7 * n_steps - 1) * (2 * 2 * 10 * 8 * 32)


def test_without_gradients_the_code_is_the_same_and_nothing_is_saved():
    module, z = layer(3), tokens(2)
    code = module.encode(z)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        unrecorded = module.encode(z)
    assert code.requires_grad and not unrecorded.requires_grad
    assert_close(unrecorded, code, rtol=1e-12, atol=1e-12)
    assert_close(code, by_autograd(module)(z, module.weight), rtol=1e-12, atol=1e-12)


def test_autocast_computes_in_bf16_close_to_float32():
    module, z = cl.Ista(64), F.layer_norm(torch.randn(4, 50, 64), (64,)).requires_grad_()
    device = z.device.type
    grad = torch.randn(4, 50, 256)
    exact = gradients(by_layer(module), z, module.weight, grad)
    with torch.autocast(device, torch.bfloat16):
        assert module(z).dtype == module.encode(z.bfloat16()).dtype == torch.bfloat16
        assert module.double()(z.double()).dtype == torch.float64  # which autocast leaves alone
        module.float()
        cast = gradients(by_layer(module), z, module.weight, grad.bfloat16())
        plain = gradients(by_autograd(module), z, module.weight, grad.bfloat16())
    assert cast[1].dtype == cast[2].dtype == torch.float32
    for a, b, c in zip(cast, exact, plain, strict=True):
        error, of_autograd = float((a.float() - b).norm() / b.norm()), float((c.float() - b).norm() / b.norm())
        assert error < 0.08 and error < 1.5 * of_autograd
    code = module.encode(z)
    with torch.autocast(device, torch.bfloat16):  # a backward pass under it, of a forward pass that was not
        assert_close(torch.autograd.grad(code, z, grad)[0], exact[1])


def saved_bytes(forward, module):
    """Bytes kept for the backward pass, each storage once, without parameters."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(size for address, size in held.items() if address not in parameters)


def official(block, x):
    """The official block written plainly, with five products in ISTA."""
    x = x + block.attention(block.attention_norm(x))
    y, D = block.ista_norm(x), block.ista.D
    code = F.relu(0.1 * (y @ D) - 0.01)
    code = F.relu(code + 0.1 * (y @ D - (code @ D.mT) @ D) - 0.01)
    return code @ D.mT


def test_a_block_saves_at_most_four_fifths_of_the_official_one():
    block, x = cl.Crate(cl.CrateConfig.preset("1L")).blocks[0], torch.randn(2, 256, 128, requires_grad=True)
    assert_close(block(x), official(block, x), rtol=1e-4, atol=1e-4)
    ours, theirs = saved_bytes(lambda: block(x), block), saved_bytes(lambda: official(block, x), block)
    assert ours <= 0.8 * theirs
    encoding = saved_bytes(lambda: block.ista.encode(x), block)
    assert encoding == (1 + 1 + 4) * x.numel() * x.element_size()  # z, one residual, the last code


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_torch_compile_takes_the_layer_whole(n_steps):
    torch.compiler.reset()
    module, z = layer(n_steps), tokens(2).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 10, 8, dtype=torch.float64)
    for way in torch.autocast(z.device.type, enabled=False), torch.autocast(z.device.type, torch.bfloat16):
        with way:
            results = [torch.autograd.grad(call(z), (z, module.weight), grad) for call in (module, compiled)]
        assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert_close(compiled(z), module(z))


def test_compiled_it_is_plain_ista(monkeypatch):
    """The backward pass by hand is not for compilers: torch 2.11 made a wrong gradient of it, without a word."""
    module, z = layer(), tokens(2)
    expected = module(z)
    monkeypatch.setattr(_Encode, "apply", lambda *arguments: pytest.fail("the pass by hand was compiled"))
    torch.compiler.reset()
    assert_close(torch.compile(module, backend="eager")(z), expected)


def test_codes_changed_in_place_are_refused():
    z = tokens().requires_grad_()
    for create_graph in False, True:
        code = layer().encode(z)
        code[..., 0] = 1  # as a careless intervention would: the mask of the backward pass is gone
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(code.sum(), z, create_graph=create_graph)


@pytest.mark.parametrize("frozen", [None, "z", "weight"])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_second_derivatives_by_finite_differences_and_by_autograd(n_steps, frozen):
    module, z = layer(n_steps, expansion=2), tokens(2, n=3).requires_grad_(frozen != "z")
    module.weight.requires_grad_(frozen != "weight")
    assert torch.autograd.gradgradcheck(by_layer(module), (z, module.weight))

    def penalty_gradients(encode):
        """Of the squared norm of a gradient, as in a gradient penalty."""
        inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in (z, module.weight)]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        slopes = torch.autograd.grad(encode(*inputs).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted)

    ours, plain = (penalty_gradients(way(module)) for way in (by_layer, by_autograd))
    assert all(gradient.any() for gradient in ours)
    assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def every_transform(encode, z, weight):
    """What `torch.func`, forward-mode AD and batched backward passes find for one scalar of the code."""

    def value(weight, z):
        return encode(z, weight).square().sum()

    slope = torch.func.grad(value)
    vector = torch.ones_like(z[0])
    primal, tangent = torch.func.jvp(value, (weight, z), (torch.ones_like(weight), torch.ones_like(z)))
    with forward_ad.dual_level():
        _, of_dual = forward_ad.unpack_dual(value(weight, forward_ad.make_dual(z, torch.ones_like(z))))
    z = z.detach().requires_grad_()
    code, picks = encode(z, weight)[0], torch.randn(4, *z.shape[1:-1], len(weight), dtype=z.dtype)
    return {
        "grad": slope(weight, z),
        "grad of grad": torch.func.grad(lambda weight: slope(weight, z).square().sum())(weight),
        "a gradient a sample": torch.func.vmap(slope, (None, 0))(weight, z),
        "a weight a sample": torch.func.vmap(slope)(torch.stack([weight, 2 * weight]), z),
        "jacrev": torch.func.jacrev(value)(weight, z),
        "jacfwd": torch.func.jacfwd(lambda z: value(weight, z))(z),
        "hessian": torch.func.hessian(lambda first: value(weight, first))(z[0]),
        "jvp": (primal, tangent),
        "vjp": torch.func.vjp(lambda first: encode(first, weight), vector)[1](torch.ones_like(encode(vector, weight))),
        "dual": of_dual,
        "batched backward": torch.autograd.grad(code, z, picks, is_grads_batched=True)[0],
        "functional hessian": torch.autograd.functional.hessian(lambda first: value(weight, first), z[0].detach()),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")  # forward-mode AD's own
def test_every_transform_finds_what_it_finds_for_plain_ista():
    module, z = layer(expansion=2), tokens(2, n=3)
    weight = module.weight.detach().clone()
    ours, plain = [], []
    for found, way in (ours, by_layer(module)), (plain, by_autograd(module)):
        torch.manual_seed(1)
        found.append(every_transform(way, z, weight))
    assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_asking_for_more_leaves_the_usual_pass_as_it_is():
    """A first-order pass saves, multiplies and yields the same after a transform has been used."""
    module, z = layer(3), tokens(2).requires_grad_()
    grad = torch.randn(2, 10, 32, dtype=torch.float64)
    before, saved = gradients(by_layer(module), z, module.weight, grad), saved_bytes(lambda: module.encode(z), module)
    torch.func.grad(lambda z: module.encode(z).sum())(z)
    after = gradients(by_layer(module), z, module.weight, grad)
    assert all(map(torch.equal, before, after))
    assert saved == saved_bytes(lambda: module.encode(z), module) == (1 + 2 + 4) * z.numel() * z.element_size()


def test_shapes_alone_pass_through_on_the_meta_device_and_as_fake_tensors():
    with torch.device("meta"):
        module, z = cl.Ista(8), torch.empty(2, 5, 8, requires_grad=True)
    code = module.encode(z)
    code.sum().backward()
    assert code.is_meta and code.shape == (2, 5, 32) and module.weight.grad.shape == (32, 8) and z.grad.shape == z.shape
    with FakeTensorMode():
        module, z = cl.Ista(8), torch.empty(2, 5, 8, requires_grad=True)
        module(z).sum().backward()
        assert module.weight.grad.shape == (32, 8) and z.grad.shape == z.shape


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_takes_the_layer(strict):
    module, z = layer(), tokens(2)
    assert_close(torch.export.export(module, (z,), strict=strict).module()(z), module(z))
