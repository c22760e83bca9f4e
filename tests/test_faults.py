"""A rank that dies, stops or hangs ends the job on every rank, with one line that says which and why."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest

from loop.run.folder import RunFolder, write_json
from loop.run.watchdog import first_line, is_from_backend
from scripts import soak
from tests.conftest import mount
from tests.launches import PYTHON, free_port, kill, launch, ranks_of, start, wait_for_rows

TIMEOUT_S = 3
FLAGS = ["--train-examples", "2000", "--epochs", "100000", "--log-every", "5", "--run-name", "run"]


@contextlib.contextmanager
def job(out: Path, world_size: int, *flags: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that train without a launcher, as an MPI or a script of one's own would start them."""
    environ = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        start([PYTHON, "train.py"], out, *FLAGS, "--ddp-timeout", str(TIMEOUT_S), *flags,
              **environ, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        wait_for_rows(ranks[0], out, 3)
        yield ranks
    finally:
        for rank in ranks:
            if rank.poll() is None:
                kill(rank)


def ends(ranks: list[subprocess.Popen[str]], within: float) -> list[str]:
    """train.py's lines; torch may add, in its own words, that rank 0's store is gone. Every rank ends with an error."""
    deadline = time.monotonic() + within
    said = []
    for rank in ranks:
        stderr = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))[1]
        assert "Traceback (most recent call last)" not in stderr
        said += [line for line in stderr.splitlines() if line.startswith("train.py: ")]
        assert rank.returncode not in (0, None)
    return said


def rank_0_says(ranks: list[subprocess.Popen[str]]) -> str:
    """The one line of rank 0. Rank 1 may add that rank 0 is gone, as no launcher keeps the store for it to see why."""
    line, *others = ends(ranks, within=20)
    assert len(others) <= 1 and all("error: rank 1 lost rank 0" in other for other in others)
    return line


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])  # 12 s, 17 s
def test_a_rank_that_dies_is_named_by_one_of_the_others(tmp_path: Path, victim: int) -> None:
    with job(tmp_path, 3 if victim else 2) as ranks:
        ranks[victim].kill()
        said = ends([rank for rank in ranks if rank is not ranks[victim]], within=TIMEOUT_S + 15)
    line, *others = said
    if victim == 0:  # which held the store, too
        assert line.startswith("train.py: error: rank 1 lost rank 0, and with it the store that all ranks share (the ")
        assert not others
    else:
        assert all("error: rank 2 lost rank 0, and with it the store" in other for other in others)  # it had ended
        assert line.startswith("train.py: error: rank 1 is dead, stopped, or cut off: no sign of life for 3 s (the ")
    assert re.search(r"\(the backend: \[.*/gloo/.*\] (Connection closed by peer|Read error) .*\)\. Its last", line)
    assert "checkpoints/epoch-" in line


def test_a_rank_that_stops_is_named_after_the_timeout(tmp_path: Path) -> None:
    with job(tmp_path, 2) as ranks:
        ranks[1].send_signal(signal.SIGSTOP)
        (line,) = ends(ranks[:1], within=TIMEOUT_S + 15)
    assert line.startswith("train.py: error: rank 1 is dead, stopped, or cut off: no sign of life for 3 s. Its last")


