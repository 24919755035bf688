import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import cratelab as cl
from cratelab.mssa import attend

from conftest import subspaces, tokens


def attention_by_hand(z, U, causal, scale):
    """Every query, key and head in a Python loop, in the book's column convention."""
    Z, columns = z.T, []
    for i in range(Z.shape[1]):
        out = torch.zeros(Z.shape[0], dtype=z.dtype)
        for U_k in U:
            last = i + 1 if causal else Z.shape[1]
            weights = [math.exp(scale * float((U_k.T @ Z[:, i]) @ (U_k.T @ Z[:, j]))) for j in range(last)]
            head = sum(w / sum(weights) * (U_k.T @ Z[:, j]) for j, w in enumerate(weights))
            out = out + U_k @ head
        columns.append(out)
    return torch.stack(columns)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_mssa_is_attention_by_hand(causal, scale):
    z, U = tokens(n=6), subspaces(k=2, p=3)
    expected = attention_by_hand(z, U, causal, 3**-0.5 if scale is None else scale)
    assert_close(cl.mssa(z, U, causal, scale), expected)


def test_batches_attend_each_for_itself():
    z, U = tokens(2, 3), subspaces()
    expected = torch.stack([torch.stack([cl.mssa(matrix, U, True) for matrix in row]) for row in z])
    assert_close(cl.mssa(z, U, True), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_maps_are_the_weights_mssa_uses(causal, scale):
    z, U = tokens(2), subspaces()
    weights = cl.attention_map(z, U, causal, scale)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert_close(sum(weights[:, k] @ z @ U[k] @ U[k].T for k in range(len(U))), cl.mssa(z, U, causal, scale))
    if causal:
        assert (weights.triu(1) == 0).all()


def test_the_future_cannot_be_seen():
    z, U = tokens(n=6).requires_grad_(), subspaces()
    (gradient,) = torch.autograd.grad(cl.mssa(z, U, causal=True)[2].sum(), z)
    assert (gradient[3:] == 0).all() and (gradient[:3] != 0).any()


def test_compression_step_goes_down_the_autograd_slope():
    z, U = tokens(2).requires_grad_(), subspaces()
    (slope,) = torch.autograd.grad(cl.subspace_rate(z, U, 0.3).sum(), z)
    assert_close(cl.compression_step(z, U, step_size=0.7, eps=0.3), z - 0.7 * slope)


@pytest.mark.parametrize("n", [3, 20])
def test_neumann_series_converges_where_it_may_and_only_there(n):
    U = subspaces()
    small, large = tokens(n=n, scale=0.1), tokens(n=n, scale=3.0)

    def error(z, order):
        exact = cl.subspace_rate_gradient(z, U)
        return float((cl.neumann_gradient(z, U, order=order) - exact).norm() / exact.norm())

    errors = [error(small, order) for order in range(6)]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors))
    assert error(large, 5) > error(large, 1) > 1


@pytest.mark.parametrize("n", [2, 3, 20])  # p = 2: square, wide and long
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_neumann_order_is_the_taylor_order(n, order):
    """Halving the tokens divides the error by 2^(2·order + 3): the first power of z that the series leaves out."""
    z, U = tokens(n=n, scale=0.02), subspaces()
    errors = [
        (cl.neumann_gradient(z / half, U, 0.4, order) - cl.subspace_rate_gradient(z / half, U, 0.4)).norm()
        for half in (1, 2)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - (2 * order + 3)) < 0.1


@pytest.mark.parametrize("n", [2, 12])
def test_gram_attention_is_what_the_first_order_leaves_when_subspaces_fill_the_space(n):
    z, U = tokens(n=n), subspaces(orthogonal=True)  # Σ_k U_k U_kᵀ = I
    expected = z - 0.05 * cl.neumann_gradient(z, U, eps=0.7, order=1)
    assert_close(cl.attention_step(z, U, 0.05, eps=0.7, attention=cl.gram_attention), expected)


def test_without_mutual_orthogonality_the_attention_step_is_off():
    z = tokens(n=12, scale=0.3)
    U = subspaces(k=4, p=4)  # four 4-dimensional subspaces of an 8-dimensional space
    exact = z - 0.05 * cl.neumann_gradient(z, U, order=1)
    off = (cl.attention_step(z, U, 0.05, attention=cl.gram_attention) - exact).norm() / (exact - z).norm()
    assert off > 0.1


