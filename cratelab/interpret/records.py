"""What neurons do on text: excerpts with activations, for all neurons of all layers at once, in one streamed pass.

An excerpt is a window of consecutive tokens. Kept are each neuron's strongest excerpts, random ones (the same for all
neurons), and a random sample of those where it is active, from which quantiles are drawn; beside them mean, variance,
density and maximum over all tokens. Memory does not grow with the text: the strongest are a running top-k on the
model's device, the sample is a reservoir.

Strictly, which is the default, windows of a neuron do not overlap, and none crosses the end of a document.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor

from cratelab.corpora.tokenized import TokenizedCorpus
from cratelab.interpret.reading import NO_TOKEN, Text, watch_neurons
from cratelab.language_model import LanguageModel, load_foreign, read_config
from cratelab.record import write_json


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

    def __getitem__(self, which) -> Self:
        """Some of the k excerpts: an integer, slice or list of them."""
        which = [which] if isinstance(which, int) else which
        return type(self)(*(getattr(self, field.name)[:, :, which] for field in fields(Excerpts)))

    def join(self, *others: "Excerpts") -> "Excerpts":
        """These excerpts and others of the same neurons and window, one after another."""
        all_of_them = [self, *others]
        return Excerpts(*(torch.cat([getattr(e, f.name) for e in all_of_them], 2) for f in fields(Excerpts)))


@dataclass
class Records:
    """What `collect_records` gathers of every neuron.

    Attributes:
        top: excerpts around the strongest activations, falling; only positive ones.
        random: excerpts at random places, the same for all neurons.
        active: a random sample of the places where a neuron is positive, its window around each, by falling activation.
        mean, variance, density, maximum: (l, h) float64, over all tokens; density is the share of positive activations.
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

    def save(self, folder: str | Path) -> None:
        """Write records.safetensors and records.json into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "records.safetensors.part"
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, part)
        part.replace(folder / "records.safetensors")
        write_json(folder / "records.json", {"n_tokens": self.n_tokens, "window": self.window})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            FileNotFoundError: `folder` holds no records.
            ValueError: a file is damaged.
        """
        facts = read_config(Path(folder) / "records.json")
        held = load_foreign(Path(folder) / "records.safetensors")
        try:
            excerpts = {
                name: Excerpts(*(held[f"{name}.{field.name}"] for field in fields(Excerpts)))
                for name in ("top", "random", "active")
            }
            statistics = {name: held[name] for name in ("mean", "variance", "density", "maximum")}
            return cls(**excerpts, **statistics, n_tokens=facts["n_tokens"])
        except KeyError as error:
            raise ValueError(f"{folder} holds no complete records: {error} is missing") from error

    def _tensors(self) -> dict[str, Tensor]:
        held = {name: getattr(self, name) for name in ("mean", "variance", "density", "maximum")}
        for name in "top", "random", "active":
            held |= {f"{name}.{field.name}": getattr(getattr(self, name), field.name) for field in fields(Excerpts)}
        return held


def collect_records(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    window: int = 64,
    n_top: int = 10,
    n_random: int = 10,
    n_active: int = 0,
    seed: int = 0,
    strict: bool = True,
    n_tokens: int | None = None,
    batch: int = 16,
) -> Records:
    """Run the model over a corpus once and gather the records of all its neurons.

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
        strict: as the paper's code if False: the strongest excerpts may overlap, and pieces are cut from the stream
            without regard to documents.
        n_tokens: read this many tokens at most.
        batch: pieces at a time.

    Returns:
        The records, on the CPU.

    Raises:
        ValueError: the corpus has tokens that the model does not know, or an argument is out of range.
    """
    if min(window, batch) < 1 or min(n_top, n_random, n_active) < 0:
        raise ValueError(
            "collect_records needs window and batch of at least 1, n_top, n_random and n_active of at least 0; "
            f"got {window}, {batch}, {n_top}, {n_random}, {n_active}"
        )
    total = min(n_tokens or len(corpus), len(corpus))
    if not total:
        raise ValueError("the corpus holds no token")
    random_places = np.sort(np.random.default_rng([seed, 0]).integers(total, size=n_random))
    keys = np.random.default_rng([seed, 1])
    layers: list[_Layer] = []
    for text, neurons in watch_neurons(model, corpus, batch, window, strict, total):
        layers = layers or [_Layer(a.shape[-1], window, n_top, n_active, a.device) for a in neurons]
        key = torch.from_numpy(keys.random(text.tokens.shape, dtype=np.float32)).to(text.tokens.device)
        inside = (random_places >= int(text.starts[0])) & (random_places < text.stop)
        for layer, activations in zip(layers, neurons, strict=True):
            layer.update(text, activations.float(), key, strict, random_places[inside].tolist())
    return _join(layers, total)


