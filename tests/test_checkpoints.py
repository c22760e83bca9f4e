"""A run that was cut off goes on as if it had not been: weights, rows and order bit for bit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import train
from loop.animator import Animator
from loop.config import InputError, parse
from loop.nets import make_net
from loop.run import checkpoints, folder
from loop.run.checkpoints import Checkpoints
from loop.run.folder import open_run
from loop.run.resume import STATE, command_to_go_on, find_flaw, newest, with_kept_flags
from tests.cases import relative_distance, toy_split
from tests.launches import rows_of
from tests.ranks import World

Worlds = Callable[[int], World]
# 5 steps an epoch, the last of 6 examples; checkpoints after steps 2, 4, 5, 6, 8, 10
SMALL = "--train-examples 70 --batch-size 16 --epochs 2 --log-every 3 --checkpoint-every 2 --wandb disabled --cpu"


@pytest.fixture(autouse=True)
def dataset(tmp_path: Path) -> None:
    """A set of 71 images to train on and 9 to test, read in no time."""
    for half, n in (("train", 71), ("t10k", 9)):
        images, labels = toy_split(n)[:2]
        header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (tmp_path / f"{half}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = bytes([0, 0, 8, 1]) + n.to_bytes(4, "big")
        (tmp_path / f"{half}-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())


class Crash(BaseException):
    """Stands for a kill: nobody expects it, and nothing is saved on its way."""


def run_here(flags: str, out: Path, crash_at: int = 0) -> tuple[int, str]:
    """Train on this rank, or crash after a step, on all ranks alike; return exit code and what was said."""
    after_cell = Checkpoints.after_cell

    def until_crash(observer: Checkpoints, cell: Any, *sums: Any) -> None:
        after_cell(observer, cell, *sums)
        if cell.last and observer.progress.step == crash_at:
            raise Crash

    said = io.StringIO()
    with (
        mock.patch.object(Checkpoints, "after_cell", until_crash),
        mock.patch.object(Animator, "save"),  # half a second each
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            code = train.train(parse([*SMALL.split(), "--dataset", str(out), *flags.split(), "--out", str(out)]))
        except Crash:
            code = -1
    return code, said.getvalue()


def cut_off(world: World, flags: str, out: Path, crash_at: int) -> None:
    assert {code for code, _ in world.run(run_here, f"{flags} --run-name cut", out, crash_at)} == {-1}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_equal(a: Path, b: Path) -> None:
    assert rows_of(a) == rows_of(b)
    ours, theirs = weights(a), weights(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("flags", "crashes"),
    [
        ("--net softmax --tail ragged --audit-every 2", [1]),  # before the first checkpoint
        ("--net mlp --momentum 0.9 --accumulate 2", [3]),  # a step after one
        ("--net lenet --optimizer adamw", [5]),  # after an epoch's last step, before its test
        # replicas differ:
        ("--net mlp --updater scratch --reduction sum --normalize rank --tail ragged --lr 0.001", [7]),
        ("--net lenet --normalize rank --tail ragged --audit-every 1", [9]),
        ("", [3, 5, 6, 10]),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])  # 10 s
def test_a_run_goes_on_bit_for_bit(
    world: Worlds, tmp_path: Path, world_size: int, flags: str, crashes: list[int]
) -> None:
    ranks = world(world_size)
    ranks.run(run_here, f"{flags} --run-name whole", tmp_path)
    for crash_at in crashes:
        cut_off(ranks, f"{flags} --resume auto", tmp_path, crash_at)
    results = ranks.run(run_here, f"{flags} --run-name cut --resume auto", tmp_path)
    assert {code for code, _ in results} == {0}
    if 1 < crash_at < 10:  # there is a checkpoint, and something left to do
        assert f"{crash_at - 1} steps are done" in results[0][1] or f"{crash_at} steps are done" in results[0][1]
    assert_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("then", "now"), [((2, 1), (3, 1)), ((1, 3), (4, 1)), ((3, 1), (1, 2))])
def test_other_ranks_and_micro_batches_end_with_the_same_weights(
    world: Worlds, tmp_path: Path, then: tuple[int, int], now: tuple[int, int]
) -> None:
    flags = "--dtype float64 --momentum 0.9 --net mlp --tail ragged"
    world(1).run(run_here, f"{flags} --run-name whole", tmp_path)
    cut_off(world(then[0]), f"{flags} --accumulate {then[1]}", tmp_path, 7)
    world(now[0]).run(run_here, f"{flags} --accumulate {now[1]} --run-name cut --resume auto", tmp_path)
    assert relative_distance(weights(tmp_path / "cut"), weights(tmp_path / "whole")) < 1e-12
    for ours, theirs in zip(rows_of(tmp_path / "cut"), rows_of(tmp_path / "whole"), strict=True):
        if "train/loss" in ours:
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-12)


def compared_as_told(a: Path, b: Path) -> str:
    """What the command of scripts/README.md prints for two runs."""
    (command,) = re.findall(r"^diff .*", Path("scripts/README.md").read_text(), re.MULTILINE)
    command = command.replace("runs/a", str(a)).replace("runs/b", str(b))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        "--net mlp --momentum 0.9 --clip-norm 0.5",
        "--net lenet --optimizer adamw --tail ragged --audit-every 2",
        "--updater scratch --reduction sum --tail pad --batch-size 12",
    ],
)
def test_with_virtual_ranks_a_run_goes_on_bit_for_bit_on_any_number_of_ranks(
    world: Worlds, tmp_path: Path, flags: str
) -> None:
    flags += " --virtual-ranks 12"
    (whole,) = world(1).run(run_here, f"{flags} --run-name whole", tmp_path)
    for ranks, crash_at in ((4, 3), (2, 4), (3, 7)):  # mid-epoch: after a checkpoint, right at one, in the other epoch
        assert {code for code, _ in world(ranks).run(run_here, f"{flags} --resume auto", tmp_path, crash_at)} == {-1}
    ((code, said),) = world(1).run(run_here, f"{flags} --resume auto", tmp_path)
    assert code == 0 and "6 steps are done" in said
    (cut,) = tmp_path.glob("*-v12-*")  # the name does not tell the number of ranks, and so is found on any
    assert (cut / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert [row["step"] for row in rows_of(cut)] == [row["step"] for row in rows_of(tmp_path / "whole")]
    assert compared_as_told(cut, tmp_path / "whole") == ""
    digest = hashlib.sha256((cut / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((cut / "summary.json").read_text())["weights_sha256"] == digest
    assert f"ranks: {digest}" in said and f"ranks: {digest}" in whole[1]


def test_an_operation_that_is_not_deterministic_ends_a_run_with_virtual_ranks_by_its_name(tmp_path: Path) -> None:
    def net_with_put(*args: Any) -> torch.nn.Module:
        net = make_net(*args)
        net.register_forward_hook(lambda *_: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)) and None)
        return net

    threads = torch.get_num_threads()
    with mock.patch("loop.nets.make_net", net_with_put):
        code, said = run_here("--virtual-ranks 4", tmp_path)
    line = "train.py: error: --virtual-ranks 4: put_ does not have a deterministic implementation. It has no checkpoint"
    assert (code, said.splitlines()[-1]) == (1, line)
    after = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    assert after == (False, threads), "a later run in the same process is as it was"


def test_a_checkpoint_of_a_version_without_virtual_ranks_has_none(tmp_path: Path) -> None:
    cut_off(World(1), "", tmp_path, 3)
    (state,) = (tmp_path / "cut/checkpoints").glob(f"*/{STATE}")
    values = json.loads(state.read_text())
    del values["mathematics"]["virtual_ranks"]
    state.write_text(json.dumps(values))
    with pytest.raises(InputError, match="virtual_ranks 0 -> 8"):
        run_here("--virtual-ranks 8 --run-name cut --resume auto", tmp_path)
    assert run_here("--run-name cut --resume auto", tmp_path)[0] == 0


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A run of one process that was cut off after step 7, with checkpoints of steps 5 (an epoch's end) and 6."""
    cut_off(World(1), "", tmp_path, 7)
    run_here("--run-name whole", tmp_path)
    return tmp_path / "cut"