FAULTY = """
import os, runpy, signal, sys, time
import loop.data, loop.run.checkpoints, loop.updater

fault, place, at = sys.argv[1:4]
owner, name = {
    "start": (loop.data, "load"),
    "step": (loop.updater.CellUpdater, "step"),
    "evaluation": (loop.data.EvalBatches, "__iter__"),
    "save": (loop.run.checkpoints.Checkpoints, "save"),
}[place]
original, calls = getattr(owner, name), 0

def faulty(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(at) and fault == "hangs":
        time.sleep(600)
    elif calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
    return original(*args, **kwargs)

setattr(owner, name, faulty)
del sys.argv[1:4]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow  # 10 s each
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("place", "at"), [("start", "1"), ("step", "9"), ("evaluation", "2"), ("save", "2")])
@pytest.mark.parametrize("fault", ["dies", "stops", "hangs"])
def test_wherever_a_rank_is_lost_one_line_names_it(
    tmp_path: Path, fault: str, place: str, at: str, world_size: int
) -> None:
    """The last rank is lost."""
    lost, flags = world_size - 1, [*FLAGS, "--ddp-timeout", str(TIMEOUT_S), "--log-every", "1", "--out", str(tmp_path)]
    programs = [["train.py"]] * lost + [["-c", FAULTY, fault, place, at]]
    with ranks_of([[PYTHON, *program, *flags] for program in programs]) as ranks:
        said = ends(ranks[:lost], within=90)  # starting takes some of it
        ranks[lost].kill()
        (line,) = said + ranks[lost].communicate()[1].splitlines()  # one that hangs may find it first
    how = "is alive, but does not come to where the others wait: it hangs"
    if fault != "hangs":
        how = "is dead, stopped, or cut off: no sign of life for 3 s"
    assert line.startswith(f"train.py: error: rank {lost} {how}"), line
    rows = tmp_path / "run" / "metrics.jsonl"
    kept = rows.read_text().splitlines() if rows.exists() else []
    assert bool(kept) == (place != "start")
    assert all(json.loads(row)["step"] for row in kept)


FAULT = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from loop.config import Config
from loop.run.run import Run
from loop.run.watchdog import Watchdog
dist.init_process_group("gloo", timeout=timedelta(seconds=2))
fault, rank = sys.argv[1], dist.get_rank()
if fault == "dies at its start" and rank == 1:
    time.sleep(1)
    os._exit(1)
run = Run(Config())
run.watchdog = Watchdog(rank, 3, 60, print)
with run.watchdog:
    if fault == "hangs" and rank == 1:
        time.sleep(60)
    try:
        if fault == "of NCCL":
            raise dist.DistBackendError(
                "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage\\n"
                "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\\n"
                "Last error:\\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000")
        if fault == "of one rank":
            if rank:
                time.sleep(60)
            raise dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error")
        run.watchdog.advance()
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        assert run._report(error)
        sys.exit(1)
"""


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (
            "hangs",
            r"rank 1 is alive, but does not come to where the others wait: it hangs "
            r"\(the backend: \[.*/gloo/.*\] Timed out waiting 2000ms for (recv|send) operation to complete\)",
        ),
        pytest.param(
            "dies at its start",
            r"rank 1 has not begun to train: it died at its start, or is still starting "
            r"\(the backend: \[.*/gloo/.*\] (Connection closed by peer|Read error) .*\)",
            marks=pytest.mark.slow,  # 9 s
        ),
        pytest.param(
            "of NCCL",
            r"a collective failed \(the backend: NCCL error in: .*NCCLUtils\.cpp:94, invalid usage "
            r"Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000\)",
            marks=pytest.mark.slow,  # 9 s
        ),
        pytest.param(
            "of one rank",
            r"a collective failed \(the backend: NCCL error in: NCCLUtils\.cpp:94, unhandled cuda error\)",
            marks=pytest.mark.slow,  # 9 s
        ),
    ],
)
def test_only_a_rank_that_is_at_fault_is_accused_and_the_backend_is_quoted(fault: str, report: str) -> None:
    waiting = {"hangs": [1], "of one rank": [1, 2]}.get(fault, [])
    with ranks_of([[PYTHON, "-c", FAULT, fault]] * 3) as ranks:
        said = "".join(rank.communicate(timeout=40)[1] for number, rank in enumerate(ranks) if number not in waiting)
    assert re.fullmatch(f"train.py: error: {report}. It has no checkpoint\n", said), said