class _Kept:
    """The k windows of highest priority of each of h neurons, so far.

    Windows stay where they were put; `slot` (h, k) says where, by falling priority. So a batch moves only what is new.
    """

    def __init__(self, h: int, k: int, window: int, device: torch.device):
        self.priority = torch.full((h, k), -torch.inf, device=device)
        self.slot = repeat(torch.arange(k, device=device), "k -> h k", h=h)
        self.tokens = torch.full((h, k, window), NO_TOKEN, dtype=torch.int32, device=device)
        self.activations = torch.zeros(h, k, window, device=device)
        self.starts = torch.full((h, k), -1, device=device)
        self.offsets = torch.zeros((h, k), dtype=torch.long, device=device)

    def merge(self, priority: Tensor, piece: Tensor, at: Tensor, text: Text, activations: Tensor) -> None:
        """Let candidates in: priority, piece and place in it, each (h, m); −inf is no candidate."""
        h, k, window = self.tokens.shape
        self.priority, index = torch.cat([self.priority, priority], 1).topk(k, 1)
        comes = index >= k
        kept = self.slot.gather(1, index.clamp(max=k - 1))
        taken = torch.zeros(h, k + 1, dtype=torch.bool, device=index.device)
        taken.scatter_(1, kept.masked_fill(comes, k), True)  # column k is for what comes
        free = taken[:, :k].int().argsort(dim=1, stable=True)  # the slots that nothing stays in come first
        self.slot = torch.where(comes, free.gather(1, (comes.cumsum(1) - 1).clamp(min=0)), kept)
        neuron, rank = (comes & self.priority.isfinite()).nonzero(as_tuple=True)
        slot, candidate = self.slot[neuron, rank], index[neuron, rank] - k
        piece, at = piece[neuron, candidate], at[neuron, candidate]
        start = text.window_starts[piece, at]
        places, present = text.cut(piece, start, window)
        self.tokens[neuron, slot] = text.tokens[piece[:, None], places].masked_fill(~present, NO_TOKEN).int()
        self.activations[neuron, slot] = activations[piece[:, None], places, neuron[:, None]] * present
        self.starts[neuron, slot] = text.starts[piece] + start
        self.offsets[neuron, slot] = at - start

    def ordered(self) -> list[Tensor]:
        """Tokens, activations, starts and offsets by falling priority."""
        wide = repeat(self.slot, "h k -> h k w", w=self.tokens.shape[-1])
        held = self.tokens.gather(1, wide), self.activations.gather(1, wide)
        return [*held, self.starts.gather(1, self.slot), self.offsets.gather(1, self.slot)]


class _Layer:
    """What is known of the h neurons of one layer."""

    def __init__(self, h: int, window: int, n_top: int, n_active: int, device: torch.device):
        self.top, self.active = _Kept(h, n_top, window, device), _Kept(h, n_active, window, device)
        self.active_at: Tensor | None = None
        self.random: list[tuple[Tensor, Tensor, int, int]] = []
        self.sum, self.squares, self.positive = torch.zeros(3, h, dtype=torch.float64, device=device)
        self.maximum = torch.full((h,), -torch.inf, dtype=torch.float64, device=device)

    def update(self, text: Text, activations: Tensor, key: Tensor, strict: bool, random_places: list[int]) -> None:
        """Take in a batch: activations (b, n, h), random keys (b, n), and the random places that lie in it."""
        window = self.top.tokens.shape[-1]
        activations = activations.masked_fill(~text.present[..., None], 0)
        known = activations[text.present].double()
        self.sum += known.sum(0)
        self.squares += known.square().sum(0)
        self.positive += (known > 0).sum(0)
        self.maximum = self.maximum.maximum(known.amax(0))
        if self.top.priority.shape[1]:
            beats = activations.clamp(min=0) > self.top.priority[:, -1].clamp(min=0)
            priority = activations.masked_fill(~beats, -torch.inf)
            candidates = _peaks(priority, text.window_starts, window, self.top.priority.shape[1], strict)
            self._offer(self.top, candidates, text, activations)
        if self.active.priority.shape[1]:
            beats = (activations > 0) & (key[..., None] > self.active.priority[:, -1])
            priority = key[..., None].masked_fill(~beats, -torch.inf)
            candidates = _peaks(priority, text.window_starts, window, self.active.priority.shape[1], strict=False)
            self._offer(self.active, candidates, text, activations)
        for place in random_places:
            piece = int((text.starts <= place).sum()) - 1
            at = place - int(text.starts[piece])
            start = text.window_starts[piece, at]
            places, present = text.cut(torch.tensor(piece, device=start.device), start, window)
            tokens = text.tokens[piece, places].masked_fill(~present, NO_TOKEN).int()
            values = (activations[piece, places] * present[:, None]).mT
            self.random.append((tokens, values, int(text.starts[piece] + start), at - int(start)))

    def _offer(self, kept: _Kept, candidates: list[tuple[Tensor, Tensor, Tensor]], text: Text, activations) -> None:
        if candidates:
            priority, piece, at = (torch.cat(parts, 0).mT for parts in zip(*candidates, strict=True))
            kept.merge(priority, piece, at, text, activations)


