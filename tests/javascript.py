"""The pages' own scripts, run without a browser."""

from pathlib import Path

from py_mini_racer import MiniRacer


def engine(*scripts: Path) -> MiniRacer:
    """V8 in which `scripts` have run: `engine(path).call("name", argument, …)` calls what they define.

    Arguments and results travel as JSON, floats in full. There is no `document`, so a script has to ask for it.
    """
    context = MiniRacer()
    for script in scripts:
        context.eval(script.read_text(encoding="utf8"))
    return context
