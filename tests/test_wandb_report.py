"""The report in W&B: all sections and panels are in its spec, a second call updates it, and failures say so at once."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scripts.panels import SECTIONS
from tests.wandb_stub import KEY, WandbStub

wandb = pytest.importorskip("wandb")
wandb_report = pytest.importorskip("scripts.wandb_report")

SLOW = pytest.mark.slow  # 4 s of W&B's import
COMMAND = [sys.executable, "-m", "scripts.wandb_report", "--entity", "ent", "--project", "p"]
AWKWARD_GROUPS = ["tails", "it's", 'say "x"', "lr=0.1", "a == b", "x < 3", "back\\slash", "0.1", "None", "a/b?", "ä ☃"]


@pytest.fixture(autouse=True)
def project(stub: WandbStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in knows a project, p; what wandb has to say is heard."""
    stub.projects.add("p")
    monkeypatch.delenv("WANDB_SILENT")


def call(*flags: str) -> None:
    wandb_report.main(["--entity", "ent", "--project", "p", *flags])


def dry_run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    call("--dry-run", *flags)
    return json.loads(capsys.readouterr().out)


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]


def panels(grid: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [panel["config"] for panel in grid["panelBankSectionConfig"]["panels"] if panel["viewType"] == kind]


def without_ids(value: Any) -> Any:
    """The spec less what every call draws anew, and the project that only the server's answer puts in."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "__id__", "project")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def test_the_spec_holds_every_section_and_panel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = dry_run(capsys)["spec"]
    headings = [block["children"][0]["text"] for block in spec["blocks"] if block["type"] == "heading"]
    assert headings == [*(section.title for section in SECTIONS), "The runs side by side"]
    for section, grid in zip(SECTIONS, grids(spec), strict=False):
        lines = panels(grid, "Run History Line Plot")
        assert [(line["chartTitle"], line["metrics"], line["yAxisTitle"], line["yLogScale"]) for line in lines] == [
            (panel.title, [panel.key], panel.unit, panel.logarithmic) for panel in section.panels
        ]
        assert {line["xAxis"] for line in lines} == {"examples"}
        assert [bar["metrics"] for bar in panels(grid, "Bar Chart")] == [["test/acc", "test/acc.last"]]
    assert panels(grids(spec)[-1], "Run Comparer") == [{"diffOnly": "split"}]


def test_runs_are_grouped_by_the_section_then_by_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for grid in grids(dry_run(capsys)["spec"]):
        (run_set,) = grid["runSets"]
        assert all(key["section"] == "config" for key in run_set["grouping"])
        found.append([key["name"] for key in run_set["grouping"]])
    assert found == [
        ["reduction.value", "normalize.value"],
        ["tail.value", "reduction.value", "normalize.value"],
        ["world_size.value", "reduction.value", "normalize.value"],
        ["normalize.value", "reduction.value"],
        [],
    ]


@pytest.mark.parametrize("group", AWKWARD_GROUPS)
def test_every_run_set_is_filtered_to_the_group_to_the_letter(
    group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"key": {"section": "run", "name": "group"}, "op": "=", "value": group, "disabled": False}
    for grid in grids(dry_run(capsys, "--group", group)["spec"]):
        assert [run_set["filters"]["filters"] for run_set in grid["runSets"]] == [[wanted]]


def test_without_a_group_nothing_is_filtered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for grid in grids(dry_run(capsys)["spec"]):
        assert [run_set["filters"]["filters"] for run_set in grid["runSets"]] == [[]]


def test_no_two_panels_of_a_grid_overlap(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for grid in grids(dry_run(capsys)["spec"]):
        taken: set[tuple[int, int]] = set()
        for panel in grid["panelBankSectionConfig"]["panels"]:
            x, y, w, h = (panel["layout"][key] for key in "xywh")
            cells = {(i, j) for i in range(x, x + w) for j in range(y, y + h)}
            assert not cells & taken and x + w <= 24
            taken |= cells


def test_formulas_and_code_are_set_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = dry_run(capsys)["spec"]["blocks"]
    children = [child for block in blocks for child in block["children"]]
    texts = [child["text"] for child in children if "text" in child]
    assert not [text for text in texts if "$" in text or "`" in text]
    formulas = [child["content"] for child in children if child.get("type") == "latex"]
    assert "\\frac{1}{WKn_r}" in formulas
    assert {"text": "--normalize global", "inlineCode": True} in children
    assert [block for block in blocks if block["type"] == "latex" and "sum, global" in block["content"]]


def test_a_dry_run_asks_no_server_and_imports_no_torch(stub: WandbStub) -> None:
    probe = "import sys, scripts.wandb_report as s; s.main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", probe, *COMMAND[3:], "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "WANDB_API_KEY": ""}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["projectName"] == "p"
    assert stub.ops == {}


def test_what_is_saved_is_the_dry_run_with_its_project(
    stub: WandbStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = dry_run(capsys, "--group", "tails")
    call("--group", "tails")
    said = capsys.readouterr()
    ((number, report),) = stub.reports.items()
    spec = json.loads(report["spec"])
    assert without_ids(spec) == without_ids(shown["spec"])
    assert (report["displayName"], report["description"]) == (shown["displayName"], shown["description"])
    homes = [run_set["project"] for grid in grids(spec) for run_set in grid["runSets"]]
    assert {(home["entityName"], home["name"]) for home in homes} == {("ent", "p")}
    assert said.out == f"{stub.url}/ent/p/reports/Mean-and-sum-under-the-all-reduce---tails--{number}\n"
    assert said.err == ""
    assert stub.unknown == []


def test_a_second_call_updates_the_report_and_leaves_others_alone(
    stub: WandbStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("--group", "tails")
    ((number, first),) = stub.reports.items()
    copies = {
        "renamed": {**first, "id": "renamed", "displayName": "Mine"},
        "rewritten": {**first, "id": "rewritten", "description": "Mine"},
    }
    stub.reports.update(copies)
    call("--group", "tails")
    assert list(stub.reports) == [number, *copies]
    assert stub.reports[number]["spec"] != first["spec"]
    assert {name: stub.reports[name] for name in copies} == copies
    call("--group", "lr")
    assert len(stub.reports) == 4
    assert stub.unknown == []


def test_a_report_that_was_deleted_is_made_anew(stub: WandbStub, monkeypatch: pytest.MonkeyPatch) -> None:
    call()
    (first,) = stub.reports
    del stub.reports[first]
    call()
    (second,) = stub.reports
    assert second != first
    assert stub.unknown == []


def failure(**environ: str) -> tuple[str, float]:
    """What a call says as it fails, and the seconds until it has ended."""
    started = time.perf_counter()
    done = subprocess.run(COMMAND, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scripts.wandb_report: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr, seconds


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_project_that_is_not_there_is_named_and_not_made(stub: WandbStub) -> None:
    stub.projects.clear()
    said, seconds = failure()
    assert "--entity ent --project p: W&B has no such project" in said
    assert seconds < 10
    assert (stub.ops["CreateProject"], stub.reports, stub.unknown) == (0, {}, [])


@pytest.mark.slow  # 15 s
@pytest.mark.parametrize(
    ("operation", "status"), [("Viewer", 401), ("Viewer", 503), ("ProjectViews", 403), ("upsertView", 500)]
)
def test_a_server_that_refuses_is_quoted_in_one_line(operation: str, status: int, stub: WandbStub) -> None:
    stub.fail = lambda kind, name: status if name == operation else None
    said, seconds = failure()
    assert "W&B refused" in said and "injected" in said and "wandb login --relogin" in said
    assert seconds < 15
    assert stub.reports == {}


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "connection refused"),
        pytest.param(
            {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "offline"}, "connection refused", marks=SLOW
        ),
        pytest.param({"WANDB_BASE_URL": "nonsense"}, "the environment: Input should be a valid URL", marks=SLOW),
        ({"WANDB_API_KEY": "short"}, "API key must have 40+ characters"),
    ],
)
def test_no_server_and_no_sense_are_told_in_one_line(environ: dict[str, str], reason: str) -> None:
    said, seconds = failure(**environ)
    assert reason in said
    assert KEY not in said
    assert seconds < 15


@pytest.mark.slow  # 10 s
def test_a_server_that_is_silent_or_falls_silent_is_given_up(stub: WandbStub) -> None:
    stub.fail = lambda kind, name: time.sleep(60) if name == "ProjectViews" else None
    with silent_server() as url, ThreadPoolExecutor() as pool:
        for ended in [pool.submit(failure, WANDB_BASE_URL=url), pool.submit(failure)]:
            said, seconds = ended.result()
            assert "did not answer" in said
            assert seconds < 35


def test_without_a_key_a_terminal_is_not_asked_for_one(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    environ = {**os.environ, "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    started = time.perf_counter()
    done = subprocess.run(COMMAND, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, timeout=30)
    seconds = time.perf_counter() - started
    said = os.read(ours, 4096).decode()
    os.close(ours), os.close(theirs)
    assert done.returncode == 2
    assert (
        said.startswith("scripts.wandb_report: error: not logged in to W&B: run `wandb login`")
        and said.count("\n") == 1
    )
    assert seconds < 10