def _peaks(
    priority: Tensor, window_starts: Tensor, window: int, k: int, strict: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """At most k places of highest priority a neuron: (m, h) priorities, pieces and places in them.

    Strictly, greedily within each piece: the best place, then the best whose window does not overlap one taken.
    """
    b, n, h = priority.shape
    found = []
    if not strict:
        m = min(k, int(priority.isfinite().sum((0, 1)).max()))
        if m:
            best, index = rearrange(priority, "b n h -> (b n) h").topk(m, 0)
            found.append((best, index // n, index % n))
        return found
    piece = repeat(torch.arange(b, device=priority.device), "b -> b h", h=h)
    for _ in range(k):
        best, at = priority.max(1)
        if not best.isfinite().any():
            break
        start = window_starts.gather(1, at)
        found.append((best, piece, at))
        overlaps = (window_starts[..., None] - start[:, None]).abs() < window
        priority = priority.masked_fill(overlaps, -torch.inf)
    return found


def _join(layers: list[_Layer], total: int) -> Records:
    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack(values).cpu()

    def kept(each: list[_Kept]) -> Excerpts:
        return Excerpts(*(stack(list(values)) for values in zip(*(one.ordered() for one in each), strict=True)))

    h, _, window = layers[0].top.tokens.shape
    tokens, _, starts, offsets = zip(*layers[0].random, strict=True) if layers[0].random else ((), (), (), ())
    tokens = torch.stack(tokens).cpu() if tokens else torch.zeros(0, window, dtype=torch.int32)

    def for_all(values: Tensor, axes: str) -> Tensor:
        return repeat(values, f"{axes} -> l h {axes}", l=len(layers), h=h)

    def values(layer: _Layer) -> Tensor:
        return torch.stack([v for _, v, *_ in layer.random], 1) if layer.random else torch.zeros(h, 0, window)

    random = Excerpts(
        tokens=for_all(tokens, "r w"),
        activations=stack([values(layer) for layer in layers]),
        starts=for_all(torch.tensor(starts, dtype=torch.long), "r"),
        offsets=for_all(torch.tensor(offsets, dtype=torch.long), "r"),
    )
    mean = stack([layer.sum for layer in layers]) / total
    return Records(
        top=kept([layer.top for layer in layers]),
        random=random,
        active=_by_activation(kept([layer.active for layer in layers])),
        mean=mean,
        variance=stack([layer.squares for layer in layers]) / total - mean.square(),
        density=stack([layer.positive for layer in layers]) / total,
        maximum=stack([layer.maximum for layer in layers]),
        n_tokens=total,
    )


def _by_activation(excerpts: Excerpts) -> Excerpts:
    """The same excerpts, falling by the activation of the token they were taken for; missing ones last."""
    strength = excerpts.activations.gather(3, excerpts.offsets[..., None])[..., 0]
    order = strength.masked_fill(excerpts.starts < 0, -torch.inf).argsort(dim=2, descending=True, stable=True)
    wide = repeat(order, "l h k -> l h k w", w=excerpts.tokens.shape[-1])
    values = (getattr(excerpts, field.name) for field in fields(Excerpts))
    return Excerpts(*(value.gather(2, wide if value.ndim == 4 else order) for value in values))
