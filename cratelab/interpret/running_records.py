"""What is known of all neurons while text streams by.

Of several processes that share the text each keeps its own, and what they know is merged: of a neuron's windows the
same are kept as by one, bit for bit.
"""

from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from cratelab.interpret.running_layer import RandomPlaces, RunningLayer, random_keys
from cratelab.reading import Text


class RunningRecords(nn.Module):
    """What is known from the batches read so far (`cratelab.shared_pass`); a module, so that this is its `state_dict`.

    Args:
        places: (r,) of the random excerpts in the text.
        window: tokens of an excerpt.
        n_top: strongest excerpts.
        n_active: size of the sample of places where a neuron is positive.
        device: of the model.

    Attributes:
        layers: a `RunningLayer` each, made when their widths are known.
        batches: numbers of those read.
        n_tokens: how many these hold.
    """

    def __init__(self, places: np.ndarray, window: int, n_top: int, n_active: int, device: torch.device):
        super().__init__()
        self.found, self.layers = RandomPlaces(places, window, device), nn.ModuleList()
        self.sizes = dict(window=window, n_top=n_top, n_random=len(places), n_active=n_active, device=device)
        self.batches: list[int] = []
        self.n_tokens = 0

    def update(self, text: Text, neurons: list[Tensor], seed: int, overlapping: bool) -> None:
        """Take in a batch, and each layer's activations (b, n, h)."""
        if not self.layers:
            self._make_layers(each.shape[-1] for each in neurons)
        keys = random_keys(text, seed) if self.sizes["n_active"] else None
        windows = self.found.update(text)
        for layer, activations in zip(self.layers, neurons, strict=True):
            layer.update(text, activations.float(), keys, overlapping, windows)
        self.batches.append(text.number)
        self.n_tokens += text.n_tokens

    def absorb(self, other: Self) -> None:
        """Go on as if what the other has read, which are other batches, had been read here."""
        if not self.layers:
            self._make_layers(len(layer.sum) for layer in other.layers)
        self.found.absorb(other.found)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.absorb(theirs)
        self.batches += other.batches
        self.n_tokens += other.n_tokens

    def load(self, held: dict[str, Tensor]) -> None:
        """Become what the `state_dict` was taken from."""
        n_layers = sum(name.endswith(".sum") for name in held)
        self._make_layers(len(held[f"layers.{i}.sum"]) for i in range(n_layers))
        self.load_state_dict(held)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.n_tokens, *self.batches])

    def set_extra_state(self, state: Tensor) -> None:
        self.n_tokens, *self.batches = state.tolist()

    def _make_layers(self, widths: Iterable[int]) -> None:
        self.layers = nn.ModuleList(RunningLayer(h, **self.sizes) for h in widths)
