"""The check of open-ended experiments: not what is found, which is open, but how it is measured."""

from collections.abc import Callable, Mapping
from math import isfinite

from cratelab.checks.grading import CheckFailed, call, number


def conduct(function: Callable[[int], Mapping[str, float]], seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Run an experiment under several seeds: it returns named numbers, one of them "control", and obeys the seed.

    Args:
        function: experiment(seed) -> {name: number}.
        seeds: at least two.

    Raises:
        CheckFailed: it cannot be repeated, ignores its seed, has no control, or returns something else than numbers.
        NotWritten: the function is a stub.
    """
    name = function.__name__
    runs = [call(function, seed, expected="a dict of numbers") for seed in seeds]
    again = call(function, seeds[0])
    for run in (*runs, again):
        if not isinstance(run, Mapping):
            raise CheckFailed(f"{name}(seed) should return a dict of numbers; it returns a {type(run).__name__}")
        if "control" not in run:
            raise CheckFailed(
                f'{name} has no "control": what would the same measurement give where there is no effect?'
            )
        if len(run) < 2:
            raise CheckFailed(f"{name} returns the control alone; what is compared with it?")
        for key, value in run.items():
            try:
                fine = isfinite(number(value, name))
            except CheckFailed:
                fine = False
            if not fine:
                raise CheckFailed(f"{name}: {key!r} is {value!r}; a finite number is needed, one for each seed")
        if set(run) != set(runs[0]):
            raise CheckFailed(
                f"{name} returns other names under another seed: {sorted(map(str, run))} and "
                f"{sorted(map(str, runs[0]))}"
            )
    numbers = [{key: float(value) for key, value in run.items()} for run in (*runs, again)]
    if numbers[-1] != numbers[0]:
        raise CheckFailed(f"two runs of {name}({seeds[0]}) differ: draw every random number from the seed")
    if all(run == numbers[0] for run in numbers[1:]):
        raise CheckFailed(f"{name} gives the same numbers under seeds {seeds}: is the seed used?")
    if all(len(set(run.values())) == 1 for run in numbers):
        raise CheckFailed(f"in {name} everything equals the control: is the same thing measured twice?")
    print(f"{name}: can be repeated, varies with the seed, and has a control. What it shows is for you to say.")