def test_the_last_two_checkpoints_are_kept(cut: Path) -> None:
    kept = sorted(path.name for path in (cut / "checkpoints").iterdir())
    assert kept == ["epoch-0002-step-00000005", "epoch-0002-step-00000006"]


LAST = "checkpoints/epoch-0002-step-00000006"


@pytest.mark.parametrize(
    ("name", "lost", "flaw"),
    [
        (f"{LAST}/model.safetensors", 7, ""),
        (f"{LAST}/optimizer.bin", 7, ""),
        (f"{LAST}/{STATE}", 7, ""),
        ("metrics.jsonl", 1, "{} has lost rows since"),
    ],
)
def test_a_checkpoint_that_is_torn_or_whose_rows_are_gone_is_named_and_the_one_before_it_used(
    cut: Path, name: str, lost: int, flaw: str
) -> None:
    path = cut / name
    path.write_bytes(path.read_bytes()[:-lost])
    code, said = run_here("--run-name cut --resume auto", cut.parent)
    assert code == 0
    assert f"left out {cut / LAST}: {flaw.format(path)}" in said and "5 steps are done" in said
    assert_equal(cut, cut.parent / "whole")


def test_checkpoints_that_are_no_good_do_not_crowd_out_new_ones(cut: Path) -> None:
    for checkpoint in (cut / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"torn")
    assert run_here("--run-name cut --resume auto", cut.parent, crash_at=5)[0] == -1
    code, said = run_here("--run-name cut --resume auto", cut.parent)
    assert code == 0
    assert "4 steps are done" in said and "left out" not in said
    assert_equal(cut, cut.parent / "whole")


