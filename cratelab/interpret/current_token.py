"""How much of a neuron the current token explains: the control that tells a reader of context from a list of words."""

import torch
from torch import Tensor

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.reading import watch_neurons


@torch.no_grad()
def share_explained(model: LanguageModel, corpus: TokenizedCorpus, batch: int = 64) -> tuple[Tensor, float]:
    """Of every neuron the share of its variance that lies between tokens and not between occurrences of one (eq-09-4).

    The correlation ratio η² of activations given the token: 1 for a network that never looks back and knows no places.

    Args:
        model: on any device.
        corpus: read as `cratelab.interpret.records.collect_records` reads it.
        batch: pieces at a time.

    Returns:
        (l, h) float64, NaN for a neuron that is constant; and what pure noise would have, (v − 1)/(n − 1) with v
        different tokens among n.

    Raises:
        ValueError: as `cratelab.reading.watch_neurons`.
    """
    sums, squares = [], []
    count = torch.zeros(corpus.n_vocab, dtype=torch.float64, device="cpu")
    for text, layers in watch_neurons(model, corpus, batch):
        tokens = text.tokens[text.present].long().cpu()
        count += tokens.bincount(minlength=corpus.n_vocab)
        if not sums:
            sums = [count.new_zeros(corpus.n_vocab, a.shape[-1]) for a in layers]
            squares = [count.new_zeros(a.shape[-1]) for a in layers]
        for layer, activations in enumerate(layers):
            a = activations[text.present].cpu().double()  # not every device has doubles
            sums[layer].index_add_(0, tokens, a)
            squares[layer] += a.square().sum(0)
    n, by_token, whole = count.sum(), torch.stack(sums), torch.stack(squares)
    mean_square = by_token.sum(1).square() / n
    between = (by_token.square() / count.clamp(min=1)[:, None]).sum(1) - mean_square
    variance = whole - mean_square
    constant = variance <= 1e-9 * whole
    return (between / variance).masked_fill(constant, torch.nan), float(((count > 0).sum() - 1) / (n - 1))
