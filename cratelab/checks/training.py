"""Checks of the exercises of chapter 7: the reach of a schedule, gap and floor, AdamW, the arithmetic of a token."""

from collections.abc import Callable
from functools import cache, partial, wraps
from math import log

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cratelab as cl
from cratelab.checks import watching
from cratelab.checks.grading import CheckFailed, also, as_tensor, grade, predict, random, unmended
from cratelab.checks.hunting import NOT_NEGATIVE, POSITIVE, hunt, judge


def reach(function: Callable[[int, int, float, float], float]) -> None:
    """Exercise 7.A: the sum of all learning rates, against PyTorch's own schedulers, step by step."""

    @cache  # the mistakes ask for the same again
    def scheduled(steps: int, warmup: int, peak: float, final: float) -> tuple[Tensor, Tensor]:
        """The rates of the warm-up, and those of the descent."""
        schedulers = torch.optim.lr_scheduler
        optimizers = [torch.optim.SGD([torch.zeros(1, device="cpu", requires_grad=True)], lr=peak) for _ in range(2)]
        rising = schedulers.LinearLR(optimizers[0], start_factor=1 / warmup, total_iters=warmup - 1)
        falling = schedulers.CosineAnnealingLR(optimizers[1], T_max=steps - warmup, eta_min=final)
        rates: tuple[list, list] = [], []
        for optimizer, scheduler, n, into in zip(
            optimizers, (rising, falling), (warmup, steps - warmup), rates, strict=True
        ):
            for _ in range(n):
                into.append(scheduler.get_last_lr()[0])
                optimizer.step()
                scheduler.step()
        return tuple(torch.tensor(values, dtype=torch.float64, device="cpu") for values in rates)

    def total(steps: int, warmup: int, peak: float, final: float) -> float:
        return float(sum(rates.sum() for rates in scheduled(steps, warmup, peak, final)))

    cases = [(100, 10, 3e-3, 3e-4), (57, 20, 1.0, 0.25), (1000, 2, 6e-4, 0.0), (9, 8, 2.0, 0.5), (31, 3, 1e-3, 4e-3)]
    mistakes = {
        "the warm-up's first step has the rate η_max/t_w, not 0, and its last one the full rate": (
            lambda s, w, top, low: total(s, w, top, low) - top
        ),
        "the descent's mean is not quite the middle: it starts at the peak, and stops one step before the final rate": (
            lambda s, w, top, low: total(s, w, top, low) - (top - low) / 2
        ),
        "the warm-up's rates are 1, 2, …, t_w times η_max/t_w, which is not the area of a triangle: add them up": (
            lambda s, w, top, low: total(s, w, top, low) - top / 2
        ),
        "both sums are taken as areas under the curve: each differs from its area by half a step at the ends": (
            lambda s, w, top, low: total(s, w, top, low) - top / 2 - (top - low) / 2
        ),
        "one step too many: t runs to t_end − 1, and no step is taken with the final rate": (
            lambda s, w, top, low: total(s, w, top, low) + low
        ),
        "the warm-up is missing": lambda s, w, top, low: float(scheduled(s, w, top, low)[1].sum()),
        "the descent is missing": lambda s, w, top, low: float(scheduled(s, w, top, low)[0].sum()),
        "the warm-up is counted at the full rate": (
            lambda s, w, top, low: float(scheduled(s, w, top, low)[1].sum()) + w * top
        ),
        "the descent ends at the final rate, not at 0": lambda s, w, top, low: total(s, w, top, 0.0),
        "the descent has t_end − t_w steps, not t_end": lambda s, w, top, low: total(s + w, w, top, low),
        "this is the peak rate times the number of steps": lambda s, w, top, low: s * top,
    }
    # where the final rate is 0 some mistakes are right by chance; the other cases tell them
    rules = [watching.no_loop((60, 6, 1.0, 0.5), (240, 24, 1.0, 0.5), "steps"), _no_list_of_rates]
    grade(function, cases, total, "PyTorch's schedulers, added up step by step,", mistakes, rtol=1e-9, rules=rules)


def _no_list_of_rates(function: Callable) -> None:
    """A rule: nothing is made that is as long as the schedule."""
    seen = watching.watch(function, 200_000, 2_000, 1.0, 0.5)
    if max(seen.largest, seen.numpy) > 20_000:
        raise CheckFailed(
            f"{function.__name__} is right, but makes a list of the rates: a closed form takes no longer for more steps"
        )


