"""What a model writes while a neuron is set, and how much it repeats itself."""

import torch
from einops import rearrange, repeat
from torch import Tensor

from cratelab.arguments import check_whole
from cratelab.language_model import LanguageModel
from cratelab.reading import check_contexts, hooked
from cratelab.steering.edits import check_values


@torch.no_grad()
def generate_when_set(
    model: LanguageModel, prompts: Tensor, layer: int, neurons: Tensor, values: Tensor, n_new: int, **options
) -> Tensor:
    """Continue every prompt under each of m neurons set, at every position, to its value.

    Args:
        model: as for `cratelab.steering.steer`.
        prompts: (p, n) tokens.
        layer: of the neurons.
        neurons: (m,) integers.
        values: (m,).
        n_new: tokens to add.
        options: as `generate` takes them; with the same `seed` all values meet the same chances.

    Returns:
        The new tokens, (m, p, n_new).

    Raises:
        ValueError: there is no such layer or neuron, or no prompt; values are not (m,), or as for `Edit`; or as
            `generate`.
    """
    check_contexts(model, prompts)
    check_values(model, layer, neurons, values[None])
    p, device = len(prompts), model.token_embedding.weight.device
    rows = torch.arange(len(neurons) * p, device=device)
    neurons, values = (repeat(each.to(device), "m -> (m p)", p=p) for each in (neurons, values))

    def set_own(module, inputs, code: Tensor) -> Tensor:
        code = code.clone()
        code[rows, :, neurons] = values.to(code.dtype)[:, None]
        return code

    with hooked((model.blocks[layer].neurons, set_own)):
        tokens = model.generate(repeat(prompts, "p n -> (m p) n", m=len(rows) // p), n_new, **options)
    return rearrange(tokens[:, prompts.shape[1] :], "(m p) n -> m p n", p=p)


def repetition(tokens: Tensor, length: int = 3) -> Tensor:
    """Share of the runs of `length` tokens that have stood before in their text, (..., n) to (...).

    Raises:
        ValueError: the texts are shorter than `length`, or that is below 1.

    Source: Welleck et al. (2020), who call it seq-rep-n.
    """
    check_whole("length", length)
    if length > tokens.shape[-1]:
        raise ValueError(f"runs of {length} tokens need texts as long; got {tokens.shape[-1]}")
    runs = tokens.unfold(-1, length, 1)
    numbers = runs.reshape(-1, length).unique(dim=0, return_inverse=True)[1].reshape(runs.shape[:-1]).sort(-1).values
    return (numbers[..., 1:] == numbers[..., :-1]).float().sum(-1) / numbers.shape[-1]
