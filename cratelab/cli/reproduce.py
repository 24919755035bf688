"""`cratelab reproduce`: what the package carries, made again."""

from pathlib import Path

from cratelab.cli.checks import (
    check_folder,
)
from cratelab.cli.options import MOST, Reproduce, dashed
from cratelab.cli.shared import print_table, report, use_one_thread
from cratelab.experiments.chapter_9 import reproduce_chapter_9
from cratelab.experiments.reference_models import make_reference_models
from cratelab.terminal import say


def check(options: Reproduce) -> None:
    least = 1 if options.what == "reference" else 3  # some runs of chapter 9 have a third of the steps
    if options.steps is not None and not least <= options.steps <= MOST:
        raise ValueError(f"--steps must be at least {least} and at most {MOST}; got {options.steps}")
    if options.what == "chapter-9" and options.text:
        raise ValueError("--text is for reference: chapter-9 reads what the reference models have read")
    for option in ("out", "reference"):
        if folder := getattr(options, option):
            check_folder(dashed(option), folder)


def run(options: Reproduce) -> None:
    use_one_thread(128)
    if options.what == "reference":
        folder = options.out or options.reference
        print_table(
            make_reference_models(folder, options.seeds, options.text, options.steps or 1500, say, report), None
        )
        say(f"{folder}/packed is what cratelab/reference holds")
    else:
        steps = (2000, 1500) if options.steps is None else (options.steps, options.steps)
        folder = options.out or Path("runs/chapter-9")
        table = reproduce_chapter_9(folder, options.reference, options.seeds, steps, say, report)
        say(f"{table} is what cratelab/reference holds")
