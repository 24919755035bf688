"""Reading a corpus with a model, document by document, and seeing what its neurons do."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cratelab.corpora.tokenized import TokenizedCorpus
from cratelab.language_model import LanguageModel

NO_TOKEN = -1  # stands behind the end of a piece of text


@torch.no_grad()
def watch_neurons(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    batch: int = 16,
    window: int = 1,
    strict: bool = True,
    n_tokens: int | None = None,
) -> Iterator[tuple["Text", list[Tensor]]]:
    """Read a corpus piece by piece, as `collect_records` describes, and yield what the neurons do.

    Yields:
        A batch of text, and each layer's activations (b, n, h); where `Text.present` is false they mean nothing.

    Raises:
        ValueError: the corpus has tokens that the model does not know.
    """
    if corpus.n_vocab > model.config.vocab_size:
        raise ValueError(f"the corpus has {corpus.n_vocab} tokens, the model knows {model.config.vocab_size}")
    pieces = list(_pieces(corpus, model.config.context, strict, n_tokens or len(corpus)))
    activations: list[Tensor] = []
    hooks = [block.neurons.register_forward_hook(lambda m, a, out: activations.append(out)) for block in model.blocks]
    try:
        for first in range(0, len(pieces), batch):
            text = Text(corpus, pieces[first : first + batch], window, model.token_embedding.weight.device)
            activations.clear()
            model(text.tokens.clamp(min=0))
            yield text, list(activations)
    finally:
        for hook in hooks:
            hook.remove()


def _pieces(corpus: TokenizedCorpus, context: int, strict: bool, total: int) -> Iterator[tuple[int, int]]:
    """Where each sequence that the model reads starts and stops in the corpus."""
    spans = (corpus.document_span(i) for i in range(corpus.n_documents)) if strict else [(0, len(corpus))]
    for start, stop in spans:
        for first in range(start, min(stop, total), context):
            yield first, min(first + context, stop, total)


class Text:
    """A batch of pieces of a corpus.

    Attributes:
        tokens: (b, n) int64, `NO_TOKEN` behind the end of a piece.
        present: (b, n) bool, where there is text.
        starts: (b,) place of each piece's first token in the corpus.
        stop: place behind the last.
        window_starts: (b, n) where in its piece the window around each token begins.
    """

    def __init__(self, corpus: TokenizedCorpus, pieces: list[tuple[int, int]], window: int, device: torch.device):
        lengths = np.array([stop - start for start, stop in pieces])
        tokens = np.full((len(pieces), lengths.max()), NO_TOKEN, np.int64)
        for row, (start, stop) in zip(tokens, pieces, strict=True):
            row[: stop - start] = corpus[start:stop]
        self.tokens = torch.from_numpy(tokens).to(device)
        self.starts = torch.tensor([start for start, _ in pieces], device=device)
        self.stop = pieces[-1][1]
        self.present = self.tokens != NO_TOKEN
        places = torch.arange(tokens.shape[1], device=device)
        last = torch.from_numpy(lengths - window).to(device).clamp(min=0)
        self.window_starts = (places - window // 2).clamp(min=0).minimum(last[:, None])  # (b, n)

    def cut(self, piece: Tensor, start: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Places (…, w) in the pieces (…,) from `start` (…,) on, and which of them hold text."""
        places = start[..., None] + torch.arange(window, device=start.device)
        inside = places < self.tokens.shape[1]
        places = places.clamp(max=self.tokens.shape[1] - 1)
        return places, inside & self.present[piece[..., None], places]
