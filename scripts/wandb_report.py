"""Make the comparison of runs as a Weights & Biases Report, or bring the one that was made up to date.

    python -m scripts.wandb_report --entity ME --project P                  all runs of the project
    python -m scripts.wandb_report --entity ME --project P --group STUDY    one study
    python -m scripts.wandb_report --entity ME --project P --dry-run        print the spec: no account, no network

The panels and words are those of `scripts.panels`, as in `scripts.compare`. A report is known by its title and
description, so that any machine finds it again, and one deleted in W&B is made anew. What was changed in it by hand is
replaced; a copy, or the report renamed, is left alone.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import threading
from dataclasses import dataclass

import wandb
from pydantic import ValidationError
from wandb.apis.public import BetaReport
from wandb.sdk.lib.service.service_connection import WandbApiFailedError
from wandb_workspaces.reports import v2 as wr
from wandb_workspaces.reports.v2.interface import BlockTypes, PanelTypes

from loop.config import InputError
from scripts.command import command
from scripts.panels import SECTIONS, TEST_ACC, Panel, Section

TITLE = "Mean and sum under the all-reduce"
LONGEST_TITLE = 128  # that a Report may have
COLUMNS, HEIGHT = 24, 8  # of a grid; of a panel
MOST_GROUPS = 32  # shown in a panel; W&B's own limit is 10
MODE = ("reduction", "normalize")
INTRODUCTION = (
    "A step covers $n$ examples with losses $l_i$ and gradients $g_i$. They are dealt to $W$ ranks and, with "
    "accumulation, to $K$ micro-batches: cell $r$ holds $n_r$ of them. DDP averages the gradients of the ranks, and "
    "`Accelerator.backward` divides by $K$. So the step that is applied depends on what a cell back-propagates, that "
    "is, on `--reduction` and `--normalize`:"
)
STEPS = r"""\begin{array}{lll}
\text{mean, rank} & \frac{1}{WK}\sum_r \frac{1}{n_r}\sum_{i\in r} g_i & \text{fewer in a cell: each counts for more}\\
\text{mean, global} & \frac{1}{n}\sum_i g_i & \text{one process's step}\\
\text{sum, rank} & \frac{1}{WK}\sum_i g_i & n/(WK)\text{ times the mean's}\\
\text{sum, global} & \sum_i g_i & n\text{ times the mean's, whatever } W \text{ and } K
\end{array}"""
READING = (
    "In each section runs are grouped by the setting in question and by their mode, `reduction` and `normalize`: a "
    "line is the mean of a group's runs, its band reaches from the least to the greatest of them. The x axis counts "
    "`examples`, on which any number of ranks agrees."
)

# A server that says nothing for so long is given up; longer where its time-out has been raised.
HTTP_TIMEOUT = os.environ.get("WANDB_HTTP_TIMEOUT", "")
GIVE_UP_S = max(25, 3 * int(HTTP_TIMEOUT) if HTTP_TIMEOUT.isdecimal() else 0)
told = threading.Event()  # the user, of a failure


def make_report(entity: str, project: str, group: str | None, *, offline: bool) -> wr.Report:
    """Return the report, not yet saved.

    offline: leave entity and project out of the run sets, which would ask the server for the project's id.
    """
    home = ("", "") if offline else (entity, project)
    filters = f"Metric('Group') == {literal(group)}" if group else ""

    def runset(*keys: str) -> wr.Runset:
        groupby = [f"config.{key}" for key in dict.fromkeys(keys)]
        return wr.Runset(*home, name=group or "All runs", filters=filters, groupby=groupby)

    blocks: list[BlockTypes] = [wr.TableOfContents(), prose(INTRODUCTION), wr.LatexBlock(STEPS), prose(READING)]
    for section in SECTIONS:
        grid = wr.PanelGrid(runsets=[runset(section.group_by, *MODE)], panels=plots(section))
        blocks += [wr.H1(section.title), prose(section.text), grid]
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(w=COLUMNS, h=2 * HEIGHT))
    blocks += [wr.H1("The runs side by side"), prose("Only what differs is shown.")]
    blocks += [wr.PanelGrid(runsets=[runset()], panels=[comparer])]

    command = f"python -m scripts.wandb_report --entity {entity} --project {project}"
    if group:
        command += f" --group {shlex.quote(group)}"
    return wr.Report(
        entity=entity,
        project=project,
        title=title(group),
        description=f"Made by: {command} (run again, it updates this report)",
        blocks=blocks,
        width="fluid",
    )


def literal(text: str) -> str:
    """Return a string literal for a filter, every character escaped: what looks like an operator gets rewritten."""
    return "'" + "".join(f"\\U{ord(character):08x}" for character in text) + "'"


def title(group: str | None) -> str:
    """Return the report's title; it becomes a part of its URL, so that only plain characters are kept."""
    return (TITLE + " - " + re.sub(r"[^\w .-]", "-", group))[:LONGEST_TITLE] if group else TITLE


def prose(text: str) -> wr.P:
    """Turn `code` and $formulas$ in a text into W&B's inline blocks."""

    def part(piece: str) -> str | wr.InlineLatex | wr.InlineCode:
        if piece.startswith("$"):
            return wr.InlineLatex(piece[1:-1])
        return wr.InlineCode(piece[1:-1]) if piece.startswith("`") else piece

    return wr.P([part(piece) for piece in re.split(r"(\$[^$]+\$|`[^`]+`)", text) if piece])


def plots(section: Section) -> list[PanelTypes]:
    """Return a section's panels, two in a row: curves, and where test accuracy is one of them, its final values."""
    drawn: list[PanelTypes] = [curves(panel, half_a_row(i)) for i, panel in enumerate(section.panels)]
    if TEST_ACC in section.panels:
        drawn.append(final_values(TEST_ACC, half_a_row(len(drawn))))
    return drawn


def half_a_row(i: int) -> wr.Layout:
    """Return the place of a grid's i-th panel."""
    width = COLUMNS // 2
    return wr.Layout(x=i % 2 * width, y=i // 2 * HEIGHT, w=width, h=HEIGHT)


def curves(panel: Panel, place: wr.Layout) -> wr.LinePlot:
    """Return the panel's curves over examples, a line and a band for each group of runs."""
    return wr.LinePlot(
        title=panel.title,
        x="examples",
        y=[panel.key],
        title_x="examples",
        title_y=panel.unit,
        log_y=panel.logarithmic,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_GROUPS,
        layout=place,
    )


def final_values(panel: Panel, place: wr.Layout) -> wr.BarPlot:
    """Return a bar for each group of runs: the mean of their last values.

    Where a run keeps more of a metric than its last value (`define_metric`), its summary has no plain `key`.
    """
    return wr.BarPlot(
        title=f"{panel.title} at the end",
        metrics=[panel.key, f"{panel.key}.last"],
        title_x=panel.unit,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_GROUPS,
        max_bars_to_show=MOST_GROUPS,
        layout=place,
    )


def spec(report: wr.Report) -> dict[str, object]:
    """Return what saving the report would send, but for the ids that only the server knows."""
    model = report._to_model()  # the one way to the spec without a server
    return {
        "entityName": report.entity,
        "projectName": report.project,
        "displayName": model.display_name,
        "description": model.description,
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def publish(entity: str, project: str, group: str | None) -> str:
    """Save the report, over the one that an earlier call saved if that is still there; return its URL.

    Raises InputError where W&B has no such project, no key, or no answer.
    """
    try:
        log_in()
        earlier = reports_of(entity, project)
        report = make_report(entity, project, group, offline=False)
        same = [r for r in earlier if (r.display_name, r.description) == (report.title, report.description)]
        if same:
            report.id = min(same, key=lambda r: r.created_at or "").id  # the first; others are copies
        return str(report.save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("while retrying: ")
        raise InputError(
            f"W&B refused, or did not answer: {reason} (check the network, WANDB_BASE_URL and the key: `wandb login "
            "--relogin`; WANDB_HTTP_TIMEOUT, in seconds, gives a slow server more time)"
        ) from error


def log_in() -> None:
    """Find the key and try it, never asking for one; raises InputError where there is none, wandb's own where it fails.

    Without the settings, WANDB_MODE=offline would refuse, and a server that is down would be asked for minutes.
    """
    try:
        wandb.setup(settings=wandb.Settings(mode="online", silent=True, x_graphql_retry_max=1))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"WANDB_{str(wrong['loc'][0]).upper()} in the environment: {wrong['msg']}") from error
    if not wandb.login(prompt=False):
        raise InputError("not logged in to W&B: run `wandb login`, or set WANDB_API_KEY (--dry-run needs neither)")


def reports_of(entity: str, project: str) -> list[BetaReport]:
    """Return the project's reports; raises InputError where there is no such project."""
    try:
        return list(wandb.Api().reports(f"{entity}/{project}"))
    except ValueError as error:
        raise InputError(
            f"--entity {entity} --project {project}: W&B has no such project, or this key may not see it: check the "
            "names, which stand in the URL of any run that was sent there"
        ) from error


@dataclass(frozen=True)
class Flags:
    """The flags."""

    entity: str
    """User or team in W&B."""
    project: str
    """Project in W&B."""
    group: str = ""
    """The study: only runs of this group."""
    dry_run: bool = False
    """Print the report's spec as JSON; asks no server."""


@command
def main(flags: Flags) -> None:
    """Print the spec, or save the report and print its URL."""
    try:
        if flags.dry_run:
            print(
                json.dumps(spec(make_report(flags.entity, flags.project, flags.group or None, offline=True)), indent=2)
            )
        else:
            print(publish(flags.entity, flags.project, flags.group or None))
    except InputError:
        told.set()
        raise


def give_up() -> None:
    """End the process; W&B's own time-outs, those of its exit among them, have added up to more than a minute."""
    if not told.is_set():
        print(f"scripts.wandb_report: error: W&B did not answer within {GIVE_UP_S} s", file=sys.stderr, flush=True)
    os._exit(2)


if __name__ == "__main__":
    watch = threading.Timer(GIVE_UP_S, give_up)
    watch.daemon = True
    watch.start()
    exit_code = main()
    watch.cancel()
    sys.exit(exit_code)
