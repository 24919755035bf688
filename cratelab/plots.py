"""One style for every figure: colours that colour-blind readers tell apart, one for CRATE and one for GPT-2 everywhere.

The palette is Okabe & Ito's. Figures keep a white ground, so that they read the same on a dark page.
"""

import matplotlib.pyplot as plt

CRATE = "#0072B2"
GPT2 = "#D55E00"
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
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
