"""The book's Animator: curves that grow while training goes on, in a notebook or in a PNG file."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loop.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDRAW_S = 2.0  # a drawing takes longer than an epoch of softmax regression: draw no more often than this


class Animator:
    """Draw curves that grow with every `add` (d2l 3.6.5).

    In a notebook the figure is redrawn in place. Elsewhere it is written to `path` (PNG), at most every two seconds;
    `save` writes what is still missing.
    """

    def __init__(
        self,
        xlabel: str | None = None,
        ylabel: str | None = None,
        legend: Sequence[str] = (),
        xlim: tuple[float, float] | None = None,
        ylim: tuple[float, float] | None = None,
        xscale: str = "linear",
        yscale: str = "linear",
        fmts: Sequence[str] = ("-", "m--", "g-.", "r:"),
        figsize: tuple[float, float] = (5.0, 3.5),
        path: str | Path = "curves.png",
        title: str | None = None,
    ) -> None:
        self.legend, self.fmts, self.figsize, self.path = legend, fmts, figsize, Path(path)
        self.axes_settings = {
            "xlabel": xlabel, "ylabel": ylabel, "xlim": xlim, "ylim": ylim,
            "xscale": xscale, "yscale": yscale, "title": title,
        }  # fmt: skip
        self.curves: list[tuple[list[float], list[float]]] = []
        self.drawn_at = -float("inf")

    def add(self, x: float, y: float | Sequence[float | None]) -> None:
        """Add a point (x, y) to each curve; None leaves a curve as it is."""
        values = y if isinstance(y, Sequence) else [y]
        while len(self.curves) < len(values):
            self.curves.append(([], []))
        for (xs, ys), value in zip(self.curves, values, strict=False):
            if value is not None:
                xs.append(x)
                ys.append(value)
        if _in_notebook():
            self._show()
        elif time.monotonic() - self.drawn_at > REDRAW_S:
            self.save()

    def save(self) -> None:
        """Write the curves to `path`, whole or not at all."""
        picture = io.BytesIO()
        self._figure().savefig(picture, format="png", dpi=150)
        write_whole(self.path, picture.getvalue())
        self.drawn_at = time.monotonic()

    def _show(self) -> None:
        from IPython import display

        display.clear_output(wait=True)
        picture = io.BytesIO()
        self._figure().savefig(picture, format="png", dpi=100)
        display.display(display.Image(picture.getvalue()))

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure  # half a second: only who draws pays; and no pyplot, so no global state

        figure = Figure(figsize=self.figsize, layout="constrained")
        axes = figure.add_subplot()
        for (xs, ys), fmt in zip(self.curves, self.fmts, strict=False):
            axes.plot(xs, ys, fmt, marker="." if len(xs) == 1 else None)
        axes.set(**{name: value for name, value in self.axes_settings.items() if value is not None})
        if self.legend:
            axes.legend(self.legend)
        axes.grid(alpha=0.4)
        return figure


def _in_notebook() -> bool:
    """Whether this runs in a kernel that can show pictures (a terminal IPython cannot)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"