def test_softmax_step_has_the_factors_of_the_derivation():
    z, U = tokens(n=12), subspaces()
    s = 2 / (12 * 0.25)
    assert_close(cl.attention_step(z, U, 0.3), (1 - 0.3 * s) * z + 0.3 * s**2 * cl.mssa(z, U))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_leaves_no_softmax_is_refused(scale):
    for function in cl.mssa, cl.attention_map:
        with pytest.raises(ValueError, match="the scale of the inner products must be finite"):
            function(tokens(), subspaces(), scale=scale)


@pytest.mark.parametrize("causal", [False, True])
def test_layer_with_its_own_subspaces_as_output_is_the_function(causal):
    layer = cl.Mssa(8, 4, causal).double()
    with torch.no_grad():
        layer.output.weight.copy_(layer.projection.weight.T)
        layer.output.bias.zero_()
    z = tokens(2)
    assert_close(layer(z), cl.mssa(z, layer.U, causal))


@pytest.mark.parametrize("function", [cl.neumann_gradient, cl.compression_step])
def test_gradients_flow_through_the_steps(function):
    U = subspaces()
    assert torch.autograd.gradcheck(lambda z: function(z, U, 0.5), tokens(n=4).requires_grad_())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 100])  # at 100 the Gram matrix and the similarities overflow float16
@pytest.mark.parametrize(
    "function",
    [
        cl.mssa,
        cl.attention_map,
        lambda z, U: cl.neumann_gradient(z, U, 20.0, order=1),
        lambda z, U: cl.compression_step(z, U, 0.5),
        lambda z, U: cl.attention_step(z, U, 0.5, 20.0, cl.gram_attention),
        lambda z, U: cl.gram_attention(z / 100, U),
    ],
    ids=["mssa", "map", "Neumann", "exact", "step", "Gram"],
)
def test_tokens_of_half_precision_are_rounded_once(function, scale, half):
    z, U = tokens(2, n=30, scale=scale).to(half).requires_grad_(), subspaces().to(half)
    found, exact = function(z, U), function(z.detach().double(), U.double())
    assert found.dtype == half and found.isfinite().all()
    error = 2 * torch.finfo(half).eps
    assert_close(found.double(), exact, rtol=error, atol=error * float(exact.abs().max()))
    (gradient,) = torch.autograd.grad(found.float().sum(), z)
    assert gradient.dtype == half and gradient.isfinite().all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_step_sizes_and_precisions_that_are_no_numbers_are_refused(wrong):
    z, U = tokens(), subspaces()
    for step in cl.compression_step, cl.attention_step:
        with pytest.raises(ValueError, match=f"step size must be finite and at least 0; got {wrong}"):
            step(z, U, wrong)
    for call in cl.neumann_gradient, lambda z, U, eps: cl.attention_step(z, U, 0.1, eps):
        with pytest.raises(ValueError, match=r"eps.*from 1e-100 to 1e100"):
            call(z, U, wrong)


def test_errors_say_what_was_wrong():
    z, U = tokens(), subspaces()
    with pytest.raises(ValueError, match="order must be at least 0, a whole number; got -1"):
        cl.neumann_gradient(z, U, order=-1)
    with pytest.raises(ValueError, match=r"order must be at least 0, a whole number; got 1\.5"):
        cl.neumann_gradient(z, U, order=1.5)
    with pytest.raises(ValueError, match="precision eps must be positive"):
        cl.neumann_gradient(z, U, eps=0)
    with pytest.raises(ValueError, match="eps"):
        cl.attention_step(z, U, 0.1, eps=0)
    for n_heads in 3, 0:
        with pytest.raises(ValueError, match=f"width=8, n_heads={n_heads}"):
            cl.Mssa(8, n_heads)
    with pytest.raises(ValueError, match="width=0, n_heads=1"):
        cl.Mssa(0, 1)
    for function in cl.neumann_gradient, lambda z, U: cl.attention_step(z, U, 0.1):
        with pytest.raises(ValueError, match="none of them 0"):
            function(z[:0], U)
    for function in cl.mssa, cl.gram_attention, cl.attention_map, cl.neumann_gradient:
        with pytest.raises(ValueError, match=r"\(k, d, p\)"):
            function(z, subspaces(d=6))


def test_compiled_attention_is_the_fast_one():
    """The plain form, which `torch.func` needs, keeps all pairs of tokens for the backward pass."""
    calls = []

    def record(graph, example):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    w = tokens(2, 4, n=6, d=3, dtype=torch.float32).requires_grad_()
    torch.compile(lambda w: attend(w, w, w, True), backend=record)(w)
    assert any("scaled_dot_product_attention" in call for call in calls)
    assert not any("sdpa_kernel" in call for call in calls)
