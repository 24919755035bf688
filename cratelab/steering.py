"""Steering: neurons edited while a model computes, and the tokens that this raises and lowers (chapter 11).

An edit acts where a block's neurons pass, `block.neurons`. What follows that site is linear in CRATE (D a), in GPT-2
(the second MLP matrix) and behind a sparse auto-encoder that is spliced in (its decoder, then that matrix). A neuron
that changes by δ therefore moves the block's output by δ times one direction, its atom, and the effects of many neurons
are had together by running only the layers above again.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from cratelab.corpora.tokenized import TokenizedCorpus
from cratelab.interpret.reading import watch_neurons
from cratelab.language_model import LanguageModel

CHUNK = 2**20  # logits at a time: what a cache holds


@dataclass(eq=False)
class Edit:
    """What happens to neurons of one layer (eq-11-1).

    Attributes:
        layer: from 0.
        neuron: one or several different ones.
        value: what the neuron is set to, or what is added to it, or what it is multiplied by; one for all neurons, or
            one for each.
        by: "set", "add" or "scale".
        where: "all" positions; "last", the last position of each forward pass, which is the prompt's last and every new
            token when text is generated with the cache, and only the newest past the context, where all is encoded
            anew; or a (b, n) mask, true where the edit acts, for forward passes on (b, n) tokens and no others.

    Raises:
        ValueError: a value is not finite, the numbers of values and neurons differ, a neuron stands twice, `by` or
            `where` is unknown, or the mask is not (b, n) bool.
    """

    layer: int
    neuron: int | Sequence[int] | Tensor
    value: float | Sequence[float] | Tensor
    by: Literal["set", "add", "scale"] = "set"
    where: Literal["all", "last"] | Tensor = "all"

    def __post_init__(self):
        self.neuron, self.value = torch.as_tensor(self.neuron).reshape(-1), torch.as_tensor(self.value)
        if self.by not in ("set", "add", "scale"):
            raise ValueError(f'by must be "set", "add" or "scale"; got {self.by!r}')
        if self.neuron.dtype.is_floating_point or len(self.neuron.unique()) != len(self.neuron) or not len(self.neuron):
            raise ValueError(f"neuron must be one integer or several different ones; got {self.neuron.tolist()}")
        if not self.value.isfinite().all() or self.value.shape not in ((), self.neuron.shape):
            raise ValueError(
                f"value must be finite, and one number or one for each of {len(self.neuron)} neurons; "
                f"got {self.value.tolist()}"
            )
        is_mask = isinstance(self.where, Tensor) and self.where.dtype == torch.bool and self.where.ndim == 2
        if not is_mask and (isinstance(self.where, Tensor) or self.where not in ("all", "last")):
            got = f"{self.where.dtype} {tuple(self.where.shape)}" if isinstance(self.where, Tensor) else self.where
            raise ValueError(f'where must be "all", "last" or a (b, n) mask of bool; got {got!r}')

    def __call__(self, code: Tensor) -> Tensor:
        """Activations (b, n, h), edited in a copy.

        Raises:
            ValueError: the mask is for another number of tokens.
        """
        neurons, value = self.neuron.to(code.device), self.value.to(code)
        before = code[..., neurons]
        after = {"set": value.expand_as(before), "add": before + value, "scale": before * value}[self.by]
        if isinstance(self.where, Tensor):
            if self.where.shape != code.shape[:2]:
                raise ValueError(
                    f"the mask says where to steer {tuple(self.where.shape)} tokens, but the model is given "
                    f'{tuple(code.shape[:2])}: take where="all" or "last" to generate'
                )
            after = torch.where(self.where.to(code.device)[..., None], after, before)
        elif self.where == "last":
            after = torch.cat([before[:, :-1], after[:, -1:]], 1)
        edited = code.clone()
        edited[..., neurons] = after
        return edited


@contextmanager
def steer(model: LanguageModel, *edits: Edit, **edit) -> Iterator[None]:
    """Edit neurons in every forward pass inside the `with` block, `generate` included.

    `with steer(model, layer=1, neuron=37, value=3.0):` makes one edit, `with steer(model, Edit(…), Edit(…)):` several,
    in that order. Such blocks nest: the inner edits follow the outer ones. On leaving, even by an error, the model is
    as it was.

    Args:
        model: any whose blocks have a `neurons` site.
        edits: what to do.
        edit: the arguments of one `Edit`.

    Raises:
        ValueError: an edit is not possible, or the model has no such layer or neuron. Nothing has been edited then.
    """
    edits = (*edits, Edit(**edit)) if edit else edits
    for each in edits:
        _check_neurons(model, each.layer, each.neuron)
    with ExitStack() as hooks:
        for each in edits:
            site = model.blocks[each.layer].neurons
            hooks.callback(site.register_forward_hook(lambda module, inputs, code, each=each: each(code)).remove)
        yield


def _check_neurons(model: LanguageModel, layer: int, neurons: Tensor) -> None:
    """Raises ValueError if the model has no such layer, or the layer no such neurons."""
    if not 0 <= layer < len(model.blocks):
        raise ValueError(f"the model has layers 0 to {len(model.blocks) - 1}; got {layer}")
    n_neurons = _count_neurons(model, layer)
    if not ((neurons >= 0) & (neurons < n_neurons)).all():
        raise ValueError(f"layer {layer} has neurons 0 to {n_neurons - 1}; got {neurons.tolist()}")


@torch.no_grad()
def _count_neurons(model: LanguageModel, layer: int) -> int:
    """How many pass the layer's site: features where an auto-encoder is spliced in. No other hook of the site runs."""

    def count(module, inputs, code: Tensor) -> None:
        raise _Seen(code.shape[-1])

    site = model.blocks[layer].neurons
    hook = site.register_forward_hook(count, prepend=True)
    try:
        site(model.token_embedding.weight.new_zeros(1, 1, model.config.expansion * model.config.width))
    except _Seen as seen:
        return seen.args[0]
    finally:
        hook.remove()