@pytest.mark.parametrize("content", ["{}", '{"bytes": {"model.safetensors": "x"}}', "[]", "nothing"])
def test_a_checkpoint_of_another_form_is_left_out(cut: Path, content: str) -> None:
    checkpoint = newest(cut)
    assert checkpoint
    (checkpoint / STATE).write_text(content)
    assert find_flaw(checkpoint)
    assert newest(cut) != checkpoint


def test_a_checkpoint_from_before_its_sizes_were_kept_is_gone_on_from(cut: Path) -> None:
    checkpoint = newest(cut)
    assert checkpoint
    state = json.loads((checkpoint / STATE).read_text())
    del state["bytes"]
    (checkpoint / STATE).write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_text('{"state.json": "its SHA-256"}')
    code, said = run_here("--run-name cut --resume auto", cut.parent)
    assert code == 0 and "6 steps are done" in said
    assert_equal(cut, cut.parent / "whole")


def test_a_folder_with_rows_of_nobody_is_left_alone(cut: Path) -> None:
    (cut / "config.json").unlink()
    before = (cut / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"has files, but no config.json"):
        run_here("--run-name cut --resume auto", cut.parent)
    assert (cut / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_no_run(cut: Path) -> None:
    (cut.parent / "documents").mkdir()
    (cut.parent / "documents" / "letter.txt").touch()
    with pytest.raises(InputError, match=r"documents has files, but no config.json: it is no run's folder"):
        run_here("--run-name documents --resume auto", cut.parent)
    assert [path.name for path in (cut.parent / "documents").iterdir()] == ["letter.txt"]


def test_a_finished_run_that_trains_on_is_not_finished_meanwhile(cut: Path) -> None:
    whole = cut.parent / "whole"
    assert (whole / "summary.json").exists()
    assert run_here("--run-name whole --resume auto --epochs 3", cut.parent, crash_at=12)[0] == -1
    assert not (whole / "summary.json").exists()


def test_only_a_folder_made_for_a_run_that_cannot_begin_is_removed(cut: Path) -> None:
    for name, remains in (("cut", True), ("new", False)):
        run = open_run(parse(["--run-name", name, "--resume", "auto", "--out", str(cut.parent)]), 1)
        run.discard()
        assert (cut.parent / name).exists() == remains


def test_another_runs_checkpoint_is_named_and_left_out(cut: Path) -> None:
    foreign = cut.parent / "whole" / "checkpoints" / "epoch-0003-step-00000010"
    shutil.copytree(foreign, cut / "checkpoints" / foreign.name)
    code, said = run_here("--run-name cut --resume auto", cut.parent)
    assert code == 0
    assert f"{foreign.name}: another run's" in said and "6 steps are done" in said
    assert_equal(cut, cut.parent / "whole")


def test_a_pickle_that_would_run_code_is_refused(cut: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (cut / "it ran",)

    checkpoint = newest(cut, json.loads((cut / "config.json").read_text())["wandb_id"])
    assert checkpoint
    torch.save(Evil(), checkpoint / "optimizer.bin")
    state = json.loads((checkpoint / STATE).read_text())
    state["bytes"]["optimizer.bin"] = (checkpoint / "optimizer.bin").stat().st_size
    (checkpoint / STATE).write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"cannot be loaded \(.*[Ww]eights.only"):
        run_here("--run-name cut --resume auto", cut.parent)
    assert not (cut / "it ran").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr 0.2", "lr 0.1 -> 0.2"),
        ("--net mlp", "net softmax -> mlp"),
        ("--batch-size 32 --seed 1", "batch_size 16 -> 32, seed 0 -> 1"),
        ("--train-examples 71", "train_examples 70 -> 71"),
        ("--normalize rank", "normalize global -> rank"),
    ],
)
def test_other_mathematics_are_refused_with_the_difference(cut: Path, flags: str, said: str) -> None:
    before = (cut / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=said):
        run_here(f"--run-name cut --resume auto {flags}", cut.parent)
    assert (cut / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("ranks", "before", "now", "said"),
    [
        (1, "--virtual-ranks 8", "--virtual-ranks 4", "virtual_ranks 8 -> 4"),
        (1, "", "--virtual-ranks 8", "virtual_ranks 0 -> 8"),
        (1, "--virtual-ranks 8", "--virtual-ranks 0", "virtual_ranks 8 -> 0"),
        (2, "--normalize rank", "--normalize rank", "world_size 2 -> 1"),
    ],
)
def test_another_number_of_cells_that_bits_or_weights_hang_on_is_other_mathematics(
    world: Worlds, tmp_path: Path, ranks: int, before: str, now: str, said: str
) -> None:
    cut_off(world(ranks), before, tmp_path, 7)
    with pytest.raises(InputError, match=said):
        run_here(f"{now} --run-name cut --resume auto", tmp_path)