def floor_and_gap(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 7.B: (floor, gap) in nats a token, against a walk from token to token."""

    cases = []
    for seed, lengths in enumerate([(7, 3, 12), (4, 9), (15, 2, 2, 6)], start=1):
        document = torch.cat([torch.full((n,), j, device="cpu") for j, n in enumerate(lengths)])
        log_p, log_q = (-random(len(document), seed=seed + i).abs() * 1.5 for i in (0, 50))
        place = torch.cat([torch.arange(n, device="cpu") for n in lengths])
        log_q[place > 7] = torch.nan
        log_p[place == 1] = 0  # certain, and yet it counts
        log_q[place == 2] = 0
        if seed == 1:
            log_q[place == 3] = -40  # a word that the model thought nearly impossible
        cases.append((log_p, log_q, document))
    # other numbers for the documents, with gaps and not rising; and a first token for which the model was not asked
    log_p, log_q, document = cases[0]
    log_q = log_q.clone()
    log_q[0] = torch.nan
    cases.append((log_p, log_q, torch.tensor([4, 9, 2], device="cpu")[document]))
    cases.append((*cases[2][:2], 3 * cases[2][2]))
    cases.append((*cases[1][:2], torch.zeros_like(cases[1][2])))  # one document: its last token is not before its first
    flip = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")
    mistakes = {
        "the first token of each document is counted: the model guessed it from the document before": _with_firsts,
        "the floor is over all tokens, the gap over some: take the same ones for both": _every_floor,
        "the floor is also over tokens for which the model was not asked: take the same ones for both": _unasked_floor,
        "the first token of each document is in the floor: take the same ones for both": _first_floor,
        "loss and floor are means over different tokens: subtract token by token": _of_losses,
        "documents are averaged first, so that a token of a short one counts more": _by_document,
        "the terms are weighted by p: the tokens were drawn from p, so that the plain mean is an expectation": (
            _weighted
        ),
        "floor and gap are weighted by p: the tokens were drawn from p, so that a plain mean is an expectation": (
            _weighted_both
        ),
        "the sign of the gap: log p is on average the larger": lambda *case: flip * _walk(*case),
        "the sign of the floor: it is a loss": lambda *case: -flip * _walk(*case),
        "tokens that do not count are in the denominator: divide by the number of those that do": (
            lambda p, q, document: _walk(p, q, document) * int((~q.isnan() & ~_firsts(document)).sum()) / len(p)
        ),
        "these are bits; nats were asked for": lambda *case: _walk(*case) / log(2),
        "the second number is the model's loss; its gap is what that has above the floor": (
            lambda *case: _walk(*case).cumsum(0)
        ),
    }
    grade(_without_nan(function), cases, _walk, "a walk from token to token", mistakes)


def _walk(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    floor, gap = _columns(log_p, log_q, document)
    return torch.stack([floor.mean(), gap.mean()])


def _firsts(document: Tensor) -> Tensor:
    return torch.tensor([i == 0 or document[i] != document[i - 1] for i in range(len(document))], device="cpu")


def _with_firsts(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    known = ~log_q.isnan()
    return torch.stack([-log_p[known].mean(), (log_p - log_q)[known].mean()])


def _every_floor(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    return torch.stack([-log_p.mean(), _walk(log_p, log_q, document)[1]])


def _unasked_floor(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    return torch.stack([-log_p[~_firsts(document)].mean(), _walk(log_p, log_q, document)[1]])


def _first_floor(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    return torch.stack([-log_p[~log_q.isnan()].mean(), _walk(log_p, log_q, document)[1]])


def _of_losses(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    floor, gap = _columns(log_p, log_q, document)
    return torch.stack([-log_p.mean(), (floor + gap).mean() + log_p.mean()])


def _by_document(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    parts = [_walk(*(x[document == j] for x in (log_p, log_q, document))) for j in document.unique()]
    return torch.stack(parts).mean(0)


def _weighted(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    floor, gap = _columns(log_p, log_q, document)
    return torch.stack([floor.mean(), ((-floor).exp() * gap).mean()])


def _weighted_both(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
    floor, gap = _columns(log_p, log_q, document)
    return torch.stack([((-floor).exp() * floor).mean(), ((-floor).exp() * gap).mean()])


BUGS = {
    "the averages are divided by 1 − β at every step, which is right for the first alone": {"correction": "once"},
    "the decay is still a part of the gradient, and divided by its size": {"coupled": True},
    "ε stands inside the root": {"inside": True},
}


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 7.C: (w, gradients, rates, betas, decay, eps) that expose the bugs of an AdamW."""
    needs = {"w": "n", "gradients": "steps n", "rates": _rates, "betas": _betas, "decay": NOT_NEGATIVE, "eps": POSITIVE}
    hunt(inputs, _unrolled, BUGS, needs, _no_rates, tell=tell)


def _rates(rates: object) -> Tensor | None:
    try:
        rates = as_tensor(rates)
    except Exception:  # whatever a library says of what is no array of real numbers
        return None
    return rates if rates.ndim == 1 and (rates > 0).all() and rates.isfinite().all() else None


def _betas(betas: object) -> tuple[float, float] | None:
    fits = isinstance(betas, (tuple, list)) and len(betas) == 2
    fits = fits and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas)
    return tuple(betas) if fits else None


