"""What a model is judged by: nats a token on windows, and token by token in whole documents (chapter 7)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.arguments import check_whole
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel


class Diverged(RuntimeError):
    """A loss, its gradient or a weight is no finite number, or the loss stays above that of the untrained model."""


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token of the windows (b, n + 1) given those before it (eq-07-1)."""
    windows = windows.to(next(model.parameters()).device)
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LanguageModel, windows: Tensor, batch: int = 16) -> float:
    """`next_token_loss` over many windows, (b, n + 1) integers, `batch` at a time.

    Raises:
        ValueError: there is no window, or `batch` is below 1.
    """
    check_whole("batch", batch)
    if not len(windows):
        raise ValueError(f"validation_loss needs one window or more; got {tuple(windows.shape)}")
    parts = windows.split(batch)
    return sum(float(next_token_loss(model, part)) * len(part) for part in parts) / len(windows)


@torch.no_grad()
def document_log_probs(model: LanguageModel, corpus: TokenizedCorpus, batch: int = 16) -> np.ndarray:
    """Nats of each token of a corpus given all before it in its document: what the gap is made of (eq-07-2).

    Args:
        model: on any device.
        corpus: read document by document; those of similar length together, `batch` at a time.
        batch: documents.

    Returns:
        (n,) float32; NaN for the first token of each document, which has none before it, and past context + 1.
    """
    device = next(model.parameters()).device
    log_probs = np.full(len(corpus), np.nan, np.float32)
    spans = [corpus.document_span(i) for i in range(corpus.n_documents)]
    spans = sorted(
        ((start, min(stop, start + model.config.context + 1)) for start, stop in spans), key=lambda s: s[1] - s[0]
    )
    for first in range(0, len(spans), batch):
        group = spans[first : first + batch]
        windows = torch.zeros(len(group), group[-1][1] - group[-1][0], dtype=torch.long)
        for window, (start, stop) in zip(windows, group, strict=True):
            window[: stop - start] = torch.from_numpy(corpus[start:stop].astype(np.int64))
        if windows.shape[1] < 2:
            continue
        windows = windows.to(device)
        losses = F.cross_entropy(model(windows[:, :-1]).mT.float(), windows[:, 1:], reduction="none")
        for loss, (start, stop) in zip(losses.cpu().numpy(), group, strict=True):
            log_probs[start + 1 : stop] = -loss[: stop - start - 1]
    return log_probs
