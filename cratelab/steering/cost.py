"""What steering costs: how far a neuron lifts the tokens it stands for, and how much it changes everything else.

An arm is a model and what is spliced into it: CRATE; GPT-2; GPT-2 with an auto-encoder; the same with the error term.
Each of its neurons is set, at every position, to growing multiples of its own maximum, as in the paper: unlike an
addition this leaves no trace of the text in the neuron. With T a set of tokens fixed beforehand, p the model
with nothing spliced in and nothing steered, which is the reference of all arms, and p′ the arm, steered:

- the lift is the mean of ``log p′(T) − log p(T)`` (eq-11-5),
- the off-target divergence is the mean of ``KL(p(·|∉T) ‖ p′(·|∉T))`` (eq-11-7),

both in nats, over all positions of the contexts. An arm that changes the model before anything is steered, as an
auto-encoder without error term does, pays for that in both. In short::

    maxima = neuron_maxima(model, corpus)[layer]                       # inside the splice, if there is one, as all
    neurons = draw_live(maxima, 100)                                   # that is asked of the arm's own neurons
    targets = most_raised(direct_effect(model, layer, neurons), 10, corpus.n_vocab)
    controls = control_tokens(targets, token_counts(corpus, v))
    frontier(model, contexts, layer, neurons, maxima[neurons], targets, controls, within=lambda: splice(model, …))
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from cratelab.arguments import check_whole
from cratelab.devices import exact_sum, single
from cratelab.language_model import LanguageModel
from cratelab.reading import check_contexts
from cratelab.shared_pass import RunningSums, model_facts, open_pass
from cratelab.steering.edits import check_values
from cratelab.steering.effects import steered_logits
from cratelab.storage import digest_of_tensors

STRENGTHS = 0.5, 1.0, 2.0, 4.0, 8.0


@dataclass
class Frontier:
    """What is reached and what it costs, for m neurons of an arm at s strengths. Float64, in nats, on the CPU.

    Attributes:
        lift: (1 + s, m) of the target tokens; the first row, as below, is the arm with nothing steered.
        control_lift: (1 + s, m) of the control tokens.
        off_target: (1 + s, m) divergence on the tokens that are no targets.
        loss_penalty: cross-entropy of the arm with nothing steered, less that of the clean model (eq-11-4).
        kl_penalty: KL from the clean model to the arm with nothing steered (eq-11-4).
    """

    lift: Tensor
    control_lift: Tensor
    off_target: Tensor
    loss_penalty: float
    kl_penalty: float

    def cost_at(self, lift: float) -> Tensor:
        """(m,) off-target divergence where each neuron first reaches a lift, linear between strengths (eq-11-8).

        It is infinite for a neuron that does not reach it, so that a median over neurons takes all of them into
        account; the share of infinite costs is to be reported beside it.

        Raises:
            ValueError: `lift` is NaN.
        """
        if lift != lift:
            raise ValueError("the lift must be a number; got NaN")
        reached = self.lift >= lift
        after = reached.int().argmax(0, keepdim=True)
        before = (after - 1).clamp(min=0)
        low, high = (self.lift.gather(0, row)[0] for row in (before, after))
        share = torch.where(after[0] > 0, (lift - low) / (high - low), 1.0)
        cost = torch.lerp(*(self.off_target.gather(0, row)[0] for row in (before, after)), share)
        return cost.masked_fill(~reached.any(0), torch.inf)

    def mean_cost(self, lift: float, n: int = 50) -> Tensor:
        """(m,) area under the frontier up to `lift`, divided by `lift` (eq-11-8); infinite as in `cost_at`.

        Args:
            lift: positive.
            n: pieces of the trapezoidal rule.

        Raises:
            ValueError: `lift` is not positive and finite, or `n` is less than 1.
        """
        check_whole("n", n)
        if not 0 < lift < np.inf:
            raise ValueError(f"a mean cost needs a positive finite lift; got {lift}")
        costs = torch.stack([self.cost_at(i * lift / n) for i in range(n + 1)])
        return (costs[1:] + costs[:-1]).mean(0) / 2


@torch.no_grad()
def frontier(
    model: LanguageModel,
    contexts: Tensor,
    layer: int,
    neurons: Tensor,
    maxima: Tensor,
    targets: Tensor,
    controls: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    within: Callable[[], AbstractContextManager] = nullcontext,
    batch: int = 4,
    folder: str | Path | None = None,
) -> Frontier:
    """Set each of m neurons to multiples of its maximum, at every position, and measure (eq-11-5, eq-11-7).

    With a `folder` the processes that Accelerate or torchrun have started share the contexts, and a killed call goes on
    where it stopped; all is what one process finds, but for the order of sums in double precision.

    Args:
        model: with nothing spliced in.
        contexts: (c, n) tokens to steer on.
        layer: of the neurons.
        neurons: (m,) integers.
        maxima: (m,) their maxima.
        targets: (m, v) bool, tokens to be lifted, fixed beforehand.
        controls: (m, v) bool, other tokens, such as equally frequent ones.
        strengths: rising multiples of the maximum.
        within: makes a context inside which the model is the arm, such as `lambda: splice(model, {layer: sae})`.
        batch: contexts at a time.
        folder: as for `collect_records`; without one, every process reads all contexts.

    Returns:
        The same in each process.

    Raises:
        ValueError: targets or controls are not (m, v) bool with some and not all tokens for each neuron; contexts are
            not (c, n) tokens with n at least 2; maxima are not (m,), finite and at least 0; strengths do not rise from
            above 0; a file in `folder` is damaged; or as `steered_logits`.
        OSError: `folder` cannot be written.
    """
    check_contexts(model, contexts, batch, least=2)
    strengths = [float(strength) for strength in strengths]
    _check(model, neurons, maxima, targets, controls, strengths)
    device = model.token_embedding.weight.device
    targets, controls, maxima = targets.to(device), controls.to(device), single(maxima.to(device))
    values = torch.outer(torch.tensor(strengths, dtype=maxima.dtype, device=device), maxima)
    with within():
        check_values(model, layer, neurons, values)

    def made_from() -> list:
        given = dict(contexts=contexts, neurons=neurons, values=values, targets=targets, controls=controls)
        with within():
            return ["frontier", model_facts(model), layer, batch, digest_of_tensors(given)]

    with open_pass(RunningSums, contexts.numel(), folder, made_from) as reading:
        for number, tokens in enumerate(contexts.to(device).split(batch)):
            if not reading.wanted(number):
                continue
            clean = single(model(tokens)).log_softmax(-1)
            measured = torch.zeros(3, 1 + len(values), len(neurons), dtype=torch.float64, device="cpu")
            with within():
                plain = single(model(tokens)).log_softmax(-1)
                unsteered = repeat(torch.stack([clean, plain]), "r b n v -> r m b n v", m=len(neurons))
                for some, logits in steered_logits(model, tokens, layer, neurons, values):
                    logits = torch.cat([unsteered[:, some], single(logits)])
                    measured[:, :, some] = exact_sum(_measure(logits, targets[some], controls[some]), (3, 4)).cpu()
            kl = exact_sum(clean.exp() * (clean - plain))
            loss = exact_sum((clean - plain)[:, :-1].gather(2, tokens[:, 1:, None].long()))
            reading.running.add(number, tokens.numel(), {"measured": measured, "kl": kl, "loss": loss})
            reading.keep()
        sums = reading.merged().sums
    n_contexts, n = contexts.shape
    loss, kl = float(sums["loss"]) / (n_contexts * (n - 1)), float(sums["kl"]) / contexts.numel()
    return Frontier(*sums["measured"] / contexts.numel(), loss, kl)


def _check(
    model: LanguageModel, neurons: Tensor, maxima: Tensor, targets: Tensor, controls: Tensor, strengths: list[float]
) -> None:
    if not strengths or not all(low < high < np.inf for low, high in pairwise([0, *strengths])):
        raise ValueError(f"strengths must be positive numbers that rise; got {strengths}")
    if not len(neurons) or maxima.shape != neurons.shape or not ((maxima >= 0) & maxima.isfinite()).all():
        raise ValueError(
            f"a frontier needs one neuron or more, and their maxima, finite and at least 0; got {neurons.tolist()} and "
            f"{maxima.tolist()}"
        )
    shape = len(neurons), model.config.vocab_size
    for name, tokens in ("targets", targets), ("controls", controls):
        if tokens.shape != shape or tokens.dtype != torch.bool:
            raise ValueError(f"{name} must be {shape} bool; got {tuple(tokens.shape)} {tokens.dtype}")
        if (useless := ~tokens.any(1) | tokens.all(1)).any():
            rows = useless.nonzero()[:, 0].tolist()
            raise ValueError(f"{name} must name some and not all tokens for each neuron; leave out rows {rows}")


def _measure(logits: Tensor, targets: Tensor, controls: Tensor) -> Tensor:
    """Lift, control lift and off-target divergence from the clean model's logits, the first of (1 + s, m, b, n, v).

    The result is (3, s, m, b, n). The targets' logits are overwritten, which spares passes over the largest tensor.
    """
    targets, are_targets = _lists(targets)
    controls, are_controls = _lists(controls)

    def log_mass(tokens: Tensor, valid: Tensor) -> Tensor:
        return logits.gather(-1, tokens.expand(*logits.shape[:-1], -1)).masked_fill(~valid, -torch.inf).logsumexp(-1)

    lifted, control = log_mass(targets, are_targets), log_mass(controls, are_controls)
    logits.scatter_(-1, targets.expand(*logits.shape[:-1], -1), -1e9)  # no target left: 0 after exp, and 0 times finite
    conditional = logits.softmax(-1)
    others = logits.amax(-1) - conditional.amax(-1).log()  # logsumexp, for less than half the time of torch's
    entropy = others - torch.linalg.vecdot(conditional[:1], logits)  # cross-entropy with the clean model's p(·|∉T)
    everything = torch.logaddexp(lifted, others)
    measured = torch.stack([lifted - everything, control - everything, entropy])
    return measured[:, 1:] - measured[:, :1]


def _lists(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (m, v) bool as numbers (m, 1, 1, k), filled up with the first, and which are no filling."""
    valid, numbers = tokens.int().topk(int(tokens.sum(1).max()), 1)
    numbers = torch.where(valid > 0, numbers, numbers[:, :1])
    return rearrange(numbers, "m k -> m 1 1 k"), rearrange(valid > 0, "m k -> m 1 1 k")
