"""The sweep: the whole product, one launch a world size, nothing trained twice, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loop.config import InputError, parse
from scripts.sweep import grid, is_finished, plan
from tests.launches import kill, launch, rows_of, start, wait_for_rows

SWEEP = [sys.executable, "-m", "scripts.sweep", "--group", "g"]
FLAGS = ["--epochs", "1", "--train-examples", "300", "--dtype", "float64", "--tail", "ragged"]


def sweep(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return launch([*SWEEP, *FLAGS], out, *flags)


def test_a_grid_is_the_product_of_the_flags_values() -> None:
    choices = grid(["--reduction", "mean", "sum", "--cpu", "--lr", "0.1", "1", "--tags", "a", "b", "--epochs", "2"])
    assert choices == [
        {"--reduction": [reduction], "--cpu": [], "--lr": [lr], "--tags": ["a", "b"], "--epochs": ["2"]}
        for reduction in ("mean", "sum")
        for lr in ("0.1", "1")
    ]
    with pytest.raises(InputError, match="what flag does this belong to"):
        grid(["stray", "--epochs", "2"])


def test_runs_are_named_after_what_varies(tmp_path: Path) -> None:
    runs = plan(["--out", str(tmp_path), "--reduction", "mean", "sum", "--seed", "1", "2"], [1, 2], "g")
    assert [run.folder.name for run in runs] == [
        f"g-{reduction}-global-spread-w{ranks}-b256-seed{seed}"
        for ranks in (1, 2)
        for reduction in ("mean", "sum")
        for seed in (1, 2)
    ]
    assert all(run.config.group == "g" for run in runs)


def test_runs_with_virtual_ranks_have_the_number_of_ranks_in_their_names(tmp_path: Path) -> None:
    runs = plan(["--out", str(tmp_path), "--virtual-ranks", "0", "8"], [1, 2], "g")
    names = [run.folder.name.removeprefix("g-mean-global-spread-") for run in runs]
    assert names == ["w1-b256", "v8-b256-w1", "w2-b256", "v8-b256-w2"]
    assert len({run.launch_key for run in runs}) == 4, "cuBLAS is set up once a process"


def test_axes_that_share_values_do_not_share_names(tmp_path: Path) -> None:
    runs = plan(["--out", str(tmp_path), "--seed", "1", "2", "--accumulate", "1", "2"], [1], "g")
    assert len({run.folder for run in runs}) == 4


def test_runs_of_another_precision_get_a_launch_of_their_own(tmp_path: Path) -> None:
    runs = plan(["--out", str(tmp_path), "--mixed-precision", "no", "bf16"], [1], "g")
    assert len({run.launch_key for run in runs}) == 2


def test_a_run_that_was_gone_on_with_by_hand_is_still_the_studys(tmp_path: Path) -> None:
    (run,) = plan(["--out", str(tmp_path)], [1], "g")
    run.folder.mkdir()
    (run.folder / "summary.json").write_text("{}")
    config = run.folder / "config.json"
    config.write_text(json.dumps({"argv": ["train.py", *run.line, "--resume", "auto", "--log-every", "7"]}))
    assert is_finished(run)
    config.write_text(json.dumps({"argv": ["train.py", *run.line, "--lr", "2"]}))
    with pytest.raises(InputError, match="was made with another lr"):
        is_finished(run)


@pytest.mark.slow  # 15 s
def test_a_sweep_trains_each_run_once_and_a_second_call_none(tmp_path: Path) -> None:
    flags = ["--world-size", "1", "2", "--reduction", "mean", "sum"]
    done = sweep(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in tmp_path.glob("*/summary.json"))
    assert [run.name for run in runs] == [f"g-{r}-global-ragged-w{w}-b256" for r in ("mean", "sum") for w in (1, 2)]
    assert all(json.loads((run / "config.json").read_text())["group"] == "g" for run in runs)
    for one, two in (runs[:2], runs[2:]):
        assert rows_of(one)[-1]["train/loss"] == pytest.approx(rows_of(two)[-1]["train/loss"], rel=1e-9)
    times = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    assert sweep(tmp_path, *flags).returncode == 0
    assert times == [(run / "summary.json").stat().st_mtime_ns for run in runs]
    changed = sweep(tmp_path, *flags, "--seed", "1")
    assert changed.returncode == 2
    assert "was made with another seed" in changed.stderr


@pytest.mark.slow  # 8 s, 12 s
@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_run_that_diverges_is_recorded_and_the_others_are_trained(tmp_path: Path, world_size: str) -> None:
    flags = ["--dtype", "float32", "--reduction", "sum", "--lr", "9e37", "1e-4", "--world-size", world_size]
    done = sweep(tmp_path, *flags)
    assert done.returncode == 1
    bad, good = (tmp_path / f"g-sum-global-ragged-w{world_size}-b256-lr{lr}" for lr in ("9e37", "1e-4"))
    reason = json.loads((bad / "failed.json").read_text())["reason"]
    assert reason.startswith("the loss is nan") and reason.endswith("; ended after step 2"), "a whole sentence"
    assert not (bad / "summary.json").exists()
    assert (good / "summary.json").exists() and not (good / "failed.json").exists()
    said = f"scripts.sweep: {bad} has failed: {reason}\n"
    assert done.stderr.endswith(said)
    ended = (bad / "failed.json").stat().st_mtime_ns
    again = sweep(tmp_path, *flags)
    assert again.returncode == 1 and again.stderr.endswith(said)
    assert (bad / "failed.json").stat().st_mtime_ns == ended, "it is not trained for ever"


@pytest.mark.slow  # 15 s
def test_an_interrupted_sweep_goes_on_and_puts_the_torn_run_aside(tmp_path: Path) -> None:
    flags = ["--reduction", "mean", "sum", "--net", "lenet", "--train-examples", "3000", "--epochs", "2"]
    process = start([*SWEEP, *flags], tmp_path)
    wait_for_rows(process, tmp_path, 0, run="g-sum*")
    kill(process)
    assert not list(tmp_path.glob("g-sum*/summary.json"))
    done = launch([*SWEEP, *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("g-*/summary.json"))) == 2
    assert len(list((tmp_path / ".unfinished").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "256", "0"], "--batch-size 0 must be at least 1"),
        (["--world-size", "3", "--tail", "pad"], "--tail pad needs"),
        (["--group", "a b/c"], "must be a plain name"),
    ],
)
def test_a_grid_with_a_bad_run_is_refused_whole(tmp_path: Path, flags: list[str], message: str) -> None:
    done = launch([*SWEEP, *flags], tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_wandb_sweep_names_flags_that_exist_with_values_they_take() -> None:
    settings = yaml.safe_load(Path("scripts/sweep.yaml").read_text())
    for name, given in settings["parameters"].items():
        for value in given.get("values", [given.get("value")]):
            assert getattr(parse([f"--{name}", str(value)]), name) == value
    assert {"accelerate", "launch", "${program}", "${args}"} <= set(settings["command"])