def test_what_leaves_the_mathematics_alone_may_change(cut: Path) -> None:
    code, _ = run_here("--run-name cut --resume auto --log-every 1 --tags a --epochs 3 --accumulate 2", cut.parent)
    assert code == 0
    assert [row["step"] for row in rows_of(cut)] == [3, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 15]


def test_a_path_begins_a_new_run_and_leaves_the_old_one_alone(cut: Path) -> None:
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    for name, path in (("a", cut), ("b", cut / "checkpoints" / "epoch-0002-step-00000005")):
        code, _ = run_here(f"--run-name {name} --resume {path}", cut.parent)
        assert code == 0
        assert_equal(cut.parent / name, cut.parent / "whole")
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_a_run_that_a_path_began_goes_on_from_there_until_it_has_a_checkpoint(cut: Path) -> None:
    code, _ = run_here(f"--run-name c --resume {cut / 'checkpoints' / 'epoch-0002-step-00000005'}", cut.parent)
    assert code == 0
    for _ in range(2):  # killed before its first checkpoint, twice
        shutil.rmtree(cut.parent / "c" / "checkpoints")
        (cut.parent / "c" / "summary.json").unlink()
        code, said = run_here("--run-name c --resume auto", cut.parent)
        assert code == 0
        assert "going on from" in said
        assert_equal(cut.parent / "c", cut.parent / "whole")


def test_a_checkpoint_that_the_disk_does_not_return_is_not_to_be_removed(cut: Path) -> None:
    stale = OSError(errno.ESTALE, "Stale file handle")
    with mock.patch("accelerate.Accelerator.load_state", side_effect=stale), pytest.raises(InputError) as refused:
        run_here("--run-name cut --resume auto", cut.parent)
    assert "cannot be read" in str(refused.value)
    assert "remove" not in str(refused.value)


