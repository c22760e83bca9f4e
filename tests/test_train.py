"""End to end, as a user starts it, on a slice of the real Fashion-MNIST: the files it leaves are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from loop.config import parse
from loop.nets import make_net
from tests.cases import relative_distance
from tests.launches import LAUNCHES, PYTHON, launch, rows_of

SLICE = ["--dtype", "float64", "--epochs", "2", "--train-examples", "1003", "--batch-size", "128", "--log-every", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """For each way of launching, the run's folder and what it said."""
    finished = {}
    for name, how in LAUNCHES.items():
        out = tmp_path_factory.mktemp("runs")
        done = launch(how, out, *SLICE, "--tail", "ragged")
        assert done.returncode == 0, done.stderr
        (run,) = out.iterdir()
        finished[name] = (run, done.stdout)
    return finished


def test_every_launch_leaves_the_same_weights(runs: dict[str, tuple[Path, str]]) -> None:
    weights = {name: load_file(run / "model.safetensors") for name, (run, _) in runs.items()}
    make_net("softmax").load_state_dict(weights["python"])  # the unwrapped net's names
    for name in LAUNCHES:
        assert relative_distance(weights[name], weights["python"]) < 1e-12, name


def test_every_launch_logs_the_same_rows(runs: dict[str, tuple[Path, str]]) -> None:
    plain = rows_of(runs["python"][0])
    assert [row["step"] for row in plain] == [3, 6, 8, 9, 12, 15, 16]
    assert [row["examples"] for row in plain] == [384, 768, 1003, 1131, 1515, 1899, 2006]
    assert [row["epoch"] for row in plain] == [1, 1, 1, 2, 2, 2, 2]
    for name, (run, _) in runs.items():
        for ours, theirs in zip(rows_of(run), plain, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"step/n_min", "step/n_max"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-12), (name, key)


def test_a_run_leaves_its_folder_complete(runs: dict[str, tuple[Path, str]]) -> None:
    for run, _ in runs.values():
        assert {path.name for path in run.iterdir()} == {
            "config.json", "metrics.jsonl", "summary.json", "curves.png", "model.safetensors", "checkpoints", ".lock",
        }  # fmt: skip
    run, _ = runs["3 ranks"]
    assert run.name == "mean-global-ragged-w3-b128"
    config = json.loads((run / "config.json").read_text())
    assert (config["world_size"], config["cells"], config["steps_per_epoch"], config["lr"]) == (3, 3, 8, 0.1)
    assert config["last_step_sizes"] == [43, 43, 21]
    summary = json.loads((run / "summary.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary == {**last, "skipped_steps": 0}
    assert (last["data/seen"], last["data/duplicated"], last["data/missing"]) == (1003, 0, 0)


def test_a_run_says_what_the_all_reduce_did(runs: dict[str, tuple[Path, str]]) -> None:
    _, said = runs["train.sh, 2 ranks"]
    assert "2 rank(s) on cpu" in said
    sentence = said.splitlines()[-1]
    assert "took 107 example(s) in 2 cells (64, 43), which were averaged: an example weighed 1/n" in sentence
    assert "effective learning rate 0.1 (--lr 0.1)" in sentence


def test_a_second_run_of_the_same_mode_gets_a_name_of_its_own(tmp_path: Path) -> None:
    flags = ["--cpu", "--wandb", "disabled", "--train-examples", "300", "--epochs", "1", "--accumulate", "2"]
    for _ in range(2):
        assert train.train(parse([*flags, "--out", str(tmp_path)])) == 0
    assert {run.name for run in tmp_path.iterdir()} == {"mean-global-spread-w1-b256", "mean-global-spread-w1-b256-2"}


def test_an_out_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to(tmp_path / "not mounted")
    done = launch(LAUNCHES["python"], tmp_path / "scratch")
    assert done.returncode == 2
    assert "cannot make the run's folder" in done.stderr


@pytest.mark.slow  # 7 s
def test_a_launcher_that_starts_fewer_processes_than_asked_is_refused(tmp_path: Path) -> None:
    how = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train.py"]
    done = launch(how, tmp_path)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [False, True])
def test_a_virtual_environment_that_is_not_there_is_named(tmp_path: Path, made: bool) -> None:
    environment = tmp_path / "environment"
    if made:
        environment.mkdir()
    done = launch(LAUNCHES["train.sh, 2 ranks"], tmp_path / "out", VIRTUAL_ENV=str(environment))
    assert done.stderr == (
        f"scripts/train.sh: VIRTUAL_ENV={environment} has no bin/python: unset it, and this script makes its own\n"
    )
    assert (done.returncode, environment.exists()) == (1, made)


def test_bad_flags_stop_train_sh_before_any_rank_starts(tmp_path: Path) -> None:
    done = launch(LAUNCHES["train.sh, 2 ranks"], tmp_path, "--tail", "pad", "--batch-size", "33")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train.py: error: --tail pad needs")
    assert "Traceback" not in done.stderr
