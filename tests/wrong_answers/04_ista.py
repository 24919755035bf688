"""Wrong answers to the exercises of chapter 4: what a check says -> a function with that mistake."""

import torch
import torch.nn.functional as F
from wrong_answers.experiments import WRONG_EXPERIMENTS


def say(**changed):
    """The right predictions but for one."""
    right = {"longer_step": "same", "longer_tokens": "more", "dearer": "fewer"}
    right |= {"both": "same", "second_step": "more", "disguised": "same"}
    return lambda: right | changed


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


WRONG = {
    "4.A": {
        "longer_step: .* η stands in front": say(longer_step="more"),
        "longer_tokens: .* more correlations exceed it": say(longer_tokens="same"),
        "dearer: .* fewer correlations": say(dearer="same"),
        "both: .* relative to the tokens": say(both="more"),
        "second_step: .* inhibition has two signs": say(second_step="fewer"),
        "disguised: .* all codes are halved": say(disguised="fewer"),
        'should return "more", "fewer" or "same"': say(dearer="down"),
    },
    "4.B": {
        "mended_ista: D and Dᵀ are exchanged: [^;]*$": exchanged(),
        "mended_ista: the threshold is λ instead of ηλ: [^;]*$": iterate(price=lambda eta, lam: lam),
        "mended_ista: the code is not clamped at zero: [^;]*$": iterate(shrink=F.softshrink),
        "exchanged: .*; and the threshold is λ [^;]*$": exchanged(price=lambda eta, lam: lam),
        "exchanged: .*; and the code is not clamped": exchanged(shrink=F.softshrink),
        "mended_ista: the threshold is λ .*; and the code is not": iterate(
            shrink=F.softshrink, price=lambda eta, lam: lam
        ),
        "exchanged: .*; and the threshold .*; and the code": exchanged(shrink=F.softshrink, price=lambda eta, lam: lam),
        "it starts from the tokens": iterate(start=lambda z, D: z),
        "what exceeds the threshold is kept whole": iterate(shrink=hard),
        "there is no threshold, only a ReLU": iterate(price=lambda eta, lam: 0.0),
        "only the last step has a threshold": price_at_the_end,
    },
    "4.C": {
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
