"""The layer's own gradient and what it saves, against autograd through `cl.ista` and the official block."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import cratelab as cl

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
def test_torch_compile_takes_the_layer_whole():
    module, z = layer(), tokens(2).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 10, 8, dtype=torch.float64)
    for way in torch.autocast(z.device.type, enabled=False), torch.autocast(z.device.type, torch.bfloat16):
        with way:
            results = [torch.autograd.grad(call(z), (z, module.weight), grad) for call in (module, compiled)]
        assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert_close(compiled(z), module(z))


def test_second_derivatives_and_codes_changed_in_place_are_refused():
    module, z = layer(), tokens().requires_grad_()
    (slope,) = torch.autograd.grad(module.encode(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    code = module.encode(z)
    code[..., 0] = 1  # as a careless intervention would: the mask of the backward pass is gone
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        code.sum().backward()
