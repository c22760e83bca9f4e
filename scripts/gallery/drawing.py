"""Drawing for the gallery: two panels, curves told apart without colours, a picture of a third of the size."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from scripts.compare.page import style
from scripts.gallery.probes import Runs


class Finding(NamedTuple):
    """What a figure shows. title: the finding, in a line or two. one, several: it in one process, on several ranks."""

    title: str
    one: str
    several: str


def panels(figure: Figure, left: str = "one process", right: str = "several ranks", **shared: Any) -> tuple[Axes, Axes]:
    """Return two axes side by side; `shared` goes to both, and with a ylabel the y axis is one."""
    pair = figure.subplots(1, 2, sharey="ylabel" in shared)
    for axes, title in zip(pair, (left, right), strict=True):
        axes.set_title(title, fontsize=9)
        axes.set(**shared)
        if "ylabel" in shared:
            axes.label_outer()
        axes.grid(alpha=0.4)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return pair[0], pair[1]


def curve(
    axes: Axes, index: int, xs: Sequence[float], ys: Sequence[float], label: str | None, marked: bool = True, **how: Any
) -> None:
    """Draw a curve in the style of its index, told apart without colours too."""
    colour, dash, width = style(index)
    line = (0, [length / 2 for length in dash]) if dash else "solid"
    marker = {"marker": "osD^vP"[index % 6], "markersize": 4} if marked else {}
    settings = {"color": colour, "linestyle": line, "linewidth": 1.8 * width, **marker, **how}
    axes.plot(xs, ys, label=label, **settings)


def legend(axes: Axes, **where: Any) -> None:
    """Explain the curves."""
    axes.legend(fontsize=7, handlelength=3, framealpha=0.8, **where)


def paint(draw: Callable[[Figure, Runs], Finding], runs: Runs) -> tuple[Figure, Finding]:
    """Return the figure that a function of this file draws, under its finding's title, and the finding."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    finding = draw(figure, runs)
    figure.suptitle(textwrap.fill(finding.title, 84, break_on_hyphens=False), fontsize=9.5)
    return figure, finding


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, 900 pixels wide, in 64 colours: a third of the size, and no difference to the eye."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