class _Seen(Exception):
    """Ends a call of a site, with the number of its neurons."""


@torch.no_grad()
def neuron_maxima(model: LanguageModel, corpus: TokenizedCorpus, n_tokens: int | None = None) -> list[Tensor]:
    """Of each layer the largest activation of every neuron, (h,), read as `watch_neurons` reads.

    A neuron whose maximum is 0 is dead on this text.
    """
    maxima: list[Tensor] = []
    for text, layers in watch_neurons(model, corpus, n_tokens=n_tokens):
        here = [activations[text.present].amax(0) for activations in layers]
        maxima = [torch.maximum(*pair) for pair in zip(maxima or here, here, strict=True)]
    return maxima


@torch.no_grad()
def atoms(model: LanguageModel, layer: int, neurons: Tensor) -> Tensor:
    """What the block's output gains from one unit of each of m neurons, (m, d).

    A column of D for CRATE, a column of the second MLP matrix for GPT-2, and the decoder's row through that matrix
    where an auto-encoder is spliced in. It is read off the block itself, which is given codes with a single 1.
    """
    _check_neurons(model, layer, neurons)
    block, m = model.blocks[layer], len(neurons)

    def single(module, inputs, code: Tensor) -> Tensor:
        codes = torch.zeros_like(code)
        codes[torch.arange(m), 0, neurons.to(code.device)] = 1
        return codes  # the last is all zero

    hook = block.neurons.register_forward_hook(single)
    try:
        output = block(model.token_embedding.weight.new_zeros(m + 1, 1, model.config.width))[:, 0]
    finally:
        hook.remove()
    return output[:-1] - output[-1]


