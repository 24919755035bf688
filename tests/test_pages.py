"""The book builds without a warning, refuses failed cells, and shows well in a browser (where there is Chromium)."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from check_chapters import equation_labels
from matplotlib.image import imread
from notebooks import BOOK, address_problem, repository_url


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The pages, built as `make book` builds them."""
    pytest.importorskip("jupyter_book", reason="the extra `book` is not installed")
    out = tmp_path_factory.mktemp("pages")
    options = ["-W", "-n", "--keep-going", "--path-output", out]
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", BOOK, *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out / "_build" / "html"


def test_pages_hold_outputs_and_links(html):
    chapter = next(html.glob("01_*.html")).read_text(encoding="utf8")
    assert "cell_output" in chapter
    assert f"/blob/main/book/{next(html.glob('01_*.html')).stem}.ipynb" in chapter  # the Colab button
    assert "#equation-eq-" in (html / "api" / "coding_rate.html").read_text(encoding="utf8")
    assert "<td" in (html / "status.html").read_text(encoding="utf8")


def test_every_equation_is_listed_with_the_functions_that_cite_it(html):
    page = (html / "equations.html").read_text(encoding="utf8")
    labels = equation_labels()
    assert len(labels) > 60 and page.count("#equation-eq-") == len(labels)
    links = re.findall(r'#equation-eq-(\d+)-(\d+)"[^>]*>\((\d+)\.(\d+)\)', page)
    shown = [tuple(map(int, link)) for link in links]
    assert len(shown) == len(labels) and shown == sorted(shown)
    assert all(link[:2] == link[2:] for link in shown)  # what a page prints is what the code says
    (row,) = (row for row in page.split("<tr") if "#equation-eq-01-4" in row)
    assert "api/coding_rate.html#cratelab.coding_rate.coding_rate" in row


def test_every_notebook_is_opened_in_colab_and_on_github_by_its_own_page(html):
    chapters = [path.stem for path in BOOK.glob("[0-9]*.ipynb")]
    assert len(chapters) > 10
    for stem in chapters:
        page = (html / f"{stem}.html").read_text(encoding="utf8")
        links = re.findall(r'href="(https://(?:colab\.research\.google|github)\.com/[^"#?]*\.ipynb)"', page)
        opened = {link.split("/blob/main/")[1] for link in links if "colab" in link}
        assert f"book/{stem}.ipynb" in opened, stem
        assert not [link for link in links if address_problem(link)]


