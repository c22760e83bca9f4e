r"""Train a grid: every flag of train.py may be given several values, and every combination is a run of one study.

    python -m scripts.sweep --group first-look --world-size 1 2 --reduction mean sum --normalize global rank \
        --tail spread ragged pad --epochs 3
    python -m scripts.compare --group first-look

All runs of one world size share a launch: imports and process group are paid once. A second call goes on where the
first was stopped: finished runs are skipped, an unfinished one is put aside and trained again. A run that fails, since
its loss is not finite or by its audit, is recorded and named, and the others are trained; the exit code is then 1.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from loop.config import Config, InputError, check_run_name, parse
from loop.run.fetch import ensure_dataset
from loop.run.folder import FAILED
from loop.run.resume import MAY_CHANGE_ON_RESUME
from loop.run.run import Run
from scripts.command import command

ROOT = Path(__file__).parent.parent
POLL_S = 0.2
IN_DEFAULT_NAME = ("--reduction", "--normalize", "--tail", "--batch-size", "--virtual-ranks")


class Planned(NamedTuple):
    """A run to be: its ranks, its configuration, and the command line that asks for it."""

    world_size: int
    config: Config
    line: list[str]

    @property
    def folder(self) -> Path:
        """Where the run will live."""
        return self.config.out / str(self.config.run_name)

    @property
    def launch_key(self) -> tuple[int, str, bool, bool]:
        """What runs of one launch share: the ranks are joined, and torch is set up, once.

        That is for one device and precision, and with or without equal bits on GPUs.
        """
        return self.world_size, self.config.mixed_precision, self.config.cpu, self.config.virtual_ranks > 0


def grid(flags: list[str]) -> list[dict[str, list[str]]]:
    """Return the product of the flags' values, each choice as {flag: its words}; --tags takes several and is no axis.

    Raises InputError for words before the first flag.
    """
    starts = [i for i, word in enumerate(flags) if word.startswith("--")]
    if flags and starts[:1] != [0]:
        raise InputError(f"{flags[0]}: what flag does this belong to?")
    axes = []
    for start, end in itertools.pairwise([*starts, len(flags)]):
        flag, *values = flags[start:end]
        several = len(values) > 1 and flag != "--tags"
        axes.append([(flag, [value]) for value in values] if several else [(flag, values)])
    return [dict(choice) for choice in itertools.product(*axes)]


def plan(flags: list[str], world_sizes: list[int], group: str) -> list[Planned]:
    """Return the study's runs, each checked as train.py would, and named after its mode and whatever else varies.

    Raises InputError for the first run that train.py would refuse.
    """
    choices = grid(flags)
    varied = [flag for flag in choices[0] if len({tuple(choice[flag]) for choice in choices}) > 1]
    runs = []
    for world_size, choice in itertools.product(world_sizes, choices):
        words = [word for flag, values in choice.items() for word in (flag, *values)]
        config = replace(parse(words), run_name=None)
        config.validate()
        config.shards(ensure_dataset(config, fetching=True).examples, world_size)
        more = [flag.lstrip("-") + "".join(choice[flag]) for flag in varied if flag not in IN_DEFAULT_NAME]
        if config.virtual_ranks:
            more.append(f"w{world_size}")  # which the default name leaves out
        name = "-".join([group, config.default_run_name(world_size), *more])
        check_run_name(name)
        line = [*words, "--group", group, "--run-name", name]
        runs.append(Planned(world_size, replace(config, group=group, run_name=name), line))
    return runs


def is_finished(run: Planned) -> bool:
    """Whether the run is there, whole or failed. Raises InputError where a finished run of this name was another's."""
    if not has_ended(run):
        return False
    made_by = asdict(parse(json.loads((run.folder / "config.json").read_text())["argv"][1:]))
    may_change = MAY_CHANGE_ON_RESUME - {"epochs"}  # as when a run was gone on with by hand
    different = [
        name for name, value in asdict(run.config).items() if made_by[name] != value and name not in may_change
    ]
    if different:
        change = ", ".join(different)
        raise InputError(f"{run.folder} was made with another {change}: choose another --group, or move it away")
    return True


