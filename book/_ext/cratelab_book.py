"""What the book asks of Sphinx beyond its packages: a status table, links in docstrings, no failed cells."""

import gc
import importlib
import inspect
import json
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path

from docutils.statemachine import StringList
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import cratelab

sys.path.insert(0, str(Path(__file__).parents[1]))  # book/, where the chapters' own code is
from chapters import is_appendix, slugs
from check_chapters import EQUATION, LABEL, equation_labels, source
from notebooks import ROOT

import exercises
from cratelab.provenance import changed_since

labels_of = cache(equation_labels)  # hundreds of docstrings ask


class ExecutionTable(SphinxDirective):
    """Table of execution.json: when and where each chapter was executed, and how long it took."""

    def run(self):
        path = Path(self.env.srcdir) / "execution.json"
        self.env.note_dependency(str(path))
        lines = ["| chapter | seconds | executed | Python | torch | numpy | on |", "|---|--:|---|---|---|---|---|"]
        for slug, entry in json.loads(path.read_text(encoding="utf8")).items():
            versions = f"{entry['python']} | {entry['torch']} | {entry['numpy']}"
            machine = f"{entry['platform']}, {entry['cpu']}"
            lines.append(f"| [](/{slug}) | {entry['seconds']} | {entry['date']} | {versions} | {machine} |")
        return self.parse_text_to_nodes(StringList(lines, str(path)))


class ReferenceTable(SphinxDirective):
    """Tables of longer runs: what made each, when, and which modules of the library are other than they were then."""

    def run(self):
        self.env.note_reread()  # depends on the library's code
        lines = ["| table | command | made | PyTorch | seeds | other code since |", "|---|---|---|---|--:|---|"]
        for file in sorted((ROOT / "cratelab" / "reference").glob("*.json")):
            facts = json.loads(file.read_text(encoding="utf8")).get("provenance")
            if facts is None:  # a tokenizer
                continue
            changed = changed_since(facts)
            since = "not recorded" if changed is None else ", ".join(f"`{name}`" for name in changed) or "none"
            made = f"{facts['date']} | {facts['torch']} | {len(facts.get('seeds', [])) or ''}"
            lines.append(f"| `{file.stem}` | `{facts['command']}` | {made} | {since} |")
        return self.parse_text_to_nodes(StringList(lines, "status.md"))


class EquationTable(SphinxDirective):
    """All numbered equations, a table a chapter, each with the functions that cite it."""

    def run(self):
        book = Path(self.env.srcdir)
        self.env.note_reread()  # depends on every chapter and docstring
        citing = citations()
        lines = []
        for slug in slugs(book):
            if is_appendix(slug):
                continue
            lines += [f"**[](/{slug})**", "", "```{list-table}", ":widths: 14 58 28", ":class: equations", ""]
            for formula, label in EQUATION.findall(source(slug, book)):
                names = ", ".join(f"{{py:obj}}`~{name}`" for name in citing.get(label, []))
                formula = " ".join(formula.split()).rstrip(".,; ")
                lines += [f"* - {{eq}}`{label}` `{label}`", f"  - $\\displaystyle {formula}$", f"  - {names}"]
            lines += ["```", ""]
        return self.parse_text_to_nodes(StringList(lines, str(book / "equations.md")))


class ExerciseTable(SphinxDirective):
    """All exercises, a table a chapter."""

    def run(self):
        book = Path(self.env.srcdir)
        lines = []
        for slug in exercises.slugs(book):
            self.env.note_dependency(str(exercises.source(slug, book)))
            lines += [f"**[](/{slug})**", "", *exercises.table(exercises.read(slug, book)[1]), ""]
        return self.parse_text_to_nodes(StringList(lines, str(book / "teaching.md")))


def citations():
    """Equation label -> the public functions, classes and methods of the library whose docstrings cite it."""
    found = {}
    for entry in pkgutil.walk_packages(cratelab.__path__, "cratelab."):
        if entry.name.endswith("__main__"):
            continue
        module = importlib.import_module(entry.name)
        for name, member in vars(module).items():
            if name.startswith("_") or getattr(member, "__module__", None) != entry.name:
                continue
            own = vars(member) if inspect.isclass(member) else {}
            members = {name: member} | {f"{name}.{key}": value for key, value in own.items() if key[0] != "_"}
            for path, each in members.items():
                for label in dict.fromkeys(match[0] for match in LABEL.finditer(each.__doc__ or "")):
                    found.setdefault(label, []).append(f"{entry.name}.{path}")
    return found


ONLY_LABELS = re.compile(rf"\(({LABEL.pattern}(?:, {LABEL.pattern})*)\)")
BACKTICKS = re.compile(r"(?<![`:\w])`([^`<>]+)`(?![`_])")


def read_docstring(app, what, name, obj, options, lines):
    """Docstrings are written for an editor's eye: link their equation labels and public names, and set their tables."""
    labels = labels_of(Path(app.srcdir))

    def equation(match):
        return f":eq:`{match[0]}`" if match[0] in labels else match[0]

    def code(match):
        public = match[1].removeprefix("cratelab.")
        home = getattr(getattr(cratelab, public, None), "__module__", None)
        return f":py:obj:`{match[1]} <{home}.{public}>`" if public in cratelab.__all__ and home else f"``{match[1]}``"

    for i, line in enumerate(lines):
        line = ONLY_LABELS.sub(r"\1", BACKTICKS.sub(code, line))  # an equation's link brings parentheses of its own
        lines[i] = LABEL.sub(equation, line)
    lines[:] = list_tables(lines)


def list_tables(lines):
    """Markdown tables, which reStructuredText does not know, as list-table directives."""
    out = []
    for line in lines:
        text = line.strip()
        if not text.startswith("|"):
            out.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        if set(text) <= set("|-: "):  # the rule below the head
            continue
        if not out or not out[-1].startswith(f"{indent}     "):
            out += [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        first, *rest = text.strip("|").split("|")
        out += [f"{indent}   * - {first.strip()}", *(f"{indent}     - {cell.strip()}" for cell in rest)]
    return out


def resolve_public_name(app, env, node, contnode):
    """Let {py:func}`cratelab.ista` find cratelab.ista.ista: the public face re-exports what the modules define."""
    package, _, name = node.get("reftarget", "").rpartition(".")
    home = getattr(getattr(cratelab, name, None), "__module__", None)
    if node.get("refdomain") != "py" or package != "cratelab" or home is None:
        return None
    found = env.get_domain("py").objects.get(f"{home}.{name}")
    return found and make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode)


def refuse_failed_cells(app, docname, source):
    """Stop the build at a notebook whose stored output is an error."""
    if Path(app.env.doc2path(docname)).suffix != ".ipynb":
        return
    for number, cell in enumerate(json.loads(source[0])["cells"], start=1):
        failed = any(output["output_type"] == "error" for output in cell.get("outputs", []))
        if failed and "raises-exception" not in cell["metadata"].get("tags", []):
            raise ExtensionError(f"{docname}.ipynb: cell {number} failed when it was executed. Run `make sync`.")


def setup(app):
    gc.set_threshold(
        100_000, 20, 100
    )  # pages are millions of small objects, all of which stay: look through them rarely
    app.add_directive("execution-table", ExecutionTable)
    app.add_directive("reference-table", ReferenceTable)
    app.add_directive("equation-table", EquationTable)
    app.add_directive("exercise-table", ExerciseTable)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("missing-reference", resolve_public_name)
    app.connect("source-read", refuse_failed_cells)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
