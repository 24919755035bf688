"""How a reader's function computes: what it calls, how much it multiplies, what it makes. Rules for `grade`.

Each rule takes the function that has given right answers, runs it once or twice more, and refuses it with `CheckFailed`
or returns a sentence. What cannot be seen, such as products within numpy, is said to be on the reader's honour.
"""

import sys
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import StringIO
from types import FrameType

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cratelab.checks.grading import CheckFailed, answering, as_tensor, ask, copied, describe, globals_of, random

HONOUR = "Right; this check does not see how."
AUTOMATIC = "torch.autograd.grad", "torch.autograd.backward", "torch.autograd.functional.*"
MEASURED = "*linalg*", "*det", "*svd*", "*eig*", "*cholesky*", "*.qr"
AUTOMATIC += "torch._functorch.eager_transforms.*", "torch.autograd.forward_ad.*", "torch.Tensor.backward", "jax.*"


@dataclass
class Seen:
    """What one call did.

    Attributes:
        called: full names of functions of Python and torch, such as "torch.linalg.solve", in the order of first calls.
        lines: how often each line of the reader's own code was run.
        products: multiplications in torch's matrix products.
        elements: numbers that torch's other operations read or wrote.
        largest: numbers in the largest tensor that torch made.
        solved: side of the largest square matrix that was inverted, factored or solved with, in torch, numpy or scipy.
        numpy: numbers (of 8 bytes) that numpy and Python held at once beyond what they held before.
    """

    called: dict[str, None] = field(default_factory=dict)
    lines: Counter = field(default_factory=Counter)
    products: float = 0
    elements: float = 0
    largest: int = 0
    numpy: float = 0
    solved: int = 0

    @property
    def operations(self) -> float:
        return self.products + self.elements


def watch(function: Callable, *case: object) -> Seen:
    """Call a function three times and note what it does; its answers are thrown away."""
    seen = Seen()
    own = globals_of(function)

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        if event == "call":
            name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"
            seen.called[name] = None
            if name.startswith(("numpy.linalg", "scipy.linalg")):
                seen.solved = max(seen.solved, _side(frame.f_locals.get("a")))
            return line if frame.f_globals is own else None

    def line(frame: FrameType, event: str, _: object) -> Callable:
        if event == "line":
            seen.lines[frame.f_code, frame.f_lineno] += 1
        return line

    torchs, before = _Names(), sys.gettrace()
    with (
        warnings.catch_warnings(),
        redirect_stdout(StringIO()),  # what a reader prints is printed by the check's calls
        answering(function, f"for {describe(function, case)}"),
    ):
        warnings.simplefilter("ignore")
        given = copied(case)
        with _numpy_memory(seen):
            function(*given)
        given = copied(case)
        with suppress(Exception), _Work(seen):  # what cannot be counted has no products
            function(*given)
        given = copied(case)
        with torchs:
            sys.settrace(trace)  # last: what the others import is loaded by now
            try:
                function(*given)
            finally:
                sys.settrace(before)
    seen.called |= dict.fromkeys(torchs.names())
    return seen


def never_calls(case: tuple, patterns: Iterable[str], why: str, what: str = "") -> Callable[[Callable], None]:
    """A rule: none of these functions, by full name with wildcards, takes part; `what` says what one found means."""

    def rule(function: Callable) -> None:
        called = watch(function, *case).called
        found = [name for name in called for pattern in patterns if fnmatchcase(name, pattern)]
        if found:
            done = what or f"calls {found[0].split('.')[-1]}"
            raise CheckFailed(f"{function.__name__} is right, but {done}: {why}")

    return rule


def no_library(case: tuple, *names: str, why: str = "here it is yours to write") -> Callable[[Callable], None]:
    """A rule: these functions and classes of cratelab, by their own names, take no part; unnamed, none."""
    patterns = [f"cratelab.*.{name}{end}" for name in names or ("[!_]*",) for end in ("", ".*")]

    def rule(function: Callable) -> None:
        called = watch(function, *case).called
        of_library = [name for name in called if not name.startswith((__name__, "cratelab.checks.grading."))]
        found = [name for name in of_library for pattern in patterns if fnmatchcase(name, pattern)]
        if found:
            raise CheckFailed(f"{function.__name__} is right, but calls cratelab's {found[0].split('.')[-1]}: {why}")

    return rule


def no_automatic_differentiation(case: tuple) -> Callable[[Callable], None]:
    """A rule: neither torch.autograd nor torch.func takes part."""
    return never_calls(case, AUTOMATIC, "derive it instead", "uses automatic differentiation")


def no_loop(short: tuple, long: tuple, over: str) -> Callable[[Callable], None]:
    """A rule: the reader's own lines run as often for a case that is longer along one axis."""

    def rule(function: Callable) -> None:
        few, many = (max(watch(function, *case).lines.values(), default=0) for case in (short, long))
        if many > few:
            raise CheckFailed(
                f"{function.__name__} is right, but loops over {over}: where there are more, a line runs {many} times "
                f"instead of {few}. Name the axis and let torch go through it"
            )

    return rule


