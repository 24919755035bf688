"""Run a chapter under several seeds and keep what it finds: numbers over seeds, with intervals.

    python book/over_seeds.py 05_crate --seeds 5
    python book/over_seeds.py 05_crate --seeds 3 --set steps=10000 --name 05_crate_long

A chapter that allows this has a line `seed = 0` and, further down, a cell `findings = {…}` of plain numbers and lists.
The cells up to that one are executed with each seed in turn, and with other values for lines `name = …` where --set
says so; cratelab/reference/NN_slug.json gets the findings and where they come from. Cells below may show that file.
A cell with the tag `page-only` (a figure, a demonstration) is not executed: no finding depends on it.
Its `code` is a hash of the executed cells without their imports, so that a test can see when the chapter has changed
and its numbers have not.
"""

import argparse
import ast
import hashlib
import json
import re
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from chapters import generate, slugs
from notebooks import BOOK, ROOT

from cratelab.provenance import provenance
from cratelab.storage import write_json

PAGE_ONLY = "page-only"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", choices=slugs(), metavar="NN_slug")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="lines of the chapter to change")
    parser.add_argument("--name", help="of the file in cratelab/reference; the chapter's unless given")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    if wrong := [setting for setting in options.set if not re.fullmatch(r"\w+=[^=].*", setting)]:
        parser.error(f"--set takes NAME=VALUE; got {', '.join(wrong)}")
    if any(setting.startswith("seed=") for setting in options.set):
        parser.error("--set takes no seed, which --seeds counts")
    plt.switch_backend("agg")
    torch.set_num_threads(1)
    code, start, findings = code_to_findings(options.chapter), time.perf_counter(), []
    settings = dict(setting.split("=", 1) for setting in options.set)
    for seed in range(options.seeds):
        findings.append(run(code, settings | {"seed": seed}))
        print(f"seed {seed}: {json.dumps(findings[-1])[:200]} … {time.perf_counter() - start:.0f} s", flush=True)
    seconds = round(time.perf_counter() - start)
    facts = provenance(seeds=list(range(options.seeds)), settings=settings, seconds=seconds, code=digest(code))
    table = ROOT / "cratelab" / "reference" / f"{options.name or options.chapter}.json"
    write_json(table, {"provenance": facts, "findings": findings})


def code_to_findings(slug: str, book: Path = BOOK) -> str:
    """The chapter's code up to and with the cell that starts `findings = `."""
    cells = [cell for cell in generate(slug, book).cells if cell.cell_type == "code"][1:]  # not the set-up
    sources = [cell.source for cell in cells if PAGE_ONLY not in cell.metadata.get("tags", [])]
    last = next((i for i, source in enumerate(sources) if source.startswith("findings = ")), None)
    code = "\n\n".join(sources[: None if last is None else last + 1])
    if last is None or "\nseed = 0\n" not in code:
        raise ValueError(f"book/src/{slug}.md needs a line `seed = 0` and a cell that starts `findings = `")
    return code


def run(code: str, settings: dict) -> dict:
    """What the code finds when each line `name = …` of the settings has the value given there."""
    for name, value in settings.items():
        code, found = re.subn(rf"^{name} = .*$", lambda _, line=f"{name} = {value}": line, code, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"the chapter should have one line `{name} = …`; it has {found}")
    names: dict = {}
    exec(compile(code, "chapter", "exec", optimize=1), names)  # without assertions: they speak of the page's own run
    plt.close("all")
    return names["findings"]


def digest(code: str) -> str:
    """Of what the code does: where its names are imported from makes no difference."""
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


if __name__ == "__main__":
    main()
