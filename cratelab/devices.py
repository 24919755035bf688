"""Where tensors live: the device to compute on, and what not every kind of device can do."""

import atexit
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import PartialState

CHOSEN = "ACCELERATE_TORCH_DEVICE"  # Accelerate's own variable, so that training obeys it too


def best_device() -> torch.device:
    """The one that was chosen (`computing_on`), else CUDA where there is one, else Apple's MPS, else the CPU."""
    if chosen := os.environ.get(CHOSEN):
        return torch.device(chosen)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def computing_on(name: str | None) -> Iterator[None]:
    """Inside the block `best_device` is the one of this name, such as "cpu" or "cuda:1"; as before if there is no name.

    Raises:
        ValueError: nothing can be computed on such a device here.
    """
    if name is None:
        yield
        return
    try:
        torch.ones(1, device=name).cpu()
    except Exception as error:  # every backend has errors of its own for a device that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"nothing can be computed on {name!r} here, but on {best_device()}: {reason}") from error
    before = os.environ.get(CHOSEN)
    os.environ[CHOSEN] = name
    try:
        yield
    finally:
        os.environ.pop(CHOSEN)
        if before is not None:
            os.environ[CHOSEN] = before


def processes() -> "PartialState":
    """The processes that torchrun or `accelerate launch` has started, this one among them; its device is then set.

    They wait for each other for a week: one may be slower, or score while the others have nothing to do.
    """
    from accelerate import PartialState

    leave_group_at_exit()
    return PartialState(cpu=best_device().type == "cpu", timeout=timedelta(days=7))


@cache
def leave_group_at_exit() -> None:
    """See to it that processes on CPUs end in order: else Gloo's threads may outlive the interpreter, and abort."""
    atexit.register(_leave_group)


def _leave_group() -> None:
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        group.destroy_process_group()


WITHOUT_FLOAT64 = ("mps",)


def check_floating(module: nn.Module) -> None:
    """Raises ValueError if parameters were cast to integers, which leaves nothing of them."""
    if bad := [name for name, parameter in module.named_parameters() if not parameter.is_floating_point()]:
        raise ValueError(f"weights must be floating point; {', '.join(bad)} of {type(module).__name__} are not")


def exact(x: Tensor) -> Tensor:
    """`x` in float64: where it is, or on the CPU if its device has no float64, as Apple's MPS."""
    return _where_exact(x).double()


def exact_sum(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """`x.sum(dim)` added up in float64, where `exact` would put it, without a copy of `x` in float64."""
    return _where_exact(x).sum(dim, dtype=torch.float64)


def single(x: Tensor) -> Tensor:
    """`x` in float32 where it is half precision; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def all_finite(x: Tensor) -> bool:
    """Whether all numbers are finite, by one sum in float32 or better: a fraction of what it costs to ask each one.

    Numbers so large that their sum is infinite are taken for infinite, too.
    """
    return math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def memory(device: torch.device) -> float:
    """Bytes of memory that a device has in all, for `meta` those of the host; infinite where nothing says how many."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type in ("cpu", "meta") and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def _where_exact(x: Tensor) -> Tensor:
    return x.cpu() if x.device.type in WITHOUT_FLOAT64 else x
