"""How well neurons match concepts that are known to be there: the measure that needs no explanation (TinyWorld).

For every neuron: the concept it detects best, how much of its activation lies on that concept, and how much would by
chance; how many concepts it takes to cover most of it; and for words of two senses, whether any neuron tells the senses
apart. What is chosen, is chosen on one half of the documents and judged on the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cratelab.arguments import check_whole
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.concepts import Concepts
from cratelab.language_model import LanguageModel
from cratelab.reading import neuron_maxima, watch_neurons

THRESHOLDS = 10  # a neuron is said to fire above 0, 1/10, …, 9/10 of its maximum: the best of these counts
LEAST = 30  # occurrences, of one concept among hundreds: a neuron that fires on two tokens would match one by luck

Pass = tuple[int, Tensor, Tensor]  # a layer, activations (m, h), and the truth (m, c) of the tokens


@dataclass
class GroundTruth:
    """Each of l × h neurons against c concepts.

    Concept and threshold are chosen on the even documents (0, 2, …); all else is measured on the odd ones.

    Attributes:
        best: (l, h) index of the concept with the highest F1, the neuron being read as a detector of it; -1 for a
            neuron that is never positive in the even documents.
        f1: (l, h) F1 of that concept.
        purity: (l, h) share of the neuron's activation that lies on that concept.
        base_rate: (l, h) share of all tokens that have that concept: what purity would be by chance.
        n_concepts: (l, h) how many concepts, chosen greedily, hold `coverage` of the activation; 0 if never positive.
    """

    best: Tensor
    f1: Tensor
    purity: Tensor
    base_rate: Tensor
    n_concepts: Tensor

    @property
    def log_lift(self) -> Tensor:
        """The logarithm of purity over base rate, (l, h), in nats; 0 by chance, −∞ where the purity is 0."""
        return (self.purity / self.base_rate).log()


@torch.no_grad()
def match_concepts(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    concepts: Concepts,
    coverage: float = 0.8,
    max_concepts: int = 10,
    batch: int = 64,
    least: int = LEAST,
) -> GroundTruth:
    """Compare all neurons with all concepts, on every token of a corpus.

    Args:
        model: on any device.
        corpus: what `concepts` was made for; read as `collect_records` reads it.
        concepts: c of them. For words and grammar apart, see `Concepts.is_word` and `Concepts.only`.
        coverage: share of the activation that `n_concepts` has to hold.
        max_concepts: where the count stops; max_concepts + 1 means more.
        batch: pieces at a time.
        least: concepts with fewer occurrences in either half are no candidates.

    Half of the text is read for the maxima, the same half for the choice, the other for the verdict, and all of it for
    every step of the greedy cover.

    Raises:
        ValueError: no concept is left or they are of another text, an argument is out of range, or as `watch_neurons`.
    """
    _check(corpus, concepts)
    if not 0 <= coverage <= 1 or not 0 <= max_concepts <= 1000 or not least >= 1:
        raise ValueError(
            "match_concepts needs coverage from 0 to 1, max_concepts from 0 to 1000 and least of at least 1; "
            f"got {coverage}, {max_concepts} and {least}"
        )
    halves = _halves(corpus)
    candidates = torch.stack([concepts.truth[kept].sum(0) >= least for _, kept in halves]).all(0).nonzero()[:, 0]
    if not len(candidates):
        raise ValueError(
            f"none of {len(concepts.names)} concepts occurs {least} times in both the even and the odd documents; "
            "take more text and more documents, or a smaller `least`"
        )
    device = model.token_embedding.weight.device
    chosen_on, judged_on = (
        _Half(model, half, concepts.truth[kept][:, candidates].to(device).float(), batch) for half, kept in halves
    )
    maxima = torch.stack(neuron_maxima(model, chosen_on.corpus, batch=batch)).float().clamp(min=0)
    best, threshold = _choose(chosen_on, maxima)
    f1, purity, total = _judge(judged_on, best, threshold)
    live = maxima > 0
    return GroundTruth(
        best=candidates.to(device)[best].masked_fill(~live, -1).cpu(),
        f1=f1.masked_fill(~live, 0).cpu(),
        purity=purity.cpu(),
        base_rate=judged_on.truth.mean(0)[best].cpu(),
        n_concepts=_greedy_cover(chosen_on, judged_on, total, coverage, max_concepts).cpu(),
    )


@dataclass
class _Half:
    """Every other document of a text, with the truth (m, c) of its tokens; to be read with a model, again and again."""

    model: LanguageModel
    corpus: TokenizedCorpus
    truth: Tensor
    batch: int

    def __iter__(self) -> Iterator[Pass]:
        for layer, activations, places in _passes(self.model, self.corpus, self.batch):
            yield layer, activations.clamp(min=0), self.truth[places]


def _halves(corpus: TokenizedCorpus) -> list[tuple[TokenizedCorpus, Tensor]]:
    """The even and the odd documents, each a corpus of its own; and which tokens (n,) of the whole are in it."""
    lengths = np.array([len(corpus.document(index)) for index in range(corpus.n_documents)], np.int64)
    halves = []
    for rest in (0, 1):
        here = np.arange(len(lengths)) % 2 == rest
        kept = np.repeat(here, lengths)
        table = np.stack([lengths[here], np.zeros(here.sum(), np.int64)], 1)
        halves.append((TokenizedCorpus([corpus[:][kept]], [table], [["half"]], corpus.n_vocab), torch.from_numpy(kept)))
    return halves


def _choose(half: _Half, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Of each neuron the concept with the highest F1, and the activation above which it then fires; (l, h) each."""
    (n_layers, h), c = maxima.shape, half.truth.shape[1]
    thresholds = maxima[:, None] * torch.arange(THRESHOLDS, device=maxima.device)[:, None] / THRESHOLDS  # (l, t, h)
    hits = half.truth.new_zeros(n_layers, THRESHOLDS * h, c)
    fired = half.truth.new_zeros(n_layers, THRESHOLDS * h)
    for layer, activations, here in half:
        fires = (activations[:, None] > thresholds[layer]).flatten(1).float()
        hits[layer].addmm_(fires.mT, here)
        fired[layer] += fires.sum(0)
    f1 = 2 * hits / (fired[..., None] + half.truth.sum(0))
    f1, best_at = f1.unflatten(1, (THRESHOLDS, h)).max(-1)
    at = f1.argmax(1, keepdim=True)
    return best_at.gather(1, at)[:, 0], thresholds.gather(1, at)[:, 0]


