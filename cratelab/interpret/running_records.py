"""What is known of all neurons while text streams by, and the folder that keeps it from a kill.

Several processes share a pass: of P, process r reads the batches r, r + P, r + 2P, …, as one process would read them,
and what all know is merged. Of a neuron's windows the same are kept, bit for bit, as is all that is no sum; sums are
added in another order, in double precision.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from cratelab.devices import processes
from cratelab.interpret.running_layer import RandomPlaces, RunningLayer, random_keys
from cratelab.reading import Text
from cratelab.storage import digest_of, read_tensors, remove_leftovers, write_tensors

KEEP_EVERY = 60  # seconds: what a kill costs at most


class RunningRecords(nn.Module):
    """What is known from the batches read so far; it is a module so that this is its `state_dict`.

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


class Pass:
    """A pass over text in this process alone.

    Args:
        make: makes `RunningRecords` of nothing.

    Attributes:
        n_processes: how many share it.
        n_tokens: how many have been read before.
        quiet: whether to show no progress; None shows it on a terminal.
    """

    def __init__(self, make: Callable[[], RunningRecords]):
        self.make, self.n_processes, self.n_tokens, self.quiet = make, 1, 0, None

    def resume(self) -> RunningRecords:
        """What to begin with."""
        return self.make()

    def wanted(self, batch: int) -> bool:
        """Whether this process has to read a batch."""
        return True

    def keep(self, running: RunningRecords) -> None:
        """Write down what is known, if it is time."""

    def merge(self, running: RunningRecords, n_tokens: int) -> RunningRecords:
        """What all processes know, once they have read the `n_tokens` of the text; the same in each."""
        return running


class SharedPass(Pass):
    """A pass that processes share, and that goes on after a kill: what each knows is kept in a folder.

        3fa1…/process-0.safetensors   what the first has read, replaced every minute

    Every batch is in one file at most, so a pass can go on with another number of processes.

    Args:
        make: makes `RunningRecords` of nothing.
        folder: on a disk that all see; each pass has a folder of its own in it.
        made_from: what decides about the result, as JSON can say it.
    """

    def __init__(self, make: Callable[[], RunningRecords], folder: str | Path, made_from: object):
        super().__init__(make)
        self.process = processes()
        self.n_processes, self.quiet = self.process.num_processes, None if self.process.is_main_process else True
        self.folder = Path(folder) / digest_of(made_from)[:16]
        self.file = self.folder / f"process-{self.process.process_index}.safetensors"
        self.last, self.done = time.monotonic(), set[int]()

    def resume(self) -> RunningRecords:
        """What this process knew when it was killed; whatever any knew is not read again.

        Raises:
            ValueError: a file is damaged.
            OSError: the folder cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        running = self.make()
        for file in self._files():
            held = self._read(file)
            self.done |= set(held.batches)
            self.n_tokens += held.n_tokens
            if file == self.file:
                running = held
        self.process.wait_for_everyone()  # before one writes, all have read
        return running

    def wanted(self, batch: int) -> bool:
        return batch % self.n_processes == self.process.process_index and batch not in self.done

    def keep(self, running: RunningRecords) -> None:
        if time.monotonic() - self.last >= KEEP_EVERY:
            self._write(running)

    def merge(self, running: RunningRecords, n_tokens: int) -> RunningRecords:
        """As `Pass.merge`. Raises ValueError if they have read fewer tokens together, or more."""
        if self.n_processes == 1 and self._files() in ([], [self.file]):
            return running
        if running.batches:
            self._write(running)
        self.process.wait_for_everyone()
        merged = self.make()
        for file in self._files():
            merged.absorb(self._read(file))
        self.process.wait_for_everyone()
        if merged.n_tokens != n_tokens:
            raise ValueError(
                f"the processes that share {self.folder} have read {merged.n_tokens} tokens together and not "
                f"{n_tokens}: do all see this folder, and no others write there? Remove it and begin anew"
            )
        return merged

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("process-*.safetensors"))

    def _read(self, file: Path) -> RunningRecords:
        running = self.make()
        try:
            running.load(read_tensors(file))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{file} does not hold what a pass has kept: {error}. Remove it, and begin again"
            ) from error
        return running

    def _write(self, running: RunningRecords) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # another that has ended may have removed it
        write_tensors(self.file, running.state_dict())
        self.last = time.monotonic()


def forget(folder: str | Path) -> None:
    """Remove what passes have kept in `folder`, and nothing else. Only for who knows that none is going on there."""
    for each in [path for path in Path(folder).glob("*") if path.is_dir()]:
        remove_leftovers(each, "process-*")
        for file in each.glob("process-*.safetensors"):
            file.unlink()
        with suppress(OSError):  # something else is in it
            each.rmdir()
    with suppress(OSError):
        Path(folder).rmdir()
