"""How auto-encoders are trained: how far and how fast, when they are looked at, and when it is enough."""

import math
from dataclasses import dataclass
from numbers import Real

from cratelab.arguments import check_seed, check_whole


@dataclass
class SaeRecipe:
    """How to train auto-encoders.

    The defaults suit small models. In 100,000 tokens of a toy's neurons, with λ = 0.01 and four features a neuron, they
    come to 70 to 100 active features a token; the paper's rate of 4e-4, with batches of 1,024, to 300.

    Attributes:
        max_tokens: where training ends at the latest.
        batch: tokens a step.
        learning_rate: Adam's.
        decay: the last share of `max_tokens`, over which the rate falls linearly to 0; before, and if 0, it is
            constant. Features should not be born again late in it.
        buffer: tokens whose activations are held; half of it is read at a time.
        resample_at: when dead features are born again, as shares of `max_tokens`.
        evaluations: how many, evenly over `max_tokens`; after each there is a checkpoint.
        validation_tokens: read in each.
        least_gain: without `decay`, training ends when over its last quarter no layer's recovered loss has gained this
            much, nor has its training loss fallen by this share. The first alone would end it too early: recovered loss
            of small models nears 1 long before the code is sparse.
        seed: 0 to 2³² − 1, of the weights, the text and its order.

    Raises:
        ValueError: a value is of another type or out of range.
    """

    max_tokens: int = 500_000
    batch: int = 256
    learning_rate: float = 3e-3
    decay: float = 0.0
    buffer: int = 65_536
    resample_at: tuple[float, ...] = (0.1, 0.2, 0.5, 0.75)
    evaluations: int = 16
    validation_tokens: int = 8192
    least_gain: float = 0.01
    seed: int = 0

    def __post_init__(self):
        try:
            self.resample_at = tuple(self.resample_at)
        except TypeError as error:
            raise ValueError(f"resample_at must be shares of max_tokens, or (); got {self.resample_at!r}") from error
        for name in "max_tokens", "batch", "buffer", "evaluations", "validation_tokens":
            check_whole(name, getattr(self, name))
        check_seed(self.seed)
        if not all(isinstance(share, Real) and 0 <= share < math.inf for share in self.resample_at):
            raise ValueError(f"resample_at must be shares of max_tokens, finite and at least 0; got {self.resample_at}")
        for name in "learning_rate", "decay", "least_gain":
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number; got {getattr(self, name)!r}")
        if not (0 < self.learning_rate < math.inf and math.isfinite(self.least_gain)):
            raise ValueError(
                f"the learning rate must be positive and the least gain finite; got {self.learning_rate} and "
                f"{self.least_gain}"
            )
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, a share of max_tokens; got {self.decay}")

    @property
    def patience(self) -> int:
        """Tokens of silence after which a feature counts as dead, a twentieth of the training.

        The usual rebirths are a tenth of it or more apart, so that a feature that is born again has twice this time to
        become active before the next; and 25,000 tokens, of the usual 500,000, spare what is rare and not dead.
        """
        return self.max_tokens // 20

    def rate(self, tokens: int) -> float:
        """The learning rate after so many tokens."""
        left = max(0.0, 1 - tokens / self.max_tokens)
        return self.learning_rate * (min(1.0, left / self.decay) if self.decay else 1.0)

    def due(self, before: int, after: int) -> tuple[bool, bool]:
        """Whether an evaluation, and whether a rebirth, lies past `before` tokens and not past `after`."""
        evaluate_at = [(i + 1) / self.evaluations for i in range(self.evaluations)]
        evaluate, resample = (
            any(before < share * self.max_tokens <= after for share in shares)
            for shares in (evaluate_at, self.resample_at)
        )
        return evaluate, resample

    def reason_to_stop(self, curve: list[dict]) -> str:
        """Why training ends after this `curve`, as `SaeTraining` has it; empty while it goes on."""
        tokens = curve[-1]["tokens"]
        if tokens >= self.max_tokens:
            return f"all {tokens} tokens were read"
        then = {row["layer"]: row for row in curve if row["tokens"] <= 0.75 * tokens}
        if self.decay or tokens < self.max_tokens / 4 or not then:
            return ""
        now = {row["layer"]: row for row in curve}
        pairs = [(now[i]["recovered"], then[i]["recovered"]) for i in now]
        gain = max((after - before for after, before in pairs if None not in (after, before)), default=0.0)
        losses = [(now[i]["loss"], then[i]["loss"]) for i in now]
        # a silent layer has no loss that could fall
        fall = max(1 - after / before if before > 1e-12 else 0.0 for after, before in losses)
        if max(gain, fall) >= self.least_gain:
            return ""
        return (
            f"in the last quarter of {tokens} tokens recovered loss gained {gain:.2%} at most, "
            f"and the training loss fell by {fall:.2%} at most"
        )
