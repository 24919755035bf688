"""How the neuron viewer looks: text made visible and harmless, shades, excerpts, and the viewer's style and script."""

import html
import json
from collections.abc import Sequence

from cratelab.storage import finite


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


def shades(colour: str) -> list[tuple[str, str]]:
    """Ground and ink of each level 0 to 100, from white to `colour`; of black and white ink, what stands out."""
    full = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found = []
    for level in range(101):
        ground = [round(255 + (c - 255) * level / 100) for c in full]
        # the contrast of two is (l + 0.05) / (l' + 0.05): with black more than with white if (l + 0.05)² > 0.05 · 1.05
        ink = "#000" if (luminance(ground) + 0.05) ** 2 > 0.0525 else "#fff"
        found.append((f"#{bytes(ground).hex()}", ink))
    return found


def luminance(rgb: Sequence[int]) -> float:
    """Relative luminance of a colour, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def histogram(levels: Sequence[int], bins: int = 20) -> str:
    """A small picture of how often each level occurs; nothing of no level."""
    if not levels:
        return ""
    counts = [0] * bins
    for level in levels:
        counts[max(level - 1, 0) * bins // 100] += 1
    bars = "".join(f"M{5 * i} 24v-{max(1, round(24 * c / max(counts)))}h4V24z" for i, c in enumerate(counts) if c)
    label = f"histogram of {len(levels)} positive activations, from 0 to the maximum"
    return f'<svg viewBox="0 0 100 24" role="img" aria-label="{label}"><title>{label}</title><path d="{bars}"/></svg>'


class Drawing:
    """Draws excerpts as the script does, for readers without one.

    Args:
        texts: what is shown of each token.
        gap: between two tokens.
        colour: of the highest level.
    """

    def __init__(self, texts: Sequence[str], gap: str, colour: str):
        self.texts, self.gap, self.shades = texts, gap, shades(colour)

    def excerpt(self, places: Sequence[int], levels: Sequence[int], maximum: float | None) -> str:
        """Tokens, by their place in `texts`, shaded by level, the highest activation before them."""

        def value(level: int) -> str:
            return "?" if maximum is None else number(level * maximum / 100)

        tokens = []
        for place, level in zip(places, levels, strict=True):
            ground, ink = self.shades[level]
            style = f' style="background:{ground};color:{ink}" title="{value(level)}"' if level else ""
            tokens.append(f"<bdi{style}>{html.escape(self.texts[place])}</bdi>")
        return f'<p><b title="highest">{value(max(levels))}</b><span>{self.gap.join(tokens)}</span></p>'

    def peak(self, places: Sequence[int], levels: Sequence[int], maximum: float | None, around: int = 8) -> str:
        """The part of an excerpt around its highest level."""
        at = levels.index(max(levels))
        cut = slice(max(0, at - around), at + around + 1)
        return self.excerpt(places[cut], levels[cut], maximum)


FRAGMENT = """\
<div class="{name} mathjax_ignore tex2jax_ignore notranslate" translate="no" role="group" aria-label="{label}">
<style>{style}</style>
<div class="title">{label} <small>{n_tokens} tokens read</small></div>
<div class="bar" hidden><button type="button" aria-label="previous neuron">◀</button>
<select aria-label="neuron">{options}</select><button type="button" aria-label="next neuron">▶</button></div>
{head}
<div class="tabs" role="tablist" aria-label="excerpts" hidden></div>
<div class="text">{sections}</div>
<div class="said" role="status" hidden></div>
{rest}
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

# The theme of the page around must not shine through: what it sets on an element is set here.
STYLE = """
ROOT{all:initial;display:block;box-sizing:border-box;max-width:60em;margin:.5em 0;padding:.8em 1em;direction:ltr;
 border:1px solid #ccc;border-radius:8px;background:#fff;color:#1a1a1a;color-scheme:light;
 font:14px/1.5 system-ui,sans-serif}
/* The book's theme gives outputs a grey panel in dark mode; this one has its own ground. */
.text_html:has(> ROOT){background:none!important;padding:0!important}
ROOT [hidden]{display:none!important}
ROOT .title{font-weight:600;font-size:1.1em;margin-bottom:.5em}
ROOT small,ROOT .said,ROOT .kind{color:#555;font-size:.85em;font-weight:400}
ROOT .bar,ROOT .tabs,ROOT .stats{display:flex;flex-wrap:wrap;gap:.3em 1em;align-items:center}
ROOT .bar{gap:.4em;margin-bottom:.6em}
ROOT button,ROOT select{font:inherit;color:inherit;background:#f4f4f4;border:1px solid #999;border-radius:5px;
 padding:.25em .7em;margin:0;min-height:2.2em;cursor:pointer}
ROOT :focus-visible{outline:2px solid #000;outline-offset:1px}
ROOT .bar:not([hidden])~.head .stats b{display:none}
ROOT .stats span{white-space:nowrap}
ROOT svg{width:100px;height:24px;border-bottom:1px solid #999}
ROOT path{fill:COLOUR}
ROOT .scale i{display:inline-block;width:4em;height:.8em;margin:0 .4em;border:1px solid #ccc;
 background:linear-gradient(90deg,#fff,COLOUR)}
ROOT .why{margin:.3em 0;overflow-wrap:anywhere}
ROOT .score{font-weight:600;white-space:nowrap;margin-left:.4em}
ROOT .tabs{gap:.2em;margin-top:.7em}
ROOT .tabs button{padding:.25em .5em;border-radius:5px 5px 0 0;border-bottom:0}
ROOT .tabs [aria-selected=true]{background:#fff;font-weight:600;box-shadow:inset 0 3px COLOUR}
ROOT .text{border-top:1px solid #999;padding:.3em 0}
ROOT[data-live] .text{max-height:32em;overflow:auto}
ROOT .kind{margin:.6em 0 0}
ROOT p{display:flex;gap:.8em;margin:0;padding:.4em 0;border-bottom:1px solid #eee;color:inherit;font:inherit}
ROOT p:last-child{border:0}
ROOT p b{flex:0 0 3.6em;text-align:right;color:#555;font-weight:400;font-variant-numeric:tabular-nums}
ROOT p span{min-width:0;line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere}
ROOT p bdi{border-radius:3px;padding:.1em 0;print-color-adjust:exact;forced-color-adjust:none;cursor:default}
ROOT p bdi:hover{outline:1px solid #000}
ROOT .said{min-height:1.6em;padding-top:.4em;border-top:1px solid #999;overflow-wrap:anywhere}
ROOT summary{cursor:pointer;margin:.6em 0}
ROOT details .head{margin-top:1em}
@media print{ROOT[data-live] .text{max-height:none}}
"""