def _judge(half: _Half, best: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F1 and purity of each neuron with its concept and threshold, and its whole activation; (l, h) each."""
    hits, fired, mass, total = half.truth.new_zeros(4, *best.shape)
    for layer, activations, truth in half:
        here, fires = truth[:, best[layer]], (activations > threshold[layer]).float()
        hits[layer] += (fires * here).sum(0)
        fired[layer] += fires.sum(0)
        mass[layer] += (activations * here).sum(0)
        total[layer] += activations.sum(0)
    return 2 * hits / (fired + half.truth.sum(0)[best]), mass / total.clamp(min=1e-30), total


def _greedy_cover(chosen_on: _Half, judged_on: _Half, total: Tensor, coverage: float, most: int) -> Tensor:
    """(l, h) how many concepts, each the one with most of the activation that the others leave, hold `coverage` of it.

    Args:
        chosen_on: where each next concept is found.
        judged_on: where it is seen how much is left.
        total: (l, h) activation there.
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
        mass, uncovered = total.new_zeros(*total.shape, chosen_on.truth.shape[1]), torch.zeros_like(total)
        for layer, rest, here in _uncovered(chosen_on, chosen[..., :step]):
            mass[layer] += rest.mT @ here
        chosen[..., step] = torch.where(going, mass.argmax(-1), -1)
        for layer, rest, _ in _uncovered(judged_on, chosen[..., : step + 1]):
            uncovered[layer] += rest.sum(0)
    return n_concepts + (uncovered > (1 - coverage) * total)


def _uncovered(half: _Half, chosen: Tensor) -> Iterator[Pass]:
    """The passes, with activations 0 where one of the neuron's concepts (l, h, k) is true; -1 is none."""
    for layer, activations, here in half:
        for concept in chosen[layer].mT:
            covered = (here[:, concept.clamp(min=0)] > 0) & (concept >= 0)
            activations = activations.masked_fill(covered, 0)
        yield layer, activations, here


@torch.no_grad()
def separate_senses(
    model: LanguageModel, corpus: TokenizedCorpus, concepts: Concepts, batch: int = 64
) -> dict[str, tuple[float, int, int]]:
    """For each word of two senses, how well the best single neuron tells them apart.

    The neuron is chosen on the even documents and judged on the odd ones: the area under its ROC curve, one half if it
    tells nothing, and 1 if every occurrence in one sense activates it more than any in the other. Where the domain
    decides the sense, knowing the domain is enough: see `sense_controls`, and `uses_within_domains` for more.

    Args:
        model: on any device.
        corpus: TinyWorld.
        concepts: with names "sense:word/meaning".
        batch: pieces at a time.

    Returns:
        Of each word the area, layer and neuron. Words with fewer than 10 occurrences in either sense in either half of
        the documents are left out.

    Raises:
        ValueError: the concepts are of another text, or as `watch_neurons`.
    """
    _check(corpus, concepts)
    pairs = _pairs(concepts)
    marked = concepts.truth[:, [index for pair in pairs.values() for index in pair]].any(1)
    held: list[list[Tensor]] = [[] for _ in model.blocks]
    where: list[Tensor] = []
    for layer, activations, places in _passes(model, corpus, batch):
        kept = marked[places.cpu()]
        held[layer].append(activations.cpu()[kept])
        if layer == 0:
            where.append(places.cpu()[kept])
    activations = torch.stack([torch.cat(parts) for parts in held])  # (l, m, h)
    row = torch.zeros(len(corpus), dtype=torch.long)
    row[torch.cat(where)] = torch.arange(activations.shape[1])

    found = {}
    for word, first, chosen_on, judged_on in _occurrences(corpus, concepts):
        area = _areas(activations[:, row[chosen_on]], first[chosen_on])
        layer, neuron = np.unravel_index(np.abs(area - 0.5).argmax(), area.shape)
        values = activations[layer : layer + 1, row[judged_on], neuron : neuron + 1]
        judged = _areas(values, first[judged_on])[0, 0]
        found[word] = float(judged if area[layer, neuron] > 0.5 else 1 - judged), int(layer), int(neuron)
    return found


def sense_controls(corpus: TokenizedCorpus, concepts: Concepts, n_before: int = 4) -> dict[str, tuple[float, float]]:
    """How well the same words' senses are told apart without any network: what `separate_senses` asks for.

    Args:
        corpus: TinyWorld.
        concepts: with names "sense:word/meaning".
        n_before: words before the word that the bag may hold, of the same document.

    Returns:
        Of each word two areas, chosen and judged as those of neurons. The first is of the domain of the document that
        tells most, the second of a bag of the words before, regardless of their order (naive Bayes, counts plus one).

    Raises:
        ValueError: the concepts are of another text, or `n_before` is below 1.
    """
    _check(corpus, concepts)
    check_whole("n_before", n_before)
    stream = torch.from_numpy(corpus[:].astype(np.int64))
    document = torch.from_numpy(
        np.repeat(np.arange(corpus.n_documents), [len(corpus.document(i)) for i in range(corpus.n_documents)])
    )
    names = [corpus.domain(i) for i in range(corpus.n_documents)]
    domain = torch.tensor([[name == each for each in sorted(set(names))] for name in names])
    found = {}
    for word, first, *halves in _occurrences(corpus, concepts):
        bags = []
        for half in halves:
            places = half[:, None] - torch.arange(1, n_before + 1)
            inside, places = places >= 0, places.clamp(min=0)
            inside &= document[places] == document[half][:, None]
            bag = torch.zeros(len(half), corpus.n_vocab, dtype=torch.float64)
            bags.append(bag.scatter_add_(1, stream[places], inside.double()))
        one, other = (bags[0][first[halves[0]] == sense].sum(0) + 1 for sense in (True, False))
        odds = (one / one.sum()).log() - (other / other.sum()).log()
        by_bag = _areas((bags[1] @ odds)[None, :, None], first[halves[1]])[0, 0]
        chosen, judged = (_areas(domain[document[half]][None].float(), first[half])[0] for half in halves)
        best = np.abs(chosen - 0.5).argmax()
        found[word] = float(judged[best] if chosen[best] > 0.5 else 1 - judged[best]), float(by_bag)
    return found


def _pairs(concepts: Concepts) -> dict[str, list[int]]:
    """Of each word the indices of its senses."""
    senses: dict[str, list[int]] = {}
    for index, name in enumerate(concepts.names):
        if name.startswith("sense:"):
            senses.setdefault(name.removeprefix("sense:").split("/")[0], []).append(index)
    return senses


def _occurrences(corpus: TokenizedCorpus, concepts: Concepts) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Words of two senses: where (n,) the first is meant; and their places (m,) in even, then in odd documents."""
    (_, even), _ = _halves(corpus)
    for word, pair in _pairs(concepts).items():
        if len(pair) != 2:
            continue
        first, second = (concepts.truth[:, index] for index in pair)
        halves = [((first ^ second) & half).nonzero()[:, 0] for half in (even, ~even)]
        if min(int(sense[half].sum()) for sense in (first, second) for half in halves) >= 10:
            yield word, first, *halves


def _areas(values: Tensor, is_first: Tensor) -> np.ndarray:
    """Of every neuron, (l, m, h) and (m,) to (l, h): the share of pairs in which the first sense activates it more.

    Ties count half.
    """
    from scipy.stats import rankdata

    first = is_first.numpy()
    n_first, n_second = first.sum(), (~first).sum()
    ranks = rankdata(values.numpy(), axis=1)[:, first].sum(1)  # float64, whatever the values
    return (ranks - n_first * (n_first + 1) / 2) / (n_first * n_second)


def _check(corpus: TokenizedCorpus, concepts: Concepts) -> None:
    if len(concepts.truth) != len(corpus):
        raise ValueError(f"the concepts are of {len(concepts.truth)} tokens, the corpus holds {len(corpus)}")


def _passes(model: LanguageModel, corpus: TokenizedCorpus, batch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batch after batch, layer after layer: activations (m, h) and the tokens' places (m,) in the corpus."""
    for text, layers in watch_neurons(model, corpus, batch):
        places = (text.starts[:, None] + torch.arange(text.tokens.shape[1], device=text.starts.device))[text.present]
        for layer, activations in enumerate(layers):
            yield layer, activations.float()[text.present], places
