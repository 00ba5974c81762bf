"""Plots of results, as PNG and SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.figures import Interval

SIZE = (7.0, 4.2)
"""Width and height in inches."""
DPI = 120
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours that are told apart by most eyes (Okabe and Ito)."""
MARKERS = "os^Dvx+"


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: Above the axes.
        series: Values by x for each name in the legend.
    """

    title: str
    series: Mapping[str, Mapping[float, Interval]]


def line_plot(
    target: Path, panels: Sequence[Panel], *, title: str, x: str, y: str, top: float | None = None
) -> list[Path]:
    """Draw lines with confidence intervals, one panel beside the other, and return the files.

    Args:
        target: Path without a suffix.
        panels: Axes.
        title: Above all of them; it says if the values are simulated.
        x: Name of the x axis.
        y: Name of the y axis.
        top: Upper end of the y axis.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "genserve"  # the same values make the same file
    from matplotlib import pyplot

    width, height = SIZE
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width * (1 + 0.75 * (len(panels) - 1)), height), sharey=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, (name, points) in enumerate(panel.series.items()):
            style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
            halves = [0.0 if math.isnan(each.half) else each.half for each in points.values()]
            axis.errorbar(
                list(points),
                [each.mean for each in points.values()],
                yerr=halves,
                label=name,
                capsize=2,
                lw=1.4,
                ms=4,
                **style,
            )
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
        axis.set_ylim(0, top)
    axes[0][0].set_ylabel(y)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [target.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=DPI, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
    return files
