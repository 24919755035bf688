"""What all checks share: asking a reader's function, comparing its answers, and saying what is wrong in one line."""

import copy
import linecache
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature, unwrap
from itertools import combinations
from traceback import walk_tb
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

RTOL, ATOL = 1e-7, 1e-9
SHARED_HOOKS = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks


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
    rules: Iterable[Callable[[Callable], str | None]] = (),
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
        rules: asked of a right answer, such as those of `cratelab.checks.watching`: each refuses the function with
            `CheckFailed`, or returns a sentence to print.

    Raises:
        CheckFailed: the answers differ from the oracle's, or a rule is broken.
        NotWritten: the function is a stub.
    """
    cases = list(cases)
    expected = [as_tensor(oracle(*case)) for case in cases]
    answers = [ask(function, case, target) for case, target in zip(cases, expected, strict=True)]
    excess = [_excess(answer, target, rtol, atol) for answer, target in zip(answers, expected, strict=True)]
    name = function.__name__
    if all((error <= 1).all() for error in excess):  # NaN is not right
        notes = [note for rule in rules if (note := rule(function))]
        print(f"{name}: right. It agrees with {by} in {len(cases)} random cases, to a relative {rtol:g}.")
        for note in notes:
            print(note)
        return
    for message, mistake in mistakes.items():
        wrong = [as_tensor(mistake(*case)) for case in cases]
        if all(
            a.shape == w.shape and (_excess(a, w, rtol, atol) <= 1).all() for a, w in zip(answers, wrong, strict=True)
        ):
            raise CheckFailed(f"{name}: {message}")
    if any(target.numel() for target in expected) and all(
        (_excess(a, t, 1e-4, 1e-5) <= 1).all() for a, t in zip(answers, expected, strict=True)
    ):
        raw = call(function, *cases[0])
        if getattr(raw, "dtype", None) in (torch.float32, torch.float16, torch.bfloat16, np.dtype("float32")):
            raise CheckFailed(
                f"{name} agrees with {by} to single precision only: stay in float64, as the arguments are"
            )
    worst = max(range(len(cases)), key=lambda i: float(excess[i].max()) if excess[i].numel() else 0)
    entry, said, right = _worst(answers[worst], expected[worst], excess[worst])
    where = f" (entry {entry} of {answers[worst].numel()})" if answers[worst].numel() > 1 else ""
    raise CheckFailed(
        f"{name} differs from {by}: for {describe(function, cases[worst])} it gives {said} "
        f"where {right} is right{where}. No common mistake explains it."
    )


def also(
    but: str, *cases: tuple, oracle: Callable, rtol: float = RTOL, atol: float = ATOL
) -> Callable[[Callable], None]:
    """A rule for `grade`: the answer is right for these cases too, which the others leave out.

    Args:
        but: what is special about them, for the message: "no token is left, and the mean of none is 0".
        cases: arguments for each call.
        oracle: gives the right answer.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    def rule(function: Callable) -> None:
        for case in cases:
            right, what = as_tensor(oracle(*case)), describe(function, case)
            try:
                answer = ask(function, case, right)
            except CheckFailed as verdict:
                raise CheckFailed(f"{verdict}. Other cases are right, but: {but}") from None
            excess = _excess(answer, right, rtol, atol)
            if excess.numel() and not (excess <= 1).all():
                _, said, target = _worst(answer, right, excess)
                raise CheckFailed(
                    f"{function.__name__} is right elsewhere, but for {what} it gives {said} where {target} is right: "
                    f"{but}"
                )

    return rule


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


