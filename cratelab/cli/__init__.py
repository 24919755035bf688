"""The command line. What a command needs is imported when it runs, so that `cratelab --help` is there at once."""

import os
import sys
from importlib import import_module
from typing import NoReturn

import tyro

from cratelab.cli.options import Compare, Export, Interpret, Layerwise, Reproduce, Steer, Train, check_ranges
from cratelab.terminal import is_main_process, plain_warnings, printable, unfailing_output

COMMANDS = {
    "train": Train,
    "compare": Compare,
    "interpret": Interpret,
    "steer": Steer,
    "layerwise": Layerwise,
    "export": Export,
    "reproduce": Reproduce,
}


def main(arguments: list[str] | None = None) -> None:
    """`cratelab train | compare | interpret | steer | layerwise | export | reproduce`.

    Raises:
        SystemExit: with a message, which is status 1, where a command cannot do what it is asked; status 2 where it
            was called wrongly, 130 where Ctrl-C stopped it.
    """
    with unfailing_output() as output, plain_warnings():
        _main(arguments)
    if output.error and not isinstance(output.error, BrokenPipeError):  # whoever closes a pipe has seen enough
        sys.exit(f"cratelab: all is done, but what it printed is cut off: {output.error}")


def _main(arguments: list[str] | None) -> None:
    options = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="cratelab",
        description="Train CRATE, compare it with GPT-2, ask what its neurons mean, steer them, and take it elsewhere.",
        args=arguments,
    )
    from cratelab.devices import computing_on

    try:
        check_ranges(options)
        command = import_module(f"cratelab.cli.{next(name for name, of in COMMANDS.items() if of is type(options))}")
        command.check(options)
        with computing_on(getattr(options, "device", None)):  # export computes nothing
            command.run(options)
    except (ValueError, OSError, ImportError) as error:
        _stop(printable(str(error)))
    except (MemoryError, RuntimeError) as error:
        from cratelab.losses import Diverged

        if isinstance(error, Diverged):
            _stop(printable(str(error)))
        if not _is_out_of_memory(error):
            raise
        _stop(
            "there is not enough memory: take a smaller model, context or batch "
            f"({printable(str(error)) or 'MemoryError'})"
        )
    except KeyboardInterrupt:
        print(
            "cratelab: stopped" + ("; the same command goes on from the last checkpoint" if options.goes_on else ""),
            file=sys.stderr,
        )
        sys.exit(130)


def _stop(message: str) -> NoReturn:
    """End with a message; those of several processes are told apart."""
    name = "cratelab" if is_main_process() else f"cratelab, process {os.environ['RANK']}"
    sys.exit(f"{name}: {message}")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was asked for that there is not; on the CPU torch says so by a plain RuntimeError."""
    told = "allocate", "out of memory", "size calculation overflowed"
    return isinstance(error, MemoryError) or any(each in str(error) for each in told)
