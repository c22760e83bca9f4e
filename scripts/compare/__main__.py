"""Compare runs, with no account and no network: a table in the terminal, report.html with curves, a PNG of each panel.

    python -m scripts.compare runs/mean-global-spread-w1-b256 runs/mean-global-spread-w2-b256
    python -m scripts.compare --group tails                     all runs in runs/ that were trained with --group tails
    python -m scripts.compare --group tails --color-by world_size --to pictures

report.html is one file that opens from disk. Runs that are not finished are compared as far as they went.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from loop.config import InputError
from scripts.command import command
from scripts.compare.page import numeric, page, style
from scripts.panels import DRIFT, PANELS, SECTIONS, TEST_ACC, THROUGHPUT, TRAIN_LOSS, Panel
from scripts.runs import DERIVED, RUN, Run, differing, grouped, read_runs, study

COLUMNS: tuple[tuple[str, Panel, Callable[[list[float]], float], str], ...] = (
    ("train loss", TRAIN_LOSS, lambda values: values[-1], "#.4g"),
    ("test acc", TEST_ACC, lambda values: values[-1], ".4f"),
    ("best test acc", TEST_ACC, max, ".4f"),
    ("max drift", DRIFT, max, ".2g"),
    ("examples/s", THROUGHPUT, statistics.median, ",.0f"),
)
"""Of the table: title, panel, what of the curve's values, format."""


@dataclass(frozen=True)
class Flags:
    """The flags."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The runs' folders."""
    group: str | None = None
    """Compare all runs of this study."""
    out: Path = Path("runs")
    """Where --group looks for runs."""
    color_by: str | None = None
    """Config key, or run, that colours the PNGs and, at first, all curves."""
    to: Path | None = None
    """Folder of the report. Default: comparison, or comparison/STUDY."""


@command
def main(flags: Flags) -> None:
    """Compare the runs."""
    if bool(flags.runs) == bool(flags.group):
        raise InputError("name the folders of runs, or give --group STUDY, and not both")
    runs = read_runs(flags.runs or study(flags.out, flags.group or ""))
    folder = Path("comparison", re.sub(r"[^\w-]+", "-", flags.group or ""))  # a study's name may hold a slash
    compare(runs, flags.group, flags.color_by, flags.to or folder)


def compare(runs: Sequence[Run], group: str | None, color_by: str | None, to: Path) -> None:
    """Print the table; write report.html and the PNGs into the folder `to`. Raises InputError where it cannot."""
    told_apart = differing(runs)
    if color_by not in (None, RUN) and not any(color_by in run.config for run in runs):
        raise InputError(f"--color-by {color_by}: no run has this key; they differ in: {', '.join([*told_apart, RUN])}")
    keys = list(dict.fromkeys([*told_apart, color_by or RUN, RUN]))
    key = color_by or next((section.group_by for section in SECTIONS if section.group_by in told_apart), keys[0])
    table = tabulate([key for key in told_apart if key not in DERIVED], runs)
    print(in_blocks(table, shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize))

    panels = [panel for panel in PANELS if any(finite(run, panel) for run in runs)]
    empty = ", ".join(f"{panel.title} ({panel.key})" for panel in PANELS if panel not in panels)
    remarks = [f"Left out, as no run has data: {empty}."] if empty else []
    remarks += [f"{run.name} has failed: {run.failure}." for run in runs if run.failure]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    html = page(f"{group}: {count}" if group else f"{count} compared", runs, panels, keys, key, table, remarks)
    try:
        to.mkdir(parents=True, exist_ok=True)
        (to / "report.html").write_text(html, encoding="utf-8")
        for panel in PANELS:
            path = to / f"{panel.key.replace('/', '-')}.png"
            path.unlink(missing_ok=True)  # an earlier comparison's
            if panel in panels:
                draw(panel, runs, key, path)
    except OSError as error:
        raise InputError(f"--to {to}: cannot write there ({error.strerror}): name another folder") from None
    print(*remarks, f"{to / 'report.html'} ({len(html) / 1e6:.1f} MB), and {len(panels)} PNGs beside it", sep="\n")


