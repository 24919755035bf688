"""How well a simulation of a neuron agrees with the neuron.

The score is Pearson's correlation over all tokens of a neuron's validation excerpts together: concatenate first,
correlate once. A protocol says which excerpts explain and which validate (`split`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.records import Records
from cratelab.reading import NO_TOKEN

ScoringProtocol = Literal["top-and-random", "random-only", "anthropic"]
PROTOCOLS: tuple[ScoringProtocol, ...] = ("top-and-random", "random-only", "anthropic")

# Unless as published; see `needs`.
NEEDS = {
    "top-and-random": dict(window=64, n_top=10, n_random=5),
    "random-only": dict(window=64, n_top=10, n_random=5),
    "anthropic": dict(window=8, n_top=25, n_random=10, n_active=220),
}


def needs(protocol: ScoringProtocol, *, as_published: bool = False) -> dict[str, int]:
    """What `collect_records` has to gather for a protocol: its arguments.

    As published, the intervals of "anthropic" are cut from random excerpts, of which there must then be many.

    Raises:
        ValueError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    return NEEDS[protocol] | (dict(n_random=250, n_active=0) if protocol == "anthropic" and as_published else {})


def split(records: Records, protocol: ScoringProtocol, *, as_published: bool = False) -> tuple[Excerpts, Excerpts]:
    """The excerpts to explain from, and those to validate on.

    | protocol | explain | validate |
    |---|---|---|
    | top-and-random | top ranks 0, 2, 4, 6, 8 | 5 random, top ranks 1, 3, 5, 7, 9 |
    | random-only | the same | the 5 random |
    | anthropic | 15 top, 2 of each of 11 intervals, 5 random | 10 top, 2 of each interval, 5 random, 10 top cropped |

    "Cropped" is the same ten to 3 tokens. What overlaps an explaining excerpt does not validate: its tokens are taken
    out.

    The intervals hold equally many of a neuron's positive activations.

    Args:
        records: from `collect_records` with at least `needs(protocol, as_published=…)`.
        protocol: which.
        as_published: as in the paper's code, excerpts may overlap, and the intervals of "anthropic" are cut from all
            activations and not only the positive ones, the highest of twelve left out.

    Raises:
        ValueError: there is no such protocol, or the records hold too few excerpts for it.

    Source: Bills et al. (2023); Bricken et al. (2023); Bai & Ma (2024) for the numbers.
    """
    for name, least in needs(protocol, as_published=as_published).items():
        held = records.window if name == "window" else getattr(records, name.removeprefix("n_")).starts.shape[2]
        if held < least:
            raise ValueError(f"{protocol} needs records with {name}={least} or more; these have {held}: collect anew")
    if protocol == "anthropic":
        validated = list(range(1, 20, 2))
        explained = [rank for rank in range(25) if rank not in validated]
        intervals = _intervals_of_all(records.random[10:250]) if as_published else _intervals(records.active)
        explain = records.top[explained].join(intervals[0], records.random[:5])
        top = records.top[validated]
        validate = top.join(intervals[1], records.random[5:10], crop(top, 3))
    else:
        explain, validate = records.top[0:10:2], records.random[:5]
        if protocol == "top-and-random":
            validate = validate.join(records.top[1:10:2])
    return explain, validate if as_published else _without_overlap(validate, explain)


def crop(excerpts: Excerpts, width: int) -> Excerpts:
    """Only the `width` tokens around the one that each excerpt was taken for; the activations stay as in context."""
    places = torch.arange(excerpts.tokens.shape[-1], device="cpu") - excerpts.offsets[..., None] + width // 2
    return excerpts.without((places < 0) | (places >= width))


