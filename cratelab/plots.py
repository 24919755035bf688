"""One style for every figure: colours that colour-blind readers tell apart, one for CRATE and one for GPT-2 everywhere.

The palette is Okabe & Ito's. Figures keep a white ground, so that they read the same on a dark page.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cratelab.colours import CRATE, GPT2
from cratelab.storage import replacing

PALETTE = [CRATE, GPT2, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"


def use_style() -> None:
    """Set matplotlib's defaults to the book's."""
    plt.rcParams.update(
        {
            "figure.figsize": (7, 3.4),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "font.size": 10,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
            "image.cmap": SEQUENTIAL,
        }
    )


def seen(z: Tensor) -> Tensor:
    """Where points (n, 3) of space stand on paper, (n, 2), seen from the place from which `draw_three_lines` looks."""
    height, way = math.radians(-14), math.radians(9.5)  # from where the three lines stand well apart
    right = z.new_tensor([-math.sin(way), math.cos(way), 0])
    up = z.new_tensor([-math.sin(height) * math.cos(way), -math.sin(height) * math.sin(way), math.cos(height)])
    return z @ torch.stack([right, up], 1)


def draw_three_lines(axes: Axes, z: Tensor, line: Tensor, U: Tensor | None = None) -> None:
    """Draw points of three-dimensional space in the colours of their lines, as they look from a fixed place.

    Args:
        axes: of a plane; they get equal scales and no ticks.
        z: points (n, 3), as `cratelab.three_lines.three_lines` gives them.
        line: (n,), the line of each, which is its colour (not those of the two networks).
        U: bases (k, 3, 1), drawn as black lines through the origin.
    """
    for direction in [] if U is None else seen(U[:, :, 0]):
        axes.plot(*(direction[:, None] * z.new_tensor([-1.6, 1.6])), color="black", lw=0.9)
    for k in line.unique():
        axes.scatter(*seen(z[line == k]).T, s=14, color=PALETTE[2 + int(k)], zorder=3)
    axes.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_loss_curve(metrics: list[dict], path: str | Path, floor: float | None = None) -> None:
    """Draw training and validation loss of one run against the tokens it has read.

    Args:
        metrics: as `cratelab.training.train` returns them.
        path: image to write, whole or not at all; its suffix says what kind, and is .png if there is none.
        floor: nats a token that no model can go below, where it is known.

    Raises:
        OSError: it cannot be written.
        ValueError: there is no such kind of image.
    """
    validated = [row for row in metrics if "validation_loss" in row]

    def draw(axes) -> None:
        axes.plot([row["tokens"] for row in metrics], [row["loss"] for row in metrics], color="0.7", lw=0.8)
        axes.plot([], [], color="0.7", label="training, each step")
        axes.plot([row["tokens"] for row in validated], [row["validation_loss"] for row in validated], "o-", ms=3)
        axes.plot([], [], color=PALETTE[0], label="validation")

    _save_losses(draw, path, floor)


def save_comparison(runs: list[dict], path: str | Path, floor: float | None = None) -> None:
    """Draw the validation losses of CRATE and GPT-2 against tokens, one line a run, one line style a size.

    Args:
        runs: as `cratelab.experiments.comparison.compare` returns them.
        path: image to write, whole or not at all; its suffix says what kind, and is .png if there is none.
        floor: nats a token that no model can go below, where it is known.

    Raises:
        OSError: it cannot be written.
        ValueError: there is no such kind of image.
    """
    presets = list(dict.fromkeys(run["preset"] for run in runs))
    colours, names = {"crate": CRATE, "gpt2": GPT2}, {"crate": "CRATE", "gpt2": "GPT-2"}

    def draw(axes) -> None:
        labelled = set()
        for run in runs:
            style = ["-", "--", ":", "-."][presets.index(run["preset"]) % 4]
            label = f"{names[run['model']]} {run['preset']}"
            tokens, losses = zip(*run["curve"], strict=True) if run["curve"] else ((), ())
            axes.plot(tokens, losses, style, color=colours[run["model"]], lw=1.2)
            if label not in labelled:
                axes.plot([], [], style, color=colours[run["model"]], label=label)
            labelled.add(label)

    _save_losses(draw, path, floor)


def _save_losses(draw, path: str | Path, floor: float | None) -> None:
    with plt.rc_context():
        use_style()
        figure = Figure(layout="constrained")
        axes = figure.add_subplot(xlabel="tokens read", ylabel="loss, nats a token")
        draw(axes)
        if floor is not None:
            axes.axhline(floor, color="black", ls="--", lw=1, label="entropy rate: no model is below")
        axes.legend()
        path = Path(path) if Path(path).suffix else Path(f"{path}.png")
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:])
