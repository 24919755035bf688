"""How the neuron viewer draws where no script runs: shades, excerpts, a histogram."""

import html
from collections.abc import Sequence

from cratelab.viewers.frame import number


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
