"""How to train: steps, batch, learning rates, precision."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from cratelab.arguments import check_seed
from cratelab.language_model import LanguageModelConfig


@dataclass
class Recipe:
    """How to train. The defaults are the paper's; `Recipe.preset("toy")` suits a laptop.

    Attributes:
        steps: updates of the weights.
        batch: windows a step, over all processes; 512 of 1,024 tokens are half a million.
        accumulate: parts into which each process cuts its share, when memory does not hold it at once.
        peak_rate: learning rate at the end of the warm-up.
        final_rate: learning rate at the end, reached along a cosine.
        warmup: steps in which the rate rises linearly; 2,000, but at most a tenth of the steps, unless given.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        seed: of the windows, below 2³². The weights are those that the model comes with.
        validate_every: steps from one validation to the next; there is one after the last step in any case.
        validation_windows: how many, the same each time, spread evenly; fewer where the corpus has fewer.
        checkpoint_every: steps from one checkpoint to the next.
        precision: "bf16" computes matrix products in bfloat16, "no" all in float32, "auto" the first where a GPU can.
        compile: torch.compile; where there is CUDA, unless given.

    Raises:
        ValueError: a number is out of range, or none.
    """

    steps: int = 600_000
    batch: int = 512
    accumulate: int = 1
    peak_rate: float = 6e-4
    final_rate: float = 6e-5
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    validate_every: int = 1000
    validation_windows: int = 256
    checkpoint_every: int = 1000
    precision: Literal["auto", "no", "bf16"] = "auto"
    compile: bool | None = None

    def __post_init__(self):
        least = dict(steps=1, batch=1, accumulate=1, warmup=0, seed=0, validate_every=1, validation_windows=1)
        least |= dict(checkpoint_every=1, peak_rate=0, final_rate=0, weight_decay=0, clip=0)
        for name, low in least.items():
            value, whole = getattr(self, name), name not in ("peak_rate", "final_rate", "weight_decay", "clip")
            if value is None and name == "warmup":
                continue
            if not isinstance(value, Integral if whole else Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a {'whole ' if whole else ''}number; got {value!r}")
            if not low <= value < math.inf:
                raise ValueError(f"{name} must be at least {low}; got {value}")
            setattr(self, name, int(value) if whole else float(value))
        check_seed(self.seed)
        self.check_division(1)
        if self.precision not in ("auto", "no", "bf16"):
            raise ValueError(f'precision must be "auto", "no" or "bf16"; got {self.precision!r}')
        if self.compile not in (None, True, False):
            raise ValueError(f"compile must be True, False or None; got {self.compile!r}")

    @classmethod
    def preset(cls, name: str, **overrides) -> "Recipe":
        """ "toy": 16 windows a step at a rate for tiny models; for any other size the paper's recipe.

        Raises:
            ValueError: there is no size of that name.
        """
        if name not in LanguageModelConfig.presets:
            raise ValueError(f"no preset {name!r}; there are {', '.join(LanguageModelConfig.presets)}")
        toy = dict(steps=1000, batch=16, peak_rate=3e-3, final_rate=3e-4, validate_every=100, validation_windows=64)
        return cls(**(toy if name == "toy" else {}) | overrides)

    def check_division(self, processes: int) -> None:
        """Raises ValueError if so many processes cannot divide the batch among them and into their parts."""
        if processes < 1 or self.batch % (processes * self.accumulate):
            raise ValueError(
                f"the batch must be a multiple of processes × accumulate; got {self.batch}, {processes} and "
                f"{self.accumulate}"
            )

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 0 (eq-07-4): linear up to the peak, then half a cosine down."""
        warmup = min(2000, self.steps // 10) if self.warmup is None else self.warmup
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.final_rate + (self.peak_rate - self.final_rate) * ((1 + math.cos(math.pi * progress)) / 2)
