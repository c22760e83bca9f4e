"""Comparing runs: the table, the files, bad input, and the page in a real browser."""

from __future__ import annotations

import itertools
import json
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

import pytest

from scripts.compare.__main__ import in_blocks, main, tabulate
from scripts.compare.page import style, thin, to_html
from scripts.panels import PANELS, SECTIONS
from scripts.runs import differing, grouped, read_runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

CONFIG: dict[str, Any] = {
    "reduction": "mean", "normalize": "global", "tail": "spread", "lr": 0.1, "seed": 0, "clip_norm": None,
    "out": "runs", "run_name": None, "group": "study", "notes": None, "wandb": "disabled", "world_size": 2,
    "last_step_sizes": [48, 48], "versions": {"torch": "2.15.0"}, "git_commit": "0123456789" * 4 + "-dirty",
    "argv": ["train.py"],
}  # fmt: skip


def write_run(folder: Path, *, epochs: int = 3, loss: float = 0.5, drift: bool = False, finished: bool = True,
              steps: int = 5, **config: Any) -> Path:  # fmt: skip
    """Make a run's folder: `steps` step rows and an epoch row in each epoch of 1000 examples."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "argv": ["train.py", str(folder)], **config}))
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        for step in range(1, steps + 1):
            examples = (epoch - 1) * 1000 + step * 1000 // steps
            rows += [{"epoch": epoch, "examples": examples, "step/grad_norm": 1 / step, "step/lr_effective": 0.1}]
        row = {"train/loss": loss / epoch, "train/acc": 0.5, "test/loss": loss, "time/examples_per_s": 1000.0 * epoch}
        row["test/acc"] = 0.9 if epoch == 2 else 0.7 + epoch / 100
        rows += [{"epoch": epoch, "examples": epoch * 1000, **row, **({"audit/replica_drift": 0.25} if drift else {})}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text(json.dumps(rows[-1] if rows else {}))
    return folder


def write_study(out: Path) -> Path:
    """Make twelve runs: reduction x tail x W; the sum's loss is larger."""
    for reduction, tail, world_size in itertools.product(("mean", "sum"), ("drop", "ragged", "spread"), (1, 2)):
        write_run(
            out / f"{reduction}-{tail}-w{world_size}", reduction=reduction, tail=tail, world_size=world_size,
            loss={"mean": 0.5, "sum": 5.0}[reduction], drift=world_size == 2,
        )  # fmt: skip
    return out


def compare(*args: str | Path) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the PNGs undrawn: they take most of the time."""
    monkeypatch.setattr("scripts.compare.__main__.draw", lambda *_: None)


def table_of(text: str) -> list[list[str]]:
    """The table's cells, header first."""
    return [re.split(r"  +", line.strip()) for line in text.split("\n\n")[0].splitlines()]


