"""Does each layer do what it was derived to do? Coding rates and sparsity, layer by layer, in one streamed pass.

Rates are those of what the subspaces see: the output of a layer's first LayerNorm, for Z^ℓ before the attention and for
Z^{ℓ+½} = Z^ℓ + attention after it, through the same LayerNorm. They are taken sequence by sequence, in nats a token,
and averaged over sequences. CRATE's subspaces are its U_k; GPT-2 has none, and its heads' value projections stand in.
"""

from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from cratelab.arguments import check_whole
from cratelab.coding_rate import check_precision, coding_rate, subspace_rate
from cratelab.crate import Crate
from cratelab.devices import exact, single
from cratelab.ista import ista, lasso_objective
from cratelab.language_model import LanguageModel
from cratelab.reading import check_contexts, hooked


def subspaces(model: LanguageModel) -> list[Tensor]:
    """The bases that each layer codes in, one (k, d, p) a layer: CRATE's U_k, GPT-2's value projections."""
    if isinstance(model, Crate):
        return [block.attention.U.detach() for block in model.blocks]
    pattern = "(three k p) d -> three k d p"
    return [
        rearrange(block.attention.projection.weight.detach(), pattern, three=3, k=model.config.n_heads)[2]
        for block in model.blocks
    ]


@torch.no_grad()
def layer_statistics(
    model: LanguageModel, batches: Iterable[Tensor], eps: float = 0.5, lasso_steps: int = 0
) -> dict[str, Tensor]:
    """Rates around every layer's attention, sparsity of its neurons, and the codes' distance from the lasso.

    Args:
        model: CRATE or GPT-2; put into evaluation mode or not, it is only read.
        batches: token batches, (b, n) integers each; consumed one at a time, so memory does not grow with the text.
        eps: precision ε of the rates, in units of the normalised tokens (length about √d).
        lasso_steps: for CRATE, ISTA steps towards the lasso solution at step size 1/‖D‖²; 0 leaves the lasso out.

    Returns:
        Tensors (l,), float64 and on the CPU. They are "R before", "R after", "R^c before", "R^c after" with the bases
        as learned, "R^c orthonormal before", "R^c orthonormal after" with a QR basis of each subspace, and "active",
        the share of neurons above zero. With `lasso_steps` also "lasso objective" of the model's codes, "converged
        lasso objective" and "lasso active", the share above 1e-6 there.

    Raises:
        ValueError: `batches` is empty or holds what are no tokens of the model's, `lasso_steps` is negative or no
            whole number, or given for a model without ISTA, or `eps` is not positive (from 1e-100 to 1e100).

    Source: the layer-wise figures of Yu et al. (2023), on the tokens that U sees.
    """
    check_whole("lasso_steps", lasso_steps, 0)
    check_precision(eps)
    if lasso_steps and not isinstance(model, Crate):
        raise ValueError(f"lasso_steps needs a model with ISTA layers; got {type(model).__name__}")
    learned = subspaces(model)
    orthonormal = [torch.linalg.qr(exact(U)).Q.to(single(U)) for U in learned]
    sums: list[dict[str, float]] = [{} for _ in model.blocks]

    def add(layer: int, name: str, values: Tensor) -> None:
        """Add the mean of `values` a sequence, times the sequences."""
        sums[layer][name] = sums[layer].get(name, 0.0) + float(exact(values).mean()) * sequences

    def watchers(layer: int) -> list[tuple[nn.Module, Callable]]:
        block, inputs = model.blocks[layer], {}

        def measure(when: str, z: Tensor) -> None:
            add(layer, f"R {when}", coding_rate(z, eps))
            add(layer, f"R^c {when}", subspace_rate(z, learned[layer], eps))
            add(layer, f"R^c orthonormal {when}", subspace_rate(z, orthonormal[layer], eps))

        def around_attention(module, arguments, output) -> None:
            measure("before", arguments[0])
            measure("after", block.attention_norm(inputs["z"] + output))

        def at_neurons(module, arguments, code) -> None:
            add(layer, "active", code > 0)
            if lasso_steps:
                D, lam, target = single(block.ista.D), block.ista.lam, single(inputs["target"])
                norm = float(torch.linalg.matrix_norm(D.cpu().float(), 2))  # not on every device
                step_size = 1 / (norm**2 or 1.0)  # a dictionary of zeros has no scale
                converged = ista(target, D, step_size, lam, lasso_steps)
                add(layer, "lasso objective", lasso_objective(target, single(code), D, lam))
                add(layer, "converged lasso objective", lasso_objective(target, converged, D, lam))
                add(layer, "lasso active", converged > 1e-6)

        hooks = [
            # `measure` calls this norm too, with Z^{ℓ+½}: z has been used by then
            (block.attention_norm, lambda module, arguments, normed: inputs.update(z=arguments[0])),
            (block.attention, around_attention),
            (block.neurons, at_neurons),
        ]
        if lasso_steps:
            hooks.append((block.ista_norm, lambda module, arguments, normed: inputs.update(target=normed)))
        return hooks

    total = 0
    with hooked(*(each for layer in range(len(model.blocks)) for each in watchers(layer))):
        for tokens in batches:
            check_contexts(model, tokens)
            sequences = len(tokens)
            model(tokens.to(model.token_embedding.weight.device))
            total += sequences
    if not total:
        raise ValueError("layer_statistics needs at least one batch of tokens; got none")
    return {
        name: torch.tensor([of[name] for of in sums], dtype=torch.float64, device="cpu") / total for name in sums[0]
    }
