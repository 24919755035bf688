"""What neurons do on text: excerpts with activations, for all neurons of all layers at once, in one streamed pass.

An excerpt is a window of consecutive tokens. Kept are each neuron's strongest excerpts, random ones (the same for all
neurons), and a random sample of those where it is active, from which quantiles are drawn; beside them mean, variance,
density and maximum over all tokens. Memory does not grow with the text: the strongest are a running top-k on the
model's device, the sample is a reservoir.

Unless it shall be as published, windows of a neuron do not overlap, and none crosses the end of a document.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cratelab.arguments import check_seed
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.excerpts import Excerpts, places_of_neurons
from cratelab.interpret.running_layer import RandomPlaces, RunningLayer
from cratelab.interpret.running_records import RunningRecords
from cratelab.interpret.running_top_k import RunningTopK
from cratelab.language_model import LanguageModel
from cratelab.reading import NO_TOKEN, tokens_to_read, watch_neurons
from cratelab.shared_pass import model_facts, open_pass, text_facts
from cratelab.storage import (
    digest_of_file,
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
)

AHEAD = 16  # batches sorted by length: of TinyWorld at context 256 padding is then 5 % of a batch, else 39 %

EXCERPTS = "top", "random", "active"
STATISTICS = "mean", "variance", "density", "maximum"
KINDS = dict.fromkeys(STATISTICS, (torch.float64, -torch.inf, torch.inf)) | {  # type, least value, what is above all
    "tokens": (torch.int32, NO_TOKEN, torch.inf),
    "activations": (torch.float32, -torch.inf, torch.inf),
    "starts": (torch.int64, -1, torch.inf),
    "offsets": (torch.int64, 0, None),  # the window
    "density": (torch.float64, 0, 1 + 1e-9),
}


@dataclass
class Records:
    """What `collect_records` gathers of every neuron.

    Attributes:
        top: excerpts around the strongest activations, falling; only positive ones.
        random: excerpts at random places, the same for all neurons.
        active: a random sample of the places where a neuron is positive, its window around each, by falling activation.
        mean: (l, h) float64, over all tokens.
        variance: likewise.
        density: (l, h) share of positive activations.
        maximum: (l, h).
        n_tokens: how many those were.
    """

    top: Excerpts
    random: Excerpts
    active: Excerpts
    mean: Tensor
    variance: Tensor
    density: Tensor
    maximum: Tensor
    n_tokens: int

    @property
    def window(self) -> int:
        return self.random.tokens.shape[-1]

    def neurons(self, layers, indices) -> Self:
        """The records of some neurons alone, renumbered from 0; as `Excerpts.neurons`."""
        which = places_of_neurons(layers, indices, self.maximum.shape)
        excerpts = {name: getattr(self, name).neurons(layers, indices) for name in EXCERPTS}
        return replace(self, **excerpts, **{name: getattr(self, name)[which] for name in STATISTICS})

    def save(self, folder: str | Path) -> None:
        """Write records.safetensors and records.json into `folder`, each replaced whole or not at all.

        Raises:
            OSError: they cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # both are written before either is replaced
        with replacing(folder / "records.json") as facts, replacing(folder / "records.safetensors") as tensors:
            write_tensors(tensors, self._tensors())
            digest = digest_of_file(tensors)  # of what was written here, whoever else writes
            write_json(facts, {"n_tokens": self.n_tokens, "window": self.window, "sha256": digest})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            FileNotFoundError: `folder` holds no records.
            ValueError: a file is damaged, or the two are not of the same records.
        """
        file = Path(folder) / "records.safetensors"
        facts, held = read_json(Path(folder) / "records.json"), read_tensors(file)
        try:
            excerpts = {
                name: Excerpts(*(held[f"{name}.{field.name}"] for field in fields(Excerpts))) for name in EXCERPTS
            }
            statistics = {name: held[name] for name in STATISTICS}
            found = cls(**excerpts, **statistics, n_tokens=facts["n_tokens"])
            found._check(facts)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds no complete records: {error}") from error
        if facts.get("sha256", known := digest_of_file(file)) != known:
            raise ValueError(f"{file} is not the file that records.json was written for: collect and save again")
        return found

    def _check(self, facts: dict) -> None:
        """Shapes, types and ranges, as far as they do not depend on model and corpus."""
        if type(self.n_tokens) is not int or self.n_tokens < 1:
            raise ValueError(f"n_tokens must be an integer above 0; got {self.n_tokens!r}")
        n_layers, h, window = *self.random.tokens.shape[:2], facts["window"]
        for name, tensor in self._tensors().items():
            kind, _, field = name.rpartition(".")
            dtype, least, below = KINDS[field]
            below = window if field == "offsets" else below
            shape = (n_layers, h, getattr(self, kind).starts.shape[2]) if kind else (n_layers, h)
            shape += (window,) if field in ("tokens", "activations") else ()
            if tensor.shape != shape or tensor.dtype != dtype:
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{name} must be {dtype} of shape {shape}; got {found}")
            wrong = ~tensor.isfinite() | (tensor < least) | (tensor >= below)
            if wrong.any():
                raise ValueError(f"{name} holds {tensor[wrong][0].item()}")

    def _tensors(self) -> dict[str, Tensor]:
        held = {name: getattr(self, name) for name in STATISTICS}
        for name in EXCERPTS:
            held |= {f"{name}.{field}": tensor for field, tensor in vars(getattr(self, name)).items()}
        return held


def collect_records(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    window: int = 64,
    n_top: int = 10,
    n_random: int = 10,
    n_active: int = 0,
    seed: int = 0,
    *,
    as_published: bool = False,
    n_tokens: int | None = None,
    batch: int = 16,
    folder: str | Path | None = None,
) -> Records:
    """Run the model over a corpus once and gather the records of all its neurons.

    With a `folder` the processes that Accelerate or torchrun have started share the text, and a killed call goes on
    where it stopped. What they gather is what one gathers: the same excerpts, maxima and densities to the bit, means
    and variances but for the order of sums in double precision.

    Each document is read from its first token, in pieces of at most the model's context. An excerpt is the window
    [c − w/2, c + w/2) around a token c, moved where it would cross the piece's ends.

    Args:
        model: any model whose blocks have a `neurons` site, on any device.
        corpus: text the model was not trained on.
        window: w tokens in an excerpt.
        n_top: strongest excerpts of each neuron.
        n_random: random excerpts, places drawn uniformly from all tokens.
        n_active: size of the sample of places where a neuron is positive, uniform over these.
        seed: of both samples.
        as_published: as the paper's code: the strongest excerpts may overlap, and pieces are cut from the stream
            without regard to documents.
        n_tokens: read this many tokens at most.
        batch: pieces at a time.
        folder: where each process keeps what it knows, on a disk that all see; model, spliced auto-encoders,
            text and arguments tell one pass there from another, but hooks do not. `cratelab.shared_pass.forget`
            empties it. Without one, every process reads all of the text.

    Returns:
        The records, on the CPU; the same in each process.

    Raises:
        ValueError: the corpus has tokens that the model does not know, an argument is out of range, the model's
            activations are not finite, or a file in `folder` is damaged.
        OSError: `folder` cannot be written.
    """
    if min(window, batch) < 1 or min(n_top, n_random, n_active) < 0:
        raise ValueError(
            "collect_records needs window and batch of at least 1, n_top, n_random and n_active of at least 0; "
            f"got {window}, {batch}, {n_top}, {n_random}, {n_active}"
        )
    check_seed(seed)
    total = tokens_to_read(corpus, n_tokens)
    longest, most = max(4096, model.config.context), max(1000, total)
    if window > longest or max(n_top, n_random, n_active) > most:
        raise ValueError(
            f"a window is at most {longest} tokens here, and excerpts of a neuron at most {most}; "
            f"got {window}, {n_top}, {n_random}, {n_active}"
        )
    random_places = np.sort(np.random.default_rng([seed, 0]).integers(total, size=n_random))
    make = partial(RunningRecords, random_places, window, n_top, n_active, model.token_embedding.weight.device)
    sizes = window, n_top, n_random, n_active, seed, as_published, batch, AHEAD
    with open_pass(
        make, total, folder, lambda: ["records", model_facts(model), text_facts(corpus), total, *sizes]
    ) as reading:
        read = watch_neurons(model, corpus, batch, window, not as_published, total, AHEAD, reading.wanted)
        for text, neurons in read:
            reading.running.update(text, neurons, seed, as_published)
            reading.keep()
        running = reading.merged()
    if not all(bool(layer.squares.isfinite().all()) for layer in running.layers):
        raise ValueError("the model's activations are too large for single precision to hold their squares")
    return _join(list(running.layers), running.found, total)


def _join(layers: list[RunningLayer], random: RandomPlaces, total: int) -> Records:
    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack(values).cpu()

    def kept(each: list[RunningTopK]) -> Excerpts:
        return Excerpts(*(stack(list(values)) for values in zip(*(one.ordered() for one in each), strict=True)))

    def for_all(values: Tensor) -> Tensor:
        return values.cpu().expand(len(layers), len(layers[0].sum), *values.shape).clone()

    mean = stack([layer.sum for layer in layers]) / total
    return Records(
        top=kept([layer.top for layer in layers]),
        random=Excerpts(
            tokens=for_all(random.tokens),
            activations=stack([layer.random for layer in layers]),
            starts=for_all(random.starts),
            offsets=for_all(random.offsets),
        ),
        active=_by_activation(kept([layer.active for layer in layers])),
        mean=mean,
        variance=stack([layer.squares for layer in layers]) / total - mean.square(),
        density=stack([layer.positive for layer in layers]) / total,
        maximum=stack([layer.maximum for layer in layers]).double(),
        n_tokens=total,
    )


def _by_activation(excerpts: Excerpts) -> Excerpts:
    """The same excerpts, falling by the activation of the token they were taken for; missing ones last."""
    strength = excerpts.strength.masked_fill(excerpts.starts < 0, -torch.inf)
    return excerpts.gather(strength.argsort(dim=2, descending=True, stable=True))
