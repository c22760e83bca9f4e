"""The explanation: its figures by brute force, its text for the book's defaults, its speed; its page in a browser."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

from loop.config import Config
from loop.effect import divisors, effect, example_weights
from loop.shards import Shards, Tail
from scripts.explain import distributed_sampler, explain, main, modes

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, PHONE = (1280, 844), (390, 844)


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 9))
def test_distributed_sampler_is_torchs(examples: int, share: int, world_size: int) -> None:
    last, twice = distributed_sampler(examples, share * world_size, world_size)
    seen: list[int] = []
    for rank in range(world_size):
        sampler = DistributedSampler(range(examples), world_size, rank, shuffle=False)
        batches = list(BatchSampler(sampler, share, drop_last=False))
        assert last[rank] == len(batches[-1])
        seen += [i for batch in batches for i in batch]
    assert twice == len(seen) - len(set(seen))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 3), st.sampled_from(["spread", "ragged"]))
def test_effects_are_those_of_the_examples_one_by_one(
    examples: int, world_size: int, accumulate: int, tail: str
) -> None:
    """Every example's gradient is a unit vector of its own, so the step shows each weight bare."""
    shards = Shards(examples, 64, world_size, accumulate, tail)
    sizes, cells = shards.steps[-1].sizes, shards.cells
    for mode in modes(Config(lr=1.0)):
        weights = []
        for size in sizes:
            for _ in range(size):
                in_cell = {("mean", "rank"): 1 / size, ("mean", "global"): cells / examples, ("sum", "rank"): 1.0}
                in_step = in_cell.get((mode.reduction, mode.normalize), cells) / cells
                divisor = divisors(mode, sizes, world_size)[0]
                weights.append(in_step / divisor if divisor else 0.0)
        ours = effect(mode, sizes, world_size)
        assert ours.lightest == pytest.approx(min(weights) * examples, rel=1e-12)
        assert ours.heaviest == pytest.approx(max(weights) * examples, rel=1e-12)
        assert ours.length == pytest.approx(sum(weights), rel=1e-12)
        last_of_ranks = {sizes[(accumulate - 1) * world_size + rank] for rank in range(world_size)}
        by_rank = mode.updater == "scratch" and mode.normalize == "rank"
        drifts = len(last_of_ranks if mode.reduction == "sum" else {bool(n) for n in last_of_ranks}) > 1
        assert ours.drifts == (by_rank and drifts)


def test_the_books_defaults_over_eight_ranks() -> None:
    text = explain(60_000, 256, 8, 1, 0.1)
    table = text.split("\n\n")
    assert table[0].startswith("60000 examples in batches of 256: 235 steps; the last has 96.")
    assert [line.split(maxsplit=4) for line in table[1].splitlines()[1:4]] == [
        ["spread", "0", "0", "0", "8 x 12"],
        ["ragged", "0", "0", "5", "3 x 32, 5 x 0"],
        ["pad", "160", "0", "0", "8 x 32"],
    ]
    assert table[1].splitlines()[4].split()[:4] == ["drop", "0", "96", "0"]
    assert Shards(60_000, 256, 8, tail="drop").step_count == 234
    ragged = next(part for part in table if part.startswith("--tail ragged"))
    assert "mean, rank                               0.375/n        0.375        0.0375  agree" in ragged
    assert "sum, rank, scratch                       0.375/n        0.375        0.0375  drift apart" in ragged
    assert table[-1] == (
        "Dealt by DistributedSampler, all ranks hold equally many examples in every step: a mean by rank is right, "
        "and no example counts twice. Dealt by --tail ragged, it gives an example 0.375/n, and a step 0.375 times the "
        "mean's; --normalize global gives 1/n under every tail. A sum by rank is divided by the 8 cell(s)."
    )


@pytest.mark.parametrize("world_size", ["8", "4096"])
def test_it_answers_at_once_and_without_torch(world_size: str) -> None:
    code = "import sys; from scripts.explain import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, "--world-size", world_size], check=True, capture_output=True)
    assert time.monotonic() - began < 2


def test_the_cells_are_drawn(tmp_path: Path) -> None:
    assert main(["--world-size", "3", "--examples", "1000", "--png", str(tmp_path / "cells.png")]) == 0
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")


def test_a_billion_examples_are_explained_in_a_moment_and_the_samplers_batches_are_named() -> None:
    began = time.process_time()
    text = explain(10**9, 256, 6, 1, 0.1)
    assert time.process_time() - began < 1
    assert "3906250 steps; the last has 256" in text  # 10^9 = 3,906,250 x 256
    assert re.search(r"^DistributedSampler .*\(in batches of 42 a rank\)$", text, re.MULTILINE)  # 256 = 6 x 42 + 4
    assert "a rank)" not in explain(60_000, 256, 8, 1, 0.1)


