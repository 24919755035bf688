"""Putting an auto-encoder into a model, in the place of a layer's neurons; or of its residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from cratelab.devices import check_floating
from cratelab.language_model import LanguageModel
from cratelab.reading import check_layer
from cratelab.sae.autoencoder import Sae
from cratelab.storage import digest_of_tensors


@contextmanager
def splice(model: LanguageModel, saes: dict[int, Sae], error_term: bool = False) -> Iterator[None]:
    """Inside, reconstructions stand in place of neurons, and `block.neurons` sees the auto-encoder's code (b, n, m).

    Whatever reads or edits `model.blocks[layer].neurons` then reads or edits features: `collect_records` (which needs
    equally many in all layers), `match_concepts`, hooks. Hooks set before see the neurons, as before.

    Args:
        model: any model whose blocks have a `neurons` site; `generate` works inside as outside.
        saes: of each layer, counted from 0, to be spliced, its auto-encoder, of any dtype; on another device than the
            model a copy of it is used.
        error_term: add what the reconstruction lacks: x' = Dec(f') + (x − Dec(f)), f' the code after any edit, so that
            to edit nothing changes nothing, to rounding.

    Raises:
        ValueError: there is no such layer, or no auto-encoder for it, or its neurons are not as many as that reads;
            or weights were cast to integers.
    """
    check_floating(model)
    width = model.config.n_neurons
    for layer, sae in saes.items():
        check_layer(model, layer)
        if not (hasattr(sae, "encode") and hasattr(sae, "decode")):
            raise ValueError(f"layer {layer} needs an auto-encoder; got {sae!r}")
        if sae.config.d_in != width:
            raise ValueError(f"layer {layer} has {width} neurons, its auto-encoder reads {sae.config.d_in}")
        if isinstance(sae, Sae):
            check_floating(sae)
    saes = {layer: on_device(sae, model.token_embedding.weight.device) for layer, sae in saes.items()}
    sites = {layer: model.blocks[layer].neurons for layer in saes}
    try:
        for layer, sae in saes.items():
            model.blocks[layer].neurons = _Spliced(sae, sites[layer], error_term)
        yield
    finally:
        for layer, site in sites.items():
            model.blocks[layer].neurons = site


def on_residual(model: LanguageModel) -> LanguageModel:
    """A copy whose `neurons` are the residual stream behind each block, (b, n, d), signed; its logits are the model's.

    What records, trains on, splices or edits neurons does so with the stream, and `config.n_neurons` is its width. The
    copy reads text; it does not generate.
    """
    view = deepcopy(model)
    view.config = replace(model.config, expansion=1)
    view.blocks = nn.ModuleList(_BehindBlock(block) for block in view.blocks)
    return view


class _BehindBlock(nn.Module):
    """A block, and the site behind it."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.neurons = block, nn.Identity()

    def forward(self, x: Tensor, cache: Tensor | None = None, position: int = 0) -> Tensor:
        return self.neurons(self.block(x, cache, position))


def on_device(sae: Sae, device: torch.device) -> Sae:
    """The auto-encoder, or a copy of it on `device` if it is on another one."""
    return deepcopy(sae).to(device) if isinstance(sae, Sae) and sae.b_dec.device != device else sae


def sae_facts(sae: Sae) -> list:
    """What tells an auto-encoder from another.

    Raises:
        ValueError: it is no `torch.nn.Module`, so that its weights cannot be asked for.
    """
    if not isinstance(sae, nn.Module):
        raise ValueError(
            f"a folder of passes tells auto-encoders apart by their weights, and {type(sae).__name__} has no "
            "state_dict: make it a torch.nn.Module, or read without a folder"
        )
    return [type(sae).__name__, repr(sae.config), digest_of_tensors(sae.state_dict())]


class _Spliced(nn.Identity):
    """An identity on the code, so that hooks see that, within a call that takes and returns neurons."""

    def __init__(self, sae: Sae, site: nn.Module, error_term: bool):
        super().__init__()
        self.site, self.error_term = site, error_term
        self.encode, self.decode = sae.encode, sae.decode  # not `sae` itself: its weights are none of the model's
        self.facts = lambda: [sae_facts(sae), error_term, site.facts() if isinstance(site, _Spliced) else None]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.site(x)
        code = self.encode(x)
        error = x - self.decode(code) if self.error_term else 0
        return (self.decode(super().__call__(code)) + error).to(x.dtype)