def tabulate(keys: Sequence[str], runs: Sequence[Run]) -> list[list[str]]:
    """Return a header and a row for each run: its label, its value of each key, and those COLUMNS that any run has.

    The weights' SHA-256, where a run has it, stands last, shortened as git's are.
    """
    columns = [column for column in COLUMNS if any(column[1].key in run.curves for run in runs)]
    table = [["run", *keys, *(title for title, *_ in columns)]]
    for run in runs:
        row = [run.label, *(run.config.get(key, "-") for key in keys)]
        for _, panel, pick, form in columns:
            values = [value for _, value in run.curves.get(panel.key, [])]
            row.append(format(pick(values), form) if values else "-")
        table.append(row)
    if any(run.weights for run in runs):
        for row, weights in zip(table, ["weights", *((run.weights or "-")[:12] for run in runs)], strict=True):
            row.append(weights)
    return table


def in_blocks(table: Sequence[Sequence[str]], width: int) -> str:
    """Return the table as text; columns that do not fit into `width` characters stand in further blocks below."""
    columns = list(zip(*table, strict=True))
    right = numeric(table)
    widths = [max(map(len, column)) for column in columns]
    blocks = [[0]]
    for index in range(1, len(columns)):
        if len(blocks[-1]) > 1 and sum(widths[i] + 2 for i in blocks[-1]) + widths[index] > width:
            blocks.append([0])
        blocks[-1].append(index)
    texts = []
    for block in blocks:
        cells = ((row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in block) for row in table)
        texts.append("".join("  ".join(row).rstrip() + "\n" for row in cells))
    return "\n".join(texts)


def finite(run: Run, panel: Panel) -> list[tuple[float, float]]:
    """Return the points of a run's curve that can be drawn: finite, and above 0 where the axis is logarithmic."""
    curve = run.curves.get(panel.key, [])
    return [(x, y) for x, y in curve if math.isfinite(y) and (y > 0 or not panel.logarithmic)]


def draw(panel: Panel, runs: Sequence[Run], key: str, path: Path) -> None:
    """Write a panel as a PNG, 1000 pixels wide, coloured and dashed by a config key."""
    from matplotlib.figure import Figure  # half a second: not for --help, not for bad input
    from matplotlib.ticker import EngFormatter, LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # 0.6 where LogFormatter writes 6e-01

    curves = {run.name: finite(run, panel) for run in runs}
    sparse = max(map(len, curves.values())) < 12
    of_key = grouped(runs, key)
    columns = max(1, min(len(of_key), 360 // (64 + 5 * max(map(len, of_key)))))  # of the legend, in points
    figure = Figure(figsize=(5, 3.2 + 0.16 * -(-len(of_key) // columns)), layout="constrained")
    axes = figure.add_subplot(title=f"{panel.title} ({panel.unit})", xlabel="examples")
    for group, members in enumerate(of_key.values()):
        colour, dash, width = style(group)
        for run in members:
            points = curves[run.name]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], color=colour, linewidth=2 * width, zorder=3 - width,
                linestyle=(0, [length / 2 for length in dash]) if dash else "solid",
                marker="osD^vP"[group % 6] if sparse or len(points) == 1 else None, markersize=4,
                label=f"{group}" if run is members[0] else None,
            )  # fmt: skip
    axes.xaxis.set_major_formatter(EngFormatter())
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(Plain())
        axes.yaxis.set_minor_formatter(Plain())
    axes.grid(alpha=0.4)
    title = None if key == RUN else key
    legend = figure.legend(loc="outside lower center", ncols=columns, title=title, fontsize=8, handlelength=4)
    for text, value in zip(legend.get_texts(), of_key, strict=True):  # as it is: matplotlib gives "$" and "_" a meaning
        text.set_text(value)
        text.set_parse_math(False)
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    sys.exit(main())
