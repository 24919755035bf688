"""Reading a corpus with a model, document by document, and seeing what its neurons do."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cratelab.arguments import check_whole
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.devices import check_floating
from cratelab.language_model import LanguageModel

NO_TOKEN = -1  # stands behind the end of a piece of text


@contextmanager
def hooked(*hooks: tuple[nn.Module, Callable], prepend: bool = False) -> Iterator[None]:
    """Inside the `with` block, functions see, and may replace, what modules give; afterwards they are gone.

    Args:
        hooks: (module, function), called as torch calls forward hooks: `function(module, inputs, output)`. What it
            returns, unless that is None, stands in place of the output.
        prepend: before the hooks that the modules have already, not after them.
    """
    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_hook(function, prepend=prepend).remove)
        yield


def texts(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    batch: int = 16,
    window: int = 1,
    by_document: bool = True,
    n_tokens: int | None = None,
    ahead: int | None = 1,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator["Text"]:
    """Read a corpus in pieces that the model can take, a batch at a time.

    Args:
        model: any, on any device.
        corpus: text; not the text the model was trained on, where its behaviour shall be judged.
        batch: pieces at a time.
        window: w tokens of the excerpts that `Text.around` cuts.
        by_document: read each document from its first token; else cut pieces from the stream without regard to them.
        n_tokens: read this many tokens at most.
        ahead: read so many batches ahead and sort their pieces by length, which leaves less padding; 1 keeps the order,
            None reads all batches ahead.
        wanted: which of the batches to read, counted from 0; the others are passed over.

    Raises:
        ValueError: the corpus has no token, or some that the model does not know; or `batch`, `window`, `n_tokens` or
            `ahead` is below 1.
    """
    for name, value in ("batch", batch), ("window", window), ("ahead", 1 if ahead is None else ahead):
        check_whole(name, value)
    total = tokens_to_read(corpus, n_tokens)
    check_vocabulary(model, corpus)
    pieces, numbers = pieces_of(corpus, model.config.context, by_document, total), count()
    while some := list(islice(pieces, ahead and batch * ahead)):
        if ahead != 1:
            some.sort(key=lambda piece: piece[0] - piece[1])  # the longest first
        for first in range(0, len(some), batch):
            if not wanted(number := next(numbers)):
                continue
            text = Text(corpus, some[first : first + batch], window, model.token_embedding.weight.device, number)
            if (largest := int(text.tokens.max())) >= model.config.vocab_size:
                raise ValueError(f"the corpus holds token {largest}, the model knows {model.config.vocab_size}")
            yield text


@torch.no_grad()
def watch_neurons(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    batch: int = 16,
    window: int = 1,
    by_document: bool = True,
    n_tokens: int | None = None,
    ahead: int | None = 1,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[tuple["Text", list[Tensor]]]:
    """Read a corpus piece by piece, and yield what the neurons do.

    Each document is read from its first token, in pieces of at most the model's context.
    The model runs as far as its last neurons. The head is left out: with 50,000 tokens it is the most costly part of a
    small model, and its logits are the largest tensor.

    Args:
        model: any whose blocks have a `neurons` site, on any device.
        corpus, batch, window, by_document, n_tokens, ahead, wanted: what is read and how; see `texts`.

    Yields:
        A batch of text, and each layer's activations (b, n, h); where `Text.present` is false they mean nothing. The
        list is emptied before the next batch is read, so that two batches are never held.

    Raises:
        ValueError: as `texts`; or activations are NaN or infinite.
    """
    activations: list[Tensor] = []

    def note(module, inputs, output: Tensor) -> None:
        activations.append(output)
        if len(activations) == len(model.blocks):
            raise _AllSeen

    with hooked(*((block.neurons, note) for block in model.blocks)):
        for text in texts(model, corpus, batch, window, by_document, n_tokens, ahead, wanted):
            activations.clear()
            with suppress(_AllSeen):
                model(text.tokens.clamp(min=0))
            _check_finite(activations, text)
            yield text, activations


class _AllSeen(Exception):
    """Ends a pass through the model behind its last neurons."""


def _check_finite(layers: list[Tensor], text: "Text") -> None:
    for layer, activations in enumerate(layers):
        sums = activations.sum(2, dtype=torch.promote_types(activations.dtype, torch.float32))
        if not bool(sums.isfinite()[text.present].all()):
            raise ValueError(
                f"layer {layer} of the model has activations that are NaN or infinite, and nothing can be said of "
                "them: are its weights finite, and did its training diverge?"
            )


@torch.no_grad()
def neuron_maxima(
    model: LanguageModel, corpus: TokenizedCorpus, n_tokens: int | None = None, batch: int = 16
) -> list[Tensor]:
    """Of each layer the largest activation of every neuron, (h,), read as `watch_neurons` reads.

    A neuron whose maximum is 0 is dead on this text.

    Raises:
        ValueError: the weights are no floating-point numbers, or as `watch_neurons`.
    """
    check_floating(model)
    maxima: list[Tensor] = []
    for text, layers in watch_neurons(model, corpus, batch, n_tokens=n_tokens):
        here = [activations[text.present].amax(0) for activations in layers]
        maxima = [torch.maximum(*pair) for pair in zip(maxima or here, here, strict=True)]
    return maxima


def check_vocabulary(model: LanguageModel, corpus: TokenizedCorpus, name: str = "corpus") -> None:
    """Raises ValueError if the corpus, known as `name`, has tokens that the model does not know."""
    if corpus.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"the {name} has {corpus.n_vocab} tokens, the model knows {model.config.vocab_size}: take a corpus of the "
            f"model's tokenizer, or a model made with vocab_size={corpus.n_vocab} or more"
        )


def check_size(corpus: TokenizedCorpus, v: int) -> None:
    """Raises ValueError if the corpus has more than v tokens, for which there is a row each."""
    if corpus.n_vocab > v:
        raise ValueError(f"the corpus has {corpus.n_vocab} tokens, more than v={v}")


def check_layer(model: LanguageModel, layer: int) -> None:
    """Raises ValueError if the model has no such layer, counted from 0."""
    if not isinstance(layer, Integral) or layer not in range(len(model.blocks)):
        raise ValueError(f"the model has layers 0 to {len(model.blocks) - 1}; got {layer}")


def tokens_to_read(corpus: TokenizedCorpus, n_tokens: int | None) -> int:
    """`n_tokens`, or as many as there are.

    Raises:
        ValueError: it is below 1, or there are none.
    """
    if n_tokens is not None:
        check_whole("n_tokens", n_tokens)
    if not len(corpus):
        raise ValueError("the corpus holds no token")
    return len(corpus) if n_tokens is None else min(n_tokens, len(corpus))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token.

    Raises:
        ValueError: the tokenizer has none of this number, such as those with which a model's vocabulary is padded.
    """
    try:
        if token >= 0:
            return tokenizer.decode([token])
    except (LookupError, OverflowError):
        pass
    raise ValueError(f"there is no token {token} in the tokenizer {getattr(tokenizer, 'name', '')}")


