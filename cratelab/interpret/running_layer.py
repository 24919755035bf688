"""What is known of the neurons of a layer, and of random places, while text streams by."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from cratelab.devices import exact
from cratelab.interpret.running_top_k import RunningTopK, peaks
from cratelab.reading import NO_TOKEN, Text, Windows

SUMS = "sum", "squares", "positive"
CHUNK = 2**20  # activations searched at a time where many may be candidates: what a cache holds


def random_keys(text: Text, seed: int) -> Tensor:
    """Random numbers (b, n) that depend on the tokens' places in the corpus alone, however it is batched."""
    keys = np.zeros(text.tokens.shape, np.float32)
    for row, (start, stop) in zip(keys, text.pieces, strict=True):
        row[: stop - start] = np.random.default_rng([seed, 1, start]).random(stop - start, dtype=np.float32)
    return torch.from_numpy(keys).to(text.tokens.device)


class RandomPlaces(nn.Module):
    """Windows around r places drawn beforehand: what all neurons have in common."""

    def __init__(self, places: np.ndarray, window: int, device: torch.device):
        super().__init__()
        self.places = torch.from_numpy(places).to(device)
        tokens = torch.full((len(places), window), NO_TOKEN, dtype=torch.int32, device=device)
        self.register_buffer("tokens", tokens)
        for name in "starts", "offsets":
            self.register_buffer(name, torch.zeros(len(places), dtype=torch.long, device=device))

    def update(self, text: Text) -> tuple[Tensor, Tensor, Windows]:
        """Which of the places (m,) lie in this text, in which of its pieces, and the windows around them."""
        at = self.places[:, None] - text.starts
        which, piece = ((at >= 0) & (at < text.present.sum(1))).nonzero(as_tuple=True)
        windows = text.around(piece, at[which, piece])
        self.tokens[which], self.starts[which], self.offsets[which] = windows.tokens, windows.starts, windows.offsets
        return which, piece, windows

    def absorb(self, other: "RandomPlaces") -> None:
        """Take over the windows that the other has met, which are not those met here."""
        self.tokens = self.tokens.maximum(other.tokens)
        self.starts += other.starts
        self.offsets += other.offsets


class RunningLayer(nn.Module):
    """What is known of the h neurons of one layer."""

    def __init__(self, h: int, window: int, n_top: int, n_random: int, n_active: int, device: torch.device):
        super().__init__()
        self.top, self.active = RunningTopK(h, n_top, window, device), RunningTopK(h, n_active, window, device)
        self.register_buffer("random", torch.zeros(h, n_random, window, dtype=torch.float32, device=device))
        self.register_buffer("maximum", exact(torch.full((h,), -torch.inf, device=device)))
        for name in SUMS:
            self.register_buffer(name, exact(torch.zeros(h, device=device)))

    def update(
        self,
        text: Text,
        activations: Tensor,
        keys: Tensor | None,
        overlapping: bool,
        random: tuple[Tensor, Tensor, Windows],
    ) -> None:
        """Take in a batch: activations (b, n, h), random keys (b, n), and the random places that lie in it."""
        if text.full:
            strongest = activations.amax(1)
        else:
            padding = ~text.present[..., None]
            activations = activations.masked_fill(padding, -torch.inf)
            strongest = activations.amax(1)
            activations.masked_fill_(padding, 0)
        self.maximum = self.maximum.maximum(exact(strongest.amax(0)))
        self.sum += exact(activations.sum(1)).sum(0)  # in single precision no further than a piece
        self.squares += exact(activations.square().sum(1)).sum(0)
        self.positive += exact(activations.clamp(min=0).sign_().sum(1)).sum(0)
        if self.top.priority.shape[1]:
            self._update_top(text, activations, strongest, overlapping)
        if keys is not None:
            self._update_active(text, activations, keys.flatten())
        which, piece, windows = random
        values = activations[piece[:, None], windows.places] * windows.present[..., None]
        self.random[:, which] = rearrange(values, "m w h -> h m w")

    def absorb(self, other: "RunningLayer") -> None:
        """Go on as if what the other has seen, which is other text, had been seen here."""
        self.top.absorb(other.top)
        self.active.absorb(other.active)
        self.maximum = self.maximum.maximum(other.maximum)
        for name in "random", *SUMS:  # of each random place one of the two has zeros
            getattr(self, name).add_(getattr(other, name))

    def _update_top(self, text: Text, activations: Tensor, strongest: Tensor, overlapping: bool) -> None:
        """Look only into pieces whose strongest activation (b, h) may be among the k best, with theirs counted in."""
        k = self.top.priority.shape[1]
        certain = torch.cat([self.top.priority, strongest.mT], 1)  # windows that do not overlap
        least = certain.topk(k, 1).values[:, -1]
        pieces, neurons = ((strongest > self.top.bar.clamp(min=0)) & (strongest >= least)).nonzero(as_tuple=True)
        size = max(1, CHUNK // activations.shape[1])
        for piece, neuron in zip(pieces.split(size), neurons.split(size), strict=True):
            bar = self.top.bar.clamp(min=0)[neuron]
            still = strongest[piece, neuron] > bar  # what came before may have raised the bar
            piece, neuron, bar = piece[still], neuron[still], bar[still]
            priority = activations[piece, :, neuron]  # (m, n)
            loses = (priority <= bar[:, None]) | (priority < least[neuron, None])
            priority.masked_fill_(loses, -torch.inf)
            starts = None if overlapping else text.window_starts[piece].int()
            row, best, at = peaks(priority, starts, text.window, min(k, priority.shape[1]))
            self.top.merge(text, activations, neuron[row], best, piece[row], at)

    def _update_active(self, text: Text, activations: Tensor, keys: Tensor) -> None:
        """Tokens by falling key, as far as any neuron's reservoir is open to it."""
        _, n, h = activations.shape
        keys, order = keys.sort(descending=True, stable=True)
        for key, token in zip(*(values.split(max(1, CHUNK // h)) for values in (keys, order)), strict=True):
            bar = self.active.bar
            m = int((key > bar.min()).sum())
            if not m:
                break
            key, token = key[:m], token[:m]
            enters = (activations[token // n, token % n] > 0) & (key[:, None] > bar)
            row, neuron = enters.nonzero(as_tuple=True)
            self.active.merge(text, activations, neuron, key[row], token[row] // n, token[row] % n)
