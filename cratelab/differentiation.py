"""When more is asked of a function than its value and one backward pass."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor) -> bool:
    """Is this inside `torch.func`'s grad, vmap, jvp, …, or are these tensors batched or dual numbers?

    Operations whose gradient is written by hand cannot follow there; the plain ones they stand for can. Being compiled
    or exported is no reason: the plain form of attention then takes several times the memory.
    """
    if _is_transforming():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(_is_batched(tensor) or forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


# PyTorch has no public names for `torch.func`'s transforms, nor for the batches of `torch.autograd.grad(…,
# is_grads_batched=True)`. Should it rename its own, these two fail with its message, and all else goes on.
_is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