def test_an_error_that_only_names_a_backend_is_left_to_its_traceback() -> None:
    assert not is_from_backend(RuntimeError("cannot read /data/NCCL or /data/gloo.idx"))
    assert not is_from_backend(RuntimeError("/home/u/gloo/runs/run/model.safetensors: No space left on device"))
    assert is_from_backend(
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    )
    assert first_line(RuntimeError()) == "RuntimeError()"


WHY = "its file system cannot lock files (flock: Function not implemented)"
NO_FLOCK = """
import errno, fcntl, os, runpy
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
runpy.run_path("train.py", run_name="__main__")
"""


NO_RUN = f"--out {{0}}: two runs could mix there, because {WHY}: choose a folder on another file system"
NO_DATA = f"--data-dir {{0}}/data: cannot keep Fashion-MNIST there: {WHY}"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], NO_RUN),
        (["--run-name", "run"], NO_RUN),
        (["--run-name", "run", "--resume", "auto"], NO_RUN),
        (["--data-dir", "{0}/data"], NO_DATA),
    ],
)
def test_a_file_system_without_flock_is_one_line_and_no_run(tmp_path: Path, flags: list[str], says: str) -> None:
    done = launch([PYTHON, "-c", NO_FLOCK], tmp_path, *(flag.format(tmp_path) for flag in flags))
    assert (done.returncode, done.stderr) == (2, f"train.py: error: {says.format(tmp_path)}\n")
    assert not [path for path in tmp_path.iterdir() if path.name != "data"]


def test_what_a_killed_process_was_writing_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run", new=True)
    killed = mock.patch("loop.files.sync", side_effect=KeyboardInterrupt), mock.patch.object(Path, "unlink")
    with killed[0], killed[1], pytest.raises(KeyboardInterrupt):
        write_json(run.path / "config.json", {"wandb_id": "a"})
    run.close()
    assert len(list(run.path.glob(".config.json.*"))) == 1
    RunFolder(run.path, new=False).close()
    assert {path.name for path in run.path.iterdir()} == {".lock", "metrics.jsonl"}


def test_a_run_folder_deleted_while_wandb_is_offline_is_one_line(tmp_path: Path) -> None:
    flags = ["--log-every", "1", "--batch-size", "8", "--run-name", "run"]
    process = start([PYTHON, "train.py"], tmp_path, *flags, WANDB_MODE="offline")
    run = wait_for_rows(process, tmp_path, 1)
    run.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    stderr = process.communicate(timeout=60)[1]
    assert stderr == f"train.py: error: the run cannot be saved: {run} was deleted. It has no checkpoint\n"
    assert process.returncode == 1


def test_a_run_folder_that_is_deleted_is_said_at_once(tmp_path: Path) -> None:
    with job(tmp_path, 2) as ranks:
        (tmp_path / "run").rename(tmp_path / "gone")  # at once, whatever is being written in it
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        line = rank_0_says(ranks)
    assert line.startswith("train.py: error: the run cannot be saved: ")


def test_a_disk_that_fills_up_with_rows_is_one_line(disk: Path) -> None:
    done = launch([PYTHON, "train.py"], disk, "--log-every", "1", "--batch-size", "8", "--run-name", "run")
    no_space = "[Errno 28] No space left on device"
    assert done.stderr == f"train.py: error: the run cannot be saved: {no_space}. It has no checkpoint\n"
    assert done.returncode == 1


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


def turn_read_only(disk: Path) -> None:
    mount("--bind", str(disk / "run"), str(disk / "run"))  # the kernel makes no disk read-only while it is in use,
    while True:  # but what is opened from here on is; unless a file has just been opened for writing
        with contextlib.suppress(subprocess.CalledProcessError):
            return mount("-o", "remount,ro,bind", str(disk / "run"))