def predict(
    function: Callable, *case: object, keys: Iterable[str], words: tuple[str, ...] = (), numbers: bool = False
) -> dict:
    """A reader's predictions, one for each key: one of the words, a number, or anything where neither is asked for.

    Raises:
        CheckFailed: the answer is no such dict.
        NotWritten: the function is a stub.
    """
    keys, what = list(keys), "a dict with the keys"
    if words:
        *others, last = (f'"{word}"' for word in words)
        what = f"{', '.join(others)} or {last} for each of"
    what = f"{what} {', '.join(keys)}"
    answer = call(function, *case, expected=what)
    complete = isinstance(answer, Mapping) and set(answer) == set(keys)
    if complete and numbers:
        return {key: number(answer[key], f"{function.__name__}: {key}") for key in keys}
    if complete and (not words or all(isinstance(value, str) and value in words for value in answer.values())):
        return dict(answer)
    raise CheckFailed(f"{function.__name__} should return {what}{_instead(answer, keys, words)}")


def _instead(answer: object, keys: list[str], words: tuple[str, ...]) -> str:
    """What was found in the place of a complete dict."""
    if not isinstance(answer, Mapping):
        return f"; it returns {_shown(answer)}" + (": does it end in `return`?" if answer is None else "")
    if missing := [key for key in keys if key not in answer]:
        return f"; {missing[0]} is missing"
    if extra := [key for key in answer if key not in keys]:
        return f"; {_shown(extra[0])} was not asked for"
    wrong = next(key for key in keys if not (isinstance(answer[key], str) and answer[key] in words))
    return f"; {wrong} is {_shown(answer[wrong])}"


def number(value: object, where: str, true: float | None = None) -> float | int:
    """A real number of any library, as Python's; NaN and infinity are numbers here, and no answer is right with them.

    Args:
        value: the reader's.
        where: whose it is, for the message.
        true: what True counts as, where True and False may stand for numbers; False counts as 0.

    Raises:
        CheckFailed: it is None, a string, a list, more than one number, or True or False where `true` is None.
    """
    try:
        truth = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
        if isinstance(value, (str, bytes)) or np.ndim(value) or (truth and true is None):
            raise TypeError
        plain = value.item() if hasattr(value, "item") else value
        if truth:
            return true * plain
        real = float(plain)
        return plain if isinstance(plain, int) else real
    except Exception:  # whatever a library says of what is no number, or is too large for one
        raise CheckFailed(f"{where}: a number is needed; got {_shown(value)}") from None


def ask(function: Callable, case: tuple, target: Tensor) -> Tensor:
    """The answer to one case as a float64 tensor of the target's shape, from arguments of its own.

    Raises:
        CheckFailed: the answer is nothing, of another kind or shape, or not finite where the target is.
        NotWritten: the function is a stub.
    """
    name, shape = function.__name__, target.shape
    expected = f"a tensor {tuple(shape)}" if len(shape) else "a number"
    answer = call(function, *case, expected=expected)
    if answer is None:
        raise CheckFailed(f"{name} returns None: does it end in `return`?")
    try:
        answer = as_tensor(answer)
    except Exception:  # whatever a library says of what is no array of real numbers
        raise CheckFailed(f"{name} returns {_shown(answer)}; {expected} was expected") from None
    if answer.shape != shape:
        transposed = answer.ndim == 2 and answer.mT.shape == shape
        raise CheckFailed(
            f"{name} returns the shape {tuple(answer.shape)} for {describe(function, case)}; "
            f"{tuple(shape)} was expected" + (": is it transposed? Tokens are rows." if transposed else "")
        )
    infinite = not target.isfinite().all()  # then infinity elsewhere is a mistake like another
    if not (answer.isfinite() | ~target.isfinite() | answer.isinf() & infinite).all():
        raise CheckFailed(f"{name} returns numbers that are not finite for {describe(function, case)}")
    return answer.clone()  # the reader's function may use one buffer for all its answers


