"""One pass over text, by one process or by several that share it, and the folder that keeps it from a kill.

Of P processes, process r reads the batches r, r + P, r + 2P, …, as one process would read them, and what all know is
merged. All that is no sum is as one process finds it, bit for bit; sums are added in another order, in double
precision.
"""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor
from tqdm import tqdm

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.devices import processes
from cratelab.language_model import LanguageModel
from cratelab.storage import digest_of, digest_of_tensors, read_tensors, remove_leftovers, write_tensors

KEEP_EVERY = 60  # seconds: what a kill costs at most


class Running(Protocol):
    """What is known from the batches read so far.

    Attributes:
        batches: numbers of those read.
        n_tokens: how many these hold.
    """

    batches: list[int]
    n_tokens: int

    def absorb(self, other: Self) -> None:
        """Go on as if what the other has read, which are other batches, had been read here."""

    def state_dict(self) -> dict[str, Tensor]:
        """All of it."""

    def load(self, held: dict[str, Tensor]) -> None:
        """Become what the `state_dict` was taken from."""


class RunningSums:
    """Sums over batches, float64 on the CPU, each under its name; a `Running`."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.batches: list[int] = []
        self.n_tokens = 0

    def add(self, batch: int, n_tokens: int, sums: Mapping[str, Tensor | float]) -> None:
        """Take in the sums of one batch."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value, dtype=torch.float64).cpu()
        self.batches.append(batch)
        self.n_tokens += n_tokens

    def absorb(self, other: Self) -> None:
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.batches += other.batches
        self.n_tokens += other.n_tokens

    def state_dict(self) -> dict[str, Tensor]:
        return self.sums | {"read": torch.tensor([self.n_tokens, *self.batches], device="cpu")}

    def load(self, held: dict[str, Tensor]) -> None:
        self.n_tokens, *self.batches = held["read"].tolist()
        self.sums = {name: value for name, value in held.items() if name != "read"}


class Pass:
    """A pass over text in this process alone, with its progress on a terminal.

    Args:
        make: makes what is known of nothing.
        total: tokens of the text.

    Attributes:
        running: what is known, from `with` on.
    """

    running: Running

    def __init__(self, make: Callable[[], Running], total: int):
        self.make, self.total = make, total
        self.n_processes, self.n_before, self.quiet = 1, 0, sys.stderr is None

    def __enter__(self) -> Self:
        self.running = self._resume()
        # None: on a terminal only, and left there unless it stands below another
        self.bar = tqdm(
            total=self.total,
            initial=self.n_before,
            unit="token",
            unit_scale=True,
            disable=self.quiet or None,
            leave=None,
        )
        self.n_resumed = self.running.n_tokens
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def wanted(self, batch: int) -> bool:
        """Whether this process has to read a batch."""
        return True

    def keep(self) -> None:
        """To be called after each batch: shows how far it is and, if it is time, writes down what is known."""
        here = self.n_before + self.n_processes * (self.running.n_tokens - self.n_resumed)  # if the others are as fast
        self.bar.update(min(here, self.total) - self.bar.n)

    def merged(self) -> Running:
        """What all processes know, once they have read all of the text; the same in each."""
        return self.running

    def _resume(self) -> Running:
        return self.make()


class SharedPass(Pass):
    """A pass that processes share, and that goes on after a kill: what each knows is kept in a folder.

        3fa1…/process-0.safetensors   what the first has read, replaced every minute

    Every batch is in one file at most, so a pass can go on with another number of processes.

    Args:
        make: makes what is known of nothing.
        total: tokens of the text.
        folder: on a disk that all see; each pass has a folder of its own in it.
        made_from: what decides about the result, as JSON can say it.

    Raises:
        ValueError: a file is damaged; or, in the end, processes have not read every token together, and each
            once.
        OSError: the folder cannot be written.
    """

    def __init__(self, make: Callable[[], Running], total: int, folder: str | Path, made_from: object):
        super().__init__(make, total)
        self.process = processes()
        self.n_processes = self.process.num_processes
        self.quiet |= not self.process.is_main_process
        self.folder = Path(folder) / digest_of(made_from)[:16]
        self.file = self.folder / f"process-{self.process.process_index}.safetensors"
        self.last, self.done = time.monotonic(), set[int]()

    def wanted(self, batch: int) -> bool:
        return batch % self.n_processes == self.process.process_index and batch not in self.done

    def keep(self) -> None:
        super().keep()
        if time.monotonic() - self.last >= KEEP_EVERY:
            self._write()

    def merged(self) -> Running:
        if self.n_processes == 1 and self._files() in ([], [self.file]):
            return self.running
        if self.running.batches:
            self._write()
        self.process.wait_for_everyone()
        merged = self.make()
        for file in self._files():
            merged.absorb(self._read(file))
        self.process.wait_for_everyone()
        twice = len(set(merged.batches)) < len(merged.batches)
        if twice or merged.n_tokens != self.total:
            raise ValueError(
                f"the processes that share {self.folder} have read {merged.n_tokens} tokens together"
                f"{', some of them twice,' * twice} and not {self.total}, each once: do all see this folder, and no "
                "others write there? Remove it and begin anew"
            )
        return merged

    def _resume(self) -> Running:
        """What this process knew when it was killed; whatever any knew is not read again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        running = self.make()
        for file in self._files():
            held = self._read(file)
            self.done |= set(held.batches)
            self.n_before += held.n_tokens
            if file == self.file:
                running = held
        self.process.wait_for_everyone()  # before one writes, all have read
        return running

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("process-*.safetensors"))

    def _read(self, file: Path) -> Running:
        running = self.make()
        try:
            running.load(read_tensors(file))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{file} does not hold what a pass has kept: {error}. Remove it, and begin again"
            ) from error
        return running

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # another that has ended may have removed it
        write_tensors(self.file, self.running.state_dict())
        self.last = time.monotonic()


def open_pass(
    make: Callable[[], Running], total: int, folder: str | Path | None, made_from: Callable[[], object]
) -> Pass:
    """A pass over text: shared, and kept in the folder, if there is one."""
    return Pass(make, total) if folder is None else SharedPass(make, total, folder, made_from())


def model_facts(model: LanguageModel) -> list:
    """What tells a model, with the auto-encoders that are spliced into it, from another; hooks are not told."""
    spliced = [block.neurons.facts() if hasattr(block.neurons, "facts") else None for block in model.blocks]
    kind = model.token_embedding.weight.device.type
    computed_in = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    return [type(model).__name__, repr(model.config), digest_of_tensors(model.state_dict()), spliced, computed_in]


def text_facts(corpus: TokenizedCorpus) -> list:
    """What tells a text, and where its documents end, from another."""
    return [corpus.facts(), digest_of_tensors({"lengths": torch.from_numpy(corpus.lengths())})]


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