def data_of(report: Path) -> dict[str, Any]:
    """The curves in report.html."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', report.read_text(encoding="utf-8"))
    assert found
    return dict(json.loads(found[1]))


@pytest.mark.usefixtures("undrawn")
def test_the_table_has_what_differs_and_the_last_and_best_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", lr=0.1, run_name="a", notes="first", drift=True)
    b = write_run(tmp_path / "b", lr=0.0004, run_name="b", notes="second", loss=5.0, versions={"torch": "2.16.0"})
    compare(a, b, "--to", tmp_path / "to")
    assert table_of(capsys.readouterr().out) == [
        ["run", "lr", "versions.torch", "train loss", "test acc", "best test acc", "max drift", "examples/s"],
        ["a", "0.1", "2.15.0", "0.1667", "0.7300", "0.9000", "0.25", "2,000"],
        ["b", "0.0004", "2.16.0", "1.667", "0.7300", "0.9000", "-", "2,000"],
    ]


def test_the_weights_hash_stands_last_where_a_run_has_one(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    (runs[0] / "summary.json").write_text(json.dumps({"weights_sha256": "0123456789ab" + "c" * 52}))
    assert [row[-1] for row in tabulate([], read_runs(runs))] == ["weights", "0123456789ab", "-"]


def test_a_key_that_only_some_runs_have_tells_them_apart(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "old"), write_run(tmp_path / "new", audit_every=10)])
    assert differing(runs) == ["audit_every"]
    assert {value: [run.name for run in members] for value, members in grouped(runs, "audit_every").items()} == {
        "10": ["new"],
        "not in its config": ["old"],
    }


def test_groups_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / str(lr), lr=lr) for lr in (0.1, 1e-5, 10.0, 0.02)])
    assert list(grouped(runs, "lr")) == ["1e-05", "0.02", "0.1", "10"]


def test_a_table_too_wide_for_the_terminal_goes_on_below() -> None:
    table = [["run", "reduction", "train loss"], ["a", "mean", "0.5"], ["b", "sum", "nan"]]
    assert (
        in_blocks(table, 80) == "run  reduction  train loss\na    mean              0.5\nb    sum               nan\n"
    )
    assert in_blocks(table, 20) == (
        "run  reduction\na    mean\nb    sum\n\nrun  train loss\na           0.5\nb           nan\n"
    )


@pytest.mark.usefixtures("undrawn")
def test_a_study_is_found_by_its_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "mine", group="tails")
    write_run(tmp_path / "runs" / "other", group="ranks")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.json").write_text("{")
    (tmp_path / "runs" / "no-run").mkdir()
    compare("--group", "tails", "--out", tmp_path / "runs", "--to", tmp_path / "to")
    out, err = capsys.readouterr()
    assert [row[0] for row in table_of(out)] == ["run", "mine"]
    assert err.startswith("left out:") and "broken" in err and err.count("\n") == 1
    assert "<h1>tails: 1 run</h1>" in (tmp_path / "to" / "report.html").read_text()


def test_runs_of_one_name_in_two_places_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "same") for place in ("x", "y")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == [str(folder) for folder in folders]


@pytest.mark.usefixtures("undrawn")
def test_the_report_is_kept_by_the_name_of_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"), group="../mean/sum")
    compare("--group", "../mean/sum")
    compare("runs/a")
    assert [str(path) for path in sorted(Path().rglob("report.html"))] == [
        "comparison/-mean-sum/report.html",
        "comparison/report.html",
    ]


@pytest.mark.usefixtures("undrawn")
def test_an_unfinished_run_is_compared_as_far_as_it_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = write_run(tmp_path / "killed", epochs=2, finished=False)
    with (killed / "metrics.jsonl").open("a") as rows:
        rows.write('{"epoch": 3, "examples": 3000, "train/lo')
    early = write_run(tmp_path / "early", epochs=0, finished=False)
    (early / "metrics.jsonl").unlink()
    compare(killed, early, "--to", tmp_path / "to")
    _, *rows_ = table_of(capsys.readouterr().out)
    assert rows_ == [
        ["killed (unfinished)", "0.2500", "0.9000", "0.9000", "1,500"],
        ["early (unfinished)", "-", "-", "-", "-"],
    ]


def test_rows_that_a_resumed_run_wrote_again_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "resumed")
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"epoch": 3, "examples": 3000, "train/loss": 0.125}\n')
    (run,) = read_runs([folder])
    assert [x for x, _ in run.curves["train/loss"]] == [1000, 2000, 3000]
    assert run.curves["train/loss"][-1] == (3000, 0.125)


@pytest.mark.usefixtures("undrawn")
def test_a_loss_that_is_not_finite_is_said_and_breaks_the_curve_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "diverged")
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"epoch": 4, "examples": 4000, "train/loss": "inf"}\n')
        rows.write('{"epoch": 5, "examples": 5000, "train/loss": "nan"}\n')
    compare(folder, "--to", tmp_path / "to")
    assert table_of(capsys.readouterr().out)[1][1] == "nan"
    xs, ys = data_of(tmp_path / "to" / "report.html")["runs"][0]["curves"]["train/loss"]
    assert xs == [1000, 2000, 3000, 4000, 5000]
    assert ys[-2:] == [None, None] and None not in ys[:-2]


def test_a_panel_without_data_is_left_out_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, to = write_run(tmp_path / "a"), tmp_path / "to"
    to.mkdir()
    (to / "audit-replica_drift.png").touch()  # of an earlier comparison
    compare(run, "--to", to)
    assert capsys.readouterr().out.count("audit/replica_drift") == 1
    assert 'data-metric="audit/replica_drift"' not in (to / "report.html").read_text()
    drawn = {f"{panel.key.replace('/', '-')}.png" for panel in PANELS if panel.key != "audit/replica_drift"}
    assert {path.name for path in to.iterdir()} == {"report.html", *drawn}


@pytest.mark.usefixtures("undrawn")
def test_a_section_is_there_if_its_key_tells_the_runs_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / tail, tail=tail) for tail in ("pad", "drop")]
    compare(*runs, "--to", tmp_path / "to")
    titles = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "to" / "report.html").read_text())
    assert titles == ["Tails: who gets the last batch", "All curves"]


def test_twelve_runs_take_less_than_ten_seconds_and_no_torch(tmp_path: Path) -> None:
    write_study(tmp_path / "runs")
    program = "import sys; from scripts.compare.__main__ import main; main(); assert 'torch' not in sys.modules"
    flags = ["--group", "study", "--out", str(tmp_path / "runs"), "--to", str(tmp_path / "to")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10  # of the processor: others may share it


class Loads(HTMLParser):
    """Collects what a page would load, and counts its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


