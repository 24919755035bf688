"""The k windows of highest priority of each of many neurons, kept while text streams by: a running top-k.

A window's priority is the activation of the token it was taken for, or a random number.
"""

import torch
from einops import repeat
from torch import Tensor

from cratelab.reading import NO_TOKEN, Text


class RunningTopK:
    """The k windows of highest priority of each of h neurons, so far, in no order. Priority −inf is an empty place."""

    def __init__(self, h: int, k: int, window: int, device: torch.device):
        self.priority = torch.full((h, k), -torch.inf, dtype=torch.float32, device=device)
        self.tokens = torch.full((h, k, window), NO_TOKEN, dtype=torch.int32, device=device)
        self.activations = torch.zeros(h, k, window, dtype=torch.float32, device=device)
        self.starts = torch.full((h, k), -1, device=device)
        self.offsets = torch.zeros((h, k), dtype=torch.long, device=device)

    @property
    def bar(self) -> Tensor:
        """(h,) what a candidate's priority has to exceed."""
        return self.priority.amin(1)

    def merge(
        self, text: Text, activations: Tensor, neuron: Tensor, priority: Tensor, piece: Tensor, at: Tensor
    ) -> None:
        """Let m candidates in: neuron, priority, piece and place in it, each (m,)."""
        if not len(neuron):
            return
        k = self.priority.shape[1]
        order = neuron.argsort(stable=True)
        which, row, count = neuron[order].unique_consecutive(return_inverse=True, return_counts=True)
        column = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[row]
        candidate = order.new_full((len(which), int(count.max())), -1)
        candidate[row, column] = order
        fresh = priority[candidate].masked_fill(candidate < 0, -torch.inf)
        both = torch.cat([self.priority[which], fresh], 1)
        chosen = torch.zeros_like(both, dtype=torch.bool).scatter_(1, both.topk(k, 1, sorted=False).indices, True)
        slot = (~chosen[:, :k]).nonzero()[:, 1]  # each neuron loses as many as come to it, so the two lists match
        row, column = chosen[:, k:].nonzero(as_tuple=True)
        real = candidate[row, column] >= 0
        slot, comes = slot[real], candidate[row, column][real]
        neuron, piece = neuron[comes], piece[comes]
        windows = text.around(piece, at[comes])
        values = activations[piece[:, None], windows.places, neuron[:, None]]
        self.priority[neuron, slot] = priority[comes]
        self.tokens[neuron, slot] = windows.tokens
        self.activations[neuron, slot] = values * windows.present
        self.starts[neuron, slot], self.offsets[neuron, slot] = windows.starts, windows.offsets

    def ordered(self) -> list[Tensor]:
        """Tokens, activations, starts and offsets by falling priority."""
        order = self.priority.argsort(dim=1, descending=True, stable=True)
        wide = repeat(order, "h k -> h k w", w=self.tokens.shape[-1])
        held = self.tokens.gather(1, wide), self.activations.gather(1, wide)
        return [*held, self.starts.gather(1, order), self.offsets.gather(1, order)]


def peaks(priority: Tensor, starts: Tensor | None, window: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most k finite places of highest priority in each row of (m, n): (q,) rows, priorities and places.

    Given where each place's window starts, (m, n), greedily: the best, then the best that does not overlap one taken.
    """
    if starts is None:
        best, at = priority.topk(k, 1)
        row, rank = best.isfinite().nonzero(as_tuple=True)
        return row, best[row, rank], at[row, rank]
    row = torch.arange(len(priority), device=priority.device)
    found = []
    for _ in range(k):
        best, at = priority.max(1)
        found.append((row, best, at))
        overlaps = (starts - starts.gather(1, at[:, None])).abs_() < window
        priority = priority.masked_fill(overlaps, -torch.inf)
        going = priority.amax(1).isfinite()
        row, priority, starts = row[going], priority[going], starts[going]
        if not len(row):
            break
    row, best, at = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, best, at
