"""A rank that dies, stops or hangs ends the job on every rank, with one line that says which and why."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts import soak
from tests.launches import PYTHON, kill, launch, start

TIMEOUT_S = 3
FLAGS = ["--train-examples", "2000", "--epochs", "100000", "--log-every", "5", "--run-name", "run"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def job(out: Path, world_size: int, *flags: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that train without a launcher, as an MPI or a script of one's own would start them."""
    environ = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        start([PYTHON, "train.py"], out, *FLAGS, "--ddp-timeout", str(TIMEOUT_S), *flags,
              **environ, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        rows = out / "run" / "metrics.jsonl"
        while not (rows.exists() and rows.read_bytes().count(b"\n") > 2):
            assert time.monotonic() < deadline and ranks[0].poll() is None, ranks[0].communicate()[1]
            time.sleep(0.1)
        yield ranks
    finally:
        for rank in ranks:
            if rank.poll() is None:
                kill(rank)


def ends(ranks: list[subprocess.Popen[str]], within: float) -> list[str]:
    """What the ranks said as they ended, all with an error; one that does not end in time fails the test."""
    deadline = time.monotonic() + within
    said = []
    for rank in ranks:
        said += rank.communicate(timeout=max(0.1, deadline - time.monotonic()))[1].splitlines()
        assert rank.returncode not in (0, None)
    return [line for line in said if line.startswith("train.py")]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_by_one_of_the_others(tmp_path: Path, victim: int) -> None:
    with job(tmp_path, 3 if victim else 2) as ranks:
        ranks[victim].kill()
        said = ends([rank for rank in ranks if rank is not ranks[victim]], within=TIMEOUT_S + 15)
    line, *others = said
    if victim == 0:  # which held the store, too
        assert "rank 1 lost rank 0, and with it the store" in line
        assert not others
    else:
        assert all("lost rank 0" in other for other in others)  # which had spoken, and ended
        assert line.startswith("train.py: error: rank 1 is dead, stopped, or cut off: no sign of life for 3 s. ")
        assert "checkpoints/epoch-" in line


def test_a_rank_that_stops_is_named_after_the_timeout(tmp_path: Path) -> None:
    with job(tmp_path, 2) as ranks:
        ranks[1].send_signal(signal.SIGSTOP)
        (line,) = ends(ranks[:1], within=TIMEOUT_S + 15)
    assert line.startswith("train.py: error: rank 1 is dead, stopped, or cut off")


HANG = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from loop.heartbeat import Heartbeat, is_lost_peer
dist.init_process_group("gloo", timeout=timedelta(seconds=2))
with Heartbeat(dist.get_rank(), 3) as heartbeat:
    if dist.get_rank() == 1:
        time.sleep(60)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        assert is_lost_peer(error)
        said = heartbeat.accuse()
        if said:
            print(said, file=sys.stderr)
        sys.exit(1)
"""


def test_a_rank_that_hangs_is_told_from_one_that_is_dead(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [PYTHON, "-c", HANG], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3", "RANK": str(rank)},
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        said = ranks[0].communicate(timeout=40)[1] + ranks[2].communicate(timeout=40)[1]
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    (line,) = [line for line in said.splitlines() if "rank 1" in line]
    assert line == "rank 1 is alive, but does not come to where the others wait: it hangs"


def test_a_run_folder_that_is_deleted_is_said_at_once(tmp_path: Path) -> None:
    with job(tmp_path, 2) as ranks:
        (tmp_path / "run").rename(tmp_path / "gone")  # at once, whatever is being written in it
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        first, *others = ends(ranks, within=15)
    assert first.startswith("train.py: error: the run cannot be saved: ")
    assert all("rank 1 lost rank 0" in line for line in others)  # no launcher kept the word that had been said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A disk of a megabyte at tmp_path/disk; the fixture's value remounts it with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True, capture_output=True)

    try:
        mount("size=1m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not permitted here")
    yield mount
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(("fault", "said"), [("full", "No space left on device"), ("ro", "Read-only file system")])
def test_a_disk_that_is_full_or_read_only_ends_the_run_with_the_last_checkpoint_kept(
    tmp_path: Path, small_disk: Callable[[str], None], fault: str, said: str
) -> None:
    disk = tmp_path / "disk"
    with job(disk, 2, "--checkpoint-every", "5") as ranks:
        if fault == "full":
            (disk / "ballast").write_bytes(b"")
            with (disk / "ballast").open("ab", buffering=0) as ballast:
                try:
                    while True:
                        ballast.write(bytes(4096))
                except OSError:
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro,force", str(disk)], check=False, capture_output=True)
            if (Path("/proc/mounts").read_text()).count(f"{disk} tmpfs ro") == 0:
                pytest.skip("a file system in use cannot be made read-only here")
        line, *_ = ends(ranks, within=20)
    assert said in line
    assert "is kept: --resume auto goes on" in line


def test_torchrun_restarts_a_run_that_goes_on_bit_for_bit(tmp_path: Path) -> None:
    flags = [
        "--train-examples",
        "3000",
        "--epochs",
        "12",
        "--net",
        "mlp",
        "--log-every",
        "5",
        "--checkpoint-every",
        "5",
    ]
    how = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2", "train.py"]
    assert launch(how, tmp_path, *flags, "--run-name", "whole").returncode == 0
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # pytorch#135712: else ranks find the last attempt's
    process = start(how, tmp_path, *flags, "--run-name", "cut", "--resume", "auto", **fresh_store)
    rows = tmp_path / "cut" / "metrics.jsonl"
    while not (rows.exists() and rows.read_bytes().count(b"\n") > 6):
        time.sleep(0.02)
    victim = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
    victim.kill()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "going on from" in out
    assert soak.compare(tmp_path / "cut", tmp_path / "whole") == []


def test_an_occupied_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = launch([PYTHON, "train.py"], tmp_path, **environ)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
    assert f"the ranks cannot join each other at 127.0.0.1:{port}" in line
    assert not list(tmp_path.iterdir())