def no_search(case: tuple, at_most: int = 20) -> Callable[[Callable], None]:
    """A rule: no line of the reader's runs very often."""

    def rule(function: Callable) -> None:
        most = max(watch(function, *case).lines.values(), default=0)
        if most > at_most:
            raise CheckFailed(
                f"{function.__name__} is right, but searches: a line runs {most} times. A closed form was asked for"
            )

    return rule


def linear_cost(short: tuple, long: tuple, advice: str) -> Callable[[Callable], str]:
    """A rule: a case with twice as many tokens takes twice the operations, memory and lines, and no more."""

    def rule(function: Callable) -> str:
        once, twice = watch(function, *short), watch(function, *long)
        cost = twice.operations / max(once.operations, 1)
        growth = {
            "cost {} times as much": cost,
            "need an array {} times as large": twice.largest / max(once.largest, 1),
            "need {} times the memory": twice.numpy / max(once.numpy, 1) if twice.numpy > 20_000 else 0,
            "run {} times as many lines": twice.lines.total() / max(once.lines.total(), 1),
        }
        for words, ratio in growth.items():
            if ratio > 2.3:
                raise CheckFailed(
                    f"{function.__name__} is right, but twice as many tokens {words.format(f'{ratio:.1f}')}: {advice}"
                )
        if not once.products:
            return f"Memory grows no faster than the tokens. {HONOUR}"
        return f"Twice as many tokens cost {cost:.1f} times as much."

    return rule


def solves_at_most(side: int, case: tuple, what: str) -> Callable[[Callable], None]:
    """A rule: no larger square matrix is inverted, factored or solved with."""

    def rule(function: Callable) -> None:
        if (found := watch(function, *case).solved) > side:
            raise CheckFailed(
                f"{function.__name__} is right, but solves with a {found}×{found} matrix: {what} ({side}×{side} here)"
            )

    return rule


def exact(
    oracle: Callable,
    *cases: tuple,
    rtol: float = 1e-12,
    like: str = "a quotient of differences would be, or a formula that cancels digits",
) -> Callable[[Callable], None]:
    """A rule: the answer has the digits of a closed form, which a quotient of differences has not."""

    def rule(function: Callable) -> None:
        for case in cases:
            right = as_tensor(oracle(*case))
            error = float((ask(function, case, right) - right).abs().max() / right.abs().max())
            if not error <= rtol:
                raise CheckFailed(
                    f"{function.__name__} is right to {error:.0e} only, as {like}: a closed form was asked for"
                )

    return rule


def differentiable(oracle: Callable, case: tuple, by: Mapping[int, str], why: str) -> Callable[[Callable], None]:
    """A rule: gradients reach these arguments, by place and name, and are the slopes of the oracle's answers."""

    def rule(function: Callable) -> None:
        given = list(copied(case))
        for i in by:
            given[i] = given[i].detach().requires_grad_()
        with torch.enable_grad(), answering(function, f"for {describe(function, case)}, with gradients"):
            answer = function(*given)
        for i, name in by.items():
            lost = not isinstance(answer, Tensor) or not answer.requires_grad
            with answering(function, "when gradients come back", f"one to {name}"):
                towards = (
                    None
                    if lost
                    else torch.autograd.grad(answer.sum(), given[i], retain_graph=True, allow_unused=True)[0]
                )
            if towards is None:
                raise CheckFailed(f"{function.__name__} is right, but no gradient comes back to {name}: {why}")
            step = 1e-6 * random(*given[i].shape, seed=i)
            up, down = (as_tensor(oracle(*case[:i], case[i] + sign * step, *case[i + 1 :])).sum() for sign in (1, -1))
            if not abs(float((towards * step).sum() - (up - down) / 2)) <= 1e-4 * float(abs(up - down)) + 1e-10:
                raise CheckFailed(
                    f"{function.__name__} is right, but the gradient that comes back to {name} is not the slope, as if "
                    f"a part were detached: {why}"
                )

    return rule


class _Names(TorchFunctionMode):
    """Notes the public names of torch's functions, methods and operators."""

    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))

    def names(self) -> set[str]:
        return {name for function in self.functions if (name := resolve_name(function))}


class _Work(TorchDispatchMode):
    """Counts what torch's kernels multiply, read and write."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        read = [x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        packet = getattr(function, "overloadpacket", None)
        if function.is_view:
            return out
        if any(word in str(function) for word in ("linalg", "inverse", "solve", "cholesky", "lu_factor")):
            self.seen.solved = max([self.seen.solved, *(_side(x) for x in tree_leaves((args, kwargs)))])
        self.seen.largest = max([self.seen.largest, *(x.untyped_storage().nbytes() // x.itemsize for x in made)])
        if packet in (torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten.addmv):
            self.seen.products += max(read)
        elif packet in flop_registry:
            self.seen.products += flop_registry[packet](*args, **kwargs, out_val=out) / 2
        else:
            self.seen.elements += max([*read, *(x.numel() for x in made)], default=0)
        return out


@contextmanager
def _numpy_memory(seen: Seen):
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        seen.numpy = (tracemalloc.get_traced_memory()[1] - before) / 8
        if not running:
            tracemalloc.stop()


def _side(x: object) -> int:
    """The side of a square matrix, or 0."""
    shape = getattr(x, "shape", ())
    return shape[-1] if len(shape) >= 2 and shape[-1] == shape[-2] else 0
