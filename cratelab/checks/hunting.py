"""Bug hunts and predictions: what a reader claims is tried, and how much of it is right is said before which.

A hunt grades *inputs*: each is given to the right function and to functions with one of the bugs. A bug is named once
an input has told it from the others.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cratelab.checks.grading import CheckFailed, answering, as_tensor, call, number

POSITIVE = "a positive number", lambda x: 0 < x < float("inf")
NOT_NEGATIVE = "a number, 0 or more", lambda x: 0 <= x < float("inf")
COUNT = "a whole number from 1 to 1000", lambda x: isinstance(x, int) and 1 <= x <= 1000
LARGEST = 2000  # numbers in an argument: oracles go from token to token
SEEN = 1e-6  # of the largest number in either answer


def hunt(
    inputs: Callable[[], list[tuple]],
    variant: Callable,
    bugs: Mapping[str, Mapping],
    needs: Mapping[str, object],
    refuse: Callable[..., str | None] = lambda *_: None,
    tell: bool = True,
    seen: float = SEEN,
) -> None:
    """Say how many bugs a reader's inputs expose, and name these.

    An input exposes a bug if it shows that bug and no other that is unknown yet: what shows several at once tells none.
    The order of the inputs does not matter, and there may be twice as many as there are bugs.

    Args:
        inputs: the reader's: returns a list of cases, each a tuple of arguments.
        variant: the right answer to a case, or that with a bug where its keywords say so.
        bugs: what to say of each -> its keywords.
        needs: name of each argument -> the axes of a tensor, such as "n d", of which equal letters are equal; a pair of
            words and a condition on a number; or a function that returns the argument, or None if it is none.
        refuse: what else is wrong with a case, or None.
        tell: whether to print the names of the bugs when all are exposed.
        seen: a bug is shown by a difference that is larger than this times the largest number in either answer.

    Raises:
        CheckFailed: a bug is left, or an input is none.
        NotWritten: the function is a stub.
    """
    shown = []
    for i, case in enumerate(_cases(inputs, 2 * len(bugs)), 1):
        where = f"{inputs.__name__}, input {i}"
        with answering(inputs, f"when input {i} is tried", f"one that fits {', '.join(needs)}"):
            case = _read(case, needs, where)
            if complaint := refuse(*case):
                raise CheckFailed(f"{where}: {complaint}")
            right = as_tensor(variant(*case))
            if not right.isfinite().all():
                raise CheckFailed(f"{where}: the right answer is not finite for it")
            shown.append({text for text, bug in bugs.items() if _differ(as_tensor(variant(*case, **bug)), right, seen)})
    exposed: dict[str, int] = {}
    while new := [(i, left) for i, seen in enumerate(shown, 1) if len(left := seen - exposed.keys()) == 1]:
        exposed[new[0][1].pop()] = new[0][0]
    lines = [f"{inputs.__name__}: {len(exposed)} of {len(bugs)} bugs exposed."]
    lines += [f"input {i}: {text}" for text, i in sorted(exposed.items(), key=lambda pair: pair[1])]
    if len(exposed) == len(bugs):
        if tell:
            print("\n".join(lines))
        return
    for i, seen in enumerate(shown, 1):
        if not seen:
            lines.append(f"input {i} shows no bug: all functions give the right answer")
        elif len(seen - exposed.keys()) > 1:
            lines.append(f"input {i} shows several of the others at once, and tells none: change one thing at a time")
    raise CheckFailed("\n".join(lines))


def judge(
    function: Callable, wrong: Mapping[str, str | None], reasons: bool = False, why: Mapping[str, str] | None = None
) -> None:
    """Refuse predictions that are not all right, and say how many are; which, and why, on request only.

    Who changes one at a time learns from the count which are right. That they do not is on their honour, and said.

    Args:
        function: the reader's.
        wrong: each key -> what is wrong about its prediction, or None if it is right.
        reasons: whether to say what is wrong.
        why: each key -> why the right answer is right, printed once all are.

    Raises:
        CheckFailed: a prediction is wrong.
    """
    told = {key: text for key, text in wrong.items() if text}
    if told:
        many = f"{function.__name__}: {len(wrong) - len(told)} of {len(wrong)} right"
        if reasons:
            raise CheckFailed("\n".join([f"{many}.", *(f"{key}{text}" for key, text in told.items())]))
        raise CheckFailed(
            f"{many}. Go through your reasons once more before you change an answer: to change one at a time and watch "
            f"the count is to guess, which only your honour forbids. `reasons=True` in the check, after "
            f"{function.__name__}, says which are wrong, and why"
        )
    for key, text in (why or {}).items():
        print(f"{key}: {text}")


def _cases(inputs: Callable, at_most: int) -> list:
    cases = call(inputs, expected="a list of inputs")
    if not isinstance(cases, list | tuple) or not cases or not all(isinstance(case, tuple) for case in cases):
        raise CheckFailed(
            f"{inputs.__name__} should return a list of inputs, each a tuple of arguments: [(…, …), (…, …)]"
        )
    if len(cases) > at_most:
        raise CheckFailed(f"{inputs.__name__} returns {len(cases)} inputs; {at_most} are enough: choose them")
    return cases


def _read(case: tuple, needs: Mapping[str, object], where: str) -> tuple:
    """The arguments, with floats in double precision."""
    if len(case) != len(needs):
        raise CheckFailed(f"{where} has {len(case)} arguments; {len(needs)} are needed: {', '.join(needs)}")
    read, sizes = [], {}
    for value, (name, need) in zip(case, needs.items(), strict=True):
        if isinstance(need, str):
            read.append(_tensor(value, need.split(), sizes, f"{where}: {name}"))
        elif callable(need):
            read.append(need(value))
            if read[-1] is None:
                raise CheckFailed(f"{where}: {name} is not what the function takes")
        else:
            words, holds = need
            read.append(number(value, f"{where}: {name}"))
            if not holds(read[-1]):
                raise CheckFailed(f"{where}: {name} is {read[-1]:g}; {words} is needed")
    return tuple(read)


def _tensor(value: object, axes: list[str], sizes: dict[str, int], where: str) -> Tensor:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    fits = shape is not None and len(shape) == len(axes) and 0 not in shape
    fits = fits and all(
        size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
        for axis, size in zip(axes, shape, strict=True)
    )
    if not fits:
        known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if axis in axes)
        raise CheckFailed(
            f"{where}: a tensor ({', '.join(axes)}) is needed{f', with {known}' if known else ''}; "
            f"got {type(value).__name__ if shape is None else shape}"
        )
    if value.numel() > LARGEST:
        raise CheckFailed(f"{where}: {value.numel()} numbers; {LARGEST} are enough")
    if not value.isfinite().all():
        raise CheckFailed(f"{where}: numbers are not finite")
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _differ(answer: Tensor, right: Tensor, seen: float) -> bool:
    """Whether two answers differ by more than rounding."""
    if answer.shape != right.shape or not answer.isfinite().all():
        return True
    if not right.numel():
        return False
    return bool((answer - right).abs().max() > seen * torch.maximum(answer.abs().max(), right.abs().max()))


def orthonormal(U: Tensor) -> str | None:
    """What is wrong with (k, d, p) bases, or None."""
    eye = torch.eye(U.shape[2], dtype=U.dtype, device=U.device)
    if U.shape[2] > U.shape[1] or not torch.allclose(U.mT @ U, eye.expand(len(U), -1, -1), atol=1e-6):
        return "the columns of each basis in U are to be orthonormal"
    return None
