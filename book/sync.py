"""Generate and execute the notebooks of the book, and those of its exercises and solutions, from their text.

    python book/sync.py               every chapter and its exercises where text and notebook differ; executes those
                                      whose code changed, and keeps the outputs of the others
    python book/sync.py 03_mssa       that chapter and its exercises, if they differ
    python book/sync.py --all         executes every chapter and its exercises, whether they differ or not
    python book/sync.py --check       change nothing; say what is out of sync or broken, and fail

Only book/src/*.md and solutions/*.py are edited by hand. Two runs on one machine give the same bytes.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import nbformat
from chapters import differences, generate, slugs
from check_chapters import check_all
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.notebooknode import NotebookNode
from notebooks import BOOK, without_title

import exercises
from cratelab.storage import write_json, write_text

CELL_TIMEOUT = 600  # seconds; a chapter is meant to take less than 60 in all
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Without it, each PNG names the version of matplotlib that drew it.
PLAIN_PNG = "--InlineBackend.print_figure_kwargs={'bbox_inches': 'tight', 'metadata': {'Software': None}}"


class ChapterError(RuntimeError):
    """A cell of a chapter failed."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="NN_slug", help="only these chapters")
    parser.add_argument("--all", action="store_true", help="execute again what has not changed, too")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if anything is wrong")
    options = parser.parse_args(arguments)
    chosen = [Path(name).stem for name in options.chapters] or slugs()
    if unknown := sorted(set(chosen) - set(slugs())):
        parser.error(f"no such chapter: {', '.join(unknown)}; book/src has {', '.join(slugs())}")

    if not options.check:
        try:
            for slug in chosen:
                if options.all or differences(slug):
                    print(f"book/{slug}.ipynb: {outcome(update(slug, again=options.all))}")
                else:
                    print(f"book/{slug}.ipynb: unchanged")
                if slug in exercises.slugs() and (options.all or exercises.differences(slug)):
                    seconds = update_exercises(slug, again=options.all)
                    print(f"exercises/ and solutions/{slug}.ipynb: {outcome(seconds)}")
        except (ChapterError, exercises.ExerciseError) as error:
            print(f"{error}\nIts notebooks were left as they were.", file=sys.stderr)
            return 1

    messages = check_all(chosen)
    print(*messages, sep="\n", file=sys.stderr, end="\n" if messages else "")
    if not messages:
        print(f"{len(chosen)} chapters in sync")
    return bool(messages)


def outcome(seconds: float | None) -> str:
    return "same code, outputs kept" if seconds is None else f"executed in {seconds:.1f} s"


def update(slug: str, book: Path = BOOK, again: bool = True) -> float | None:
    """Write the notebook of a chapter, executed, and its entry in execution.json.

    Returns:
        the seconds it took, or None where the code was not executed because only text had changed (and not `again`).
    """
    notebook, path = generate(slug, book), book / f"{slug}.ipynb"
    seconds = None
    if again or not keep_outputs(path, notebook):
        seconds = execute(notebook, f"book/src/{slug}.md", book)
    write_text(path, nbformat.writes(notebook) + "\n")
    if seconds is not None:
        record(slug, seconds, book)
    return seconds


def update_exercises(slug: str, book: Path = BOOK, again: bool = True) -> float | None:
    """Write the notebooks of exercises and solutions, the latter executed; returns as `update` does."""
    to_do, done = exercises.generate(slug, book)
    paths = exercises.paths(slug, book)
    seconds = None
    if again or not keep_outputs(paths[1], done):
        seconds = execute(done, f"solutions/{slug}.py", book.parent / "solutions")
    for path, notebook in zip(paths, (to_do, done), strict=True):
        path.parent.mkdir(exist_ok=True)
        write_text(path, nbformat.writes(notebook) + "\n")
    return seconds


def keep_outputs(path: Path, notebook: NotebookNode) -> bool:
    """Take over the outputs of the notebook at `path`, if it was executed and its code is the same; whether it is.

    The titles of forms are comments, and no code.
    """
    if not path.exists():
        return False
    old, new = (
        [cell for cell in each.cells if cell.cell_type == "code"]
        for each in (nbformat.read(path, as_version=4), notebook)
    )
    sources = [[without_title(cell.source) for cell in cells] for cells in (old, new)]
    if sources[0] != sources[1] or None in [cell.execution_count for cell in old]:
        return False
    for before, after in zip(old, new, strict=True):
        after.outputs, after.execution_count = before.outputs, before.execution_count
    return True


def execute(notebook: NotebookNode, text: str, folder: Path) -> float:
    """Fill in the outputs, in a fresh kernel of this Python that runs in `folder`; the seconds it took."""
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,  # else the number of stored pieces depends on how fast they came
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=[PLAIN_PNG, "--log-level=ERROR"],
    )
    with tempfile.TemporaryDirectory() as own:  # the settings of the reader's own IPython stay out
        try:
            client.execute(env=os.environ | SINGLE_THREAD | {"IPYTHONDIR": own})
        except CellExecutionError as error:
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            number = next(i for i, cell in enumerate(code, 1) if any(o.output_type == "error" for o in cell.outputs))
            raise ChapterError(f"{text}, code cell {number} failed:\n{error}") from error
    notebook.metadata.pop("language_info", None)  # names the Python in use
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":  # only in cells tagged raises-exception; the traceback has paths in it
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return time.perf_counter() - start


def record(slug: str, seconds: float, book: Path = BOOK) -> None:
    """Note in execution.json, which the status page shows, when, where and how fast a chapter was executed."""
    path = book / "execution.json"
    entries = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    entries[slug] = {
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch").split("+")[0],
        "numpy": version("numpy"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
    }
    kept = {slug: entries[slug] for slug in slugs(book) if slug in entries}
    write_json(path, kept)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