@torch.no_grad()
def direct_effect(model: LanguageModel, layer: int, neurons: Tensor) -> Tensor:
    """What one unit of each of m neurons adds to the logits by itself, (m, v): atom, last norm, unembedding (eq-11-2).

    The last LayerNorm is frozen: the atom is centred and multiplied by the norm's weight, but not divided by the
    standard deviation σ of the tokens, which differs from place to place, does not change the order of the tokens of
    the vocabulary, and would turn the result into logits if it did not move. From any layer but the last it is a
    reading and not the whole of any path: what the layers above add is left out, and in CRATE, whose next layer hands
    on nothing but its own atoms, there is no path around them. `full_effect` has it all.
    """
    directions = atoms(model, layer, neurons)
    directions = (directions - directions.mean(1, keepdim=True)) * model.norm.weight
    return F.linear(directions, model.token_embedding.weight)


@torch.no_grad()
def steered_logits(
    model: LanguageModel, tokens: Tensor, layer: int, neurons: Tensor, values: Tensor, by: str = "set"
) -> Iterator[tuple[slice, Tensor]]:
    """Logits when each neuron, it alone, is edited at every position.

    The same as under `steer`, for many neurons at once: the model runs once, then only the layers above, some neurons
    at a time, so that memory does not grow with m.

    Args:
        model: CRATE or GPT-2, with or without auto-encoders spliced in.
        tokens: (b, n).
        layer: of the neurons.
        neurons: (m,) integers.
        values: (s, m), s values for each neuron.
        by: "set", "add" or "scale".

    Yields:
        Which of the neurons, and logits (s, m', b, n, v).

    Raises:
        ValueError: there is no such layer or neuron.
    """
    directions, neurons, values = atoms(model, layer, neurons), neurons.to(tokens.device), values.to(tokens.device)
    block, seen = model.blocks[layer], {}
    hooks = [
        block.neurons.register_forward_hook(lambda module, inputs, code: seen.update(code=code[..., neurons])),
        block.register_forward_hook(lambda module, inputs, output: seen.update(output=output)),
    ]
    try:
        n_vocab = model(tokens).shape[-1]
    finally:
        for hook in hooks:
            hook.remove()
    before = rearrange(seen["code"], "b n m -> m b n")
    size = max(1, CHUNK // (len(values) * tokens.numel() * n_vocab))
    for first in range(0, len(neurons), size):
        some = slice(first, first + size)
        value, old = rearrange(values[:, some], "s m -> s m 1 1"), before[some]
        change = {"set": value - old, "add": value + 0 * old, "scale": (value - 1) * old}[by]
        x = seen["output"] + einsum(change, directions[some], "s m b n, m d -> s m b n d")
        x = rearrange(x, "s m b n d -> (s m b) n d")
        for above in model.blocks[layer + 1 :]:
            x = above(x)
        logits = F.linear(model.norm(x), model.token_embedding.weight)
        yield some, rearrange(logits, "(s m b) n v -> s m b n v", s=len(values), b=len(tokens))


@torch.no_grad()
def full_effect(
    model: LanguageModel,
    contexts: Tensor,
    layer: int,
    neurons: Tensor,
    values: Tensor,
    by: str = "set",
    batch: int = 8,
) -> Tensor:
    """Mean change of the log-probability of every token when each of m neurons, it alone, is edited at every position.

    Args:
        model: as for `steered_logits`.
        contexts: (c, n) tokens; the mean is over all c·n positions.
        layer: of the neurons.
        neurons: (m,) integers.
        values: (m,).
        by: "set", "add" or "scale".
        batch: contexts at a time.

    Returns:
        (m, v) float64, in nats.

    Raises:
        ValueError: there is no such layer or neuron.
    """
    change = torch.zeros(len(neurons), model.config.vocab_size, dtype=torch.float64, device=contexts.device)
    for tokens in contexts.split(batch):
        before = model(tokens).log_softmax(-1)
        for some, logits in steered_logits(model, tokens, layer, neurons, values[None], by):
            change[some] += (logits[0].log_softmax(-1) - before).sum((1, 2), dtype=torch.float64)
    return change / contexts.numel()
