"""What a table of n-grams knows: what a language model of real text has to beat before it is worth asking."""

import numpy as np

from cratelab.arguments import check_whole


def witten_bell(training: np.ndarray, held_out: np.ndarray, n_vocab: int, order: int) -> list[float]:
    """Loss on held-out tokens of n-gram tables blended by Witten and Bell's rule (eq-06-5), orders 1 to `order`.

    Args:
        training: (n,) integers from 0 to `n_vocab` − 1, one stream.
        held_out: (m,) likewise; its first `order` − 1 tokens are only context.
        n_vocab: v.
        order: the longest; v to the power of it must be below 2⁶³.

    Returns:
        Nats a token of each order, all over the same tokens.

    Raises:
        ValueError: a stream is shorter than the order, holds what is no token, or `order` is below 1 or too large.

    Source: Witten & Bell (1991).
    """
    check_whole("order", order)
    check_whole("n_vocab", n_vocab)
    n_vocab = int(n_vocab)  # of numpy's integers a power may overflow
    training, held_out = np.asarray(training), np.asarray(held_out)
    for name, stream in ("training", training), ("held_out", held_out):
        if len(stream) < order or stream.dtype.kind not in "iu" or stream.min() < 0 or stream.max() >= n_vocab:
            raise ValueError(
                f"{name} must be at least {order} tokens from 0 to {n_vocab - 1}; got {len(stream)}"
                + (f" from {stream.min()} to {stream.max()}" if len(stream) else "")
            )
    if n_vocab**order >= 2**63:
        raise ValueError(f"{n_vocab} tokens to the power of {order} do not fit 64 bits: lower the order")
    probability, losses = np.full(len(held_out) - order + 1, 1 / n_vocab), []
    for k in range(1, order + 1):
        gram, count = np.unique(_grams(training, k, n_vocab), return_counts=True)
        context, first = np.unique(gram // n_vocab, return_index=True)
        types = np.diff(np.append(first, len(gram)))
        total = np.add.reduceat(count, first)
        asked = _grams(held_out, k, n_vocab)[order - k :]
        c, t, n = _look_up(gram, count, asked), *(_look_up(context, x, asked // n_vocab) for x in (types, total))
        probability = np.where(n > 0, (c + t * probability) / np.maximum(n + t, 1), probability)
        losses.append(float(-np.log(probability).mean()))
    return losses


def _grams(stream: np.ndarray, k: int, n_vocab: int) -> np.ndarray:
    """Every k tokens in a row as one number, the last the lowest digit."""
    n = len(stream) - k + 1
    grams = np.zeros(n, np.int64)
    for i in range(k):
        grams = grams * n_vocab + stream[i : i + n].astype(np.int64)
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of each key asked for its value, 0 where there is none; `keys` are sorted."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
