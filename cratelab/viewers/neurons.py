"""A neuron viewer for notebooks and pages: tokens shaded by activation, explanations, scores, to click through.

Where scripts do not run, it shows the first neuron whole and the others in brief.

Activations are rounded to hundredths of the neuron's maximum, statistics to two digits, so that equal records give
equal bytes. Records made on another CPU can still differ by a hundredth: tag a chapter's cell `nbval-ignore-output`,
and assert beside it what the reader should see.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cratelab.colours import CRATE
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.explainers import Explanations
from cratelab.interpret.records import Records
from cratelab.interpret.scores import Scores
from cratelab.reading import NO_TOKEN
from cratelab.viewers.drawing import Drawing, histogram
from cratelab.viewers.frame import (
    Viewer,
    check_colour,
    escape,
    fragment,
    gap_of,
    number,
    places,
    script_data,
    shown_token,
)

_KINDS = {"top": "strongest", "random": "random", "active": "active"}

BODY = """\
<div class="title">{label} <small>{n_tokens} tokens read</small></div>
<div class="bar" hidden><button type="button" aria-label="previous neuron">◀</button>
<select aria-label="neuron">{options}</select><button type="button" aria-label="next neuron">▶</button></div>
{head}
<div class="tabs" role="tablist" aria-label="excerpts" hidden></div>
<div class="text">{sections}</div>
<div class="said" role="status" hidden></div>
{rest}"""


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
        neurons: (layer, index) of each neuron to show, in this order; as they are numbered in the records, which number
            from 0 what `Records.neurons` chose.
        explanations: what explainers say of the records' neurons, by the explainer's name.
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
    drawing = Drawing([shown_token(tokenizer, token) for token in table], gap_of(tokenizer), colour)
    return Viewer(title, chosen, _fragment(title, records.n_tokens, chosen, shown, kinds, drawing))


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
    check_colour(colour)


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
        found.append((places(table, [token for token, _ in text]), [level for _, level in text]))
    return found if kind == "random" else sorted(found, key=lambda excerpt: -max(excerpt[1]))


def _finite(text: str) -> float | None:
    return float(text) if math.isfinite(float(text)) else None


def _levels(activations: Tensor, maximum: Tensor) -> list[int]:
    """Hundredths of the maximum, 0 to 100; 0 where one of the two is no number, or the maximum infinite."""
    if not maximum > 0:
        return [0] * len(activations)
    shares = (100 * activations.double() / maximum.double()).nan_to_num(0)
    return shares.round().clamp(0, 100).int().tolist()


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
    darkest = drawing.shades[-1][0]
    return fragment("neurons", content["label"], BODY.format(**content), content["data"], darkest, made_of=content)