def test_figures_can_be_read_on_a_dark_page(html):
    """They bring their own ground, and the theme's dark filter leaves text and axes a contrast of 7 (WCAG AAA)."""
    css = "".join(path.read_text(encoding="utf8") for path in html.rglob("_static/**/*.css"))
    filters = set(re.findall(r"html\[data-theme=dark\] [^{}]*img[^{}]*\{filter:([^;}]*)", css))
    assert filters == {"brightness(.8) contrast(1.2)"}
    figures = {path.name: imread(path) for path in (html / "_images").glob("*.png")}
    assert len(figures) > 30
    for name, pixels in figures.items():
        rgb, alpha = pixels[..., :3].reshape(-1, 3).astype(float), pixels[..., 3:]
        assert (alpha == 1).all(), f"{name} is transparent"
        dimmed = np.clip((0.8 * rgb - 0.5) * 1.2 + 0.5, 0, 1)
        linear = np.where(dimmed <= 0.04045, dimmed / 12.92, ((dimmed + 0.055) / 1.055) ** 2.4)
        luminance = np.sort(linear @ [0.2126, 0.7152, 0.0722])
        text, ground = luminance[len(luminance) // 1000], np.median(luminance)
        assert (ground + 0.05) / (text + 0.05) > 7, name


def test_pages_in_a_browser(html, check_pages):
    assert {page: problems for page, problems in check_pages.check(html).items() if problems} == {}


def test_a_tap_enlarges_a_figure_within_its_column(html, check_pages):
    look = """const shown = image => image.getBoundingClientRect().width > 0;
        const figure = [...document.querySelectorAll('.cell_output img')].find(shown);
        if (arguments[0]) figure.click();
        return [figure.getBoundingClientRect().width, document.documentElement.scrollWidth]"""
    page = next(html.glob("01_*.html")).name
    with (
        check_pages.served(html) as address,
        check_pages.browser() as driver,
        check_pages.screen(driver, check_pages.PHONE),
    ):
        driver.get(f"{address}/{page}")
        widths = [driver.execute_script(look, tap) for tap in (False, True, True)]
    assert widths[0] == widths[2] and widths[0][0] <= 390 < 700 < widths[1][0]
    assert {page for _, page in widths} == {390}


GOOD = """<p id="here"><a href="#here">a</a> <a href="https://arxiv.org/abs/2410.16443">b</a>
<a href="{ours}/blob/main/README.md">c</a> <img alt="a blue dot" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
<span style="display: block; overflow: auto"><b style="display: block; width: 3000px">scrolls</b></span></p>"""


def test_faults_of_a_page_are_named(check_pages, tmp_path):
    faults = {
        '<img alt="_images/1.png" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">': "no alt text: data:image/gif",
        '<p style="width: 900px">wide</p>': "wider than a phone: <p style",
        '<a href="other.html#nowhere">x</a>': "leads to no place on its page: /other.html#nowhere",
        '<a href="missing.html">x</a>': "leads to no page: /missing.html",
        '<a href="http://example.org">x</a>': "an odd address: http://example.org/",
        '<a href="https://localhost:8000/v1">x</a>': "an odd address: https://localhost:8000/v1",
        '<a href="https://arxiv.org/abs/24101.6443">x</a>': "arxiv.org has no such address",
        '<a href="{ours}/blob/main/book/no.md">x</a>': "the repository has no book/no.md",
        '<span class="math">x</span>': "1 formulas: raw",
        "<p>$$ x $$</p>": "1 formulas: raw",
        '<script>console.error("broken")</script>': "broken",
        '<script src="gone.js"></script>': "status 404",
    }
    head = '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    page = f"<!doctype html>{head}<article>{{}}</article>"
    bodies = [GOOD, *(GOOD + fault for fault in faults)]
    for number, body in enumerate(bodies):
        text = page.format(body.replace("{ours}", repository_url()))
        (tmp_path / f"{number:02}.html").write_text(text)
    (tmp_path / "other.html").write_text(page.format("<p>nothing</p>"))
    found = check_pages.check(tmp_path)
    assert found.pop("00.html") == found.pop("other.html") == []
    for message, problems in zip(faults.values(), found.values(), strict=True):
        assert message in problems[-1] and len(problems) <= 2, problems  # what does not load is in the console, too


@pytest.fixture
def extension():
    """book/_ext/cratelab_book.py, which only Sphinx has on its path."""
    pytest.importorskip("sphinx", reason="the extra `book` is not installed")
    spec = importlib.util.spec_from_file_location("cratelab_book", BOOK / "_ext" / "cratelab_book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_stops_at_a_failed_cell(extension):
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda name: f"{name}.ipynb"))
    cell = {"metadata": {}, "outputs": [{"output_type": "error"}]}
    with pytest.raises(extension.ExtensionError, match=r"01_x\.ipynb: cell 1 failed"):
        extension.refuse_failed_cells(app, "01_x", [json.dumps({"cells": [cell]})])
    cell["metadata"]["tags"] = ["raises-exception"]
    extension.refuse_failed_cells(app, "01_x", [json.dumps({"cells": [cell]})])


def test_docstrings_become_links_and_tables(extension):
    app = SimpleNamespace(srcdir=BOOK)
    label = next(iter(extension.equation_labels(BOOK)))
    lines = [f"A rate ({label}) of `z`, see `coding_rate`.", "", "| a | b |", "|---|---|", "| 1 | 2 |"]
    extension.read_docstring(app, "function", "f", None, None, lines)
    assert lines[0] == f"A rate :eq:`{label}` of ``z``, see :py:obj:`coding_rate <cratelab.coding_rate.coding_rate>`."
    assert lines[2:5] == [".. list-table::", "   :header-rows: 1", ""]
    assert lines[5:] == ["   * - a", "     - b", "   * - 1", "     - 2"]