def start_here(flags: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Call train.py's main, which is expected to end before it trains; return the exit code."""
    words = f"train.py {SMALL} --dataset {out} --out {out} {flags}".split()
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(train, "train", mock.Mock(return_value="trained"))
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code


def test_a_finished_run_is_left_as_it_is(
    cut: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cut.parent / "whole"
    assert not start_here("--run-name whole --resume auto", cut.parent, monkeypatch)
    assert f"{whole} is finished" in capsys.readouterr().out
    assert start_here("--run-name whole --resume auto --epochs 3", cut.parent, monkeypatch) == "trained"
    assert start_here("--run-name whole --resume auto --net mlp", cut.parent, monkeypatch) == 2
    assert "net softmax -> mlp" in capsys.readouterr().err


def test_a_finished_run_goes_on_for_more_epochs(cut: Path) -> None:
    assert run_here("--run-name three --epochs 3", cut.parent)[0] == 0
    assert run_here("--run-name whole --epochs 3 --resume auto", cut.parent)[0] == 0
    assert_equal(cut.parent / "whole", cut.parent / "three")


def test_a_run_cannot_go_back(cut: Path) -> None:
    with pytest.raises(InputError, match=r"--epochs 1: .*step-00000006 is from epoch 2"):
        run_here("--run-name cut --resume auto --epochs 1", cut.parent)


@pytest.mark.parametrize("check", ["", "--check"])
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("cut", "net softmax -> mlp"),
        ("cut/checkpoints", "no checkpoint"),
        ("copied", "no checkpoint"),
        (".", "no chec"),
    ],
)
def test_a_path_that_is_no_use_is_refused_before_anything_starts(
    cut: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str, said: str, check: str
) -> None:
    newest_of_cut = newest(cut)
    assert newest_of_cut
    shutil.copytree(newest_of_cut, cut.parent / "copied")  # without its run's rows
    flags = f"--net mlp --run-name new --resume {cut.parent / source} {check}"
    assert start_here(flags, cut.parent, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (cut.parent / "new").exists()


def test_a_set_with_another_number_of_classes_is_other_mathematics(cut: Path) -> None:
    labels = cut.parent / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + bytes([26]))
    with pytest.raises(InputError, match=r"was trained with other mathematics \(classes 10 -> 27\)"):
        run_here("--run-name cut --resume auto", cut.parent)


def test_a_run_that_another_process_trains_is_refused(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LOCK_S", 0.1)
    with FileLock(cut / ".lock"), pytest.raises(InputError, match="another process is training this run"):
        run_here("--run-name cut --resume auto", cut.parent)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_save_that_fails_leaves_the_good_one(tmp_path: Path, call: int) -> None:
    real, calls = checkpoints.sync, []

    def fails(path: Path) -> None:
        calls.append(path)
        if len(calls) == 20 + call:  # while the third or fourth is written
            raise OSError(28, "No space left on device", str(path))
        real(path)

    with mock.patch.object(checkpoints, "sync", fails):
        code, said = run_here("--run-name cut", tmp_path)
    assert code == 1
    assert "the run cannot be saved: [Errno 28] No space left on device" in said
    kept = sorted((tmp_path / "cut" / "checkpoints").glob("epoch-*"))
    assert kept
    assert find_flaw(kept[-1]) is None
    assert f"Its last checkpoint, {kept[-1]}, is kept" in said
    run_here("--run-name whole", tmp_path)
    assert run_here("--run-name cut --resume auto", tmp_path)[0] == 0
    assert_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("flags", ["--log-every 1", "--log-every 1000 --checkpoint-every 0", "--log-every 1000"])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(
    world: Worlds, tmp_path: Path, flags: str
) -> None:
    wild = f"--net mlp --reduction sum --lr 1e30 --run-name wild {flags}"
    results = world(2).run(run_here, wild, tmp_path)
    assert {code for code, _ in results} == {1}
    assert "train.py: the loss is nan, under --reduction sum --normalize global: start a new run" in results[0][1]
    for checkpoint in (tmp_path / "wild" / "checkpoints").glob("epoch-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("--reduction sum", "--lr 6.25e+28 (a sum's step is 16 times the mean's), or --reduction mean"),
        ("--reduction sum --normalize rank --accumulate 2", "--lr 1.25e+29 (a sum's step is 8 times the mean's), or"),
        ("--reduction mean", "a smaller --lr than 1e+30"),
        ("--reduction sum --clip-norm 1", "a smaller --lr than 1e+30"),
        ("--reduction sum --optimizer adam", "a smaller --lr than 1e+30"),
    ],
)
def test_the_advice_divides_the_learning_rate_where_that_scales_the_step(
    tmp_path: Path, flags: str, advice: str
) -> None:
    code, said = run_here(f"--net mlp --lr 1e30 --log-every 1 --run-name wild {flags}", tmp_path)
    assert code == 1
    assert f": start a new run with {advice}" in said


