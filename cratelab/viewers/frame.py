"""What both viewers are: one piece of HTML with its style, data and script in it, and text made visible and harmless.

Nothing is fetched, and everything is escaped. Where scripts do not run, as in a notebook that is not trusted, there is
still something to read.
"""

import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from cratelab.colours import CRATE
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.reading import token_text
from cratelab.storage import finite, write_text

FRAGMENT = """\
<div class="{name} mathjax_ignore tex2jax_ignore notranslate" translate="no" role="group" aria-label="{label}">
<style>{style}</style>
{body}
<script type="application/json">{data}</script>
<script>{script}</script>
</div>"""

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title></head><body>
{viewer}
</body></html>
"""


@dataclass(frozen=True)
class Viewer:
    """What the functions of this package make; as the last value of a notebook's cell it is shown.

    Attributes:
        title: of the viewer, and of the page that `save` writes.
        neurons: (layer, index) of each.
        html: the piece of HTML.
    """

    title: str
    neurons: tuple[tuple[int, int], ...]
    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> None:
        """Write a page of its own, whole or not at all; it forbids the browser to fetch anything.

        Raises:
            OSError: `path` cannot be written.
        """
        write_text(path, PAGE.format(title=escape(self.title), viewer=self.html))


def fragment(kind: str, label: str, body: str, data: str, colour: str, made_of: object) -> str:
    """A viewer's HTML.

    Args:
        kind: its style and script are the files KIND.css and KIND.js of this package. The theme of the page around
            must not shine through: what it sets on an element is set there.
        label: what it is, as HTML.
        body: HTML, to be read with and without scripts.
        data: what the script draws from, as `script_data` writes it.
        colour: "#rrggbb", for COLOUR in the style.
        made_of: as JSON, what tells it from other viewers on a page. From this its class is named, for ROOT in style
            and script, which so act on this viewer alone.
    """
    name = f"{kind}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:10]}"
    style, script = (_text_of(f"{kind}.{suffix}").replace("ROOT", f".{name}") for suffix in ("css", "js"))
    style = style.replace("COLOUR", colour)
    return FRAGMENT.format(name=name, label=label, style=style, body=body, data=data, script=script)


def _text_of(file: str) -> str:
    return "\n" + (resources.files(__package__) / file).read_text(encoding="utf8")


def check_colour(colour: str) -> None:
    """Raises ValueError unless this is #rrggbb."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        raise ValueError(f"colour must be #rrggbb, such as {CRATE}; got {colour!r}")


def places(table: dict[int, int], tokens: Iterable[int]) -> list[int]:
    """Where tokens stand in the `table` of those that a viewer shows, each once; new ones are added to it."""
    return [table.setdefault(token, len(table)) for token in tokens]


def gap_of(tokenizer: Tokenizer) -> str:
    """What stands between two tokens: nothing, if they carry their own spaces."""
    return " " if tokenizer.decode([0, 0]) != 2 * tokenizer.decode([0]) else ""


def shown_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is shown: bytes that are no character as \\xe2, white space and control characters as signs."""
    try:
        text = token_text(tokenizer, token)
    except ValueError as error:
        raise ValueError(f"there is a token {token}, which the tokenizer {tokenizer.name} lacks") from error
    if hasattr(tokenizer, "decode_single_token_bytes"):  # `decode` loses parts of a character
        text = tokenizer.decode_single_token_bytes(token).decode("utf8", "backslashreplace")
    if text.isspace() or not text:
        return visible(text).replace(" ", "␣") or "∅"
    mark = unicodedata.category(text[0]).startswith("M")  # an accent, which needs something to stand on
    return "◌" * mark + visible(text)


def visible(text: str) -> str:
    """Text without characters that cannot be seen or that change how others are shown: these as signs or escapes."""
    signs = {"\n": "⏎", "\t": "⇥"}
    return "".join(
        c if c.isprintable() else signs.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}")
        for c in text
    )


def escape(text: str) -> str:
    """Any text, visible, as HTML."""
    return html.escape(visible(text))


def script_data(content: object) -> str:
    """JSON to stand in a `<script>`, which nothing in it ends; NaN and infinity, which no browser reads, are null."""
    written = json.dumps(finite(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c")


def number(value: float) -> str:
    """To two digits."""
    return f"{float(f'{value:.2g}'):g}"
