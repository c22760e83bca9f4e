"""Kill ranks or launcher at random, go on by --resume auto, hold the end bit for bit against a run that nobody killed.

    python -m scripts.soak --kills 50 --world-size 2
    python -m scripts.soak --kills 10 --world-size 3 --seed 7 -- --net lenet

Each round sends SIGKILL, at a random moment of its start, its training or its saving, to one rank or to the launcher
(python itself where W = 1), waits until every process of it is gone, and starts the same command again. The run after
the last kill goes to its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
from tqdm import tqdm

from loop.config import InputError
from scripts.command import command

ROOT = Path(__file__).parent.parent
GONE_S = 60  # by when the other processes of a launch have ended after a kill


def launch_line(world_size: int, flags: Sequence[str]) -> list[str]:
    """Return the command line of a launch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    return [sys.executable, *(launcher if world_size > 1 else []), str(ROOT / "train.py"), *flags]


def launch(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a launch, one thread a rank, its output going to a file."""
    with log.open("ab") as output:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environ, cwd=ROOT)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the process and all that it has started."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ranks(members: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return those that are ranks of a launch."""
    found = []
    for member in members:
        with contextlib.suppress(psutil.Error):
            if "LOCAL_RANK" in member.environ():
                found.append(member)
    return found


def kill(process: subprocess.Popen[bytes], after: float, chance: random.Random) -> str | None:
    """Kill a rank or the launcher after so many seconds; return which, None if the run had ended before.

    Raises TimeoutError where processes outlive the kill for GONE_S seconds.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
        return None
    members = family(process)
    victim = chance.choice([*ranks(members[1:]), *members[:1]])
    is_launcher = victim.pid == process.pid
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    members += [child for child in family(process) if child not in members]
    deadline = time.monotonic() + GONE_S
    process.wait(GONE_S)
    _, alive = psutil.wait_procs(members[1:], max(0, deadline - time.monotonic()))
    if alive:
        raise TimeoutError(f"{len(alive)} process(es) outlived the kill of {victim.pid} by {GONE_S} s")
    return "launcher" if is_launcher else "rank"


def rows(run: Path) -> list[dict[str, Any]]:
    """Return a run's rows, without the clock's."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


def compare(run: Path, whole: Path) -> list[str]:
    """Return what of a run differs from the uninterrupted one."""
    model = "model.safetensors"
    same = {"weights": (run / model).read_bytes() == (whole / model).read_bytes(), "rows": rows(run) == rows(whole)}
    return [what for what, equal in same.items() if not equal]


def soak(flags: Flags, out: Path) -> list[str]:
    """Kill and go on; return what differs in the end. Says what it did."""
    chance = random.Random(flags.seed)
    base = [*flags.train, "--out", str(out), "--checkpoint-every", str(flags.checkpoint_every)]
    log = out / "soak.log"
    started = time.monotonic()
    whole = launch(launch_line(flags.world_size, [*base, "--run-name", "whole"]), log)
    if whole.wait():
        raise RuntimeError(f"the uninterrupted run failed:\n{log.read_text()[-2000:]}")
    seconds = time.monotonic() - started
    words = launch_line(flags.world_size, [*base, "--run-name", "cut", "--resume", "auto", "--ddp-timeout", "20"])
    killed: Counter[str] = Counter()
    finished = 0
    with tqdm(total=flags.kills, unit="kill", dynamic_ncols=True) as bar:
        while killed.total() < flags.kills:
            process = launch(words, log)
            victim = kill(process, chance.uniform(0.1, 1) * seconds, chance)
            if victim is None:
                if process.returncode:
                    raise RuntimeError(f"a run that nobody killed failed:\n{log.read_text()[-2000:]}")
                finished += 1
                differs = compare(out / "cut", out / "whole")
                if differs:
                    return differs
                (out / "cut").rename(out / f"cut-{finished}")
                continue
            killed[victim] += 1
            bar.update()
    if launch(words, log).wait():
        raise RuntimeError(f"the last run failed:\n{log.read_text()[-2000:]}")
    print(
        f"W = {flags.world_size}: {killed['rank']} kills of ranks and {killed['launcher']} of the launcher in "
        f"{time.monotonic() - started:.0f} s; {finished + 1} run(s) went through to the end"
    )
    return compare(out / "cut", out / "whole")


@dataclass(frozen=True)
class Flags:
    """The flags."""

    train: tyro.conf.Positional[tuple[str, ...]] = ("--net", "mlp", "--epochs", "3", "--train-examples", "20000")
    """Flags of train.py, after --."""
    kills: int = 50
    """How many times ranks or launcher are killed."""
    world_size: int = 2
    """Ranks, W."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the moments and the victims."""


@command
def main(flags: Flags) -> int:
    """Soak; return 0 where every run that ended was bit-equal to the uninterrupted one."""
    if min(flags.kills, flags.world_size, flags.checkpoint_every) < 1:
        raise InputError("--kills, --world-size and --checkpoint-every must be at least 1")
    with tempfile.TemporaryDirectory() as out:
        try:
            differs = soak(flags, Path(out))
        except (RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
            print(f"scripts.soak: error: {error}", file=sys.stderr)
            return 1
    print(f"not as without a kill: {', '.join(differs)}" if differs else "bit-equal to the run that nobody killed")
    return int(bool(differs))


if __name__ == "__main__":
    sys.exit(main())
