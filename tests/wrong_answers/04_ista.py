"""Wrong answers to the exercises of chapter 4: what a check says -> a function with that mistake."""

import torch
import torch.nn.functional as F
from wrong_answers.asked import at_first, hunts, on_request
from wrong_answers.experiments import WRONG_EXPERIMENTS

import cratelab as cl


def say(**changed):
    """The right predictions but for one."""
    right = {"longer_step": "same", "longer_tokens": "more", "dearer": "fewer"}
    right |= {"both": "same", "second_step": "more", "disguised": "same"}
    return on_request(lambda: right | changed)


def soft(x, threshold):
    return torch.relu(x - threshold)


def hard(x, threshold):
    return x * (x > threshold)


def iterate(start=lambda z, D: z.new_zeros(len(z), D.shape[1]), shrink=soft, price=lambda eta, lam: eta * lam):
    """ISTA from `start` with another threshold."""

    def function(z, D, step_size, lam, n_steps):
        code = start(z, D)
        for _ in range(n_steps):
            code = shrink(code + step_size * (z - code @ D.mT) @ D, price(step_size, lam))
        return code

    return function


def exchanged(**changes):
    return lambda z, D, *rest: iterate(**changes)(z, D.mT, *rest)


def price_at_the_end(z, D, step_size, lam, n_steps):
    before = iterate(price=lambda eta, lam: 0.0)(z, D, step_size, lam, n_steps - 1)
    return torch.relu(before + step_size * (z - before @ D.mT) @ D - step_size * lam)


def layer(steps=2, **changes):
    """The layer with another iteration."""
    return lambda z, D, step_size, lam: iterate(**changes)(z, D, step_size, lam, steps) @ D.mT


def second(step):
    """The layer with another second step: step(a₁, z, D, η, ηλ), before the ReLU."""

    def function(z, D, step_size, lam):
        first = torch.relu(step_size * z @ D - step_size * lam)
        return torch.relu(step(first, z, D, step_size, step_size * lam)) @ D.mT

    return function


def right_layer(z, D, step_size, lam):
    return layer()(z, D, step_size, lam)


def by_atoms(z, D, step_size, lam):
    first = torch.relu(step_size * z @ D - step_size * lam)
    return torch.relu(first + step_size * z @ D - step_size * first @ (D.mT @ D) - step_size * lam) @ D.mT


def counted():
    cl.ista(torch.randn(4, 3), torch.randn(3, 6), 0.1, 0.1, 2)
    return say()()


def entry_by_entry(x, theta, mu, cap):
    out = torch.empty_like(x)
    for i, value in enumerate(x.flatten().tolist()):
        out.view(-1)[i] = min(max((value - theta) / (1 + mu), 0.0), cap)
    return out


def searched(x, theta, mu, cap):
    low, high = torch.zeros_like(x), torch.full_like(x, cap)
    for _ in range(60):
        middle = (low + high) / 2
        rising = middle - x + theta + mu * middle > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return torch.where(high < 1e-12, 0.0, high)


def four_products(z, D, step_size, lam, first_of=lambda a: a, residual_of=lambda r: r):
    first = first_of(torch.relu(step_size * z @ D - step_size * lam))
    return torch.relu(first + step_size * residual_of(z - first @ D.mT) @ D - step_size * lam) @ D.mT


def of_numpy(z, D, step_size, lam):
    z, D = z.detach().numpy(), D.detach().numpy()
    first = (step_size * z @ D - step_size * lam).clip(0)
    return (first + step_size * (z - first @ D.T) @ D - step_size * lam).clip(0) @ D.T


def exposing():
    codes, turn, mirror = torch.rand(4, 3) + 0.2, torch.eye(3)[[1, 2, 0]], torch.eye(3)[[1, 0, 2]]
    inputs = [(codes @ turn.mT, turn, 1.0, 0.1, 3), (codes @ mirror, mirror, 0.5, 0.1, 3)]
    return [*inputs, (-codes @ mirror, mirror, 1.0, 0.1, 3)]


