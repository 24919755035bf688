"""Steering: neurons edited while a model computes, and the tokens that this raises and lowers (chapter 11).

An edit acts where a block's neurons pass, `block.neurons`. What follows that site is linear in CRATE (D a), in GPT-2
(the second MLP matrix) and behind a sparse auto-encoder that is spliced in (its decoder, then that matrix). A neuron
that changes by δ therefore moves the block's output by δ times one direction, its atom, and the effects of many neurons
are had together by running only the layers above again.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from cratelab.arguments import check_whole
from cratelab.corpora.tokenized import TokenizedCorpus
from cratelab.devices import all_finite, check_floating, exact_sum, single
from cratelab.interpret.reading import watch_neurons
from cratelab.language_model import LanguageModel

CHUNK = 2**20  # logits at a time: what a cache holds
LARGEST = 1e15  # in size, of an edited activation: norms square what it makes of the tokens, and float32 ends at 3e38


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
        ValueError: a value is not finite or larger than `LARGEST`, the numbers of values and neurons differ, a neuron
            stands twice, `by` or `where` is unknown, or the mask is not (b, n) bool.
    """

    layer: int
    neuron: int | Sequence[int] | Tensor
    value: float | Sequence[float] | Tensor
    by: Literal["set", "add", "scale"] = "set"
    where: Literal["all", "last"] | Tensor = "all"

    def __post_init__(self):
        try:
            self.neuron, self.value = torch.as_tensor(self.neuron).reshape(-1), torch.as_tensor(self.value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"neuron and value must be numbers; got {self.neuron!r} and {self.value!r}") from error
        if self.by not in ("set", "add", "scale"):
            raise ValueError(f'by must be "set", "add" or "scale"; got {self.by!r}')
        _check_numbers(self.neuron)
        if len(self.neuron.unique()) != len(self.neuron):
            raise ValueError(f"neuron must be one integer or several different ones; got {self.neuron.tolist()}")
        if self.value.is_complex() or not _in_range(self.value) or self.value.shape not in ((), self.neuron.shape):
            raise ValueError(
                f"value must be finite, at most {LARGEST:g} in size, and one number or one for each of "
                f"{len(self.neuron)} neurons; got {self.value.tolist()}"
            )
        is_mask = isinstance(self.where, Tensor) and self.where.dtype == torch.bool and self.where.ndim == 2
        if not is_mask and not (isinstance(self.where, str) and self.where in ("all", "last")):
            got = f"{self.where.dtype} {tuple(self.where.shape)}" if isinstance(self.where, Tensor) else self.where
            raise ValueError(f'where must be "all", "last" or a (b, n) mask of bool; got {got!r}')

    def __call__(self, code: Tensor) -> Tensor:
        """Activations (b, n, h), edited in a copy.

        Raises:
            ValueError: the mask is for another number of tokens, or an edited activation is not finite, or is larger
                than `LARGEST`.
        """
        neurons, value = self.neuron.to(code.device), self.value.to(code)
        before = code[..., neurons]
        after = {"set": value.expand_as(before), "add": before + value, "scale": before * value}[self.by]
        if not _in_range(after):
            raise ValueError(
                f"layer {self.layer}: {self.by} {self.value.tolist()} makes of neurons {self.neuron.tolist()} "
                f"activations of {float(after.abs().max()):g} in {code.dtype}; {LARGEST:g} is the limit"
            )
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
            A pass inside the block raises it if an edited layer's output is not finite.
    """
    edits = (*edits, Edit(**edit)) if edit else edits
    for each in edits:
        _check_neurons(model, each.layer, each.neuron)
        _check_range(model, each.value)
    with ExitStack() as hooks:
        for each in edits:
            block = model.blocks[each.layer]
            edit = block.neurons.register_forward_hook(lambda module, inputs, code, each=each: each(code))
            check = block.register_forward_hook(lambda module, inputs, output, each=each: _check_output(each, output))
            hooks.callback(edit.remove)
            hooks.callback(check.remove)
        yield


def _check_output(edit: Edit, output: Tensor) -> None:
    if not all_finite(output):
        raise ValueError(
            f"layer {edit.layer}: after {edit.by} {edit.value.tolist()} of neurons {edit.neuron.tolist()} its output "
            f"is not finite in {output.dtype}: take smaller values, if it is without them"
        )


def _in_range(values: Tensor) -> bool:
    return bool((single(values).abs() <= LARGEST).all())  # in half precision `LARGEST` would be infinite


def _check_numbers(neurons: Tensor) -> None:
    """Raises ValueError unless they are (m,) integers, m at least 1."""
    if not isinstance(neurons, Tensor):
        raise ValueError(f"neurons must be a tensor (m,) of integers; got {neurons!r}")
    if neurons.dtype not in (torch.int32, torch.int64) or neurons.ndim != 1 or not len(neurons):
        raise ValueError(f"neurons must be one integer or several, (m,) and m at least 1; got {neurons.tolist()}")


def _check_range(model: LanguageModel, values: Tensor) -> None:
    """Raises ValueError unless all values are finite in the model's dtype and at most `LARGEST` in size."""
    dtype = model.token_embedding.weight.dtype
    if not _in_range(values.to(dtype)):
        raise ValueError(f"values must be finite in {dtype} and at most {LARGEST:g} in size; got {values.tolist()}")


