"""What a training run will cost, before it starts: parameters, memory, arithmetic, time.

Nothing is estimated by formula that can be counted: the model runs on PyTorch's fake tensors, which have shapes and no
numbers, while PyTorch's own counter adds up its arithmetic and a hook what it keeps for the backward pass.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cratelab.devices import best_device
from cratelab.language_model import LanguageModel, LanguageModelConfig
from cratelab.losses import next_token_loss
from cratelab.recipe import Recipe

SHARE_OF_PEAK = 0.4  # of the measured rate of matrix products; benchmarks/README.md has what was reached where


_UNITS = {"years": 365.25 * 86400, "months": 365.25 * 86400 / 12, "days": 86400, "hours": 3600, "minutes": 60}


def duration(seconds: float) -> str:
    """A time to expect, in words: rounded, in the largest unit of which there are two or more."""
    for unit, size in _UNITS.items():
        if seconds >= 2 * size:
            return f"about {seconds / size:,.0f} {unit}"
    return f"about {seconds:.0f} seconds" if seconds >= 2 else "a second or two"


@dataclass
class Budget:
    """The cost of a run.

    Attributes:
        parameters: all of them, positions included.
        flops_per_token: floating-point operations of a forward and a backward pass, a multiply-add counted as two.
        state_bytes: weights, gradients and AdamW's two moments in float32, on each process.
        activation_bytes: what one window keeps for its backward pass in float32; in bf16 it is about half.
        windows: at a time on one process.
        tokens: of the whole run.
        matmul_rate: measured floating-point operations a second of this machine's matrix products.
        device: the machine it was measured on.
    """

    parameters: int
    flops_per_token: float
    state_bytes: int
    activation_bytes: int
    windows: int
    tokens: int
    matmul_rate: float
    device: str

    @property
    def memory_bytes(self) -> int:
        """Of one process, in float32."""
        return self.state_bytes + self.windows * self.activation_bytes

    @property
    def seconds(self) -> float:
        """On one such device at `SHARE_OF_PEAK` of its rate."""
        return self.tokens * self.flops_per_token / (SHARE_OF_PEAK * self.matmul_rate)

    def __str__(self) -> str:
        memory, state, each = (n / 2**30 for n in (self.memory_bytes, self.state_bytes, self.activation_bytes))
        return "\n".join(
            [
                f"parameters    {self.parameters:,}",
                f"memory        {memory:.2f} GiB a process in float32: {state:.2f} of weights, gradients and moments, "
                f"{self.windows} × {each:.3f} of activations",
                f"arithmetic    {self.flops_per_token / 1e6:.1f} MFLOP a token, forward and backward",
                f"tokens        {self.tokens:,}",
                f"time          {duration(self.seconds)} on one {self.device}, at {SHARE_OF_PEAK:.0%} of the measured "
                f"{self.matmul_rate / 1e12:.2f} TFLOP/s of its matrix products",
            ]
        )


def estimate(
    model_class: type[LanguageModel], config: LanguageModelConfig, recipe: Recipe, processes: int = 1
) -> Budget:
    """The cost of training a model of this configuration.

    Args:
        model_class: `Crate` or `Gpt2`.
        config: its configuration.
        recipe: how it is to be trained.
        processes: among which each batch is divided.

    Raises:
        ValueError: the batch cannot be divided so.
    """
    recipe.check_division(processes)
    # one layer with all that stands around them, and for each further layer what a second one adds
    one, two = (_count(model_class, replace(config, n_layers=n)) for n in (1, 2))
    n_parameters, flops, activation_bytes = (
        first + (config.n_layers - 1) * (both - first) for first, both in zip(one, two, strict=True)
    )
    device = best_device()
    return Budget(
        parameters=n_parameters,
        flops_per_token=flops / config.context,
        state_bytes=16 * n_parameters,
        activation_bytes=activation_bytes,
        windows=recipe.batch // (recipe.accumulate * processes),
        tokens=recipe.steps * recipe.batch * config.context,
        matmul_rate=measure_matmul_rate(device),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
    )


def _count(model_class: type[LanguageModel], config: LanguageModelConfig) -> tuple[int, int, int]:
    """Parameters, floating-point operations and bytes kept for the backward pass, of one window."""
    with FakeTensorMode():
        model, window = model_class(config), torch.zeros(1, config.context + 1, dtype=torch.long)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = next_token_loss(model, window)
        activation_bytes = sum(kept.values())
        del loss
        # the counter knows attention's products only where they are plain ones
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next_token_loss(model, window).backward()
        return model.count_parameters(), counter.get_total_flops(), activation_bytes


def measure_matmul_rate(device: torch.device, size: int = 2048, seconds: float = 0.5) -> float:
    """Floating-point operations a second of square matrix products: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size *= 1 if device.type == "cpu" else 4
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def finished(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            c = a @ b
        c[0, 0].item()
        return time.perf_counter() - start

    finished(1)
    n = max(1, int(seconds / finished(1)))
    return 2 * size**3 * n / finished(n)
