"""The k windows of highest priority of each of many neurons, kept while text streams by: a running top-k.

A window's priority is the activation of the token it was taken for, or a random number. Of equal ones the first to come
counts more, so that the k are the same however a text is divided among processes.
"""

import torch
from einops import repeat
from torch import Tensor, nn

from cratelab.reading import NO_TOKEN, Text


class RunningTopK(nn.Module):
    """The k windows of highest priority of each of h neurons, so far, in no order. Priority −inf is an empty place.

    It is a module so that what it knows is its `state_dict`.
    """

    def __init__(self, h: int, k: int, window: int, device: torch.device):
        super().__init__()
        for name, held in {
            "priority": torch.full((h, k), -torch.inf, dtype=torch.float32),
            "arrival": torch.zeros((h, k), dtype=torch.long),  # as `Text.arrival`
            "tokens": torch.full((h, k, window), NO_TOKEN, dtype=torch.int32),
            "activations": torch.zeros(h, k, window, dtype=torch.float32),
            "starts": torch.full((h, k), -1),
            "offsets": torch.zeros((h, k), dtype=torch.long),
        }.items():
            self.register_buffer(name, held.to(device))

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
        arrival = text.arrival(piece, at)
        best = both.topk(k, 1, sorted=False).indices
        least = both.gather(1, best).amin(1, keepdim=True)
        if (tied := ((both >= least).sum(1) > k) & least[:, 0].isfinite()).any():  # topk takes any of equal ones
            came = torch.cat([self.arrival[which[tied]], arrival[candidate[tied]]], 1)
            best[tied] = _falling(both[tied], came)[:, :k]
        chosen = torch.zeros_like(both, dtype=torch.bool).scatter_(1, best, True)
        slot = (~chosen[:, :k]).nonzero()[:, 1]  # each neuron loses as many as come to it, so the two lists match
        row, column = chosen[:, k:].nonzero(as_tuple=True)
        real = candidate[row, column] >= 0
        slot, comes = slot[real], candidate[row, column][real]
        neuron, piece = neuron[comes], piece[comes]
        windows = text.around(piece, at[comes])
        values = activations[piece[:, None], windows.places, neuron[:, None]]
        self.priority[neuron, slot], self.arrival[neuron, slot] = priority[comes], arrival[comes]
        self.tokens[neuron, slot] = windows.tokens
        self.activations[neuron, slot] = values * windows.present
        self.starts[neuron, slot], self.offsets[neuron, slot] = windows.starts, windows.offsets

    def absorb(self, other: "RunningTopK") -> None:
        """Go on as if what the other has seen, which is other text, had been seen here."""
        k = self.priority.shape[1]
        both = {
            name: torch.cat([mine, theirs], 1)
            for (name, mine), theirs in zip(self.named_buffers(), other.buffers(), strict=True)
        }
        order = _falling(both["priority"], both["arrival"])[:, :k]
        for name, held in both.items():
            setattr(self, name, _reordered(held, order))

    def ordered(self) -> list[Tensor]:
        """Tokens, activations, starts and offsets by falling priority."""
        order = _falling(self.priority, self.arrival)
        return [_reordered(held, order) for held in (self.tokens, self.activations, self.starts, self.offsets)]


def _falling(priority: Tensor, arrival: Tensor) -> Tensor:
    """(m, k) places by falling priority, of equal ones the first to come first."""
    order = arrival.argsort(1)
    return order.gather(1, priority.gather(1, order).argsort(dim=1, descending=True, stable=True))


def _reordered(held: Tensor, order: Tensor) -> Tensor:
    """(m, k) or (m, k, w) in another order of their k."""
    return held.gather(1, order if held.ndim == 2 else repeat(order, "m k -> m k w", w=held.shape[2]))


def peaks(priority: Tensor, starts: Tensor | None, window: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most k finite places of highest priority in each row of (m, n): (q,) rows, priorities and places.

    Given where each place's window starts, (m, n), greedily: the best, then the best that does not overlap one taken.
    """
    if starts is None:
        best, at = (each[:, :k] for each in priority.sort(dim=1, descending=True, stable=True))
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
