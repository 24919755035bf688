"""Which tokens a neuron raises and lowers, all neurons together.

What follows the site of the neurons is linear in CRATE (D a), in GPT-2 (the second MLP matrix) and behind a sparse
auto-encoder that is spliced in (its decoder, then that matrix). A neuron that changes by δ therefore moves the block's
output by δ times one direction, its atom, and the effects of many neurons are had together by running only the layers
above again.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from cratelab.devices import all_finite, exact_sum, single
from cratelab.language_model import LanguageModel
from cratelab.reading import check_contexts, hooked
from cratelab.shared_pass import RunningSums, model_facts, open_pass
from cratelab.steering.edits import check_neurons, check_values
from cratelab.storage import digest_of_tensors

CHUNK = 2**20  # logits at a time: what a cache holds


@torch.no_grad()
def atoms(model: LanguageModel, layer: int, neurons: Tensor) -> Tensor:
    """What the block's output gains from one unit of each of m neurons, (m, d).

    A column of D for CRATE, a column of the second MLP matrix for GPT-2, and the decoder's row through that matrix
    where an auto-encoder is spliced in. It is read off the block itself, which is given codes with a single 1.
    """
    check_neurons(model, layer, neurons)
    block, m = model.blocks[layer], len(neurons)

    def one_each(module, inputs, code: Tensor) -> Tensor:
        ones = F.one_hot(neurons.to(code.device).long(), code.shape[-1])
        return F.pad(ones, (0, 0, 0, 1))[:, None].to(code)  # the last code is all zero

    with hooked((block.neurons, one_each)):
        output = block(model.token_embedding.weight.new_zeros(m + 1, 1, model.config.width))[:, 0]
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
    with hooked(
        (block.neurons, lambda module, inputs, code: seen.update(code=code[..., neurons])),
        (block, lambda module, inputs, output: seen.update(output=output)),
    ):
        n_vocab = model(tokens).shape[-1]
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
    folder: str | Path | None = None,
) -> Tensor:
    """Mean change of the log-probability of every token when each of m neurons, it alone, is edited at every position.

    With a `folder` the processes that Accelerate or torchrun have started share the contexts, and a killed call goes on
    where it stopped; all is what one process finds, but for the order of sums in double precision.

    Args:
        model: as for `steered_logits`.
        contexts: (c, n) tokens; the mean is over all c·n positions.
        layer: of the neurons.
        neurons: (m,) integers.
        values: (m,).
        by: "set", "add" or "scale".
        batch: contexts at a time.
        folder: as for `collect_records`; without one, every process reads all contexts.

    Returns:
        (m, v) float64 on the CPU, in nats; the same in each process.

    Raises:
        ValueError: as `steered_logits` and `check_contexts`; or a file in `folder` is damaged.
        OSError: `folder` cannot be written.
    """
    check_contexts(model, contexts, batch)
    check_values(model, layer, neurons, values[None], by)

    def made_from() -> list:
        given = dict(contexts=contexts, neurons=neurons, values=values)
        return ["full effect", model_facts(model), layer, by, batch, digest_of_tensors(given)]

    with open_pass(RunningSums, contexts.numel(), folder, made_from) as reading:
        for number, tokens in enumerate(contexts.to(model.token_embedding.weight.device).split(batch)):
            if not reading.wanted(number):
                continue
            before = single(model(tokens)).log_softmax(-1)
            change = before.new_zeros(len(neurons), before.shape[-1], dtype=torch.float64, device="cpu")
            for some, logits in steered_logits(model, tokens, layer, neurons, values[None], by):
                change[some] = exact_sum(single(logits[0]).log_softmax(-1) - before, (1, 2)).cpu()
            reading.running.add(number, tokens.numel(), {"change": change})
            reading.keep()
        return reading.merged().sums["change"] / contexts.numel()
