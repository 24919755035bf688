"""What all checks share: asking a reader's function, comparing its answers, and saying what is wrong in one line."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from itertools import combinations

import torch
from torch import Tensor

RTOL, ATOL = 1e-7, 1e-9


class Verdict(Exception):
    """What a check says; a notebook shows this line and no traceback."""

    def _render_traceback_(self) -> list[str]:  # read by IPython
        return [f"{type(self).__name__}: {self}"]


class CheckFailed(Verdict, AssertionError):
    """An answer is wrong."""


class NotWritten(Verdict, NotImplementedError):
    """The function is still the stub."""


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64 on the CPU, the same for the same seed; torch's own seed is left alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def tokens(n: int, d: int, seed: int) -> Tensor:
    """(n, d) tokens that differ in reach from direction to direction and are not centred."""
    return random(n, d, seed=seed) * torch.linspace(0.3, 2, d, dtype=torch.float64, device="cpu") + 0.4


def subspaces(k: int, d: int, p: int, seed: int) -> Tensor:
    """(k, d, p) bases with orthonormal columns."""
    return torch.linalg.qr(random(k, d, p, seed=seed)).Q


def grade(
    function: Callable,
    cases: Iterable[tuple],
    oracle: Callable,
    by: str,
    mistakes: Mapping[str, Callable],
    rtol: float = RTOL,
    atol: float = ATOL,
) -> None:
    """Compare a reader's function with an oracle on each case, and name the mistake that explains all answers.

    Args:
        function: the reader's.
        cases: arguments for each call. Between them they must tell the mistakes from each other.
        oracle: gives the right answer to the same arguments, computed in another way.
        by: what the oracle is, for the message: "automatic differentiation".
        mistakes: what to say -> the answer of a function with that mistake, to the same arguments.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        CheckFailed: the answers differ from the oracle's.
        NotWritten: the function is a stub.
    """
    cases = list(cases)
    expected = [as_tensor(oracle(*case)) for case in cases]
    answers = [ask(function, case, target.shape) for case, target in zip(cases, expected, strict=True)]
    errors = [_excess(answer, target, rtol, atol) for answer, target in zip(answers, expected, strict=True)]
    name = function.__name__
    if all(error <= 1 for error in errors):  # NaN is not right
        print(f"{name}: right. It agrees with {by} in {len(cases)} random cases, to a relative {rtol:g}.")
        return
    for message, mistake in mistakes.items():
        wrong = [as_tensor(mistake(*case)) for case in cases]
        if all(a.shape == w.shape and _excess(a, w, rtol, atol) <= 1 for a, w in zip(answers, wrong, strict=True)):
            raise CheckFailed(f"{name}: {message}")
    worst = max(range(len(cases)), key=errors.__getitem__)
    got, target = answers[worst].flatten(), expected[worst].flatten()
    entry = int((got - target).abs().argmax())
    where = f" (entry {entry} of {len(got)})" if len(got) > 1 else ""
    raise CheckFailed(
        f"{name} differs from {by}: for {describe(function, cases[worst])} it gives {got[entry]:.6g} "
        f"where {target[entry]:.6g} is right{where}. No common mistake explains it."
    )


def unmended(variant: Callable, bugs: Mapping[str, Mapping]) -> dict[str, Callable]:
    """The mistakes of a reader who was to mend several bugs: some, or all, are still there.

    Args:
        variant: the answer to a case, with a bug where its keywords say so.
        bugs: what to say of each -> the keywords.

    Returns:
        What to say -> the answer, as `grade` takes it, for every set of bugs, single ones first.
    """
    sets = [some for size in range(1, len(bugs) + 1) for some in combinations(bugs, size)]
    return {
        "; and ".join(some): partial(variant, **{key: value for bug in some for key, value in bugs[bug].items()})
        for some in sets
    }


def predict(function: Callable, *case: object, keys: Iterable[str], words: tuple[str, ...] = ()) -> dict:
    """A reader's predictions, one for each key: one of the words, or anything where there are none.

    Raises:
        CheckFailed: the answer is no such dict.
        NotWritten: the function is a stub.
    """
    answer, keys = call(function, *case), list(keys)
    complete = isinstance(answer, dict) and set(answer) == set(keys)
    if complete and (not words or all(value in words for value in answer.values())):
        return answer
    what = "a dict with the keys"
    if words:
        *others, last = (f'"{word}"' for word in words)
        what = f"{', '.join(others)} or {last} for each of"
    raise CheckFailed(f"{function.__name__} should return {what} {', '.join(keys)}")


def ask(function: Callable, case: tuple, shape: torch.Size) -> Tensor:
    """The answer to one case as a float64 tensor of the expected shape, from arguments of its own.

    Raises:
        CheckFailed: the answer is nothing, of another kind or shape, or not finite; or the arguments were changed.
        NotWritten: the function is a stub.
    """
    name, own = function.__name__, copied(case)
    answer = call(function, *own)
    if answer is None:
        raise CheckFailed(f"{name} returns None: does it end in `return`?")
    try:
        answer = as_tensor(answer)
    except (TypeError, ValueError, RuntimeError):
        raise CheckFailed(f"{name} returns a {type(answer).__name__}; a tensor {tuple(shape)} was expected") from None
    if answer.shape != shape:
        transposed = answer.ndim == 2 and answer.mT.shape == shape
        raise CheckFailed(
            f"{name} returns the shape {tuple(answer.shape)} for {describe(function, case)}; "
            f"{tuple(shape)} was expected" + (": is it transposed? Tokens are rows." if transposed else "")
        )
    if not answer.isfinite().all():
        raise CheckFailed(f"{name} returns numbers that are not finite for {describe(function, case)}")
    if not same(case, own):
        raise CheckFailed(f"{name} changes its arguments in place: compute with copies")
    return answer


def call(function: Callable, *arguments: object) -> object:
    """The function's answer; a stub's error becomes one line."""
    try:
        return function(*arguments)
    except NotImplementedError as error:
        raise NotWritten(str(error)) from None


def copied(argument: object) -> object:
    """An argument, or a tuple or list of arguments, with copies of its tensors."""
    if isinstance(argument, (tuple, list)):
        return type(argument)(map(copied, argument))
    return argument.clone() if isinstance(argument, Tensor) else argument


def same(before: object, after: object) -> bool:
    """Whether all tensors of an argument are as they were in `copied`, with NaN equal to NaN."""
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(map(same, before, after))
    return not isinstance(before, Tensor) or (
        before.shape == after.shape and bool(((before == after) | before.isnan() & after.isnan()).all())
    )


def as_tensor(value: object) -> Tensor:
    return torch.as_tensor(value).detach().to("cpu", torch.float64)


def describe(function: Callable, case: tuple) -> str:
    """The arguments in a few words, by their names: shapes of tensors, and numbers."""
    names = list(signature(function).parameters)
    names = names if len(names) >= len(case) else ["an argument"] * len(case)
    words = [
        f"{name} of shape {tuple(argument.shape)}" if isinstance(argument, Tensor) else f"{name} = {argument:g}"
        for name, argument in zip(names, case, strict=False)
        if isinstance(argument, (Tensor, int, float))
    ]
    return ", ".join(words) or "its arguments"


def _excess(answer: Tensor, target: Tensor, rtol: float, atol: float) -> float:
    """The largest error in units of what is tolerated."""
    return float(((answer - target).abs() / (atol + rtol * target.abs())).max())