def test_virtual_ranks_are_the_shares_of_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--examples 3001 --batch-size 256 --virtual-ranks 8"
    for world_size, mine in ((1, "0, 1, 2, 3, 4, 5, 6, 7"), (2, "0, 2, 4, 6"), (8, "0")):
        assert main([*words.split(), "--world-size", str(world_size)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].endswith(f"{world_size} rank(s) x {8 // world_size} micro-batch(es) = 8 cell(s).")
        assert said[1].endswith("the last step has 8 shares, of 24, 7 x 23 examples;"), "185 = 24 + 7 * 23"
        assert said[2].startswith(f"rank 0 has the shares {mine}. Each")
    assert main([*words.split(), "--world-size", "3"]) == 2
    assert "--virtual-ranks 8: 3 ranks do not divide 8: start one of 1, 2, 4, 8" in capsys.readouterr().err


# The page in a browser


class Opened:
    """The page, opened from disk; `wrong` collects messages, errors and requests to a network."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page, self.address, self.wrong = page, path.as_uri(), list[str]()
        page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("request", lambda request: self.wrong.append(request.url))
        self.set("")

    def set(self, fragment: str) -> None:
        """Open a link to these settings, as if for the first time."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}#{fragment}")
        self.wrong = [wrong for wrong in self.wrong if wrong.split("#")[0] not in ("about:blank", self.address)]

    def figure(self, name: str) -> str:
        """Return what stands below a heading, such as "Idle ranks"."""
        return self.page.locator("#figures div", has_text=name).locator("dd").inner_text()

    @property
    def rows(self) -> list[str]:
        """What a screen reader says of each rank."""
        rows = self.page.locator("#ranks [role=img]").all()
        return [row.get_attribute("aria-label") or "" for row in rows]


