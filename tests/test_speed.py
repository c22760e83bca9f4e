"""What the speed rests on: no step waits for the device, nothing is imported too early; and the bench's figures."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import train
from loop.config import parse
from scripts.bench import __main__ as bench
from scripts.watch import Watch, steps_watched
from tests.forks import Forked
from tests.launches import PYTHON, environment
from tests.ranks import World

TINY = ["--examples", "600", "--rounds", "2", "--slow-rounds", "1", "--workers", "0"]


def test_the_watch_sees_a_number_read() -> None:
    with Watch() as watch:
        watch.arm(True)
        with pytest.raises(AssertionError, match="waits"):
            float(torch.ones(2).sum())
        watch.arm(False)


@pytest.mark.parametrize(
    "flags",
    [[], ["--updater", "scratch"], ["--clip-norm", "1", "--accumulate", "2"], ["--momentum", "0.9"]],
    ids=" ".join,
)
def test_no_step_between_log_steps_waits_for_the_device(flags: list[str], tmp_path: Path) -> None:
    short = ["--train-examples", "700", "--batch-size", "64", "--epochs", "2", "--log-every", "4"]
    with steps_watched() as watch:
        assert train.train(parse([*short, "--wandb", "disabled", "--out", str(tmp_path), *flags])) == 0
    assert watch.seen > 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_taken_anew_page_by_page() -> None:
    code = (
        "import ctypes, resource, sys, torch; from loop.run.launch import keep_freed_memory\n"
        "ctypes.CDLL(None).mallopt(-3, 2**17)\n"  # glibc's threshold, before it adapts to what has been freed
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for i in range(10):\n"
        "    before = faults(); blocks = [torch.ones(2**22) for _ in range(4)]; del blocks\n"  # 16 MiB each
        "print(faults() - before)"
    )
    taken = {}
    for how in ("keep", "plain"):
        taken[how] = int(Forked([PYTHON, "-c", code, how], environment()).communicate()[0])
    assert taken["keep"] < taken["plain"] / 10


def test_the_first_step_needs_no_picture_no_wandb_and_no_torchvision(tmp_path: Path) -> None:
    """And torch._dynamo, which costs over a second, only because torch.optim imports it itself."""
    code = (
        "import os, sys, train; from loop.progress import Progress; from loop.config import parse\n"
        "def end(*_): print(sorted({name.split('.')[0] for name in sys.modules})); sys.stdout.flush(); os._exit(0)\n"
        "Progress.after_cell = end; train.train(parse(sys.argv[1:]))"
    )
    flags = ["--train-examples", "256", "--wandb", "disabled", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()[-1]
    assert "'torch'" in imported
    assert not [name for name in ("matplotlib", "wandb", "IPython", "plotly", "torchvision") if f"'{name}'" in imported]


def flags_of(*words: str) -> bench.Flags:
    return tyro.cli(bench.Flags, args=words)


def timed(net: str, *flags: str) -> bench.Figures:
    """The loops of a net, timed on this rank."""
    return bench.time_loops(flags_of("--time", net, *TINY, *flags))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_bench_times_every_loop_and_splits_a_step(world: Callable[[int], World], world_size: int) -> None:
    figures = world(world_size).run(timed, "softmax")[0]
    seconds = figures["seconds"]
    assert {"bare", "ours", "ours, Accelerate's objects", "Accelerate"} <= set(seconds)
    assert ("book, 0 workers" in seconds) == (world_size == 1)
    assert [len(seconds[name]) for name in ("bare", "ours", "Accelerate")] == [2, 2, 1]
    assert figures["steps"] == 3
    table = bench.loops_in_words(json.loads(json.dumps(figures)))
    assert all(name in table for name in (*seconds, "data", "forward", "all-reduce", "1.00"))


def test_the_bench_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"cost": "audit", "ratio": 1.0}
    monkeypatch.setattr(bench, "in_ranks", lambda world_size, args, *flags: {**figures, "ranks": world_size})
    assert bench.main(["--parts", "costs", "--json", str(tmp_path / "bench.json")]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [cost["ranks"] for cost in written["costs"]] == [2, 1, 1, 2, 2]
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["device"] and written["cores"] and written["device"] in capsys.readouterr().out


@pytest.mark.parametrize("world_sizes", [[], ["--world-sizes", "1"]])
def test_what_needs_more_gpus_than_there_are_is_left_out_and_named(
    world_sizes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[tuple[int, str]] = []

    def measured(world_size: int, args: Any, what: str, name: str, *flags: str) -> bench.Figures:
        launched.append((world_size, name))
        return {"loop": name, "world_size": world_size, "mb": [2], "mb_before": [1]}

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench, "in_ranks", measured)
    monkeypatch.setattr(bench, "startup", lambda args: {f"{[*filter(args.fits, args.world_sizes)]}": [1.0]})
    monkeypatch.setattr(bench, "loops_in_words", lambda figures: "")
    assert bench.main(["--device", "cuda", "--json", str(tmp_path / "bench.json"), *world_sizes]) == 0
    loops, memory, costs = ("softmax", "mlp", "lenet"), ("bare", "ours"), ("checkpoint", "wandb")
    assert launched == [(1, name) for name in (*loops, *memory, *costs)]
    left_out = [] if world_sizes else ["loops, memory, startup on 2 ranks"]
    left_out += [f"the cost of {name} on 2 ranks" for name in ("audit", "global", "virtual-ranks")]
    said = capsys.readouterr().out
    assert f"left out, as there are too few GPUs: {'; '.join(left_out)}\n" in said
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["left_out"] == left_out
    assert written["startup"] == {"[1]": [1.0]}


def test_a_cost_is_a_ratio_with_its_interval() -> None:
    assert bench.interval([[1.1, 2.2, 3.3], [1.0, 2.0, 3.0]]) == pytest.approx((1.1, 1.1, 1.1))
    ratio, low, high = bench.interval([[1.0, 2.0] * 16, [1.0, 1.0] * 16])
    assert ratio == pytest.approx(2**0.5)
    assert low < ratio < high
    assert ratio / low == pytest.approx(high / ratio) == pytest.approx(1.1354, rel=1e-3), "t = 2.0395 at 31"


@pytest.mark.parametrize("name", ["checkpoint", pytest.param("audit", marks=pytest.mark.slow)])  # 10 s
def test_a_cost_comes_from_pairs_of_runs(capsys: pytest.CaptureFixture[str], name: str) -> None:
    figures = bench.cost(flags_of("--cost", name, "--pairs", "5", "--examples", "600"))
    assert [len(side) for side in figures["seconds"]] == [5, 5]
    assert all(seconds > 0 for side in figures["seconds"] for seconds in side)
    assert (name == "audit") == ("--audit-every 1" in capsys.readouterr().out)
    if name == "checkpoint":
        assert figures["ratio"] > 1