def pieces_of(corpus: TokenizedCorpus, context: int, by_document: bool, total: int) -> Iterator[tuple[int, int]]:
    """Where each sequence that the model reads starts and stops in the corpus.

    Args:
        corpus: of documents, each read from its first token; read as one stream where not `by_document`.
        context: longest sequence.
        by_document: whether documents count.
        total: tokens from the start of the corpus; later ones are not read.
    """
    spans = (corpus.document_span(i) for i in range(corpus.n_documents)) if by_document else [(0, len(corpus))]
    for start, stop in spans:
        for first in range(start, min(stop, total), context):
            yield first, min(first + context, stop, total)


class Windows(NamedTuple):
    """Excerpts of m windows of w tokens.

    Attributes:
        places: (m, w) where in their piece the tokens stand.
        present: (m, w) bool, false behind the end of a piece that is shorter than the window.
        tokens: (m, w) int32, `NO_TOKEN` where there is no text.
        starts: (m,) place of the first token in the corpus.
        offsets: (m,) place in the window of the token that it was taken for.
    """

    places: Tensor
    present: Tensor
    tokens: Tensor
    starts: Tensor
    offsets: Tensor


class Text:
    """A batch of pieces of a corpus.

    Attributes:
        tokens: (b, n) int64, `NO_TOKEN` behind the end of a piece.
        present: (b, n) bool, where there is text.
        full: whether that is everywhere.
        starts: (b,) place of each piece's first token in the corpus.
        window_starts: (b, n) where in its piece the window around each token begins.
        number: of the batch, counted from 0.
        n_tokens: in all its pieces.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        pieces: list[tuple[int, int]],
        window: int,
        device: torch.device,
        number: int = 0,
    ):
        lengths = np.array([stop - start for start, stop in pieces])
        tokens = np.full((len(pieces), lengths.max()), NO_TOKEN, np.int64)
        for row, (start, stop) in zip(tokens, pieces, strict=True):
            row[: stop - start] = corpus[start:stop]
        self.pieces, self.window, self.number = pieces, window, number
        self.tokens = torch.from_numpy(tokens).to(device)
        self.starts = torch.tensor([start for start, _ in pieces], device=device)
        self.present = self.tokens != NO_TOKEN
        self.n_tokens, self.full = int(lengths.sum()), bool((lengths == lengths.max()).all())
        places = torch.arange(tokens.shape[1], device=device)
        last = torch.from_numpy(lengths - window).to(device).clamp(min=0)
        self.window_starts = (places - window // 2).clamp(min=0).minimum(last[:, None])  # (b, n)

    def arrival(self, piece: Tensor, at: Tensor) -> Tensor:
        """(m,) int64 that grow from batch to batch and in it from token to token."""
        return self.number * 2**32 + piece * self.tokens.shape[1] + at

    def around(self, piece: Tensor, at: Tensor) -> Windows:
        """The windows around the tokens at places `at` (m,) of the pieces (m,)."""
        start = self.window_starts[piece, at]
        places = start[:, None] + torch.arange(self.window, device=start.device)
        inside = places < self.tokens.shape[1]
        places = places.clamp(max=self.tokens.shape[1] - 1)
        tokens = self.tokens[piece[:, None], places]
        present = inside & (tokens != NO_TOKEN)
        return Windows(
            places, present, tokens.masked_fill(~inside, NO_TOKEN).int(), self.starts[piece] + start, at - start
        )


def check_contexts(model: LanguageModel, contexts: Tensor, batch: int = 1, least: int = 1) -> None:
    """Raises ValueError unless these are (c, n) tokens of the model's, n at least `least`, to be read in batches."""
    check_whole("batch", batch)
    if contexts.ndim != 2 or not len(contexts) or contexts.shape[1] < least:
        raise ValueError(f"contexts must be (c, n), c at least 1, n at least {least}; got {tuple(contexts.shape)}")
    check_floating(model)
    v = model.config.vocab_size
    if contexts.dtype not in (torch.int32, torch.int64) or not ((contexts >= 0) & (contexts < v)).all():
        raise ValueError(
            f"contexts must be integers from 0 to {v - 1}; got {contexts.dtype}, "
            f"{contexts.min().item()} to {contexts.max().item()}"
        )
