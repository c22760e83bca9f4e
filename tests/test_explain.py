"""The explanation: its figures by brute force, its text for the book's defaults, its speed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

from loop.config import Config
from loop.effect import divisors, effect
from loop.shards import Shards
from scripts.explain import distributed_sampler, explain, main, modes


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--world-size", "0"], "world_size must be at least 1, got 0"),
        (["--lr", "0"], "--lr 0 must be a finite number above 0"),
        (["--lr", "nan"], "--lr nan must be a finite number above 0"),
        (["--png", "."], "[Errno 21] Is a directory: '.'"),
    ],
)
def test_bad_flags_get_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert capsys.readouterr().err == f"scripts.explain: error: {says}\n"


def test_a_billion_examples_are_explained_in_a_moment_and_the_samplers_batches_are_named() -> None:
    began = time.perf_counter()
    text = explain(10**9, 256, 6, 1, 0.1)
    assert time.perf_counter() - began < 1
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
