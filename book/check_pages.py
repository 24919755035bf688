"""Open every built page in headless Chromium and report what a reader would see go wrong.

    make book && python book/check_pages.py            every page, from a local server, with no other network
    python book/check_pages.py --shots FOLDER          and a screenshot of each, light and dark

A page fails on a console error, a failed request, a request to another host, or a formula left untypeset.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

HTML = Path(__file__).parent / "_build" / "html"
GENERATED = {"genindex.html", "search.html", "py-modindex.html", "prf-prf.html", "index.html"}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1400,1600"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
# Formulas: how many MathJax containers, how many errors in them, and text outside code that still shows its TeX.
READ_PAGE = """
const raw = [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container'));
const text = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
let dollars = 0;
while (text.nextNode())
    if (text.currentNode.data.includes('$$') && !text.currentNode.parentElement.closest('pre, code')) dollars++;
return {formulas: document.querySelectorAll('mjx-container').length,
        errors: document.querySelectorAll('mjx-merror, [data-mjx-error]').length, raw: raw.length + dollars};
"""


WAIT_FOR_FORMULAS = """
const done = arguments[0];
window.MathJax?.startup ? MathJax.startup.promise.then(() => done(true)) : done(true);
"""
SET_MODE = "const data = document.documentElement.dataset; data.theme = data.mode = arguments[0]"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def browser(profile: str) -> webdriver.Chrome:
    """Debian's Chromium, logging its console and its network."""
    binary, driver = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def chromium() -> tuple[str, str] | None:
    """The paths of Chromium and its driver, or None where either is missing."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (binary, driver) if binary and driver else None


def inspect(driver: webdriver.Chrome, url: str) -> tuple[int, list[str]]:
    """The number of formulas on a page, and what is wrong with it."""
    driver.get(url)
    WebDriverWait(driver, 30).until(lambda driver: driver.execute_async_script(WAIT_FOR_FORMULAS))
    page = driver.execute_script(READ_PAGE)
    problems = [f"{page[kind]} formulas: {kind}" for kind in ("errors", "raw") if page[kind]]
    problems += [f"console: {entry['message']}" for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return page["formulas"], problems + network_problems(driver, urlsplit(url).netloc)


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


def shoot(driver: webdriver.Chrome, file: Path) -> None:
    """A screenshot of the whole page in both modes: NAME-light.png and NAME-dark.png."""
    for mode in ("light", "dark"):
        driver.execute_script(SET_MODE, mode)
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.set_window_size(1400, min(height + 150, 12000))
        driver.save_screenshot(str(file.with_name(f"{file.name}-{mode}.png")))
    driver.set_window_size(1400, 1600)
    driver.get_log("browser"), driver.get_log("performance")  # what the screenshots caused is no problem of the page


def check(html: Path = HTML, shots: Path | None = None) -> dict[str, list[str]]:
    """Problems of each page; prints a table as it goes."""
    pages = sorted(path for path in html.rglob("*.html") if path.name not in GENERATED and "_static" not in path.parts)
    found = {}
    print(f"{'page':32} formulas  problems")
    with tempfile.TemporaryDirectory() as profile, served(html) as address:
        driver = browser(profile)
        try:
            for path in pages:
                name = path.relative_to(html).as_posix()
                formulas, found[name] = inspect(driver, f"{address}/{name}")
                print(f"{name:32} {formulas:8}  {'; '.join(found[name]) or 'none'}")
                if shots:
                    shoot(driver, shots / name.removesuffix(".html").replace("/", "-"))
        finally:
            driver.quit()
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
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    if chromium() is None:
        sys.exit("check_pages needs Chromium and its driver. On Debian: apt install chromium chromium-driver")
    if not (HTML / "intro.html").exists():
        sys.exit(f"{HTML} has no built book. Run `make book` first.")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    return any(check(shots=options.shots).values())


if __name__ == "__main__":
    sys.exit(main())
