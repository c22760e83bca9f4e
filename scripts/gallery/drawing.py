"""Drawing for the gallery: panels, curves told apart without colours, and the rules that every picture keeps."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scripts.compare.page import style
from scripts.gallery.probes import Runs

WORDS = 8  # of a title, at most
NO_UNIT = (
    "step", "epoch", "ranks, W", "training examples, N", "examples in the batch, n", "micro-batches in a step, K",
    "--lr", "effective lr", "loss scale", "largest parameter difference",
)  # fmt: skip
"""Axis labels that need no unit; every other ends on its unit in brackets. Named ticks need no label."""


class Finding(NamedTuple):
    """What a figure shows. title: the finding, without numbers. one, several: it in one process, on several ranks."""

    title: str
    one: str
    several: str


def plot(figure: Figure, **settings: Any) -> Axes:
    """Return the only axes of a figure."""
    axes = figure.subplots()
    dress(axes, **settings)
    return axes


def panels(figure: Figure, left: str = "one process", right: str = "several ranks", **shared: Any) -> tuple[Axes, Axes]:
    """Return two axes side by side; `shared` goes to both, and with a ylabel the y axis is one."""
    pair = figure.subplots(1, 2, sharey="ylabel" in shared)
    for axes, title in zip(pair, (left, right), strict=True):
        axes.set_title(title, fontsize=9)
        dress(axes, **shared)
        if "ylabel" in shared:
            axes.label_outer()
    return pair[0], pair[1]


def dress(axes: Axes, **settings: Any) -> None:
    """Set what all axes have in common, and these settings."""
    axes.set(**settings)
    axes.grid(alpha=0.4)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


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
    """Return the figure that a function draws, under its finding's title, and the finding."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    finding = draw(figure, runs)
    figure.suptitle(finding.title, fontsize=11 * figure.get_figwidth() / 6)
    if len(finding.title.split()) > WORDS:
        raise ValueError(f"a title of more than {WORDS} words: {finding.title}")
    if bare := [text for text in labels(figure) if text not in NO_UNIT and not text.endswith(")")]:
        raise ValueError(f"axes without a unit: {bare}")
    return figure, finding


def labels(figure: Figure) -> list[str]:
    """Return the labels of all axes that have ticks of numbers; '' where one lacks its label."""
    texts = []
    for axes in (axes for axes in figure.axes if axes.axison):
        for axis, group in ((axes.xaxis, axes.get_shared_x_axes()), (axes.yaxis, axes.get_shared_y_axes())):
            alike = [getattr(other, f"{axis.axis_name}axis").get_label_text() for other in group.get_siblings(axes)]
            named = any(tick.get_text().isalpha() for tick in axis.get_ticklabels())
            texts += [] if named else [max(alike)]
    return list(dict.fromkeys(texts))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG in 64 colours: a third of the size, and no difference to the eye. It notes the title and labels."""
    picture, notes = io.BytesIO(), PngInfo()
    notes.add_text("Title", figure.get_suptitle())
    notes.add_text("Labels", json.dumps(labels(figure)))
    figure.savefig(picture, format="png", dpi=150)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=notes)
