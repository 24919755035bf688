"""The activations that auto-encoders learn from: random pieces of text, read block by block and mixed.

Nothing random has a state: what a block holds, and in which order, is drawn anew from `[seed, number of the block]`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.reading import pieces_of, watch_neurons


class ActivationBlocks:
    """What the neurons of some layers do on a corpus, half a buffer at a time.

    Args:
        model: any.
        corpus: pieces of its documents are drawn with replacement.
        layers: counted from 0.
        buffer: tokens of two blocks together.
        seed: of all that is drawn.
    """

    def __init__(self, model: LanguageModel, corpus: TokenizedCorpus, layers: list[int], buffer: int, seed: int):
        self.model, self.corpus, self.layers, self.seed = model, corpus, layers, seed
        self.pieces = np.array(list(pieces_of(corpus, model.config.context, True, len(corpus))))
        self.n_drawn = max(1, buffer // 2 // model.config.context)

    def read(self, block: int) -> Tensor:
        """Activations (l, n, h) of random pieces of text, their tokens in random order, in float32.

        Raises:
            ValueError: some are not finite.
        """
        draw = np.random.default_rng([self.seed, 0, block])
        drawn = self.pieces[draw.integers(len(self.pieces), size=self.n_drawn)]
        tokens = np.concatenate([self.corpus[start:stop] for start, stop in drawn])
        document = np.repeat(np.arange(len(drawn)), drawn[:, 1] - drawn[:, 0])
        text_drawn = TokenizedCorpus.from_arrays(tokens, document, ["drawn"] * len(drawn), self.corpus.n_vocab)
        device = self.model.token_embedding.weight.device
        order = torch.from_numpy(draw.permutation(len(tokens))).to(device)
        held = torch.empty(len(self.layers), len(tokens), self.model.config.n_neurons, device=device)
        at = 0
        for text, neurons in watch_neurons(self.model, text_drawn, batch=16, ahead=None):
            places = order[at : at + int(text.present.sum())]
            for each, layer in zip(held, self.layers, strict=True):
                each[places] = neurons[layer][text.present].float()
            at += len(places)
        for each, layer in zip(held, self.layers, strict=True):
            if not each.isfinite().all():  # in float64 they may have been, beyond what float32 holds
                raise ValueError(
                    f"activations of layer {layer} are not finite: is the model damaged, or did it diverge?"
                )
        return held


def mixed(old: Tensor, new: Tensor, size: int) -> Iterator[Tensor]:
    """Batches (l, about `size`, h) of the later half of one block and the earlier half of the next.

    So every batch mixes the texts of two blocks, and over time every half is served once.
    """
    late, early = old[:, old.shape[1] // 2 :], new[:, : new.shape[1] // 2]
    most = max(late.shape[1], early.shape[1])  # else some are empty
    n_batches = min(most, max(1, (late.shape[1] + early.shape[1]) // size))
    for halves in zip(late.tensor_split(n_batches, 1), early.tensor_split(n_batches, 1), strict=True):
        yield torch.cat(halves, 1)