def call(function: Callable, *arguments: object, expected: str = "an answer") -> object:
    """The function's answer to copies of the arguments; errors become one line, which says what was `expected`.

    Raises:
        CheckFailed: the function raises an error, or changes an argument in place, or a setting of torch.
        NotWritten: the function is a stub.
    """
    given = copied(arguments)
    before, modes, dtype, hooks = state(given), torch.is_grad_enabled(), torch.get_default_dtype(), _shared_hooks()
    with answering(function, f"for {describe(function, arguments)}" if arguments else "", expected):
        answer = function(*given)
    if (modes, dtype, hooks) != (torch.is_grad_enabled(), torch.get_default_dtype(), _shared_hooks()):
        torch.set_grad_enabled(modes)
        torch.set_default_dtype(dtype)
        for held, was in zip(SHARED_HOOKS, hooks, strict=True):
            for key in held.keys() - was:
                del held[key]
        raise CheckFailed(
            f"{function.__name__} leaves torch changed: whether gradients are kept, the default dtype, or hooks on all "
            "modules. Use `with`, or take it back in `finally`"
        )
    for i, (was, now) in enumerate(zip(before[1:], state(given)[1:], strict=True)):
        if not same(was, now):
            if isinstance(given[i], nn.Module):
                raise CheckFailed(
                    f"{function.__name__} leaves the model changed: take hooks and settings back, even when an error "
                    "comes between"
                )
            raise CheckFailed(f"{function.__name__} changes its arguments in place: compute with copies")
    return answer


@contextmanager
def answering(function: Callable, where: str, expected: str = "an answer") -> Iterator[None]:
    """An error of a reader's function, called within, becomes one line.

    Args:
        function: the reader's.
        where: at which input: "for z of shape (3, 4)", or nothing.
        expected: what it should have returned there.

    Raises:
        CheckFailed: names the input, what was expected, the error, and in which of the reader's lines it came up.
        NotWritten: the function is a stub.
    """
    try:
        yield
    except Verdict:
        raise
    except NotImplementedError as error:
        raise NotWritten(str(error)) from None
    except Exception as error:
        own = globals_of(function)
        steps = [step for step in walk_tb(error.__traceback__) if own is not None and step[0].f_globals is own]
        line = linecache.getline(steps[-1][0].f_code.co_filename, steps[-1][1]).strip() if steps else ""
        raise CheckFailed(
            f"{function.__name__} raises {type(error).__name__}{where and f' {where}'}, where {expected} was expected: "
            f"{' '.join(str(error).split())[:300]}{line and f', in `{line}`'}"
        ) from error


def globals_of(function: Callable) -> dict | None:
    """Where the reader's functions live, through wrappers."""
    while isinstance(function, partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, partial) else unwrap(function)
    return getattr(function, "__globals__", None)


def _shared_hooks() -> list[set]:
    """The keys of the hooks that act on every module."""
    return [set(held) for held in SHARED_HOOKS]


def copied(argument: object) -> object:
    """An argument, or a tuple, list, set or dict of arguments, with copies of its tensors, arrays and modules.

    What is none of these, such as a stream or a generator of random numbers, is handed on as it is.
    """
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*map(copied, argument))
    if isinstance(argument, (tuple, list)):
        return type(argument)(map(copied, argument))
    if isinstance(argument, dict):
        other = copy.copy(argument)
        other.update({key: copied(value) for key, value in argument.items()})
        return other
    if isinstance(argument, (set, bytearray, np.ndarray)):
        return argument.copy()
    if isinstance(argument, SimpleNamespace):
        return type(argument)(**{name: copied(value) for name, value in vars(argument).items()})
    if isinstance(argument, nn.Module):
        return copy.deepcopy(argument)
    return argument.clone() if isinstance(argument, Tensor) else argument


def state(argument: object) -> object:
    """What `same` compares of an argument before and after a call.

    Its values; a module's tensors, hooks, mode and the names of its attributes.
    """
    if isinstance(argument, nn.Module):
        hooks = [
            len(vars(part)[kind])
            for part in argument.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]
        replaced = [(name, id(part), "forward" in vars(part)) for name, part in argument.named_modules()]
        tensors = [*argument.named_parameters(), *argument.named_buffers()]
        mode = [(part.training, sorted(vars(part))) for part in argument.modules()]
        return copied(
            (hooks, replaced, mode, [(name, tensor.requires_grad, tensor.detach()) for name, tensor in tensors])
        )
    if isinstance(argument, SimpleNamespace):
        return state(vars(argument))
    if isinstance(argument, (tuple, list)):
        return [type(argument), *map(state, argument)]
    if isinstance(argument, dict):
        return {key: state(value) for key, value in argument.items()}
    return copied(argument)


