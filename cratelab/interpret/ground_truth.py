"""How well neurons match concepts that are known to be there: the measure that needs no explanation (TinyWorld).

For every neuron: the concept it detects best, how much of its activation lies on that concept, how many concepts it
takes to cover most of it; and for words of two senses, whether any neuron tells the senses apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.concepts import Concepts
from cratelab.language_model import LanguageModel
from cratelab.reading import neuron_maxima, watch_neurons

THRESHOLDS = 10  # a neuron is said to fire above 0, 1/10, …, 9/10 of its maximum: the best of these counts

Pass = tuple[int, Tensor, Tensor]  # a layer, activations (m, h), and the tokens' places (m,) in the corpus


@dataclass
class GroundTruth:
    """Each of l × h neurons against c concepts.

    Attributes:
        f1: (l, h) F1 of the best concept, when the neuron is read as a detector of it.
        best: (l, h) index of that concept; -1 for a neuron that is never positive.
        purity: (l, h) share of the neuron's activation that lies on its best concept.
        base_rate: (l, h) share of all tokens that have that concept: what purity would be by chance.
        n_concepts: (l, h) how many concepts, chosen greedily, hold `coverage` of the activation; 0 if never positive.
    """

    f1: Tensor
    best: Tensor
    purity: Tensor
    base_rate: Tensor
    n_concepts: Tensor


@torch.no_grad()
def match_concepts(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    concepts: Concepts,
    coverage: float = 0.8,
    max_concepts: int = 10,
    batch: int = 64,
) -> GroundTruth:
    """Compare all neurons with all concepts, on every token of a corpus.

    Args:
        model: on any device.
        corpus: what `concepts` was made for; read as `collect_records` reads it.
        concepts: c of them.
        coverage: share of the activation that `n_concepts` has to hold.
        max_concepts: where the count stops; max_concepts + 1 means more.
        batch: pieces at a time.

    The text is read for the maxima, for the counts, and for every step of the greedy cover.

    Raises:
        ValueError: the concepts are none or of another text, an argument is out of range, or as `watch_neurons`.
    """
    _check(corpus, concepts)
    if not concepts.names or not 0 <= coverage <= 1 or not 0 <= max_concepts <= 1000:
        raise ValueError(
            "match_concepts needs a concept, coverage from 0 to 1 and max_concepts from 0 to 1000; "
            f"got {len(concepts.names)} concepts, {coverage} and {max_concepts}"
        )
    truth = concepts.truth.to(model.token_embedding.weight.device).float()
    passes = partial(_passes, model, corpus, batch)
    maxima = torch.stack(neuron_maxima(model, corpus, batch=batch)).float().clamp(min=0)
    f1, mass, total = _detect(passes(), truth, maxima)
    f1, best = f1.amax(1).max(-1)
    live = total > 0
    purity = mass.gather(2, best[..., None])[..., 0] / total.clamp(min=1e-30)
    return GroundTruth(
        f1=f1.masked_fill(~live, 0).cpu(),
        best=best.masked_fill(~live, -1).cpu(),
        purity=purity.cpu(),
        base_rate=truth.mean(0)[best].cpu(),
        n_concepts=_greedy_cover(passes, truth, mass, total, coverage, max_concepts).cpu(),
    )


def _detect(passes: Iterator[Pass], truth: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F1 at each threshold, (l, t, h, c); and the activation on each concept, (l, h, c), and on all tokens, (l, h)."""
    (n_layers, h), c = maxima.shape, truth.shape[1]
    hits = truth.new_zeros(n_layers, THRESHOLDS, h, c)
    fired = truth.new_zeros(n_layers, THRESHOLDS, h)
    mass, total = truth.new_zeros(n_layers, h, c), truth.new_zeros(n_layers, h)
    for layer, activations, places in passes:
        here, a = truth[places], activations.clamp(min=0)
        mass[layer] += a.mT @ here
        total[layer] += a.sum(0)
        for t in range(THRESHOLDS):
            fires = (a > maxima[layer] * t / THRESHOLDS).float()
            hits[layer, t] += fires.mT @ here
            fired[layer, t] += fires.sum(0)
    return 2 * hits / (fired[..., None] + truth.sum(0)).clamp(min=1), mass, total


