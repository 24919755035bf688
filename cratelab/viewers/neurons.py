"""A neuron viewer for notebooks and pages: tokens shaded by activation, explanations, scores, to click through.

A `Viewer` is one piece of HTML with its style, data and script in it: nothing is fetched, everything is escaped. Where
scripts do not run, as in a notebook that is not trusted, it shows the first neuron whole and the others in brief.

Activations are rounded to hundredths of the neuron's maximum, statistics to two digits, so that equal records give
equal bytes. Records made on another CPU can still differ by a hundredth: tag a chapter's cell `nbval-ignore-output`,
and assert beside it what the reader should see.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.explainers import Explanations
from cratelab.interpret.records import Records
from cratelab.interpret.scores import Scores
from cratelab.plots import CRATE
from cratelab.reading import NO_TOKEN, token_text
from cratelab.storage import write_text
from cratelab.viewers.frame import (
    FRAGMENT,
    PAGE,
    SCRIPT,
    STYLE,
    Drawing,
    escape,
    histogram,
    number,
    script_data,
    visible,
)

_KINDS = {"top": "strongest", "random": "random", "active": "active"}


@dataclass(frozen=True)
class Viewer:
    """What `viewer` makes; as the last value of a notebook's cell it is shown.

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


def viewer(
    records: Records,
    tokenizer: Tokenizer,
    neurons: Sequence[tuple[int, int]],
    explanations: Mapping[str, Explanations] | None = None,
    scores: Mapping[str, Scores] | None = None,
    title: str = "Neurons",
    colour: str = CRATE,
    n_excerpts: int = 10,
) -> Viewer:
    """Show neurons on their excerpts.

    A token's ground is white at activations of 0 and below, and `colour` at the neuron's maximum over all text. The
    histogram is of the active sample, or where there is none, of the positive activations in the random excerpts.

    Args:
        records: of the neurons, from `collect_records`.
        tokenizer: of the corpus that they were collected from.
        neurons: (layer, index) of each neuron to show, in this order.
        explanations: what explainers say of all neurons, by the explainer's name.
        scores: of these explanations, by the same names.
        title: what stands above.
        colour: "#rrggbb"; the book's are `plots.CRATE` and `plots.GPT2`.
        n_excerpts: of each kind, at most: the strongest, the first random ones, active ones evenly by activation.

    Raises:
        ValueError: no neuron is given, the records or scores have none of that number, the records hold no excerpts or
            a token that the tokenizer lacks, `colour` is no colour, or `n_excerpts` is below 1.
    """
    explanations, scores = explanations or {}, scores or {}
    chosen = tuple(dict.fromkeys((int(layer), int(index)) for layer, index in neurons))
    kinds = [kind for kind in _KINDS if getattr(records, kind).starts.shape[2]]
    if n_excerpts < 1:
        raise ValueError(f"n_excerpts must be at least 1; got {n_excerpts}")
    _check(records, kinds, chosen, scores, colour)
    table: dict[int, int] = {}  # token -> its place among those shown
    shown = [
        _Neuron(
            head=_head(records, layer, index, _opinions(layer, index, tokenizer, explanations, scores)),
            maximum=_finite(number(records.maximum[layer, index])),
            parts=[_excerpts(records, kind, layer, index, n_excerpts, table) for kind in kinds],
        )
        for layer, index in chosen
    ]
    texts = [_token_text(tokenizer, token) for token in table]
    gap = " " if tokenizer.decode([0, 0]) != 2 * tokenizer.decode([0]) else ""  # do tokens carry their own spaces?
    return Viewer(title, chosen, _fragment(title, records.n_tokens, chosen, shown, kinds, Drawing(texts, gap, colour)))


@dataclass
class _Neuron:
    """What is shown of one: for each kind its excerpts, as places in the table of tokens and levels 0 to 100.

    Without a finite maximum levels are of nothing, and no activation is shown.
    """

    head: str
    maximum: float | None
    parts: list[list[tuple[list[int], list[int]]]]


def _check(records: Records, kinds: Sequence[str], chosen: Sequence, scores: Mapping, colour: str) -> None:
    n_layers, h = records.maximum.shape
    wrong = [(layer, index) for layer, index in chosen if not (0 <= layer < n_layers and 0 <= index < h)]
    if wrong or not chosen:
        raise ValueError(
            f"neurons must be pairs of a layer from 0 to {n_layers - 1} and a neuron from 0 to {h - 1}; "
            f"got {wrong[0] if wrong else 'none'}"
        )
    if not kinds:
        raise ValueError("the records hold no excerpts: collect them with n_top, n_random or n_active above 0")
    for name, one in scores.items():
        if one.correlation.shape != (n_layers, h):
            held = tuple(one.correlation.shape)
            raise ValueError(f"scores {name!r} are of {held} layers and neurons, the records of {(n_layers, h)}")
    if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        raise ValueError(f"colour must be #rrggbb, such as {CRATE}; got {colour!r}")