@pytest.mark.slow  # 8 s each
@pytest.mark.parametrize(
    ("fails", "said"), [(fill, "No space left on device"), (turn_read_only, "Read-only file system")]
)
def test_a_disk_that_takes_no_more_ends_the_run_with_the_last_checkpoint_kept(
    disk: Path, fails: Callable[[Path], None], said: str
) -> None:
    with job(disk, 2, "--checkpoint-every", "5") as ranks:
        fails(disk)
        line = rank_0_says(ranks)
    assert line.startswith("train.py: error: the run cannot be saved: ")
    assert said in line
    assert line.endswith("--ddp-timeout 3 --checkpoint-every 5 --out " + f"{disk} --run-name run --resume auto")


@pytest.mark.slow  # 32 s
def test_torchrun_restarts_a_run_that_goes_on_bit_for_bit(tmp_path: Path) -> None:
    flags = ["--train-examples=3000", "--epochs", "12", "--net", "mlp", "--log-every", "5", "--checkpoint-every", "5"]
    how = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2", "train.py"]
    assert launch(how, tmp_path, *flags, "--run-name", "whole").returncode == 0
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # pytorch#135712: else ranks find the last attempt's
    process = start(how, tmp_path, *flags, "--run-name", "cut", "--resume", "auto", **fresh_store)
    wait_for_rows(process, tmp_path, 7, run="cut")
    victim = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
    victim.kill()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "going on from" in out
    assert soak.compare(tmp_path / "cut", tmp_path / "whole") == []


@pytest.mark.slow  # 25 s
@pytest.mark.parametrize(("resume", "exit_codes"), [("never", [0, 2]), ("auto", [0, 0])])
def test_two_runs_of_one_name_at_the_same_moment_never_mix(tmp_path: Path, resume: str, exit_codes: list[int]) -> None:
    flags = ["--train-examples", "3000", "--log-every", "1", "--epochs", "3", "--resume", resume]
    assert launch([PYTHON, "train.py"], tmp_path, *flags, "--run-name", "alone").returncode == 0
    both = [start([PYTHON, "train.py"], tmp_path, *flags, "--run-name", "same") for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == exit_codes, said
    if resume == "never":
        (refused,) = [line for text in said for line in text.splitlines()]
        assert refused.startswith("train.py: error: --run-name same: there is such a run in")
    assert soak.compare(tmp_path / "same", tmp_path / "alone") == []


def test_an_occupied_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = launch([PYTHON, "train.py"], tmp_path, **environ)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"the ranks cannot join each other at 127.0.0.1:{port}" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["launcher", "rank"])
def test_a_rank_that_waits_to_join_the_others_ends_at_once(tmp_path: Path, fault: str) -> None:
    """Where its launcher is killed, or itself is told to stop: not after the time-out of the join."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launcher = start(["sh", "-c", '"$@"; true', "launcher", PYTHON, "train.py"], tmp_path, **environ)
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(launcher.pid).children()) or "torch" not in mapped(children[0]):
        assert time.monotonic() < deadline, "rank 1 gets as far as torch"
        time.sleep(0.1)
    time.sleep(2)  # and on to the join
    assert children[0].is_running()
    if fault == "launcher":
        launcher.kill()
    else:
        children[0].terminate()
    _, alive = psutil.wait_procs(children, timeout=5)
    for process in alive:
        process.kill()
    launcher.communicate()
    assert not alive


def test_a_rank_whose_launcher_died_before_it_could_look_ends_at_once(tmp_path: Path) -> None:
    """Killed with the launcher 20 ms after their start, ranks lived on for 90 s."""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = launch([PYTHON, "train.py"], tmp_path, **variables, **address)
    assert done.returncode == 2
    assert done.stderr == (
        f"train.py: error: the launcher's store at 127.0.0.1:{address['MASTER_PORT']} is gone, and maybe the launcher: "
        "[Errno 111] Connection refused\n"
    )
    assert not list(tmp_path.iterdir())


def mapped(process: psutil.Process) -> str:
    """The libraries that a process has loaded."""
    return " ".join(each.path for each in process.memory_maps())
