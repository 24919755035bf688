"""When more is asked of a function than its value and one backward pass."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor) -> bool:
    """Is this inside `torch.func`'s grad, vmap, jvp, … or `torch.export`, or are these tensors batched or dual numbers?

    Operations whose gradient is written by hand cannot follow there; the plain ones they stand for can.
    """
    # PyTorch has no public names for the first, nor for the batches of `torch.autograd.grad(…, is_grads_batched=True)`.
    if torch._C._are_functorch_transforms_active() or _is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(
        torch._C._functorch.is_legacy_batchedtensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


# Older versions of PyTorch cannot tell it from compiling, where the plain operations are right as well.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
