"""Open every built page in headless Chromium and report what a reader would see go wrong.

    make book && python book/check_pages.py            every page, from a local server, with no other network
    python book/check_pages.py --shots FOLDER          and screenshots of each: wide and narrow, light and dark
    python book/check_pages.py 03_mssa intro           these pages only

A page fails on a console error, a failed request, a request to another host, a formula left untypeset, a picture
without alt text, a width beyond a phone's, or a link that leads nowhere. Links to other sites are judged by their
form, and those to the book's repository by the file they name.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from notebooks import address_problem
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

HTML = Path(__file__).parent / "_build" / "html"
GENERATED = {"genindex.html", "search.html", "py-modindex.html", "prf-prf.html", "index.html"}
# Formulas: how many MathJax containers, how many errors in them, and text outside code that still shows its TeX.
# Pictures: those without alt text, for which Sphinx puts the name of the file.
READ_PAGE = """
const raw = [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container'));
const text = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
let dollars = 0;
while (text.nextNode())
    if (text.currentNode.data.includes('$$') && !text.currentNode.parentElement.closest('pre, code')) dollars++;
return {formulas: document.querySelectorAll('mjx-container').length,
        errors: document.querySelectorAll('mjx-merror, [data-mjx-error]').length, raw: raw.length + dollars,
        pictures: [...document.querySelectorAll('article img')].filter(e => !e.alt.includes(' ')).map(e => e.src),
        anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
        links: [...new Set([...document.querySelectorAll('a[href]')].map(e => e.href))],
        seconds: performance.getEntriesByType('navigation')[0].loadEventEnd / 1000,
        megabytes: performance.getEntriesByType('resource').reduce((sum, e) => sum + e.decodedBodySize, 0) / 1e6};
"""
# What sticks out at the right of a phone's screen, unless something around it scrolls or cuts it off.
READ_WIDTH = """
const wide = [...document.querySelectorAll('article *')].filter(element => {
    if (element.getBoundingClientRect().right <= arguments[0] + 1) return false;
    for (let around = element.parentElement; around; around = around.parentElement)
        if (getComputedStyle(around).overflowX !== 'visible') return false;
    return getComputedStyle(element).overflowX === 'visible' && !element.closest('mjx-assistive-mml');
});
return wide.slice(0, 3).map(e => e.outerHTML.slice(0, 90));
"""
WAIT_FOR_FORMULAS = """
const done = arguments[0];
window.MathJax?.startup ? MathJax.startup.promise.then(() => done(true)) : done(true);
"""
SET_MODE = "const data = document.documentElement.dataset; data.theme = data.mode = arguments[0]"
DESKTOP, PHONE = (1400, 1500), (390, 1500)  # width and height of the window, in pixels, and of a screenshot
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    f"--window-size={DESKTOP[0]},{DESKTOP[1]}",
)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Debian's Chromium with a profile of its own, logging its console and its network."""
    binary, service = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
        try:
            yield driver
        finally:
            driver.quit()


def chromium() -> tuple[str, str] | None:
    """The paths of Chromium and its driver, or None where either is missing."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (binary, driver) if binary and driver else None


def inspect(driver: webdriver.Chrome, url: str) -> tuple[dict, list[str]]:
    """What a page holds (formulas, links, anchors, seconds to load, megabytes), and what is wrong with it."""
    driver.get(url)
    WebDriverWait(driver, 30).until(lambda driver: driver.execute_async_script(WAIT_FOR_FORMULAS))
    page = driver.execute_script(READ_PAGE)
    problems = [f"{page[kind]} formulas: {kind}" for kind in ("errors", "raw") if page[kind]]
    problems += [f"no alt text: {source}" for source in page["pictures"]]
    problems += [f"console: {entry['message']}" for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    problems += network_problems(driver, urlsplit(url).netloc)
    with screen(driver, PHONE):
        problems += [f"wider than a phone: {element}" for element in driver.execute_script(READ_WIDTH, PHONE[0])]
    return page, problems


@contextmanager
def screen(driver: webdriver.Chrome, size: tuple[int, int]) -> Iterator[None]:
    """A screen of another width and height."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def link_problems(html: Path, address: str, pages: dict[str, dict]) -> Iterator[tuple[str, str]]:
    """Page and complaint for each link that leads nowhere, as far as one can see without a network."""
    anchors = {name: set(page["anchors"]) for name, page in pages.items()}
    for name, page in pages.items():
        for link in page["links"]:
            parts = urlsplit(link)
            path = unquote(parts.path).lstrip("/")
            if not link.startswith(f"{address}/"):
                if problem := address_problem(link):
                    yield name, problem
            elif not (html / path).exists():
                yield name, f"leads to no page: /{path}"
            elif parts.fragment and path in anchors and unquote(parts.fragment) not in anchors[path]:
                yield name, f"leads to no place on its page: /{path}#{parts.fragment}"


def network_problems(driver: webdriver.Chrome, host: str) -> list[str]:
    """Requests of the page that failed or went elsewhere."""
    problems, urls = [], {}
    for entry in driver.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        parameters = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            parts = urlsplit(url := parameters["request"]["url"])
            urls[parameters["requestId"]] = url
            if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != host:
                problems.append(f"asks another host: {url}")
        elif event["method"] == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            problems.append(f"status {parameters['response']['status']}: {parameters['response']['url']}")
        elif event["method"] == "Network.loadingFailed" and not parameters.get("canceled"):
            # An id not seen before is a request of the browser itself, as it starts.
            problems += [f"{parameters['errorText']}: {urls[key]}" for key in [parameters["requestId"]] if key in urls]
    return problems


def shoot(driver: webdriver.Chrome, folder: Path, name: str) -> None:
    """Screenshots of a whole page, from top to bottom: NAME-{wide,phone}-{light,dark}-01.png and on."""
    for size, (width, step) in {"wide": DESKTOP, "phone": PHONE}.items():
        with screen(driver, (width, step)):
            for mode in ("light", "dark"):
                driver.execute_script(SET_MODE, mode)
                time.sleep(0.6)  # menus slide and colours fade
                height = driver.execute_script("return document.documentElement.scrollHeight")
                for number, top in enumerate(range(0, height, step), start=1):
                    driver.execute_script("scrollTo({top: arguments[0], behavior: 'instant'})", top)
                    driver.save_screenshot(str(folder / f"{name}-{size}-{mode}-{number:02}.png"))
    driver.get_log("browser"), driver.get_log("performance")  # what the screenshots caused is no problem of the page


def check(html: Path = HTML, shots: Path | None = None, only: Sequence[str] = ()) -> dict[str, list[str]]:
    """Problems of each page; prints a table as it goes."""
    paths = sorted(path for path in html.rglob("*.html") if path.name not in GENERATED and "_static" not in path.parts)
    pages, found = {}, {}
    print(f"{'page':32} formulas  load, s  MB    problems")
    with served(html) as address, browser() as driver:
        for path in paths:
            name = path.relative_to(html).as_posix()
            if only and name.removesuffix(".html") not in only:
                continue
            page, found[name] = inspect(driver, f"{address}/{name}")
            pages[name] = page
            speed = f"{page['seconds']:7.1f}  {page['megabytes']:4.1f}"
            print(f"{name:32} {page['formulas']:8}  {speed}  {'; '.join(found[name]) or 'none'}")
            if shots:
                shoot(driver, shots, name.removesuffix(".html").replace("/", "-"))
    for name, problem in link_problems(html, address, pages):
        print(f"{name}: {problem}")
        found[name].append(problem)
    return found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a local server of `folder`."""
    with ThreadingHTTPServer(("localhost", 0), partial(QuietHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="names of pages, such as 03_mssa or api/ista")
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    if chromium() is None:
        sys.exit("check_pages needs Chromium and its driver. On Debian: apt install chromium chromium-driver")
    if not (HTML / "intro.html").exists():
        sys.exit(f"{HTML} has no built book. Run `make book` first.")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    return any(check(shots=options.shots, only=options.pages).values())


if __name__ == "__main__":
    sys.exit(main())
