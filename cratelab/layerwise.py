"""Does each layer do what it was derived to do? Coding rates and sparsity, layer by layer, in one streamed pass.

Rates are those of what the subspaces see: the output of a layer's first LayerNorm, for Z^ℓ before the attention and for
Z^{ℓ+½} = Z^ℓ + attention after it, through the same LayerNorm. They are taken sequence by sequence, in nats a token,
and averaged over sequences. CRATE's subspaces are its U_k; GPT-2 has none, and its heads' value projections stand in.

Controls say what attention has to do with a change of rate. Two put a fixed map in place of the learned one and keep
the matrices: "identity", where each token sees only itself, and "uniform", the mean over all that a token may see. One
keeps the tokens and takes random subspaces of the same sizes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from cratelab.arguments import check_seed, check_whole
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
def attention_spectra(model: LanguageModel) -> Tensor:
    """Singular values of the map through which attention writes, (l, d), float64 and falling.

    It is W_out W_U for CRATE and W_out W_V for GPT-2: what a token that sees only itself gets, but for the bias.
    """
    width = model.config.width
    pairs = [(block.attention.output.weight, block.attention.projection.weight) for block in model.blocks]
    return torch.stack([torch.linalg.svdvals(exact(out) @ exact(read)[-width:]) for out, read in pairs]).cpu()


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of the squared singular values' shares: r where r of them are equal and the rest 0.

    Args:
        singular_values: (..., d), not all 0.

    Returns:
        (...), from 1 to d.

    Source: Roy & Vetterli (2007), with squares, the shares of the energy, for the values themselves.
    """
    return torch.distributions.Categorical(probs=singular_values.square()).entropy().exp()


@torch.no_grad()
def token_lengths(model: LanguageModel, batches: Iterable[Tensor]) -> Tensor:
    """The "length" of `layer_statistics`, (l,), without its rates: by it their ε can be chosen.

    Args:
        model: CRATE or GPT-2.
        batches: token batches, (b, n) integers each; consumed one at a time.

    Raises:
        ValueError: `batches` is empty or holds what are no tokens of the model's.
    """
    sums = torch.zeros(len(model.blocks), dtype=torch.float64, device="cpu")

    def add(i: int, normed: Tensor) -> None:
        sums[i] += exact(normed).norm(dim=-1).mean(-1).sum().cpu()

    hooks = [
        (block.attention_norm, lambda module, arguments, normed, i=i: add(i, normed))
        for i, block in enumerate(model.blocks)
    ]
    return sums / _read(model, batches, hooks, "token_lengths")


