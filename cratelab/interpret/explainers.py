"""Explanations of neurons that need no language model: of tokens, of the tokens before them, and of concepts.

An explainer sees the explaining excerpts alone; its explanations simulate activations on others. All neurons at once.
"""

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from cratelab.arguments import check_seed
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.concepts import Concepts
from cratelab.interpret.excerpts import Excerpts
from cratelab.reading import NO_TOKEN, token_text


class Explanations(Protocol):
    """What an explainer says of the l × h neurons whose excerpts it saw."""

    def simulate(self, excerpts: Excerpts) -> tuple[Tensor, Tensor]:
        """Activations on excerpts of the same neurons, (l, h, k, w), and (l, h) the share of tokens it knows.

        NaN throughout for a neuron of which nothing can be foretold: it has no score.
        """

    def describe(self, layer: int, neuron: int, tokenizer: Tokenizer) -> str:
        """One neuron's explanation in words, by its place in those excerpts; the tokenizer is theirs."""


class Explainer(Protocol):
    """Makes explanations from the explaining excerpts of all neurons."""

    def explain(self, excerpts: Excerpts) -> Explanations: ...


def discretise(activations: Tensor) -> Tensor:
    """Activations (l, h, k, w) in tenths of each neuron's maximum, rounded down, so 0 to 10 (eq-08-1).

    Source: Bills et al. (2023).
    """
    activations = activations.double().clamp(min=0)
    if not activations.numel():
        return activations
    tenths = (10 * activations / activations.amax((2, 3), keepdim=True)).floor().clamp(max=10)
    return tenths.nan_to_num(0)  # a neuron that is never positive: 0 / 0


class TokenExplainer:
    """Each neuron as a table: the mean of its discretised activation at every token seen; 0 at others (eq-08-2)."""

    def explain(self, excerpts: Excerpts) -> "SuffixExplanations":
        return SuffixExplanations(excerpts, order=1, shrinkage=0.0)


class SuffixExplainer:
    """Each neuron as a tree of suffixes: what follows up to `order` tokens is believed as it has been seen often.

    With p_0 = 0, the suffix of length o has p_o = (Σ a + κ p_{o−1}) / (count + κ), where the sum and the count are over
    the places that end in it; unseen suffixes keep the p of the longest seen one.

    Args:
        order: longest suffix, the token itself included.
        shrinkage: κ, how many sightings the shorter suffix is worth.

    Source: after Neuron-to-Graph, Foote et al. (2023).
    """

    def __init__(self, order: int = 3, shrinkage: float = 1.0):
        if order < 1 or order % 1 or not 0 <= shrinkage < math.inf:
            raise ValueError(f"SuffixExplainer needs a whole order >= 1 and shrinkage >= 0; got {order}, {shrinkage}")
        self.order, self.shrinkage = order, shrinkage

    def explain(self, excerpts: Excerpts) -> "SuffixExplanations":
        return SuffixExplanations(excerpts, self.order, self.shrinkage)