def _check_neurons(model: LanguageModel, layer: int, neurons: Tensor) -> None:
    """Raises ValueError if the model has no such layer, or the layer no such neurons."""
    _check_numbers(neurons)
    check_floating(model)
    if not isinstance(layer, Integral) or layer not in range(len(model.blocks)):
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

    Raises:
        ValueError: the corpus has tokens that the model does not know, or none; `n_tokens` is less than 1; or
            activations are not finite.
    """
    check_floating(model)
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

    def one_each(module, inputs, code: Tensor) -> Tensor:
        codes = torch.zeros_like(code)
        codes[torch.arange(m, device=code.device), 0, neurons.to(code.device)] = 1
        return codes  # the last is all zero

    hook = block.neurons.register_forward_hook(one_each)
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
        Which of the neurons, and logits (s, m', b, n, v), in the model's dtype.

    Raises:
        ValueError: there is no such layer or neuron; values are not (s, m), not finite in the model's dtype or larger
            than `LARGEST`; `by` is unknown; or the output is not finite, steered or not.
    """
    check_values(model, layer, neurons, values, by)
    device = model.token_embedding.weight.device
    directions = single(atoms(model, layer, neurons))
    tokens, neurons, values = tokens.to(device), neurons.to(device), values.to(directions)
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
    if not all_finite(seen["output"]):
        raise ValueError(
            f"layer {layer} has outputs that are not finite before anything is edited: is the model damaged, or did "
            "its training diverge?"
        )
    before = rearrange(seen["code"], "b n m -> m b n")
    size = max(1, CHUNK // (len(values) * tokens.numel() * n_vocab))
    for first in range(0, len(neurons), size):
        some = slice(first, first + size)
        value, old = rearrange(values[:, some], "s m -> s m 1 1"), before[some]
        change = {"set": value - old, "add": value + 0 * old, "scale": (value - 1) * old}[by]
        x = seen["output"] + einsum(change, directions[some], "s m b n, m d -> s m b n d")
        x = rearrange(x, "s m b n d -> (s m b) n d").to(seen["output"].dtype)
        for above in model.blocks[layer + 1 :]:
            x = above(x)
        x = model.norm(x)
        if not all_finite(x):
            raise ValueError(
                f"what layer {layer} leads to is not finite in {x.dtype} when neurons {neurons[some].cpu().tolist()} "
                f"are edited ({by}) by {values[:, some].cpu().tolist()}: take smaller values"
            )
        logits = F.linear(x, model.token_embedding.weight)
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
        (m, v) float64 on the CPU, in nats.

    Raises:
        ValueError: as `steered_logits` and `check_contexts`.
    """
    check_contexts(model, contexts, batch)
    check_values(model, layer, neurons, values[None], by)
    change = torch.zeros(len(neurons), model.config.vocab_size, dtype=torch.float64, device="cpu")
    for tokens in contexts.to(model.token_embedding.weight.device).split(batch):
        before = single(model(tokens)).log_softmax(-1)
        for some, logits in steered_logits(model, tokens, layer, neurons, values[None], by):
            change[some] += exact_sum(single(logits[0]).log_softmax(-1) - before, (1, 2)).cpu()
    return change / contexts.numel()


def check_values(model: LanguageModel, layer: int, neurons: Tensor, values: Tensor, by: str = "set") -> None:
    """Raises ValueError unless the layer has these neurons (m,), and they can take these values (s, m)."""
    if by not in ("set", "add", "scale"):
        raise ValueError(f'by must be "set", "add" or "scale"; got {by!r}')
    _check_neurons(model, layer, neurons)
    if values.ndim != 2 or values.shape[1] != len(neurons):
        raise ValueError(f"{len(neurons)} neurons need as many values each time; got {tuple(values.shape)}")
    _check_range(model, values)


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
