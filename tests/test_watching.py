"""How an answer is computed: the rules of exercises see what breaks them, and let other routes pass."""

import numpy as np
import pytest
import scipy.linalg
import torch

import cratelab as cl
from cratelab.checks import coding_rate, watching
from cratelab.checks.grading import CheckFailed, random

SHORT, LONG = (random(200, 4, seed=1),), (random(400, 4, seed=2),)
named = cl.soft_threshold


def by_grad(z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(z.sum() ** 2, z)[0]


def by_backward(z):
    z = z.clone().requires_grad_()
    (z.sum() ** 2).backward()
    return z.grad


def squared(z):
    return z.sum() ** 2


def one_by_one(z):
    return torch.stack([row * 2 for row in z])


def row_by_row(z):
    return torch.stack([z @ row for row in z]).sum(0)


def pair_by_pair(z):
    total = 0.0
    for a in z.tolist()[::20]:
        for b in z.tolist()[::20]:
            total += a[0] * b[0]
    return total


def bisected(z):
    low, high = 0.0, 1.0
    for _ in range(50):
        low, high = low, (low + high) / 2
    return low


@pytest.mark.parametrize(
    ("rule", "broken", "kept", "said"),
    [
        (
            watching.no_automatic_differentiation(SHORT),
            [
                by_grad,
                by_backward,
                torch.func.grad(squared),
                torch.func.jacrev(squared),
                lambda z: torch.func.jvp(squared, (z,), (z,)),
                lambda z: torch.autograd.functional.jacobian(squared, z),
            ],
            [squared, torch.no_grad()(squared), lambda z: torch.vmap(squared)(z), lambda z: np.linalg.norm(z)],
            "uses automatic differentiation: derive",
        ),
        (
            watching.no_library(SHORT),
            [lambda z: cl.soft_threshold(z, 0.1), lambda z: named(z, 0.1), lambda z: cl.coding_rate(z)],
            [squared, lambda z: torch.relu(z)],
            "but calls cratelab's (soft_threshold|coding_rate): here it is yours",
        ),
        (
            watching.no_library(SHORT, "coding_rate", why="no"),
            [lambda z: cl.coding_rate(z)],
            [lambda z: cl.soft_threshold(z, 0.1)],
            "but calls cratelab's coding_rate: no",
        ),
        (
            watching.never_calls(SHORT, ["torch.linalg.inv", "torch.Tensor.__matmul__", "torch.Tensor.matmul"], "no"),
            [lambda z: torch.linalg.inv(z.T[:, :4]), lambda z: z @ z.T],
            [squared],
            "no",
        ),
        (
            watching.no_loop(SHORT, LONG, "tokens"),
            [one_by_one, row_by_row, pair_by_pair, lambda z: [x for x in z], lambda z: list(map(lambda x: x + 1, z))],
            [squared, lambda z: [z @ z.T for _ in range(3)]],
            "loops over tokens: where there are more, a line runs",
        ),
        (watching.no_search(SHORT), [bisected, one_by_one], [squared], "searches: a line runs"),
        (
            watching.linear_cost(SHORT, LONG, "no"),
            [
                lambda z: z @ z.T @ z,
                lambda z: (z[:, None] - z).square().sum(),
                lambda z: z.numpy() @ z.numpy().T,
                row_by_row,
                pair_by_pair,
            ],
            [squared, one_by_one, lambda z: z @ (z.T @ z), lambda z: z.numpy() @ (z.numpy().T @ z.numpy())],
            r"twice as many tokens (cost|need|run) .*: no$",
        ),
    ],
)
def test_a_broken_rule_is_seen_and_a_kept_one_passes(rule, broken, kept, said):
    for function in broken:
        with pytest.raises(CheckFailed, match=said):
            rule(_named(function))
    for function in kept:
        rule(_named(function))


def _named(function):
    if not hasattr(function, "__name__"):
        function.__name__ = "answer"
    return function


def test_answers_of_checks_are_no_answers():
    with pytest.raises(CheckFailed, match="but calls cratelab's _rate"):
        watching.no_library(SHORT)(lambda z: coding_rate._rate(z, 0.5))


def test_prints_of_a_watched_function_are_not_repeated(capsys):
    watching.watch(lambda z: print(len(z)), *SHORT)
    assert capsys.readouterr().out == ""


def test_square_matrices_that_one_solves_with_are_measured():
    z, gram = random(9, 3, seed=1), random(3, 3, seed=2)
    for small in (
        lambda z: torch.linalg.solve(gram, z.T),
        lambda z: np.linalg.solve(gram.numpy(), z.numpy().T),
        lambda z: torch.relu(z @ z.T),
    ):
        watching.solves_at_most(3, (z,), "no")(small)
    for large in (
        lambda z: torch.linalg.inv(z @ z.T + torch.eye(9)),
        lambda z: torch.cholesky_solve(z, torch.linalg.cholesky(z @ z.T + torch.eye(9))),
        lambda z: np.linalg.inv(z.numpy() @ z.numpy().T + np.eye(9)),
        lambda z: scipy.linalg.solve(z.numpy() @ z.numpy().T + np.eye(9), z.numpy()),
    ):
        with pytest.raises(CheckFailed, match=r"solves with a 9×9 matrix: no \(3×3 here\)"):
            watching.solves_at_most(3, (z,), "no")(large)


def test_a_gradient_is_the_slope():
    rule = watching.differentiable(lambda z: z.square(), SHORT, {0: "z"}, "no")
    rule(lambda z: z * z)
    for broken, said in [
        (torch.no_grad()(torch.square), "no gradient comes back to z: no"),
        (lambda z: z.detach().square(), "no gradient"),
        (lambda z: z.detach().numpy() ** 2, "no gradient"),
        (lambda z: z * z.detach(), "is not the slope, as if a part were detached"),
    ]:
        with pytest.raises(CheckFailed, match=said):
            rule(_named(broken))


def test_honour_is_said_where_nothing_is_seen():
    rule = watching.linear_cost(SHORT, LONG, "no")
    assert watching.HONOUR in rule(lambda z: z.numpy().sum())
    assert rule(lambda z: z.T @ z) == "Twice as many tokens cost 2.0 times as much."


def test_products_are_counted_by_all_routes():
    z, D = random(40, 8, seed=1), random(8, 32, seed=2)
    routes = [
        lambda z, D: z @ D,
        lambda z, D: torch.einsum("nd,dh->nh", z, D),
        lambda z, D: torch.stack([row @ D for row in z]),
        lambda z, D: torch.addmm(torch.zeros(32, dtype=z.dtype), z, D),
        lambda z, D: torch.nn.functional.linear(z, D.mT),
    ]
    assert [watching.watch(route, z, D).products for route in routes] == [40 * 8 * 32] * 5
    assert watching.watch(lambda z, D: (z[:, :, None] * D).sum(1), z, D).elements >= 2 * 40 * 8 * 32