def _no_rates(w: Tensor, gradients: Tensor, rates: Tensor, *_: object) -> str | None:
    return None if len(rates) == len(gradients) <= 100 else "a rate is needed for each step, and at most 100 steps"


def mended_adamw(
    function: Callable[[Tensor, Tensor, Tensor, tuple[float, float], float, float], Tensor],
    inputs: Callable[[], list[tuple]],
) -> None:
    """Exercise 7.C: weights after several steps of AdamW, against torch.optim.AdamW, after the hunt."""
    exposing(inputs, tell=False)

    def torch_adamw(w, gradients, rates, betas, decay, eps):
        parameter = torch.nn.Parameter(w.clone())
        optimizer = torch.optim.AdamW([parameter], betas=betas, weight_decay=decay, eps=eps)
        for gradient, rate in zip(gradients, rates, strict=True):
            optimizer.param_groups[0]["lr"] = float(rate)
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    cases = []
    for seed, (n, steps, betas, decay, eps) in enumerate(
        [(4, 6, (0.9, 0.95), 0.1, 1e-3), (3, 9, (0.8, 0.99), 0.5, 1e-2), (5, 4, (0.9, 0.999), 0.05, 1e-1)], start=1
    ):
        gradients = random(steps, n, seed=seed) * torch.logspace(-1, 1, n, dtype=torch.float64, device="cpu")
        gradients[:, 0] = gradients[2, 1:] = 0
        rates = 0.05 + 0.1 * torch.arange(steps, dtype=torch.float64, device="cpu").cos() ** 2
        cases.append((2 + random(n, seed=seed + 10), gradients, rates, betas, decay, eps))
    others = {
        "the averages are not corrected: they start from zero": {"correction": "none"},
        "the decay is not multiplied by the rate": {"by_rate": False},
        "the decay comes after the step: both are taken from the weights before": {"late": True},
        "t is one too large in 1 − βᵗ: the first step is t = 1": {"first": 1},
    }
    mistakes = unmended(_unrolled, BUGS) | {text: partial(_unrolled, **options) for text, options in others.items()}
    edges = [
        (
            random(1, seed=21),
            random(1, 1, seed=22),
            torch.ones(1, dtype=torch.float64, device="cpu"),
            (0.0, 0.0),
            0,
            1e-3,
        ),
        (random(4, seed=23) - 2, random(3, 4, seed=24), cases[0][2][:3], (0.0, 0.9), 0.2, 1e-8),
    ]
    rules = [
        watching.never_calls(cases[0], ["torch.optim.*"], "here the steps are yours to write"),
        also("there may be one step or no decay, β may be 0, and weights negative", *edges, oracle=torch_adamw),
    ]
    grade(function, cases, torch_adamw, "torch.optim.AdamW", mistakes, rules=rules)


def _unrolled(
    w,
    gradients,
    rates,
    betas,
    decay,
    eps,
    correction="power",
    coupled=False,
    inside=False,
    by_rate=True,
    first=0,
    late=False,
):
    """AdamW with the running averages written out as weighted sums, and with mistakes."""
    w = w.clone()
    history: list[Tensor] = []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        history.append(gradient + decay * w if coupled else gradient)
        averages = []
        for beta, power in zip(betas, (1, 2), strict=True):
            kept = [(1 - beta) * beta ** (t - s) * g**power for s, g in enumerate(history, 1)]
            weights = {"power": 1 - beta ** (t + first), "once": 1 - beta, "none": 1.0}[correction]
            averages.append(sum(kept) / weights)
        m, v = averages
        step = m / (v + eps).sqrt() if inside else m / (v.sqrt() + eps)
        decayed = w - rate * step if late else w
        w = w - (0 if coupled else (rate if by_rate else 1) * decay * decayed) - rate * step
    return w


