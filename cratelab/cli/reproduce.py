"""`cratelab reproduce`: what the package carries, made again."""

from pathlib import Path

from cratelab.cli.checks import check_alone, check_folder
from cratelab.cli.options import MOST, Reproduce, dashed
from cratelab.cli.shared import print_table, report, use_one_thread
from cratelab.experiments.chapter_9 import reproduce_chapter_9, reproduce_sparser
from cratelab.experiments.rates import reproduce_rates
from cratelab.experiments.reference_models import make_reference_models, make_toys
from cratelab.terminal import say


def check(options: Reproduce) -> None:
    if options.steps is not None and not 1 <= options.steps <= MOST:
        raise ValueError(f"--steps must be at least 1 and at most {MOST}; got {options.steps}")
    check_alone("reproduce")
    if options.what != "reference" and options.text:
        raise ValueError(f"--text is for reference: {options.what} reads TinyWorld")
    if options.out:
        check_folder(dashed("out"), options.out)


def run(options: Reproduce) -> None:
    use_one_thread(128)
    folder = options.out or Path("runs/reference" if options.what == "reference" else "runs/tinyworld")
    given = {name: getattr(options, name) for name in ("seeds", "steps") if getattr(options, name) is not None}
    told = {"on_run": say, "on_step": report}
    if options.what == "rates":
        steps = {"steps": (options.steps, options.steps)} if options.steps else {}
        table = reproduce_rates(folder, **given | steps, **told)
    elif options.what == "chapter-9":
        table = reproduce_chapter_9(folder, **given, **told)
    elif options.what == "sparser":
        table = reproduce_sparser(folder, **given, **told)
    else:
        if options.what == "toys":
            rows = make_toys(folder, **given, **told)
        else:
            rows = make_reference_models(folder, text=options.text, **given, **told)
        print_table(rows, None)
        table = folder / "packed"
    say(f"{table} is what cratelab/reference holds")