@torch.no_grad()
def layer_statistics(
    model: LanguageModel,
    batches: Iterable[Tensor],
    eps: float | Sequence[float] = 0.5,
    lasso_steps: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Rates around every layer's attention with controls, sparsity of its neurons, the codes' distance from the lasso.

    Args:
        model: CRATE or GPT-2; put into evaluation mode or not, it is only read.
        batches: token batches, (b, n) integers each; consumed one at a time, so memory does not grow with the text.
        eps: precision ε of the rates, in the units of what the subspaces see: one for all layers, or one for each. A
            fresh LayerNorm gives a token the length √d, a trained one any: see "length" below.
        lasso_steps: for CRATE, ISTA steps towards the lasso solution at step size 1/‖D‖²; 0 leaves the lasso out.
        seed: of the random subspaces.

    Returns:
        Tensors (l,), float64 and on the CPU. The rates are "R …", "R^c …" with the bases as learned, "R^c
        orthonormal …" with a QR basis of each subspace and "R^c random …" with random ones, where … is "before",
        "after", or "identity" and "uniform", after with that map. Then "length", the mean of ‖LN z‖, "update", that of
        ‖attention(LN z)‖/‖z‖, and "active", the share of neurons above zero. With `lasso_steps` also "lasso objective"
        of the model's codes, "converged lasso objective" and "lasso active", the share above 1e-6 there.

    Raises:
        ValueError: `batches` is empty or holds what are no tokens of the model's, `lasso_steps` is negative or no
            whole number, or given for a model without ISTA, `eps` is not positive (from 1e-100 to 1e100) or not one
            for each layer, or `seed` is out of range.

    Source: the layer-wise figures of Yu et al. (2023), on the tokens that U sees.
    """
    check_whole("lasso_steps", lasso_steps, 0)
    precisions = list(eps) if isinstance(eps, Sequence | Tensor) else [eps] * len(model.blocks)
    for precision in precisions:
        check_precision(precision)
    if len(precisions) != len(model.blocks):
        raise ValueError(f"eps must be one number or one for each of {len(model.blocks)} layers; got {len(precisions)}")
    check_seed(seed)
    if lasso_steps and not isinstance(model, Crate):
        raise ValueError(f"lasso_steps needs a model with ISTA layers; got {type(model).__name__}")
    draw = torch.Generator("cpu").manual_seed(seed)
    parts = zip(model.blocks, subspaces(model), precisions, strict=True)
    layers = [_Layer(block, U, float(precision), lasso_steps, draw) for block, U, precision in parts]
    total = _read(model, batches, [hook for layer in layers for hook in layer.hooks()], "layer_statistics")
    return {
        name: torch.tensor([layer.sums[name] for layer in layers], dtype=torch.float64, device="cpu") / total
        for name in layers[0].sums
    }


def _read(model: LanguageModel, batches: Iterable[Tensor], hooks: list[tuple[nn.Module, Callable]], who: str) -> int:
    """Let the model read under `hooks`; how many sequences there were."""
    total = 0
    with hooked(*hooks):
        for tokens in batches:
            check_contexts(model, tokens)
            model(tokens.to(model.token_embedding.weight.device))
            total += len(tokens)
    if not total:
        raise ValueError(f"{who} needs at least one batch of tokens; got none")
    return total


class _Layer:
    """Measures one layer while the model reads, and adds up over sequences what it finds."""

    def __init__(self, block: nn.Module, U: Tensor, eps: float, lasso_steps: int, draw: torch.Generator):
        self.block, self.eps, self.lasso_steps = block, eps, lasso_steps
        random = torch.randn(U.shape, generator=draw, device="cpu").to(U)
        self.bases = {"R^c": U, "R^c orthonormal": _orthonormal(U), "R^c random": _orthonormal(random)}
        self.sums: dict[str, float] = {}

    def hooks(self) -> list[tuple[nn.Module, Callable]]:
        block = self.block
        hooks = [
            (block.attention_norm, self.before_attention),
            (block.attention, self.around_attention),
            (block.neurons, self.at_neurons),
        ]
        return [*hooks, (block.ista_norm, self.before_ista)] if self.lasso_steps else hooks

    def before_attention(self, module, arguments, normed) -> None:
        self.z = arguments[0]  # called for Z^{ℓ+½}, too, but z has been used by then

    def around_attention(self, attention, arguments, output) -> None:
        z, normed = self.z, arguments[0]
        values = attention.projection(normed)[..., -z.shape[-1] :]  # MSSA's projection is its values
        updates = {
            "after": output,
            "identity": attention.output(values),
            "uniform": attention.output(_mean_of_seen(values, attention.span)),
        }
        self.add_rates("before", normed)
        for when, update in updates.items():
            self.add_rates(when, self.block.attention_norm(z + update))
        self.add("length", exact(normed).norm(dim=-1))
        self.add("update", exact(output).norm(dim=-1) / exact(z).norm(dim=-1))

    def before_ista(self, module, arguments, normed) -> None:
        self.target = single(normed)

    def at_neurons(self, module, arguments, code) -> None:
        self.add("active", code > 0)
        if self.lasso_steps:
            D, lam = single(self.block.ista.D), self.block.ista.lam
            norm = float(torch.linalg.matrix_norm(D.cpu().float(), 2))  # not on every device
            step_size = 1 / (norm**2 or 1.0)  # a dictionary of zeros has no scale
            converged = ista(self.target, D, step_size, lam, self.lasso_steps)
            self.add("lasso objective", lasso_objective(self.target, single(code), D, lam))
            self.add("converged lasso objective", lasso_objective(self.target, converged, D, lam))
            self.add("lasso active", converged > 1e-6)

    def add_rates(self, when: str, z: Tensor) -> None:
        self.add(f"R {when}", coding_rate(z, self.eps))
        for name, U in self.bases.items():
            self.add(f"{name} {when}", subspace_rate(z, U, self.eps))

    def add(self, name: str, values: Tensor) -> None:
        """Add the mean of `values` (b, …) a sequence, times the sequences."""
        self.sums[name] = self.sums.get(name, 0.0) + float(exact(values).mean()) * len(values)


def _orthonormal(bases: Tensor) -> Tensor:
    return torch.linalg.qr(exact(bases)).Q.to(single(bases))


def _mean_of_seen(values: Tensor, span: int | None) -> Tensor:
    """Of each token of (b, n, d) the mean over itself and those before it, at most `span`."""
    summands, n = single(values), values.shape[1]
    seen = torch.ones(n, n).to(summands).tril()
    if span is not None:
        seen = seen.triu(-span)
    return (seen / seen.sum(-1, keepdim=True) @ summands).to(values.dtype)