def products(function: Callable[[int, int, int, int, int, int], dict[str, int]], reasons: bool = False) -> None:
    """Exercise 7.D: multiply–adds a token from (d, h, L, v, n, T), against PyTorch's counter."""
    shared = {
        "the head is one more product of v·d": lambda d, h, L, v, n, T: -v * d,
        "to look up an embedding is no product": lambda d, h, L, v, n, T: v * d,
        "the scores and the weighted sum of values are missing: n·d each, for a token and layer": (
            lambda d, h, L, v, n, T: -2 * L * n * d
        ),
        "scores and weighted sum take n·d each, and the mask saves nothing: all n × n are computed": (
            lambda d, h, L, v, n, T: -L * n * d
        ),
    }
    mistakes = {
        "CRATE": shared
        | {
            "the first step starts from a code of zeros, so that it has no D a to subtract": (
                lambda d, h, L, v, n, T: L * h * d
            ),
            "the sum of atoms DA that the layer hands on is one more product": lambda d, h, L, v, n, T: -L * h * d,
            "a matrix that is used several times is multiplied several times; this counts the dictionary once": (
                lambda d, h, L, v, n, T: -(2 * T - 1) * L * h * d
            ),
            "each further step has two products, D a and Dᵀ times what is left": lambda d, h, L, v, n, T: (
                -(T - 1) * L * h * d
            ),
            "query, key and value are one product": lambda d, h, L, v, n, T: 2 * L * d * d,
            "the output matrix of MSSA is one more product": lambda d, h, L, v, n, T: -L * d * d,
        },
        "GPT-2": shared
        | {
            "query, key and value are three products": lambda d, h, L, v, n, T: -2 * L * d * d,
            "the output matrix of attention is one more product": lambda d, h, L, v, n, T: -L * d * d,
            "an MLP has two matrices": lambda d, h, L, v, n, T: -L * h * d,
        },
    }
    sizes = [(16, 64, 2, 50, 12, 2), (12, 24, 3, 31, 7, 3), (8, 40, 1, 19, 30, 4), (6, 6, 2, 17, 1, 1)]
    counted = [_counted(*size) for size in sizes]
    answers = [predict(function, *size, keys=mistakes) for size in sizes]
    wrong: dict[str, str | None] = dict.fromkeys(mistakes)
    for key in mistakes:
        said, right = [_whole(function, key, answer[key]) for answer in answers], [count[key] for count in counted]
        excess = [a - b for a, b in zip(said, right, strict=True)]
        if any(excess):
            named = [text for text, by in mistakes[key].items() if excess == [by(*size) for size in sizes]]
            if said == [2 * n for n in right]:
                named.append("a multiply–add is counted as two; here it counts as one")
            if said == [n * size[4] for n, size in zip(right, sizes, strict=True)]:
                named.append("this is for the whole text; it was asked for one token")
            reason = named[0] if named else "no common mistake explains it; go through the layer product by product"
            i = next(i for i, off in enumerate(excess) if off)
            d, h, L, v, n, T = sizes[i]
            wrong[key] = (
                f": for d={d}, h={h}, L={L}, v={v}, n={n}, T={T} you say {said[i]:,}, PyTorch counts "
                f"{right[i]:,}; {reason}"
            )
    judge(function, wrong, reasons)
    print(f"{function.__name__}: right. PyTorch counts the same products for both models in {len(sizes)} sizes.")


def _whole(function: Callable, key: str, value: object) -> int:
    """A count as an integer.

    Raises:
        CheckFailed: it is none.
    """
    try:
        if not isinstance(value, str) and int(value) == value:
            return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise CheckFailed(f"{function.__name__}: {key} is {value!r}; a whole number is needed")


def _counted(d: int, h: int, L: int, v: int, n: int, T: int) -> dict[str, int]:
    """Multiply–adds a token of both models, as PyTorch counts them."""
    size = dict(n_layers=L, n_heads=2, width=d, vocab_size=v, context=n, expansion=h // d)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        models = {"CRATE": cl.Crate(cl.CrateConfig(**size, n_steps=T)), "GPT-2": cl.Gpt2(cl.Gpt2Config(**size))}
        text = torch.zeros(1, n, dtype=torch.long)
    counted = {}
    for name, model in models.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(text)
        counted[name] = counter.get_total_flops() // 2 // n
    return counted


def _columns(log_p: Tensor, log_q: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """−log p and log p − log q of the tokens that count, one after the other."""
    floor, gap, before = [], [], None
    for p, q, own in zip(log_p.tolist(), log_q.tolist(), document.tolist(), strict=True):
        if own == before and q == q:
            floor.append(-p)
            gap.append(p - q)
        before = own
    return tuple(torch.tensor(x, dtype=torch.float64, device="cpu") for x in (floor, gap))


def _without_nan(function: Callable) -> Callable:
    """The function; if it returns NaN, that is said."""

    @wraps(function)
    def asked(log_p: Tensor, log_q: Tensor, document: Tensor) -> Tensor:
        answer = function(log_p, log_q, document)
        if isinstance(answer, Tensor) and answer.isnan().any():
            raise CheckFailed(f"{function.__name__} returns NaN: log_q is NaN where the model was not asked")
        return answer

    return asked