def has_ended(run: Planned) -> bool:
    """Whether the run has come to its own end, good or bad."""
    return any((run.folder / name).exists() for name in ("summary.json", FAILED))


def put_aside(run: Planned) -> None:
    """Move what an interrupted sweep left of a run out of the study's way."""
    if run.folder.exists():
        aside = run.folder.parent / ".unfinished" / f"{run.folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.parent.mkdir(exist_ok=True)
        run.folder.rename(aside)


def launch(runs: list[Planned], log: Path, bar: tqdm[None]) -> int:
    """Train runs that can share a launch, one after the other; return its exit code."""
    world_size = runs[0].world_size
    with tempfile.NamedTemporaryFile("w", suffix=".json") as lines, log.open("a") as output:
        json.dump([run.line for run in runs], lines)
        lines.flush()
        worker = ["-m", "scripts.sweep", "--worker", lines.name]
        if world_size > 1:
            settings = ["--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", str(world_size)]
            worker = ["-m", "accelerate.commands.launch", *settings, *worker]
        threads = max(1, (os.cpu_count() or 1) // world_size)
        process = subprocess.Popen(
            [sys.executable, *worker],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
        )
        waiting = list(runs)
        try:
            while True:
                ended = process.poll() is not None
                for run in filter(has_ended, list(waiting)):
                    waiting.remove(run)
                    bar.update()
                if ended:
                    return process.returncode
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            process.terminate()
            return process.wait() or 130


def work(lines: list[list[str]]) -> int:
    """Train on this rank, one run after the other, whichever fail; return the exit code of one that is stopped."""
    from train import fit

    for line in lines:
        sys.argv = ["train.py", *line]
        config = parse(line)
        with Run(config) as run:
            fit(config, run)
        if run.exit_code and not run.failed:
            return run.exit_code
    return 0


@dataclass(frozen=True)
class Flags:
    """The flags; every other one goes to train.py, and given several values is an axis of the grid."""

    group: str | None = None
    """Name of the study."""
    world_size: tuple[int, ...] = (1,)
    """Ranks, on this machine."""
    worker: Path | None = None
    """Given by this program to the ranks it starts: train the runs in this file."""


@command
def main(flags: Flags, others: list[str]) -> int:
    """Plan, skip what is finished, launch the rest, world size by world size."""
    if flags.worker:
        return work(json.loads(flags.worker.read_text()))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: end the launch, too
    if flags.group is None:
        raise InputError("--group NAME is needed: it is what the study is found by")
    runs = plan(others, list(flags.world_size), flags.group)
    out = runs[0].config.out
    exit_code = run_all(runs, out, flags.group)
    if exit_code:
        return exit_code
    failed = [run for run in runs if (run.folder / FAILED).exists()]
    for run in failed:
        reason = json.loads((run.folder / FAILED).read_text())["reason"]
        print(f"scripts.sweep: {run.folder} has failed: {reason}", file=sys.stderr)
    print(f"{len(runs)} runs in {out}; to compare: python -m scripts.compare --group {flags.group} --out {out}")
    if list(out.glob(f"{flags.group}-*/wandb/offline-run-*")):
        print(f"W&B has those kept offline after: wandb sync {out}/{flags.group}-*/wandb/offline-run-*")
    return 1 if failed else 0


def run_all(runs: list[Planned], out: Path, name: str) -> int:
    """Train what is not finished, a launch a world size; return 0, or the exit code of the launch that failed.

    Raises InputError where another sweep of this name is at work in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / f".{name}.lock", timeout=0):
            return _run_unfinished(runs, out, name)
    except Timeout:
        raise InputError(f"another sweep of {name} is at work in {out}") from None


def _run_unfinished(runs: list[Planned], out: Path, name: str) -> int:
    todo = [run for run in runs if not is_finished(run)]
    for run in todo:
        put_aside(run)
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", dynamic_ncols=True) as bar:
        for key in dict.fromkeys(run.launch_key for run in todo):
            log = out / f"{name}-w{key[0]}.log"
            if exit_code := launch([run for run in todo if run.launch_key == key], log, bar):
                print(f"scripts.sweep: stopped with {exit_code}; see {log}; the same call goes on", file=sys.stderr)
                return exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
