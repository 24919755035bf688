"""Generation: text continued token by token, with a cache as long as the context lasts (chapter 5)."""

import math
import warnings
from numbers import Real

import torch
from torch import Tensor, nn

from cratelab.arguments import check_seed, check_whole
from cratelab.devices import all_finite


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    n_new: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: int | None = None,
    n_vocab: int | None = None,
) -> Tensor:
    """Continue each row of `tokens` by sampling.

    Args:
        model: a `LanguageModel`, of which this is a method.
        tokens: prompts, (b, n) integers, n at least 1.
        n_new: tokens to add at most.
        temperature: divides the logits; 0 takes the most likely token, the first of several.
        top_k: sample among the k most likely tokens only; of equally likely ones the first count.
        seed: 0 to 2³² − 1, makes the draw repeatable; without it torch's global generator is used.
        stop: a token that ends its row; the row is filled up with it, and all rows done ends the call.
        n_vocab: tokens that the corpus knows, where the model's vocabulary is padded; none beyond is sampled.

    Returns:
        (b, n + at most n_new), prompts included.

    Past the context the cache is of no use, since positions are learned: the last window is then encoded anew for
    every token, and a warning says so.

    Raises:
        ValueError: a prompt is empty, a token is not in the vocabulary, an option is out of range, or the logits
            are not finite.
    """
    check_tokens(tokens)
    _check_options(model.config.vocab_size, n_new, temperature, top_k, seed, stop, n_vocab)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise ValueError(
            f"tokens must lie in [0, {model.config.vocab_size}); got {int(tokens.min())} to {int(tokens.max())}"
        )
    context = model.config.context
    if tokens.shape[1] + n_new - 1 > context:
        warnings.warn(
            f"{tokens.shape[1] + n_new} tokens do not fit the context of {context}: "
            "past it the last window is encoded anew for every token",
            stacklevel=2,
        )
    tokens = tokens.to(model.token_embedding.weight.device)
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(int(seed))
    cache = model.new_cache(len(tokens))
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    cached = 0
    for _ in range(n_new):
        if tokens.shape[1] <= context:
            logits = model(tokens[:, cached:], cache, cached)[:, -1]
            cached = tokens.shape[1]
        else:
            logits = model(tokens[:, -context:])[:, -1]
        new = _sample(logits[:, :n_vocab], temperature, top_k, generator)
        if stop is not None:
            new = new.masked_fill(done, stop)
            done |= new == stop
        tokens = torch.cat([tokens, new[:, None]], 1)
        if stop is not None and bool(done.all()):
            break
    return tokens


def check_tokens(tokens: Tensor) -> None:
    """Raises ValueError unless these are (b, n) integers, n at least 1."""
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens must be (b, n), n at least 1, of int32 or int64; got {tokens.dtype} {tuple(tokens.shape)}"
        )


def _check_options(
    vocab_size: int,
    n_new: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    stop: int | None,
    n_vocab: int | None,
) -> None:
    check_whole("n_new", n_new, 0)
    if not isinstance(temperature, Real) or isinstance(temperature, bool) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, a finite number; got {temperature!r}")
    if top_k is not None:
        check_whole("top_k", top_k)
    if seed is not None:
        check_seed(seed)
    if n_vocab is not None:
        check_whole("n_vocab", n_vocab, 1, vocab_size)
    if stop is not None:
        check_whole("stop", stop, 0, (vocab_size if n_vocab is None else n_vocab) - 1)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    highest = logits.amax(-1, keepdim=True)
    if not all_finite(highest):
        raise ValueError("the logits are not finite: the model's weights are not, or activations overflowed")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        out = logits < least
        if out.sum() < out.numel() - top_k * len(out):  # too many are left: some are equal
            equal, room = logits == least, top_k - (logits > least).sum(-1, keepdim=True)
            out |= equal & (equal.cumsum(-1) > room)
        logits = logits.masked_fill(out, -torch.inf)
    # The highest becomes 0, which a temperature near 0 leaves as it is while all others go to −∞.
    scaled = (logits - highest).float() * min(1 / temperature, torch.finfo(torch.float32).max)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
