"""The book's Animator: curves that grow while training goes on, in a notebook, in pyplot or in a PNG file."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loop.files import write_whole

REDRAW_S = 2.0  # a drawing takes longer than an epoch of softmax regression: draw no more often than this


class Animator:
    """Draw curves that grow with every `add` (d2l 3.6.5).

    Without a path the figure is pyplot's: a notebook redraws it in place, and `plt.show` and `plt.savefig` find it.
    With a path it is drawn without pyplot and written there (PNG), at most every two seconds; `save` writes what is
    still missing.
    fig, axes: the figure and its axes; the curves are drawn in axes[0]. X, Y: one list of values per curve.
    """

    def __init__(
        self,
        xlabel: str | None = None,
        ylabel: str | None = None,
        legend: Sequence[str] | None = None,
        xlim: Sequence[float] | None = None,
        ylim: Sequence[float] | None = None,
        xscale: str = "linear",
        yscale: str = "linear",
        fmts: Sequence[str] = ("-", "m--", "g-.", "r:"),
        nrows: int = 1,
        ncols: int = 1,
        figsize: tuple[float, float] = (3.5, 2.5),
        *,
        path: str | Path | None = None,
    ) -> None:
        if path is None:
            from matplotlib import pyplot  # half a second: only who draws pays

            self.fig: Any = pyplot.figure(figsize=figsize, layout="tight")
        else:
            from matplotlib.figure import Figure  # no global state

            self.fig = Figure(figsize=figsize, layout="tight")
        axes = self.fig.subplots(nrows, ncols)
        self.axes: Any = [axes] if nrows * ncols == 1 else axes
        settings = {
            "xlabel": xlabel, "ylabel": ylabel, "xscale": xscale, "yscale": yscale, "xlim": xlim, "ylim": ylim,
        }  # fmt: skip
        self.axes_settings = {name: value for name, value in settings.items() if value is not None}
        self.legend, self.fmts, self.path = legend, fmts, Path(path) if path is not None else None
        self.X: list[list[Any]] = []
        self.Y: list[list[Any]] = []
        self.drawn_at = -float("inf")

    def add(self, x: Any, y: Any) -> None:
        """Add a point to each curve; None leaves a curve as it is.

        y: one value, or a list, array or tensor of one per curve. x: the same, or one value for all curves.
        """
        ys = _numbers(y)
        ys = ys if hasattr(ys, "__len__") else [ys]
        xs = _numbers(x)
        xs = xs if hasattr(xs, "__len__") else [xs] * len(ys)
        while len(self.X) < len(ys):
            self.X.append([])
            self.Y.append([])
        for i, (a, b) in enumerate(zip(xs, ys, strict=False)):
            if a is not None and b is not None:
                self.X[i].append(_numbers(a))
                self.Y[i].append(_numbers(b))
        if self.path is None:
            self._draw()
            if _in_notebook():
                self._show()
        elif time.monotonic() - self.drawn_at > REDRAW_S:
            self.save()

    def config_axes(self) -> None:
        """Set the labels, scales, limits, legend and grid of axes[0]."""
        self.axes[0].set(**self.axes_settings)
        if self.legend:
            self.axes[0].legend(self.legend)
        self.axes[0].grid(alpha=0.4)

    def save(self) -> None:
        """Write the curves to `path`, whole or not at all. Raises ValueError where there is none."""
        if self.path is None:
            raise ValueError("an Animator without a path is saved by plt.savefig")
        self._draw()
        write_whole(self.path, self._png(dpi=150))
        self.drawn_at = time.monotonic()

    def _draw(self) -> None:
        self.axes[0].cla()
        for xs, ys, fmt in zip(self.X, self.Y, self.fmts, strict=False):
            for line in self.axes[0].plot(xs, ys, fmt):
                if len(xs) == 1 and line.get_marker() == "None":
                    line.set_marker(".")  # a line of one point is invisible
        self.config_axes()

    def _show(self) -> None:
        from IPython import display

        display.display(display.Image(self._png(dpi="figure")))
        display.clear_output(wait=True)  # once the next output comes; at a cell's end it is pyplot's figure

    def _png(self, dpi: float | str) -> bytes:
        picture = io.BytesIO()
        self.fig.savefig(picture, format="png", dpi=dpi)
        return picture.getvalue()


def _numbers(value: Any) -> Any:
    """Return the numbers of a tensor or an array, on whatever device; another value as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _in_notebook() -> bool:
    """Whether this runs in a kernel that can show pictures (a terminal IPython cannot; Colab's is a subclass)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return "ZMQInteractiveShell" in (kind.__name__ for kind in type(shell).__mro__)
