"""Starting train.py as a user does, and reading what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from tests.forks import Forked

PYTHON = sys.executable
RANKS = """
import os, runpy, socket, sys

world_size, program = sys.argv[1:3]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": world_size}
pids = []
for rank in map(str, range(int(world_size))):
    pids.append(os.fork())
    if pids[-1] == 0:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        sys.argv = sys.argv[2:]
        runpy.run_path(program, run_name="__main__")
        sys.exit()
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


def forked_ranks(world_size: int) -> list[str]:
    """A launch of so many ranks that needs no launcher, and so none of its imports."""
    return [PYTHON, "-c", RANKS, str(world_size), "train.py"]


LAUNCHES = {
    "python": [PYTHON, "train.py"], "train.sh, 2 ranks": ["bash", "scripts/train.sh"], "3 ranks": forked_ranks(3),
}  # fmt: skip


def environment(**environ: str) -> dict[str, str]:
    """One thread, no GPU, no W&B, unless `environ` says otherwise ('': unset)."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": sys.prefix, "WANDB_MODE": "disabled"}
    return {key: value for key, value in (env | environ).items() if value or key == "CUDA_VISIBLE_DEVICES"}


def start(how: list[str], out: Path, *flags: str, **environ: str) -> subprocess.Popen[str]:
    """Start a launch in the `environment`."""
    command, env = [*how, *flags, "--out", str(out)], environment(**environ)
    if how[0] == PYTHON:
        return Forked(command, env)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=env)


def free_port() -> str:
    """A port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a launch outright: launcher, ranks, and W&B's service."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()


@contextlib.contextmanager
def ranks_of(commands: list[list[str]]) -> Iterator[list[Forked]]:
    """Start a command for each rank, with a store that is this process's, as it is the launcher's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [
        Forked(command, environment(**environ, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank, command in enumerate(commands)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launch's ranks, in rank order; without a launcher, the process itself."""
    ranks = {int(c.environ()["RANK"]): c.pid for c in psutil.Process(process.pid).children() if "RANK" in c.environ()}
    return [ranks[rank] for rank in sorted(ranks)] or [process.pid]


def launch(how: list[str], out: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a launch to its end."""
    process = start(how, out, *flags, **environ)
    try:
        stdout, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_for_rows(process: subprocess.Popen[str], out: Path, count: int, run: str = "*") -> Path:
    """Wait until a run under `out` has so many rows; return its folder. The process must not end before."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for rows in out.glob(f"{run}/metrics.jsonl"):
            if rows.read_bytes().count(b"\n") >= count:
                return rows.parent
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return pytest.fail(f"no {count} rows within a minute")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without the clock's."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
