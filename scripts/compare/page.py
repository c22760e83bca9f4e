"""A comparison of runs as one HTML file that needs no network: what `page.html` is filled with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from latex2mathml.converter import convert as latex_to_mathml

from scripts.panels import PANELS, SECTIONS, Panel, Section
from scripts.runs import NAMES, Curve, Run, grouped

# A group has the colour and the dash of its index, so that it is told apart without colours too. Each colour has a
# contrast of at least 3:1 to the page; neighbours differ in lightness.
LIGHT = ("#0b4f9c", "#d95f02", "#00806a", "#a8327f", "#2f8fd6", "#7a6200", "#c4122f", "#4a4a4a")
DARK = ("#6cb4ff", "#ff9d4f", "#2fd0a5", "#f08bd0", "#b5dcff", "#e3c546", "#ff7080", "#d5d5d5")
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 2), (8, 3, 2, 3), (13, 4), (12, 3, 2, 3, 2, 3))  # on, off, ...

MAX_POINTS = 50_000  # on a page: with plotly.js (4.9 MB) it stays below 6 MB


def style(group: int) -> tuple[str, tuple[int, ...], float]:
    """Return colour, dash and width of a group; the first 48 all differ. Whole lines are wider: dashes lie on them."""
    dash = (group % len(LIGHT) + group // len(LIGHT)) % len(DASHES)
    return LIGHT[group % len(LIGHT)], DASHES[dash], 1 - 0.1 * dash


def numeric(table: Sequence[Sequence[str]]) -> list[bool]:
    """Return for each column whether all that stands below its header is numbers, or nothing."""
    number = re.compile(r"-|nan|-?inf|-?[\d.,]+(e[-+]\d+)?")
    return [all(number.fullmatch(cell) for cell in column[1:]) for column in zip(*table, strict=True)]


def page(
    title: str,
    runs: Sequence[Run],
    panels: Sequence[Panel],
    keys: Sequence[str],
    key: str,
    table: Sequence[Sequence[str]],
    remarks: Sequence[str],
) -> str:
    """Return report.html.

    keys: the config keys that curves can be coloured by; key: the one that colours the section of all panels at first.
    table: the header and a row for each run. A section is left out where all runs have the same value of its key.
    """
    from plotly.offline import get_plotlyjs

    asked = [section for section in SECTIONS if section.group_by in keys and set(section.panels) & set(panels)]
    sections = [*asked, Section("All curves", key, "Every panel, by whatever tells the runs apart.", tuple(PANELS))]
    parts = {
        "TITLE": escape(title),
        "SUMMARY": _summary(table[0], keys, sections, remarks),
        "TABLE": _table(table) + _same_in_all(runs),
        "SECTIONS": "\n".join(_section(section, panels, keys) for section in sections),
        "DATA": _data(runs, panels, keys),
        "PLOTLY": get_plotlyjs(),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], template)


def _summary(header: Sequence[str], keys: Sequence[str], sections: Sequence[Section], remarks: Sequence[str]) -> str:
    differ = [f"<code>{escape(key)}</code>" for key in header if key in keys and key != header[0]]
    lines = [f"<p>They differ in {', '.join(differ)}.</p>" if differ else "<p>Their configs do not differ.</p>"]
    lines += [f'<p class="soft">{escape(remark)}</p>' for remark in remarks]
    links = "".join(f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in sections)
    return "\n".join([*lines, f"<nav>{links}</nav>"])


def _table(table: Sequence[Sequence[str]]) -> str:
    header, *rows = table
    marks = [' class="number"' if number else "" for number in numeric(table)]

    def cells(tag: str, row: Sequence[str], form: str) -> str:
        return "".join(f"<{tag}{mark}>{form.format(escape(c))}</{tag}>" for mark, c in zip(marks, row, strict=True))

    head = cells("th", header, '<button type="button" title="Sort">{}</button>')
    body = "\n".join(f"<tr>{cells('td', row, '{}')}</tr>" for row in rows)
    return (
        '<p class="soft sideways">The table scrolls sideways.</p>'
        '<div class="table" tabindex="0" role="region" aria-label="The runs">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _same_in_all(runs: Sequence[Run]) -> str:
    """Return what all runs have in common, folded away."""
    same = {key: value for key, value in runs[0].config.items() if all(run.config.get(key) == value for run in runs)}
    items = (f"<div><dt>{escape(k)}</dt> <dd>{escape(v)}</dd></div>" for k, v in same.items() if k not in NAMES)
    return f"<details><summary>The same in all of them</summary><dl>{''.join(items)}</dl></details>"


def _section(section: Section, panels: Sequence[Panel], keys: Sequence[str]) -> str:
    options = "".join(f"<option{' selected' * (key == section.group_by)}>{escape(key)}</option>" for key in keys)
    figures = "\n".join(
        f"<figure><figcaption>{escape(panel.title)} <span>{escape(panel.unit)}{', log' * panel.logarithmic}</span>"
        f'</figcaption><div class="plot" data-metric="{escape(panel.key)}"></div></figure>'
        for panel in section.panels
        if panel in panels
    )
    return (
        f'<section id="{_anchor(section)}" data-curves><h2>{escape(section.title)}</h2>\n'
        f"<p>{to_html(section.text)}</p>\n<label>Colour by <select>{options}</select></label>\n"
        f'<div class="legend" role="group" aria-label="Legend: click to hide or show"></div>\n'
        f'<div class="grid">\n{figures}\n</div></section>'
    )


def to_html(text: str) -> str:
    """Return text with `code` and $formulas$ in LaTeX as HTML, whose formulas are MathML."""
    html = ""
    for piece in re.split(r"(\$[^$]+\$|`[^`]+`)", text):
        if piece.startswith("$"):
            html += latex_to_mathml(piece[1:-1])
        elif piece.startswith("`"):
            html += f"<code>{escape(piece[1:-1])}</code>"
        else:
            html += escape(piece, quote=False)
    return html


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower())


def _data(runs: Sequence[Run], panels: Sequence[Panel], keys: Sequence[str]) -> str:
    """Return the curves, the groups of runs by each key, and the styles, as JSON that may stand in a <script>."""
    of_key = {key: grouped(runs, key) for key in keys}
    curves = [{p.key: run.curves[p.key] for p in panels if p.key in run.curves} for run in runs]
    limit = MAX_POINTS // max(sum(map(len, curves)), 1)
    data = {
        "runs": [
            {
                "name": run.label,
                "groups": {key: [run in members for members in of_key[key].values()].index(True) for key in keys},
                "curves": {key: _columns(thin(curve, limit)) for key, curve in its_curves.items()},
            }
            for run, its_curves in zip(runs, curves, strict=True)
        ],
        "keys": {key: list(by_value) for key, by_value in of_key.items()},
        "panels": {panel.key: {"unit": panel.unit, "logarithmic": panel.logarithmic} for panel in panels},
        "styles": {"light": LIGHT, "dark": DARK, "dashes": DASHES},
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _columns(curve: Curve) -> tuple[list[int], list[float | None]]:
    """Return examples and values, to six digits; None where a value is not finite, so that the curve breaks off."""
    return [int(x) for x, _ in curve], [float(f"{y:.6g}") if math.isfinite(y) else None for _, y in curve]


def thin(curve: Curve, limit: int) -> Curve:
    """Return a curve of about `limit` points that keeps the ends, and the lowest and highest of what lies between."""
    if len(curve) <= max(limit, 4):
        return curve
    size = math.ceil(2 * (len(curve) - 2) / max(limit - 2, 2))
    inner = curve[1:-1]
    kept = [curve[0]]
    for start in range(0, len(inner), size):
        few = inner[start : start + size]
        lowest = min(few, key=lambda point: point[1])
        highest = max(few, key=lambda point: point[1])
        kept += sorted({lowest, highest} | {point for point in few if not math.isfinite(point[1])})
    return [*kept, curve[-1]]