def correlation(actual: Tensor, simulated: Tensor, present: Tensor) -> Tensor:
    """Pearson's correlation over the last axis (eq-08-3), (…, n) to (…,) float64; NaN where either is constant.

    Args:
        actual: activations.
        simulated: the shape of `actual`.
        present: which places count, the shape of `actual`.
    """
    weights = present.double()
    count = weights.sum(-1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = values.double() * weights
        centre = values.sum(-1, keepdim=True) / count
        spread = (values - centre) * weights
        constant = spread.abs().amax(-1, keepdim=True) <= 1e-9 * values.abs().amax(-1, keepdim=True)
        return spread.masked_fill(constant, 0)

    a, s = centred(actual), centred(simulated)
    return (a * s).sum(-1) / (a.square().sum(-1) * s.square().sum(-1)).sqrt()  # 0 / 0 is NaN


def rank_correlation(actual: Tensor, simulated: Tensor, present: Tensor) -> Tensor:
    """Spearman's correlation, as `correlation` of ranks; equal values share their mean rank."""
    from scipy.stats import rankdata

    def ranks(values: Tensor) -> Tensor:  # absent places rank last and are then left out
        values = values.double().masked_fill(~present, torch.inf)
        return torch.from_numpy(rankdata(values.numpy(), axis=-1)) if values.numel() else values

    return correlation(ranks(actual), ranks(simulated), present)


def within_token_correlation(actual: Tensor, simulated: Tensor, present: Tensor, tokens: Tensor) -> Tensor:
    """`correlation` of what the current token leaves of both sides (eq-09-5): differences among its own occurrences.

    Of `actual` and `simulated` the mean over the present places with the same token is subtracted first, so a neuron
    or a simulation that depends on the current token alone has none, and a token that occurs once counts for nothing.

    Args:
        actual: activations, (…, n).
        simulated: the shape of `actual`.
        present: which places count, the shape of `actual`.
        tokens: integers, the shape of `actual`.
    """
    order = tokens.argsort(-1)
    in_order = tokens.gather(-1, order)
    group = torch.zeros_like(order)
    group[..., 1:] = (in_order[..., 1:] != in_order[..., :-1]).cumsum(-1)
    group = torch.zeros_like(order).scatter(-1, order, group)
    weights = present.double()
    count = torch.zeros_like(weights).scatter_add(-1, group, weights).clamp(min=1)

    def rest(values: Tensor) -> Tensor:
        values = values.double() * weights
        mean = (torch.zeros_like(values).scatter_add(-1, group, values) / count).gather(-1, group)
        left = values - mean
        return left.masked_fill(left.abs() <= 1e-9 * values.abs().amax(-1, keepdim=True), 0)  # rounding

    return correlation(rest(actual), rest(simulated), present)


@dataclass
class Scores:
    """Scores of l × h neurons.

    Attributes:
        correlation: (l, h) float64, NaN where undefined.
        rank_correlation: (l, h), likewise.
        within_token: (l, h), likewise: of what the current token does not explain.
        dead: (l, h) bool: undefined because the neuron is constant on the validation excerpts.
        constant: (l, h) bool: undefined because the simulation is constant or there is none, though the neuron varies.
        coverage: (l, h) share of the validation tokens that the explanation has something to say of; 1 unless given.
    """

    correlation: Tensor
    rank_correlation: Tensor
    within_token: Tensor
    dead: Tensor
    constant: Tensor
    coverage: Tensor

    def by_layer(self, undefined_as_zero: bool = True) -> Tensor:
        """(l,) means over neurons × 100 (eq-09-1); without a score they count as 0, or not at all as in the paper."""
        if undefined_as_zero:
            return 100 * self.correlation.nan_to_num(0).mean(1)
        return 100 * torch.stack([layer[~layer.isnan()].mean() for layer in self.correlation])


def score(simulated: Tensor, validation: Excerpts, coverage: Tensor | None = None) -> Scores:
    """Compare simulated activations (l, h, k, w) with those of the validation excerpts.

    Raises:
        ValueError: they are not of the same shape.
    """
    if simulated.shape != validation.activations.shape:
        shapes = f"{tuple(simulated.shape)} and {tuple(validation.activations.shape)}"
        raise ValueError(f"simulated and actual activations must be of one shape; got {shapes}")
    actual, simulated, tokens = (
        rearrange(values, "l h k w -> l h (k w)") for values in (validation.activations, simulated, validation.tokens)
    )
    present = tokens != NO_TOKEN
    found = correlation(actual, simulated, present)
    dead = correlation(actual, actual, present).isnan()
    return Scores(
        correlation=found,
        rank_correlation=rank_correlation(actual, simulated, present),
        within_token=within_token_correlation(actual, simulated, present, tokens),
        dead=dead,
        constant=found.isnan() & ~dead,
        coverage=torch.ones_like(found) if coverage is None else coverage,
    )


def _without_overlap(excerpts: Excerpts, others: Excerpts) -> Excerpts:
    """Without the text of those whose window shares a place of the corpus with one of the others."""
    window = excerpts.tokens.shape[-1]
    near = (excerpts.starts[..., None] - others.starts[:, :, None]).abs() < window
    return excerpts.without((near & (others.starts[:, :, None] >= 0)).any(3)[..., None])


def _intervals(active: Excerpts, n: int = 11) -> tuple[Excerpts, Excerpts]:
    """Two excerpts to explain and two to validate from each of n equal parts of each neuron's own active sample."""
    held = (active.starts >= 0).sum(2, keepdim=True)  # (l, h, 1); they stand first, by falling activation
    parts = torch.arange(n, device="cpu")
    chosen = [((parts + place) / n * held).long() for place in (0.125, 0.625, 0.375, 0.875)]
    return active.gather(torch.cat(chosen[:2], 2)), active.gather(torch.cat(chosen[2:], 2))


def _intervals_of_all(random: Excerpts, n: int = 12) -> tuple[Excerpts, Excerpts]:
    """The same from random excerpts ordered by activation, without the highest of n parts: the paper's code."""
    order = random.strength.argsort(dim=2, descending=True, stable=True)
    size = random.starts.shape[2] // n
    places = [torch.arange(size, n * size, size, device="cpu") + offset for offset in (0, 2, 1, 3)]
    first, second = (torch.cat(pair) for pair in (places[:2], places[2:]))
    return random.gather(order[:, :, first]), random.gather(order[:, :, second])
