"""Starting train.py as a user does, and reading what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PYTHON = sys.executable
LAUNCHES = {
    "python": [PYTHON, "train.py"],
    "train.sh, 2 ranks": ["bash", "scripts/train.sh"],
    "torchrun, 3 ranks": [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "train.py"],
}


def start(how: list[str], out: Path, *flags: str, **environ: str) -> subprocess.Popen[str]:
    """Start a launch on the CPU, each rank on one thread, without W&B unless `environ` says otherwise ('': unset)."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": sys.prefix, "WANDB_MODE": "disabled"}
    return subprocess.Popen(
        [*how, *flags, "--out", str(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in (env | environ).items() if value or key == "CUDA_VISIBLE_DEVICES"},
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a launch outright: launcher, ranks, and W&B's service."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()


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


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without the clock's."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