@pytest.mark.usefixtures("undrawn")
def test_the_report_is_one_file_below_6_mb_however_long_the_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{i}", seed=i, steps=1000, epochs=4, drift=True) for i in range(12)]
    compare(*runs, "--to", tmp_path / "to")
    html = (tmp_path / "to" / "report.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 6e6
    page = Loads()
    page.feed(html)
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert page.scripts == 3  # the data, plotly.js once, and what draws
    style_ = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style_ and "@import" not in style_


def test_a_thinned_curve_keeps_its_ends_its_spikes_and_what_is_not_finite() -> None:
    curve = [(float(x), 1.0 + x % 2) for x in range(10_000)]
    curve[1234], curve[5678], curve[9000] = (1234.0, -50.0), (5678.0, 99.0), (9000.0, float("inf"))
    thinned = thin(curve, 100)
    assert len(thinned) <= 104
    assert thinned == sorted(thinned)
    assert {curve[0], curve[1234], curve[5678], curve[9000], curve[-1]} <= set(thinned)
    assert thin(curve[:50], 100) == curve[:50]


@pytest.mark.usefixtures("undrawn")
def test_words_of_a_config_cannot_break_the_page(tmp_path: Path) -> None:
    words = "</script><script>alert(1)</script>"
    runs = [write_run(tmp_path / "a", group=words), write_run(tmp_path / "b", group="@DATA@ & <i>")]
    compare(*runs, "--to", tmp_path / "to")
    html = (tmp_path / "to" / "report.html").read_text(encoding="utf-8")
    assert words not in html
    assert data_of(tmp_path / "to" / "report.html")["keys"]["group"] == sorted([words, "@DATA@ & <i>"])


def test_formulas_are_mathml_and_code_is_code() -> None:
    for section in SECTIONS:
        words = re.sub(r"<[^>]*>", "", to_html(section.text))
        assert not set("$`\\{}_^") & set(words.replace("world_size", "")), words
    html = to_html("so $\\frac{1}{n_r}$ & `a`")
    assert html.startswith("so <math ") and html.endswith("</math> &amp; <code>a</code>")
    frac = ElementTree.fromstring(html[len("so ") : html.index(" &amp;")])
    tags = [each.tag.rpartition("}")[2] for each in frac.iter()]
    assert " ".join(tags) == "math mrow mfrac mrow mn mrow msub mi mi"
    assert "".join(frac.itertext()) == "1nr"


def test_forty_eight_groups_look_different() -> None:
    assert len({style(group) for group in range(48)}) == 48


def test_the_pictures_are_a_thousand_pixels_wide(tmp_path: Path) -> None:
    compare(write_study(tmp_path / "runs") / "mean-drop-w1", "--color-by", "run", "--to", tmp_path / "to")
    for png in (tmp_path / "to").glob("*.png"):
        width, height = struct.unpack(">II", png.read_bytes()[16:24])
        assert width == 1000 and 600 < height < 800, png


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_compared_is_named_and_the_rest_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        '{"examples": 1, "train/loss": 4.0}',
        '{"exam',
        f'{{"examples": {10**400}}}',
        '{"examples": 2, "train/loss": 2.0}',
    ]
    write_run(Path("runs/a")).joinpath("metrics.jsonl").write_text("\n".join(rows) + "\n")
    write_run(Path("runs/b"), lr=9e37, finished=False)
    Path("runs/b/failed.json").write_text(json.dumps({"reason": "the loss is nan", "step": 3}))
    for name, of_run in (("c", "summary.json"), ("d", "failed.json")):
        write_run(Path("runs", name)).joinpath(of_run).write_text("[1")
    Path("runs/study-w1.log").write_text("a sweep's")
    compare(*sorted(Path("runs").iterdir()))
    out, err = capsys.readouterr()
    broken = "cannot be read (Expecting ',' delimiter: line 1 column 3 (char 2)): leave this run out"
    assert err == (
        "left out: runs/a/metrics.jsonl, line 2: no row of numbers\n"
        "left out: runs/a/metrics.jsonl, line 3: no row of numbers\n"
        f"left out: runs/c/summary.json {broken}\n"
        f"left out: runs/d/failed.json {broken}\n"
        "left out: runs/study-w1.log is no folder: name the folders of runs, such as runs/*-w2-*\n"
    )
    table = table_of(out)
    assert [(row[0], row[2]) for row in table] == [("run", "train loss"), ("a", "2.000"), ("b (failed)", "0.1667")]
    assert "b has failed: the loss is nan." in out