def narrowed(rounds, points):
    """The cheapest point of a grid, in ever smaller grids around it."""

    def function(x, theta, mu, cap):
        low, high = torch.zeros_like(x), torch.full_like(x, cap)
        for _ in range(rounds):
            a = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, points)
            cost = (a - x[..., None]) ** 2 / 2 + theta * a + mu * a**2 / 2
            best = cost.argmin(-1, keepdim=True)
            low = a.gather(-1, (best - 1).clamp(min=0))[..., 0]
            high = a.gather(-1, (best + 1).clamp(max=points - 1))[..., 0]
        return a.gather(-1, best)[..., 0]

    return function


WRONG = {
    "4.A": {
        "change_of_firing: 4 of 6 right. Go through": at_first(say(dearer="same", second_step="fewer")),
        "longer_step: .* η stands in front": say(longer_step="more"),
        "longer_tokens: .* more correlations exceed it": say(longer_tokens="same"),
        "dearer: .* fewer correlations": say(dearer="same"),
        "both: .* relative to the tokens": say(both="more"),
        "second_step: .* inhibition has two signs": say(second_step="fewer"),
        "disguised: .* all codes are halved": say(disguised="fewer"),
        'should return "more", "fewer" or "same" .*; dearer is a str': say(dearer="down"),
        'should return "more", "fewer" or "same" .*; both is None': say(both=None),
        "is right, but calls cratelab's ista: predict": counted,
    },
    "4.B": {
        **hunts(exposing, (torch.eye(3) - 0.5, torch.arange(9.0).reshape(3, 3).sin(), 0.2, 0.1, 3)),
        "mended_ista: D and Dᵀ are exchanged$": exchanged(),
        "mended_ista: the threshold is λ instead of ηλ$": iterate(price=lambda eta, lam: lam),
        "mended_ista: the code is not clamped at zero$": iterate(shrink=F.softshrink),
        "exchanged; and the threshold is λ [^;]*$": exchanged(price=lambda eta, lam: lam),
        "exchanged; and the code is not clamped": exchanged(shrink=F.softshrink),
        "mended_ista: the threshold is λ .*; and the code is not": iterate(
            shrink=F.softshrink, price=lambda eta, lam: lam
        ),
        "exchanged; and the threshold .*; and the code": exchanged(shrink=F.softshrink, price=lambda eta, lam: lam),
        "is right, but calls cratelab's ista: ": lambda *case: cl.ista(*case),
        "is right, but calls cratelab's soft_threshold": iterate(shrink=lambda x, t: cl.soft_threshold(x, t)),
        "right elsewhere, but .*as many steps as it is asked for": lambda z, D, eta, lam, n_steps: iterate()(
            z, D, eta, lam, max(n_steps, 2)
        ),
        "right elsewhere, but .*tokens may be zero, one, or tiny": lambda z, D, eta, lam, n_steps: iterate()(
            z, D, eta, max(lam, 1e-2), n_steps
        ),
        "it starts from the tokens": iterate(start=lambda z, D: z),
        "what exceeds the threshold is kept whole": iterate(shrink=hard),
        "there is no threshold, only a ReLU": iterate(price=lambda eta, lam: 0.0),
        "only the last step has a threshold": price_at_the_end,
    },
    "4.C": {
        "is right to .* only, as a search would be: a closed form": narrowed(3, 200),
        "but searches: a line runs 13 times": narrowed(12, 20),
        "the threshold comes after the division": lambda x, theta, mu, cap: (x / (1 + mu) - theta).clamp(0, cap),
        "not clamped at zero": lambda x, theta, mu, cap: ((x - theta) / (1 + mu)).clamp(max=cap),
        "two-sided": lambda x, theta, mu, cap: (F.softshrink(x, theta) / (1 + mu)).clamp(-cap, cap),
        "and capped above only": lambda x, theta, mu, cap: (F.softshrink(x, theta) / (1 + mu)).clamp(max=cap),
        "the squared price shifts": lambda x, theta, mu, cap: (F.relu(x - theta) - mu).clamp(0, cap),
        "the cap is missing": lambda x, theta, mu, cap: F.relu(x - theta) / (1 + mu),
        "x is capped": lambda x, theta, mu, cap: F.relu(x.clamp(max=cap) - theta) / (1 + mu),
        "capped before the division": lambda x, theta, mu, cap: (x - theta).clamp(0, cap) / (1 + mu),
        "the squared price has no effect": lambda x, theta, mu, cap: (x - theta).clamp(0, cap),
        "twice the squared price": lambda x, theta, mu, cap: ((x - theta) / (1 + 2 * mu)).clamp(0, cap),
        "loops over entries": entry_by_entry,
        "searches: a line runs": searched,
        "right elsewhere, but .*x may have any shape": lambda x, theta, mu, cap: (
            ((x - theta) / (1 + mu)).clamp(0, cap) if mu else F.relu(x - theta)
        ),
        "raises .*Other cases are right, but: x may have any shape": lambda x, theta, mu, cap: torch.stack(
            [((row - theta) / (1 + mu)).clamp(0, cap) for row in x]
        ),
        "multiplied by 1 \\+ μ": lambda x, theta, mu, cap: ((x - theta) * (1 + mu)).clamp(0, cap),
        "the price θ a unit has no effect": lambda x, theta, mu, cap: (x / (1 + mu)).clamp(0, cap),
        "a hard threshold": lambda x, theta, mu, cap: (hard(x, theta) / (1 + mu)).clamp(0, cap),
        "the sign of θ": lambda x, theta, mu, cap: ((x + theta) / (1 + mu)).clamp(0, cap),
    },
    "4.D": {
        "the threshold is λ instead of ηλ": layer(price=lambda eta, lam: lam),
        "the code is not clamped at zero": layer(shrink=F.softshrink),
        "there is no threshold, only a ReLU": layer(price=lambda eta, lam: 0.0),
        "only the last step has a threshold": lambda z, D, eta, lam: price_at_the_end(z, D, eta, lam, 2) @ D.mT,
        "the second step has no threshold": second(lambda a, z, D, eta, theta: a + eta * (z - a @ D.mT) @ D),
        "forgets the code of the first": second(lambda a, z, D, eta, theta: eta * (z - a @ D.mT) @ D - theta),
        "forgets the tokens": second(lambda a, z, D, eta, theta: a - eta * a @ D.mT @ D - theta),
        "nothing is explained away": second(lambda a, z, D, eta, theta: a + eta * z @ D - theta),
        "the sign of DᵀDA₁": second(lambda a, z, D, eta, theta: a + eta * (z + a @ D.mT) @ D - theta),
        "this is one step": layer(steps=1),
        "no gradient comes back to z: a layer is trained": torch.no_grad()(lambda *case: four_products(*case)),
        "no gradient comes back to z": of_numpy,
        "no gradient comes back to D": lambda z, D, *rest: four_products(z, D.detach(), *rest),
        "the gradient that comes back to z is not the slope": lambda *case: four_products(
            *case, first_of=lambda a: a.detach()
        ),
        "gradient that comes back to z is not the slope": lambda *case: four_products(
            *case, residual_of=lambda r: r.detach()
        ),
        "is right, but calls cratelab's ista": lambda z, D, eta, lam: cl.ista(z, D, eta, lam, 2) @ D.mT,
        "right elsewhere, but .*tokens may be zero, one, or tiny": lambda z, D, eta, lam: four_products(
            z, D, eta, max(lam, 1e-2)
        ),
        "these are three steps": layer(steps=3),
        "it starts from Dᵀz": layer(start=lambda z, D: z @ D),
        "the tokens are added": lambda z, *rest: z + right_layer(z, *rest),
        "what is left unexplained": lambda z, *rest: z - right_layer(z, *rest),
        r"returns the shape \(6, 12\)": lambda z, D, eta, lam: iterate()(z, D, eta, lam, 2),
        "costs as much as 5 products": right_layer,
        "needs no matrix DᵀD": by_atoms,
    },
    "4.E": WRONG_EXPERIMENTS,
}