SCRIPT = """
for (const root of document.querySelectorAll('ROOT:not([data-live])')) {
  root.dataset.live = '';
  const find = what => root.querySelector(what), data = JSON.parse(find('script').textContent);
  const [bar, pick, tabs, text, said] = ['.bar', 'select', '.tabs', '.text', '.said'].map(find);
  const heads = [...root.querySelectorAll('.head')].map(head => head.cloneNode(true));
  let part = 0;
  const make = (tag, facts, ...inside) => {
    const made = Object.assign(document.createElement(tag), facts);
    made.append(...inside);
    return made;
  };
  const excerpt = ([places, digits], max) => {
    const levels = places.map((_, i) => parseInt(digits.slice(2 * i, 2 * i + 2), 16));
    const value = level => max === null ? '?' : String(Number((level * max / 100).toPrecision(2)));
    const tokens = places.flatMap((place, i) => {
      const level = levels[i], token = make('bdi', {tabIndex: -1, title: value(level)}, data.tokens[place]);
      token.dataset.share = level;
      if (level) [token.style.background, token.style.color] = data.shades[level];
      return i ? [data.gap, token] : [token];
    });
    return make('p', {}, make('b', {title: 'highest'}, value(Math.max(...levels))), make('span', {}, ...tokens));
  };
  const buttons = data.kinds.map((kind, i) => make('button', {type: 'button', onclick: () => { part = i; show(); }}));
  const show = () => {
    const {max, parts} = data.neurons[pick.selectedIndex], chosen = parts[part] || [];
    find('.head').replaceWith(heads[pick.selectedIndex].cloneNode(true));
    buttons.forEach((button, i) => {
      button.textContent = `${data.kinds[i]} (${parts[i].length})`;
      button.setAttribute('role', 'tab');
      button.setAttribute('aria-selected', i === part);
      button.tabIndex = i === part ? 0 : -1;
    });
    text.replaceChildren(...chosen.map(one => excerpt(one, max)));
    if (!chosen.length) text.append(make('p', {}, data.none));
    text.setAttribute('aria-label', `${data.kinds[part]} excerpts`);
    text.scrollTop = 0;
    text.querySelector('bdi')?.setAttribute('tabindex', 0);
    said.textContent = 'Point at a token, or move to it with Tab and the arrow keys, to read its activation.';
  };
  const step = by => {
    pick.selectedIndex = (pick.selectedIndex + by + heads.length) % heads.length;
    show();
  };
  const say = event => {
    const {textContent: what, title, dataset} = event.target.closest('bdi') || {};
    if (dataset) said.textContent = `${what}: activation ${title}, ${dataset.share} % of the maximum`;
  };
  const arrows = (element, move) => element.addEventListener('keydown', event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); move(by, event.target); }
  });
  for (const kind of ['mouseover', 'focusin', 'click']) text.addEventListener(kind, say);
  arrows(bar, step);
  arrows(tabs, by => {
    part = (part + by + buttons.length) % buttons.length;
    show();
    buttons[part].focus();
  });
  arrows(text, (by, from) => {
    const tokens = [...text.querySelectorAll('bdi')], to = tokens[tokens.indexOf(from) + by];
    if (to) { from.tabIndex = -1; to.tabIndex = 0; to.focus(); }
  });
  const [previous, next] = bar.querySelectorAll('button');
  previous.onclick = () => step(-1);
  next.onclick = () => step(1);
  pick.onchange = show;
  tabs.append(...buttons);
  text.setAttribute('role', 'tabpanel');
  bar.hidden = heads.length < 2;
  tabs.hidden = said.hidden = false;
  if (find('.rest')) find('.rest').hidden = true;
  show();
}
"""
