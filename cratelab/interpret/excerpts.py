"""Excerpts of all neurons: windows of consecutive tokens with the activations on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from einops import repeat
from torch import Tensor

from cratelab.reading import NO_TOKEN


@dataclass
class Excerpts:
    """Windows of w tokens: k of each of the h neurons of l layers.

    Attributes:
        tokens: (l, h, k, w) int32, `NO_TOKEN` where there is no text.
        activations: (l, h, k, w) float32, 0 where there is no text.
        starts: (l, h, k) int64, place of the first token in the corpus; -1 where a neuron has fewer than k excerpts.
        offsets: (l, h, k) int64, where in the window the token stands that it was taken for: the middle, but for the
            ends of documents.
    """

    tokens: Tensor
    activations: Tensor
    starts: Tensor
    offsets: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Excerpts":
        """`change` of each of the four tensors."""
        return Excerpts(*map(change, vars(self).values()))

    def neurons(self, layers, indices) -> "Excerpts":
        """Some neurons: integers that broadcast to (m,), of one row (1, m, k, …), or to (r, m), of r rows (r, m, k, …).

        They are renumbered from 0: neuron j of row i is here what stood at the j-th place asked for in that row.

        Raises:
            ValueError: there is no such neuron, or none is asked for.
        """
        which = places_of_neurons(layers, indices, self.starts.shape[:2])
        return self.map(lambda value: value[which])

    def __getitem__(self, ranks: int | slice | list[int]) -> "Excerpts":
        """Some of each neuron's k excerpts: the third axis, not the first."""
        ranks = [ranks] if isinstance(ranks, int) else ranks
        return self.map(lambda value: value[:, :, ranks])

    def join(self, *others: "Excerpts") -> "Excerpts":
        """These excerpts and others of the same neurons and window, one after another."""
        parts = (vars(each).values() for each in (self, *others))
        return Excerpts(*(torch.cat(values, 2) for values in zip(*parts, strict=True)))

    def gather(self, index: Tensor) -> "Excerpts":
        """Of each neuron its own excerpts `index`, (l, h, m)."""
        wide = repeat(index, "l h m -> l h m w", w=self.tokens.shape[-1])
        return self.map(lambda value: value.gather(2, wide if value.ndim == 4 else index))

    def without(self, places: Tensor) -> Self:
        """The same without the text at `places`, bool that broadcasts to (l, h, k, w)."""
        tokens, activations = self.tokens.masked_fill(places, NO_TOKEN), self.activations.masked_fill(places, 0)
        return replace(self, tokens=tokens, activations=activations)

    @property
    def strength(self) -> Tensor:
        """(l, h, k) activation of the token that each excerpt was taken for."""
        return self.activations.gather(3, self.offsets[..., None])[..., 0]


def places_of_neurons(layers, indices, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Layers and indices, each (r, m), of neurons that are there."""
    try:
        which = [torch.as_tensor(each, device="cpu") for each in (layers, indices)]
        if any(each.numel() and (each.is_floating_point() or each.dtype == torch.bool) for each in which):
            raise TypeError("some are none")
        layers, indices = (torch.atleast_2d(each.long()) for each in torch.broadcast_tensors(*which))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"layers and indices must be whole numbers that broadcast: {error}") from error
    wrong = (layers < 0) | (layers >= shape[0]) | (indices < 0) | (indices >= shape[1])
    if wrong.any() or not layers.numel():
        found = ", ".join(map(str, zip(layers[wrong].tolist()[:5], indices[wrong].tolist(), strict=False)))
        raise ValueError(f"neurons must be (layer, index) below {tuple(shape)}; got {found or 'no neuron'}")
    return layers, indices