class SuffixExplanations:
    """Tables of mean activation by suffix, of all neurons together: a sorted list of keys for each length."""

    def __init__(self, excerpts: Excerpts, order: int, shrinkage: float):
        self.shape = excerpts.tokens.shape[:2]
        largest = int(excerpts.tokens.max()) if excerpts.tokens.numel() else NO_TOKEN
        self.base = largest + 3  # the last two stand for the excerpt's start and for unseen tokens
        if order > 62 or self.base**order * excerpts.tokens.shape[0] * excerpts.tokens.shape[1] >= 2**63:
            raise ValueError(f"{self.shape} neurons and {self.base} tokens have too many suffixes of {order} to number")
        present = (excerpts.tokens != NO_TOKEN).flatten()
        activations = discretise(excerpts.activations).flatten()[present]
        self.keys, self.means = [], []
        for length in range(1, order + 1):
            keys, index, count = (
                self._keys(excerpts.tokens, length).flatten()[present].unique(return_inverse=True, return_counts=True)
            )
            sums = torch.zeros(len(keys), dtype=torch.float64, device="cpu").scatter_add_(0, index, activations)
            shorter = self._look_up(keys // self.base, length - 1)[0]
            self.keys.append(keys)
            self.means.append((sums + shrinkage * shorter) / (count + shrinkage))

    def simulate(self, excerpts: Excerpts) -> tuple[Tensor, Tensor]:
        """Activations (l, h, k, w) on the discretised scale, and (l, h) the share of tokens with a known suffix."""
        present = excerpts.tokens != NO_TOKEN
        simulated = torch.zeros(excerpts.tokens.shape, dtype=torch.float64, device="cpu")
        for length in range(1, len(self.keys) + 1):
            means, known = self._look_up(self._keys(excerpts.tokens, length), length)
            if length == 1:
                seen = known & present
            simulated = torch.where(known, means, simulated)
        coverage = seen.sum((2, 3)) / present.sum((2, 3)).clamp(min=1)
        return simulated.masked_fill(~present, 0), coverage

    def describe(self, layer: int, neuron: int, tokenizer: Tokenizer, n: int = 5) -> str:
        """The n tokens with the highest mean, and how high."""
        number = layer * self.shape[1] + neuron
        mine = self.keys[0] // self.base == number
        tokens, means = self.keys[0][mine] % self.base, self.means[0][mine]
        best = means.argsort(descending=True)[:n].tolist()
        said = [f"{token_text(tokenizer, int(tokens[i]))!r} ({float(means[i]):.1f})" for i in best if means[i] > 0]
        return "active on " + ", ".join(said) if said else "never active in the excerpts"

    def named_tokens(self, layer: int, neurons: Tensor, n: int, v: int) -> Tensor:
        """The n tokens that the explanation of each of m neurons of a layer names first, or fewer: (m, v) bool.

        Raises:
            ValueError: there is no such layer or neuron, or not 1 <= n <= v.
        """
        n_layers, h = self.shape
        if layer not in range(n_layers) or not ((neurons >= 0) & (neurons < h)).all() or not 1 <= n <= v:
            raise ValueError(
                f"named_tokens needs a layer from 0 to {n_layers - 1}, neurons from 0 to {h - 1}, and n from 1 to {v}; "
                f"got {layer}, {neurons.tolist()}, {n}"
            )
        own, tokens = self.keys[0] // self.base, self.keys[0] % self.base
        row = torch.full(self.shape, -1, device="cpu")
        row[layer, neurons.cpu()] = torch.arange(len(neurons), device="cpu")
        row = row.flatten()
        mine = row[own] >= 0
        means = torch.zeros(len(neurons), v, dtype=torch.float64, device="cpu")
        means[row[own[mine]], tokens[mine]] = self.means[0][mine]
        top = means.topk(n, 1)
        return torch.zeros_like(means, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)

    def _keys(self, tokens: Tensor, length: int) -> Tensor:
        """A number for neuron and last `length` tokens at each place; the excerpt's start counts as a token."""
        n_layers, h = self.shape
        keys = repeat(
            torch.arange(n_layers * h, device="cpu"), "(l h) -> l h k w", h=h, k=tokens.shape[2], w=tokens.shape[3]
        ).clone()
        unknown = (tokens < 0) | (tokens >= self.base - 2)
        known = tokens.long().masked_fill(unknown, self.base - 1)
        for back in range(length):
            token = torch.full_like(keys, self.base - 2)
            token[..., back:] = known[..., : tokens.shape[3] - back]
            keys = keys * self.base + token
        return keys

    def _look_up(self, keys: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Means of the suffixes of this length with these keys, 0 where unknown, and which are known."""
        if length == 0:
            return torch.zeros(keys.shape, dtype=torch.float64, device="cpu"), torch.ones_like(keys, dtype=torch.bool)
        known_keys, means = self.keys[length - 1], self.means[length - 1]
        if not len(known_keys):  # no neuron has an excerpt
            return torch.zeros(keys.shape, dtype=torch.float64, device="cpu"), torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(known_keys, keys).clamp(max=len(known_keys) - 1)
        known = known_keys[place] == keys
        return torch.where(known, means[place], 0.0), known


class ConceptExplainer:
    """Each neuron as the concept, or the two joined by "and" or "and not", that correlates best with its activation.

    Args:
        concepts: what may be said, for every token of the corpus that the excerpts come from.
        n_first: of how many best single concepts a conjunction may start.
        gain: by how much correlation a conjunction has to be better than its first concept.

    Raises:
        ValueError: there is no concept, `n_first` is below 1, or `gain` is negative.
    """

    def __init__(self, concepts: Concepts, n_first: int = 3, gain: float = 0.02):
        if not concepts.names or n_first < 1 or not gain >= 0:
            raise ValueError(
                "ConceptExplainer needs a concept, n_first >= 1 and gain >= 0; "
                f"got {len(concepts.names)} concepts, {n_first} and {gain}"
            )
        self.concepts, self.n_first, self.gain = concepts, n_first, gain

    def explain(self, excerpts: Excerpts) -> "ConceptExplanations":
        """Chooses on these excerpts alone, for each neuron."""
        n_layers, h = excerpts.tokens.shape[:2]
        first, second, negated = (torch.full((n_layers, h), -1, device="cpu") for _ in range(3))
        level = torch.zeros(n_layers, h, dtype=torch.float64, device="cpu")
        for layer in range(n_layers):
            for start in range(0, h, 32):  # truth of all concepts is large: some neurons at a time
                some = torch.arange(start, min(start + 32, h), device="cpu")
                found = self._choose(excerpts.neurons(layer, some))
                for target, value in zip((first, second, negated, level), found, strict=True):
                    target[layer, some] = value
        return ConceptExplanations(self.concepts, first, second, negated.bool(), level)

    def _choose(self, excerpts: Excerpts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        truth = rearrange(self.concepts.of(excerpts), "1 h k w c -> h c (k w)").float()
        a = rearrange(excerpts.activations, "1 h k w -> h (k w)").float()
        present = rearrange(excerpts.tokens != NO_TOKEN, "1 h k w -> h (k w)").float()
        single = _correlations(a, truth, present)
        best, order = single.topk(min(self.n_first, truth.shape[1]), 1)
        first = order[:, 0]
        rows = torch.arange(len(a), device="cpu")
        second, negated = torch.full_like(first, -1), torch.zeros_like(first)
        reached = best[:, 0] + self.gain
        chosen = truth[rows, first]
        for rank in range(order.shape[1]):
            start = truth[rows, order[:, rank]][:, None]
            for no, pair in enumerate((start * truth, start * (1 - truth))):
                value, other = _correlations(a, pair, present).max(1)
                better = value > reached
                reached = torch.where(better, value, reached)
                first = torch.where(better, order[:, rank], first)
                second = torch.where(better, other, second)
                negated = torch.where(better, no, negated)
                chosen = torch.where(better[:, None], pair[rows, other], chosen)
        none = ~(best[:, 0] > 0)
        level = (a * chosen).sum(1) / chosen.sum(1).clamp(min=1)
        return first.masked_fill(none, -1), second.masked_fill(none, -1), negated, level.double()


@dataclass
class ConceptExplanations:
    """A concept or a conjunction of two for each of l × h neurons.

    Attributes:
        concepts: which they are taken from.
        first: (l, h) index of the concept; -1 where none correlates.
        second: (l, h) index of the one joined to it; -1 where it stands alone.
        negated: (l, h) whether the second is joined by "and not".
        level: (l, h) mean activation where the explanation is true.
    """

    concepts: Concepts
    first: Tensor
    second: Tensor
    negated: Tensor
    level: Tensor

    def simulate(self, excerpts: Excerpts) -> tuple[Tensor, Tensor]:
        """The level where the explanation is true, else 0: (l, h, k, w); and coverage, 1 where there is a concept."""
        simulated = []
        for layer, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            part = excerpts.map(itemgetter(layer))
            places = self.concepts.places(part)
            one = self.concepts.truth[places, first.clamp(min=0)[:, None, None]]
            two = self.concepts.truth[places, second.clamp(min=0)[:, None, None]] ^ self.negated[layer][:, None, None]
            true = one & (two | (second < 0)[:, None, None]) & (first >= 0)[:, None, None]
            simulated.append(true & (part.tokens != NO_TOKEN))
        return torch.stack(simulated) * self.level[..., None, None], (self.first >= 0).double()

    def describe(self, layer: int, neuron: int, tokenizer: Tokenizer | None = None) -> str:
        """The sentence."""
        first, second = int(self.first[layer, neuron]), int(self.second[layer, neuron])
        if first < 0:
            return "active where no concept says"
        joined = (
            f" and {'not ' * bool(self.negated[layer, neuron])}{self.concepts.names[second]}" if second >= 0 else ""
        )
        return f"active where {self.concepts.names[first]}{joined}"


def shuffle(explanations: Explanations, excerpts: Excerpts, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The control: each neuron is simulated by the explanation of another one of its layer."""
    layer, order = others(*excerpts.tokens.shape[:2], seed)
    simulated, coverage = explanations.simulate(excerpts.neurons(layer, order))
    back = order.argsort(dim=1)
    return simulated[layer, back], coverage[layer, back]


def others(n_layers: int, h: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Whose excerpts each neuron's explanation meets in the control: layers (l, 1) and indices (l, h)."""
    check_seed(seed)
    draw = np.random.default_rng(seed)
    order = torch.from_numpy(np.stack([_derangement(draw, h) for _ in range(n_layers)]))
    return torch.arange(n_layers, device="cpu")[:, None], order


def _derangement(draw: np.random.Generator, n: int) -> np.ndarray:
    """A permutation that moves all of n > 1 items: each to the next of a random circle."""
    circle = draw.permutation(n)
    order = np.empty(n, np.int64)
    order[circle] = np.roll(circle, 1)
    return order


def _correlations(a: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Of activations (h, n) with each row of truth (h, c, n) over present places: (h, c), 0 where undefined."""
    count = present.sum(1).clamp(min=1)
    spread = (a - ((a * present).sum(1) / count)[:, None]) * present
    together = torch.einsum("hn,hcn->hc", spread, truth)
    share = truth.sum(2) / count[:, None]
    scale = (spread.square().sum(1)[:, None] * count[:, None] * share * (1 - share)).sqrt()
    return torch.where(scale > 0, together / scale, 0.0)