def test_a_name_that_no_encoding_has_breaks_no_comparison(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "caf\udce9", tags=["\udce9"]), write_run(tmp_path / "b")]
    assert compare(*runs, "--to", tmp_path / "to") == 0
    assert r"caf\udce9" in (tmp_path / "to" / "report.html").read_text(encoding="utf-8").replace("\\\\", "\\")


def test_a_legend_shows_names_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def keep_legend(figure: Any, *_: Any, **__: Any) -> None:
        figure.draw_without_rendering()
        shown.append([text.get_text() for text in figure.legends[0].get_texts()])

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep_legend)
    runs = [write_run(tmp_path / "_a", tags=["$x"]), write_run(tmp_path / "b", tags=["_y", "costs $5 or $6"])]
    for key in ("run", "tags"):
        compare(*runs, "--color-by", key, "--to", tmp_path / "to")
    assert ["_a", "b"] in shown
    assert ["$x", "_y, costs $5 or $6"] in shown


BAD = {
    "nothing asked": ([], "name the folders of runs, or give --group"),
    "both asked": (["runs/a", "--group", "study"], "not both"),
    "no such folder": (["runs/b"], "runs/b is no folder"),
    "a folder that is no run": (["runs"], "runs is no run: it has no config.json"),
    "a broken config": (["broken"], "broken/config.json cannot be read"),
    "no such study": (["--group", "nothing"], "--group nothing: none of the 1 run(s) in runs is of this study"),
    "no such out": (["--group", "study", "--out", "elsewhere"], "--out elsewhere is no folder"),
    "no such key": (["runs/a", "--color-by", "colour"], "--color-by colour: no run has this key"),
    "a file in the way": (["runs/a", "--to", "runs/a/config.json"], "--to runs/a/config.json: cannot write there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_that_names_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"))
    write_run(Path("broken")).joinpath("config.json").write_text("{")
    args, message = BAD[case]
    assert compare(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("scripts.compare: error: ") and message in err and err.count("\n") == 1, err


# The page in a browser

WIDE, PHONE = (1440, 900), (390, 844)


class Report:
    """The report of twelve runs, open in a browser; `wrong` collects messages, errors and requests to a network."""

    def __init__(self, browser: Browser, path: Path, size: tuple[int, int]) -> None:
        self.size, self.wrong = size, list[str]()
        small = size == PHONE
        self.page = browser.new_page(
            viewport={"width": size[0], "height": size[1]}, color_scheme="light", is_mobile=small, has_touch=small
        )
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", lambda request: self.wrong.append(request.url))
        self.page.goto(path.as_uri())
        self.wrong.remove(path.as_uri())

    def section(self, name: str) -> Section:
        """Scroll to a section and wait until its plots are drawn."""
        section = Section(self.page.locator(f"#{name}"))
        for plot in section.locator.locator(".plot").all():
            plot.scroll_into_view_if_needed()
            plot.locator("path.js-line").first.wait_for(state="attached")
        return section


@dataclass
class Section:
    """A section of the report. What it shows is read off its first plot."""

    locator: Locator

    @property
    def curves(self) -> Locator:
        return self.locator.locator(".plot >> nth=0 >> path.js-line")

    @property
    def colours(self) -> set[str]:
        return set(self.curves.evaluate_all("lines => lines.map(line => line.style.stroke)"))

    @property
    def legend(self) -> list[str]:
        return self.locator.locator(".legend > button").all_text_contents()

    def button(self, name: str) -> Locator:
        return self.locator.get_by_role("button", name=name, exact=True)


@pytest.fixture(scope="module")
def open_reports(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Report]:
    folder = tmp_path_factory.mktemp("study")
    compare("--group", "study", "--out", write_study(folder / "runs"), "--to", folder / "to")
    return {size: Report(browser, folder / "to" / "report.html", size) for size in (WIDE, PHONE)}


@pytest.fixture(params=[WIDE, PHONE], ids=["wide", "phone"])
def report(open_reports: dict[tuple[int, int], Report], request: pytest.FixtureRequest) -> Iterator[Report]:
    """The report on either screen. Sections do not share state: a test that leaves some behind has one of its own."""
    shown = open_reports[request.param]
    yield shown
    assert not shown.wrong


def test_every_plot_is_drawn_by_the_time_it_is_seen(report: Report) -> None:
    for name in ("mean-against-sum", "tails-who-gets-the-last-batch", "world-sizes", "all-curves"):
        for plot in report.section(name).locator.locator(".plot").all():
            metric = plot.get_attribute("data-metric")
            assert plot.locator("path.js-line").count() == (6 if metric == "audit/replica_drift" else 12), metric


def test_a_click_in_the_legend_hides_a_group_and_another_shows_it(report: Report) -> None:
    section = report.section("mean-against-sum")
    assert section.legend == ["mean (6)", "sum (6)"]
    assert (section.curves.count(), len(section.colours)) == (12, 2)
    section.button("mean (6)").click()
    assert (section.curves.count(), len(section.colours)) == (6, 1)
    assert section.button("mean (6)").get_attribute("aria-pressed") == "false"
    section.button("mean (6)").click()
    assert section.curves.count() == 12


def test_a_click_on_a_single_run_hides_its_curve_in_that_section_only(report: Report) -> None:
    section = report.section("tails-who-gets-the-last-batch")
    section.locator.get_by_text("Show or hide single runs").click()
    section.button("sum-drop-w2").click()
    assert section.curves.count() == 11
    assert report.section("mean-against-sum").curves.count() == 12


def test_a_double_click_shows_a_group_alone(report: Report) -> None:
    section = report.section("world-sizes")
    section.button("2 (6)").dblclick()
    assert section.curves.count() == 6
    assert section.locator.locator(".legend > button[aria-pressed=true]").all_text_contents() == ["2 (6)"]
    section.button("2 (6)").dblclick()
    assert section.curves.count() == 12


def test_another_key_regroups_and_recolours_the_curves(report: Report) -> None:
    section = report.section("all-curves")
    select = section.locator.locator("select")
    select.select_option("tail")
    assert section.legend == ["drop (4)", "ragged (4)", "spread (4)"]
    assert len(section.colours) == 3
    select.select_option("run")
    assert len(section.legend) == 12
    assert len(section.colours) == 8  # and dashes tell apart what has the same colour


def test_a_click_on_a_header_sorts_the_runs(report: Report) -> None:
    losses, header = report.page.locator("tbody td:nth-child(5)"), report.page.get_by_role("button", name="train loss")
    header.click()
    ascending = [float(text) for text in losses.all_text_contents()]
    header.click()
    descending = [float(text) for text in losses.all_text_contents()]
    assert ascending == sorted(descending) and descending == sorted(ascending, reverse=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(report: Report, scheme: Literal["light", "dark"]) -> None:
    report.section("all-curves").locator.locator("select").select_option("run")  # the longest legend
    report.page.emulate_media(color_scheme=scheme)
    width = report.size[0]
    assert report.page.evaluate("document.documentElement.scrollWidth") == width
    right = "all => Math.max(...all.map(each => each.getBoundingClientRect().right))"
    assert report.page.locator("figure, .plot, .legend, p, select").evaluate_all(right) <= width


def test_light_and_dark_are_followed_while_the_page_is_open(report: Report) -> None:
    section = report.section("mean-against-sum")
    seen = []
    for scheme, background in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")):
        report.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        report.page.wait_for_function(f"getComputedStyle(document.body).backgroundColor === '{background}'")
        report.page.wait_for_timeout(200)
        seen.append(section.colours)
    assert len(seen[0]) == len(seen[1]) == 2
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("report", [WIDE], ids=["wide"], indirect=True)
def test_pointing_at_a_curve_shows_its_run_its_group_and_its_value(report: Report) -> None:
    section = report.section("mean-against-sum")
    box = section.locator.locator(".plot >> nth=0 >> .points path").first.bounding_box()
    assert box
    report.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown = section.locator.locator(".hoverlayer .hovertext").first
    shown.wait_for()
    lines = shown.locator("tspan.line").all_text_contents()
    assert re.fullmatch(r"(mean|sum)-\w+-w\d", lines[0])
    assert lines[1] == f"reduction: {lines[0].split('-')[0]}"
    assert re.fullmatch(r"[\d.]+ \S+.*", lines[2]) and re.fullmatch(r"after [\d,]+ examples", lines[3])


@pytest.mark.parametrize("report", [PHONE], ids=["phone"], indirect=True)
def test_a_phone_is_told_that_the_table_scrolls(report: Report) -> None:
    assert report.page.get_by_text("The table scrolls sideways.").is_visible()


@pytest.mark.parametrize("report", [WIDE], ids=["wide"], indirect=True)
def test_a_panel_that_is_0_throughout_is_drawn_from_0_and_no_panel_leaves_a_row_empty(report: Report) -> None:
    page = report.page
    page.evaluate("document.querySelectorAll('.plot').forEach(plot => plot.scrollIntoView())")
    report.section("all-curves")
    lowest = "all => Math.min(...all.filter(p => p._fullLayout && p._fullLayout.yaxis.type === 'linear')"
    assert page.locator(".plot").evaluate_all(f"{lowest}.map(p => p._fullLayout.yaxis.range[0]))") >= 0
    rights = page.locator(".grid > figure:last-child").evaluate_all(
        "all => all.map(each => each.parentElement.getBoundingClientRect().right - each.getBoundingClientRect().right)"
    )
    assert max(rights) < 2


@pytest.mark.parametrize("report", [PHONE], ids=["phone"], indirect=True)
def test_a_finger_on_a_plot_scrolls_the_page(report: Report) -> None:
    page, plot = report.page, report.section("mean-against-sum").locator.locator(".plot").first
    plot.evaluate("plot => plot.scrollIntoView({ behavior: 'instant', block: 'center' })")
    before, box = page.evaluate("scrollY"), plot.bounding_box()
    assert box
    touch = page.context.new_cdp_session(page)
    points = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2 - 20 * i} for i in range(10)]
    for kind, point in zip(["touchStart"] + ["touchMove"] * 9, points, strict=True):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        page.wait_for_timeout(16)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(300)
    assert page.evaluate("scrollY") - before > 100


def test_every_panel_stands_in_a_section() -> None:
    assert {panel for section in SECTIONS for panel in section.panels} == set(PANELS)