@pytest.fixture(params=[WIDE, PHONE], ids=["wide", "phone"])
def opened(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    """The page of N = 897, W = 4, batches of 256."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    path = tmp_path / "explain.html"
    assert main(["--examples", "897", "--world-size", "4", "--html", str(path)]) == 0
    opened = Opened(page, path)
    yield opened
    assert opened.wrong == []
    page.close()


def last_step(n_all: int, batch_size: int, world_size: int, accumulate: int, tail: str) -> dict[str, Any] | None:
    """Return the sizes and copies of the last step's cells and the epoch's census, by Python; None: refused."""
    if tail == "sampler":
        each, share = -(-n_all // world_size), max(1, batch_size // world_size)
        capacity, cells = -(-share // accumulate), []
        for k in range(accumulate):  # positions at or past N are the sampler's copies; rank r has r, r + W, ...
            for rank in range(world_size):
                last = range(rank, each * world_size, world_size)[(each - 1) // share * share :]
                cells.append(last[k * capacity : (k + 1) * capacity])
        duplicated, missing = each * world_size - n_all, 0
    else:
        try:
            shards = Shards(n_all, batch_size, world_size, accumulate, tail)  # type: ignore[arg-type]
        except ValueError:
            return None
        step = shards.last_step
        cells = [range(step.start + a, step.start + b) for a, b in itertools.pairwise(step.offsets)]
        _, duplicated, missing = shards.census
    copies = [sum(position >= n_all for position in cell) for cell in cells]
    return {"sizes": [len(c) for c in cells], "copies": copies, "duplicated": duplicated, "missing": missing}


@pytest.mark.parametrize("opened", [WIDE], indirect=True, ids=["wide"])
def test_the_pages_arithmetic_is_pythons(opened: Opened) -> None:
    """21,600 cases: every way of dealing out, and every mode of each."""
    sizes = itertools.product(
        (1, 2, 3, 7, 64, 65, 100, 127, 129, 255, 897, 60_000), (1, 3, 4, 12, 64, 100), (1, 2, 3, 4, 7), (1, 2, 3)
    )
    plans = [(*size, tail) for size in sizes for tail in (*get_args(Tail), "sampler")]
    config = Config(lr=0.1)
    chosen = [mode for mode in modes(config) if mode.updater == "torch"]
    told = [plans, [{"reduction": m.reduction, "normalize": m.normalize, "lr": m.learning_rate} for m in chosen]]
    answer = opened.page.evaluate(  # of texts: playwright takes 7 s for the same objects
        """told => {
            const [plans, modes] = JSON.parse(told);
            return JSON.stringify(plans.map(([N, B, W, K, tail]) => {
                const { refused, ...step } = lastStep({ N, B, W, K, tail });
                return refused ? null : { ...step, effects: modes.map(mode => effect(mode, step.sizes)) };
            }));
        }""",
        json.dumps(told),
    )
    theirs = json.loads(answer)
    refused = 0
    for plan, their in zip(plans, theirs, strict=True):
        ours = last_step(*plan)
        if ours is None:
            assert their is None, plan
            refused += 1
            continue
        assert {key: their[key] for key in ours} == ours, plan
        n = sum(ours["sizes"])
        for mode, got in zip(chosen, their["effects"], strict=True):
            of_cells = example_weights(mode.reduction, mode.normalize, ours["sizes"])
            expected = [weight * n for weight, size in zip(of_cells, ours["sizes"], strict=True) if size]
            expected += effect(mode, ours["sizes"], plan[2])[2:4]
            assert [weight is None for weight in got["weights"]] == [size == 0 for size in ours["sizes"]], plan
            figures = [w for w in got["weights"] if w is not None] + [got["length"], got["lrEffective"]]
            assert all(map(partial(math.isclose, rel_tol=1e-12), figures, expected)), (plan, mode, figures, expected)
    assert len(plans) * len(chosen) == 21_600 and 0 < refused < len(plans) / 2


def test_the_page_shows_the_step_of_its_settings(opened: Opened) -> None:
    """129 = 64 + 64 + 1 + 0: a mean by rank counts a rank's examples 129 / (4 x 64) and 129 / 4 times."""
    assert opened.rows == ["64 examples of weight 0.504"] * 2 + ["1 example of weight 32.3", "empty"]
    assert opened.figure("Weight") == "0.504 to 32.3"
    assert (opened.figure("Step / the mean's"), opened.figure("Effective learning rate")) == ("0.75", "0.075")
    assert opened.figure("Idle ranks") == "1"
    assert "hangs" in opened.page.locator("#advice").inner_text()


def test_a_framework_is_a_preset_and_the_address_keeps_it(opened: Opened) -> None:
    page = opened.page
    page.get_by_label("Framework").select_option("This project")
    assert opened.rows == ["33 examples of weight 1"] + ["32 examples of weight 1"] * 3
    assert "tail=spread&reduction=mean&normalize=global" in page.url
    page.get_by_label("Framework").select_option("Accelerate, its default")
    assert opened.rows[2:] == ["64 examples of weight 1, 63 seen before", "64 examples of weight 1, 64 seen before"]
    assert opened.figure("Copies in the epoch") == "127"
    page.get_by_label("Framework").select_option("DDP with DistributedSampler")
    assert opened.figure("Copies in the epoch") == "3"  # 4 x 225 - 897
    page.get_by_label("Reduction").select_option("sum")
    assert page.get_by_label("Framework").evaluate("select => select.selectedOptions[0].text").startswith("none")


def test_a_link_restores_its_settings_and_nonsense_in_it_is_ignored(opened: Opened) -> None:
    opened.set("N=10&B=4&W=2&K=1&lr=0.5&tail=ragged&reduction=sum&normalize=rank")
    assert opened.rows == ["2 examples of weight 1", "empty"]  # each weighs 1 / 2, of n = 2
    assert opened.figure("Effective learning rate") == "0.5"
    opened.set("N=-5&B=x&W=1e9&K=&lr=nan&tail=toString&reduction=%3Cb%3E")
    assert opened.rows[2] == "1 example of weight 32.3"  # as at first
    opened.page.evaluate("location.hash = 'W=3&tail=pad'")  # a link followed on the page itself
    opened.page.wait_for_function("document.getElementById('tail').value === 'pad'")
    assert opened.page.locator("#advice").inner_text().endswith("take 255 or 258 in place of 256.")
    assert opened.page.locator("#ranks").is_hidden()


def test_the_keyboard_moves_every_slider_by_one_at_least(opened: Opened) -> None:
    page = opened.page
    for key in "NBWK":
        page.locator(f"#{key}-slider").focus()
        before = int(page.locator(f"#{key}").input_value())
        page.keyboard.press("ArrowRight")
        after = int(page.locator(f"#{key}").input_value())
        assert after > before
        assert f"{key}={after}" in page.url
    opened.set("N=1&B=1&W=1&K=1")
    for key in "NBWK":
        page.locator(f"#{key}-slider").focus()
        for arrow, expected in zip(["Right"] * 3 + ["Left"] * 3, "234321", strict=True):
            page.keyboard.press(f"Arrow{arrow}")
            assert page.locator(f"#{key}").input_value() == expected


def test_nothing_is_wider_than_the_screen_and_boxes_are_as_wide_as_their_examples(opened: Opened) -> None:
    for fragment in ("", "W=64&K=16&B=8192&N=1000000", "W=5&K=3&tail=ragged&N=100&B=90&reduction=sum&normalize=global"):
        opened.set(f"{fragment}&a=1")
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), fragment
        overflow = "rows => rows.filter(row => row.scrollWidth > row.clientWidth + 1).length"
        assert opened.page.locator(".cells").evaluate_all(overflow) == 0, fragment
    opened.set("N=96&B=64&W=3&tail=ragged")  # 32 = 22 + 10 + 0; an empty box is as wide as the widest
    widths = opened.page.locator(".cell").evaluate_all("boxes => boxes.map(box => box.offsetWidth)")
    assert widths == pytest.approx([widths[0], widths[0] * 10 / 22, widths[0]], abs=3)
