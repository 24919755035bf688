"""Neurons edited while a model computes (eq-11-1): in every forward pass inside a `with` block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cratelab.devices import all_finite, check_floating, single
from cratelab.language_model import LanguageModel
from cratelab.reading import check_layer, hooked

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
        _check_by(self.by)
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
        check_neurons(model, each.layer, each.neuron)
        _check_range(model, each.value)
    hooks = []
    for each in edits:
        block = model.blocks[each.layer]
        hooks.append((block.neurons, lambda module, inputs, code, each=each: each(code)))
        hooks.append((block, lambda module, inputs, output, each=each: _check_output(each, output)))
    with hooked(*hooks):
        yield


def check_values(model: LanguageModel, layer: int, neurons: Tensor, values: Tensor, by: str = "set") -> None:
    """Raises ValueError unless the layer has these neurons (m,), and they can take these values (s, m)."""
    _check_by(by)
    check_neurons(model, layer, neurons)
    if values.ndim != 2 or values.shape[1] != len(neurons):
        raise ValueError(f"{len(neurons)} neurons need as many values each time; got {tuple(values.shape)}")
    _check_range(model, values)


def check_neurons(model: LanguageModel, layer: int, neurons: Tensor) -> None:
    """Raises ValueError if the model has no such layer, or the layer no such neurons."""
    _check_numbers(neurons)
    check_floating(model)
    check_layer(model, layer)
    n_neurons = _count_neurons(model, layer)
    if not ((neurons >= 0) & (neurons < n_neurons)).all():
        raise ValueError(f"layer {layer} has neurons 0 to {n_neurons - 1}; got {neurons.tolist()}")


def _check_output(edit: Edit, output: Tensor) -> None:
    if not all_finite(output):
        raise ValueError(
            f"layer {edit.layer}: after {edit.by} {edit.value.tolist()} of neurons {edit.neuron.tolist()} its output "
            f"is not finite in {output.dtype}: take smaller values, if it is without them"
        )


def _check_by(by: str) -> None:
    if by not in ("set", "add", "scale"):
        raise ValueError(f'by must be "set", "add" or "scale"; got {by!r}')


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


@torch.no_grad()
def _count_neurons(model: LanguageModel, layer: int) -> int:
    """How many pass the layer's site: features where an auto-encoder is spliced in. No other hook of the site runs."""

    def count(module, inputs, code: Tensor) -> None:
        raise _Seen(code.shape[-1])

    site = model.blocks[layer].neurons
    with hooked((site, count), prepend=True):
        try:
            site(model.token_embedding.weight.new_zeros(1, 1, model.config.n_neurons))
        except _Seen as seen:
            return seen.args[0]


class _Seen(Exception):
    """Ends a call of a site, with the number of its neurons."""