def _greedy_cover(
    passes: Callable[[], Iterator[Pass]], truth: Tensor, mass: Tensor, total: Tensor, coverage: float, most: int
) -> Tensor:
    """(l, h) how many concepts, each the one with most of the activation that the others leave, hold `coverage` of it.

    Args:
        passes: reads the text once more, for every step.
        truth: (n, c).
        mass: (l, h, c) activation on each concept.
        total: (l, h).
        coverage: share of `total`.
        most: where the count stops; most + 1 means more.
    """
    uncovered, n_concepts = total, torch.zeros_like(total, dtype=torch.long)
    chosen = torch.full((*total.shape, most), -1, device=total.device)
    for step in range(most):
        going = uncovered > (1 - coverage) * total
        if not going.any():
            break
        n_concepts += going
        chosen[..., step] = torch.where(going, mass.argmax(-1), -1)
        mass, uncovered = torch.zeros_like(mass), torch.zeros_like(total)
        for layer, activations, places in passes():
            here, a = truth[places], activations.clamp(min=0)
            covered = torch.zeros_like(a, dtype=torch.bool)
            for concept in chosen[layer, :, : step + 1].mT:
                covered |= (here[:, concept.clamp(min=0)] > 0) & (concept >= 0)
            rest = a.masked_fill(covered, 0)
            mass[layer] += rest.mT @ here
            uncovered[layer] += rest.sum(0)
    return n_concepts + (uncovered > (1 - coverage) * total)


@torch.no_grad()
def separate_senses(
    model: LanguageModel, corpus: TokenizedCorpus, concepts: Concepts, batch: int = 64
) -> dict[str, tuple[float, int, int]]:
    """For each word of two senses, how well the best single neuron tells them apart.

    The neuron is chosen on every other occurrence of the word and judged on the rest: the area under its ROC curve, one
    half if it tells nothing, and 1 if every occurrence in one sense activates it more than any in the other.

    Args:
        model: on any device.
        corpus: TinyWorld.
        concepts: with names "sense:word/meaning".
        batch: pieces at a time.

    Returns:
        Of each word the area, layer and neuron. Words with fewer than 20 occurrences in either sense are left out.

    Raises:
        ValueError: the concepts are of another text, or as `watch_neurons`.
    """
    _check(corpus, concepts)
    senses: dict[str, list[int]] = {}
    for index, name in enumerate(concepts.names):
        if name.startswith("sense:"):
            senses.setdefault(name.removeprefix("sense:").split("/")[0], []).append(index)
    marked = concepts.truth[:, [index for pair in senses.values() for index in pair]].any(1)
    held: list[list[Tensor]] = [[] for _ in model.blocks]
    where: list[Tensor] = []
    for layer, activations, places in _passes(model, corpus, batch):
        kept = marked[places.cpu()]
        held[layer].append(activations.cpu()[kept])
        if layer == 0:
            where.append(places.cpu()[kept])
    places, activations = torch.cat(where), torch.stack([torch.cat(parts) for parts in held])  # (l, m, h)

    found = {}
    for word, pair in senses.items():
        if len(pair) != 2:
            continue
        first, second = (concepts.truth[places, index] for index in pair)
        mine = (first ^ second).nonzero()[:, 0]
        halves = [mine[::2], mine[1::2]]
        if min(int(sense[half].sum()) for sense in (first, second) for half in halves) < 10:
            continue
        area = _areas(activations[:, halves[0]], first[halves[0]])
        layer, neuron = np.unravel_index(np.abs(area - 0.5).argmax(), area.shape)
        judged = _areas(activations[layer : layer + 1, halves[1], neuron : neuron + 1], first[halves[1]])[0, 0]
        found[word] = float(judged if area[layer, neuron] > 0.5 else 1 - judged), int(layer), int(neuron)
    return found


def _areas(values: Tensor, is_first: Tensor) -> np.ndarray:
    """Of every neuron, (l, m, h) and (m,) to (l, h): the share of pairs in which the first sense activates it more.

    Ties count half. In float64, since the statistic comes in the precision of the values.
    """
    from scipy.stats import mannwhitneyu

    first, second = (values[:, which].double().numpy() for which in (is_first, ~is_first))
    pairs = first.shape[1] * second.shape[1]
    return np.stack(
        [mannwhitneyu(a, b, method="asymptotic").statistic / pairs for a, b in zip(first, second, strict=True)]
    )


def _check(corpus: TokenizedCorpus, concepts: Concepts) -> None:
    if len(concepts.truth) != len(corpus):
        raise ValueError(f"the concepts are of {len(concepts.truth)} tokens, the corpus holds {len(corpus)}")


def _passes(model: LanguageModel, corpus: TokenizedCorpus, batch: int) -> Iterator[Pass]:
    """Batch after batch, layer after layer."""
    for text, layers in watch_neurons(model, corpus, batch):
        places = (text.starts[:, None] + torch.arange(text.tokens.shape[1], device=text.starts.device))[text.present]
        for layer, activations in enumerate(layers):
            yield layer, activations.float()[text.present], places