def same(before: object, after: object) -> bool:
    """Whether all values of an argument are as they were in `copied` or `state`, with NaN equal to NaN."""
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(map(same, before, after))
    if isinstance(before, dict):
        return list(before) == list(after) and all(same(before[key], after[key]) for key in before)
    if isinstance(before, np.ndarray):
        floats = before.dtype.kind in "fc"
        return before.dtype == after.dtype and np.array_equal(before, after, equal_nan=floats)
    if isinstance(before, Tensor):
        return before.shape == after.shape and bool(((before == after) | before.isnan() & after.isnan()).all())
    if isinstance(before, (str, bytes, bytearray, int, float, set)):
        return type(before) is type(after) and (before == after or before != before)
    return before is after


def as_tensor(value: object) -> Tensor:
    """Real numbers of any library, or lists and tuples of them, as a float64 tensor on the CPU.

    Raises:
        TypeError: they are complex, or no numbers.
        ValueError: their rows differ in length.
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError("complex numbers")
        return (value if value.layout == torch.strided else value.to_dense()).detach().to("cpu", torch.float64)
    if isinstance(value, (list, tuple)):
        return torch.stack([as_tensor(entry) for entry in value]) if len(value) else torch.zeros(0, dtype=torch.float64)
    array = np.asarray(np.ma.filled(value, np.nan) if isinstance(value, np.ma.MaskedArray) else value)
    if array.dtype.kind not in "biufO" or (array.dtype.kind == "O" and not hasattr(value, "__float__")):
        raise TypeError("no real numbers")
    return torch.from_numpy(np.array(array, dtype=np.float64))  # a copy: of any strides and byte order


def describe(function: Callable, case: tuple) -> str:
    """The arguments in a few words, by their names: shapes of tensors, numbers, and how long lists are."""
    try:
        names = list(signature(function).parameters)
    except ValueError:  # some of torch's own have none
        names = []
    names = names if len(names) >= len(case) else ["an argument"] * len(case)
    words = []
    for name, argument in zip(names, case, strict=False):
        if isinstance(argument, Tensor):
            words.append(f"{name} of shape {tuple(argument.shape)}")
        elif isinstance(argument, (int, float)):
            words.append(f"{name} = {argument:zg}")
        elif isinstance(argument, str):
            words.append(f"{name} = {argument!r:.60}")
        elif isinstance(argument, (list, tuple)):
            words.append(f"{name} of length {len(argument)}")
    return ", ".join(words) or "its arguments"


def _excess(answer: Tensor, target: Tensor, rtol: float, atol: float) -> Tensor:
    """Each entry's error in units of what is tolerated: 0 for equal ones, infinity among them; infinity for NaN."""
    error = (answer - target).abs() / (atol + rtol * target.abs())
    equal = (answer == target) | answer.isnan() & target.isnan()
    return error.nan_to_num(torch.inf, torch.inf).masked_fill(equal, 0)


def _worst(answer: Tensor, target: Tensor, excess: Tensor) -> tuple[int, str, str]:
    """The entry that is farthest off, and both its numbers with as many digits as it takes to see that they differ."""
    entry = int(excess.argmax())
    said, right = (float(numbers.flatten()[entry]) for numbers in (answer, target))
    for digits in range(6, 18):
        if f"{said:z.{digits}g}" != f"{right:z.{digits}g}":
            break
    return entry, f"{said:z.{digits}g}", f"{right:z.{digits}g}"


def _shown(value: object) -> str:
    """A value in a few words."""
    if value is None:
        return "None"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (bool, int, float, str)):
        return f"a {type(value).__name__}, {value!r:.40}"
    return f"a {type(value).__name__}"