@pytest.mark.parametrize(
    ("flags", "logged"), [("", True), ("--momentum 0.9", True), ("--optimizer adam", False), ("--clip-norm 1", False)]
)
def test_an_effective_learning_rate_is_logged_where_it_scales_the_step(
    tmp_path: Path, flags: str, logged: bool
) -> None:
    code, said = run_here(f"--run-name run {flags}", tmp_path)
    assert code == 0
    assert ("effective learning rate" in said) is logged
    for row in rows_of(tmp_path / "run"):
        assert ("step/lr_effective" in row) is (logged and "step/loss" in row)


def test_a_resumed_run_keeps_what_it_is_not_told_to_change(tmp_path: Path) -> None:
    words = "--tf32 --group study --tags a b --notes remark --wandb-project project --log-every 2 --audit-every 4"
    words += " --virtual-ranks 4"
    cut_short = f"{SMALL} --dataset {tmp_path} --out {tmp_path} {words} --run-name run"
    assert train.train(parse(cut_short.split())) == 0
    before = parse(cut_short.split())
    told = ["--out", str(tmp_path), "--run-name", "run", "--resume", "auto", "--tags", "c"]
    now = with_kept_flags(parse(told), told, world_size=1)
    assert now == replace(before, resume="auto", tags=("c",), lr=0.1, cpu=False)
    again = [*cut_short.split(), "--resume", "auto"]
    assert with_kept_flags(parse(again), again, 1) == parse([*again, "--lr", "0.1"]), "told everything once more"
    assert with_kept_flags(before, cut_short.split(), 1) == before, "without --resume auto"


@pytest.mark.parametrize(
    ("environ", "argv", "command"),
    [
        ({}, ["train.py"], "python train.py --run-name run --resume auto"),
        (
            {"LOCAL_WORLD_SIZE": "3"},
            ["train.py", "--resume=auto", "--net", "mlp", "--run_name", "run", "--notes", "it's on"],
            """torchrun --nproc_per_node 3 train.py --net mlp --notes 'it'"'"'s on' --run-name run --resume auto""",
        ),
        (
            {"LAUNCHED_BY": "NPROC=4 bash scripts/train.sh", "LOCAL_WORLD_SIZE": "4"},
            ["train.py", "--resume", "auto", "--out", "o"],
            "NPROC=4 bash scripts/train.sh --out o --run-name run --resume auto",
        ),
    ],
)
def test_the_way_to_go_on_is_the_whole_command(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], argv: list[str], command: str
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LAUNCHED_BY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", argv)
    assert command_to_go_on("run") == command


def test_the_speed_of_a_resumed_epoch_counts_what_was_trained_since(tmp_path: Path) -> None:
    run_here("--run-name cut", tmp_path, crash_at=9)
    run_here("--run-name cut --resume auto", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    trained = [row["time/examples_per_s"] * row["time/epoch_s"] for row in rows if "time/epoch_s" in row]
    assert trained == pytest.approx([70, 16 + 6]), "an epoch, and the steps after the checkpoint at step 8"


def test_a_test_loss_that_is_not_finite_ends_the_run_too(tmp_path: Path) -> None:
    code, said = run_here("--net mlp --reduction sum --lr 1e30 --batch-size 70 --epochs 1 --run-name wild", tmp_path)
    assert code == 1
    assert "the loss is nan" in said and "--resume" not in said


def test_a_stop_is_acted_on_at_a_checkpoint_too(tmp_path: Path) -> None:
    def told(observer: Checkpoints, cell: Any, *sums: Any) -> None:
        if observer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            observer.run.stop.thread.join(0.2)  # who notes it
        after_cell(observer, cell, *sums)

    after_cell = Checkpoints.after_cell
    with mock.patch.object(Checkpoints, "after_cell", told):
        code, said = run_here("--log-every 1000 --run-name cut", tmp_path)
    assert code == 143
    assert "stopped by SIGTERM after step 4" in said and "step-00000004, is kept" in said