def _excerpts(
    records: Records, kind: str, layer: int, index: int, most: int, table: dict[int, int]
) -> list[tuple[list[int], list[int]]]:
    """A neuron's excerpts of one kind, by falling highest level unless random."""
    excerpts = getattr(records, kind)
    held = (excerpts.tokens[layer, index] != NO_TOKEN).any(1).nonzero()[:, 0].tolist()
    if kind == "active" and len(held) > most > 1:
        held = [held[i * (len(held) - 1) // (most - 1)] for i in range(most)]
    found = []
    for k in held[:most]:
        tokens = excerpts.tokens[layer, index, k]
        levels = _levels(excerpts.activations[layer, index, k], records.maximum[layer, index])
        text = [(token, level) for token, level in zip(tokens.tolist(), levels, strict=True) if token != NO_TOKEN]
        found.append(([table.setdefault(token, len(table)) for token, _ in text], [level for _, level in text]))
    return found if kind == "random" else sorted(found, key=lambda excerpt: -max(excerpt[1]))


def _finite(text: str) -> float | None:
    return float(text) if math.isfinite(float(text)) else None


def _levels(activations: Tensor, maximum: Tensor) -> list[int]:
    """Hundredths of the maximum, 0 to 100; 0 where one of the two is no number, or the maximum infinite."""
    if not maximum > 0:
        return [0] * len(activations)
    shares = (100 * activations.double() / maximum.double()).nan_to_num(0)
    return shares.round().clamp(0, 100).int().tolist()


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is shown: bytes that are no character as \\xe2, white space and control characters as signs."""
    try:
        text = token_text(tokenizer, token)
    except ValueError as error:
        raise ValueError(f"the records hold token {token}, which the tokenizer {tokenizer.name} lacks") from error
    if hasattr(tokenizer, "decode_single_token_bytes"):  # `decode` loses parts of a character
        text = tokenizer.decode_single_token_bytes(token).decode("utf8", "backslashreplace")
    if text.isspace() or not text:
        return visible(text).replace(" ", "␣") or "∅"
    mark = unicodedata.category(text[0]).startswith("M")  # an accent, which needs something to stand on
    return "◌" * mark + visible(text)


def _opinions(layer: int, index: int, tokenizer: Tokenizer, explanations: Mapping, scores: Mapping) -> Iterator[str]:
    """Each explanation of a neuron and its score, as HTML."""
    for name in dict.fromkeys([*explanations, *scores]):
        words = explanations[name].describe(layer, index, tokenizer) if name in explanations else ""
        line = f"<b>{escape(name)}</b> <bdi>{escape(words)}</bdi>"
        if name in scores:
            value, dead = float(scores[name].correlation[layer, index]), scores[name].dead[layer, index]
            none = f"no score: the {'neuron' if dead else 'simulation'} is constant"
            said = none if value != value else f"score {round(value, 2) + 0.0:.2f}"
            line += f' <span class="score" title="correlation of simulated with actual activations">{said}</span>'
        yield f'<div class="why">{line}</div>'


def _head(records: Records, layer: int, index: int, opinions: Iterator[str]) -> str:
    """Statistics, histogram, scale and explanations of a neuron, as HTML."""
    active, maximum = records.active, records.maximum[layer, index]
    sample = active.activations[layer, index].gather(1, active.offsets[layer, index][:, None])[:, 0]
    sample = sample[active.starts[layer, index] >= 0]
    if not len(sample):
        sample = records.random.activations[layer, index]
    picture = ""
    if maximum > 0:
        scale = f'<span class="scale" aria-hidden="true">0<i></i>{number(maximum)}</span>'
        picture = histogram(_levels(sample[sample > 0], maximum)) + scale
    facts = [
        f"active on {number(100 * records.density[layer, index])} % of tokens",
        f"mean {number(records.mean[layer, index])}",
        f"maximum {number(maximum)}",
    ]
    stats = "".join(f"<span>{fact}</span>" for fact in facts)
    name = f"<b>layer {layer}, neuron {index}</b>"
    return f'<div class="head"><div class="stats">{name}{stats}{picture}</div>{"".join(opinions)}</div>'


def _fragment(
    title: str,
    n_tokens: int,
    chosen: Sequence[tuple[int, int]],
    shown: list[_Neuron],
    kinds: list[str],
    drawing: Drawing,
) -> str:
    """The whole: the first neuron drawn, the others drawn in brief, and the data from which the script draws any."""
    none = f"No excerpt: the neuron is never active in the {n_tokens:,} tokens read."
    first, *others = shown
    sections = ""
    for kind, part in zip(kinds, first.parts, strict=True):
        lines = "".join(drawing.excerpt(*excerpt, first.maximum) for excerpt in part)
        sections += f'<div class="kind">{_KINDS[kind]} excerpts</div>{lines or f"<p>{none}</p>"}'
    rest = ""
    for one in others:
        part = next((part for part in one.parts if part), [])
        rest += one.head + ("".join(drawing.peak(*excerpt, one.maximum) for excerpt in part[:3]) or f"<p>{none}</p>")
    data = {
        "tokens": drawing.texts,
        "gap": drawing.gap,
        "shades": drawing.shades,
        "kinds": [_KINDS[kind] for kind in kinds],
        "none": none,
        "neurons": [
            {"max": one.maximum, "parts": [[(p, bytes(levels).hex()) for p, levels in part] for part in one.parts]}
            for one in shown
        ],
    }
    options = "".join(f"<option>layer {layer}, neuron {index}</option>" for layer, index in chosen)
    content = dict(
        label=escape(title),
        n_tokens=f"{n_tokens:,}",
        options=options,
        head=first.head,
        sections=sections,
        rest=f'<details class="rest"><summary>{len(others)} more, in brief</summary>{rest}</details>' if others else "",
        data=script_data(data),
    )
    name = "neurons-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
    style = STYLE.replace("ROOT", f".{name}").replace("COLOUR", drawing.shades[-1][0])
    return FRAGMENT.format(name=name, style=style, script=SCRIPT.replace("ROOT", f".{name}"), **content)
