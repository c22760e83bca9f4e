r"""Train a grid: every flag of train.py may be given several values, and every combination is a run of one study.

    python -m scripts.sweep --group first-look --world-size 1 2 --reduction mean sum --normalize global rank \
        --tail spread ragged pad --epochs 3
    python -m scripts.compare --group first-look

All runs of one world size share a launch: imports and process group are paid once. A second call goes on where the
first was stopped: finished runs are skipped, an unfinished one is put aside and trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from loop.config import InputError, parse
from loop.fetch import provide

ROOT = Path(__file__).parent.parent
POLL_S = 0.2


class Planned(NamedTuple):
    """A run to be: its ranks, its command line, its folder."""

    world_size: int
    line: list[str]
    folder: Path


def grid(flags: list[str]) -> list[list[str]]:
    """Return a command line for each combination of the flags' values; --tags, which takes several, is no axis."""
    starts = [i for i, word in enumerate(flags) if word.startswith("--")]
    axes = []
    for start, end in itertools.pairwise([*starts, len(flags)]):
        flag, *values = flags[start:end]
        several = len(values) > 1 and flag != "--tags"
        axes.append([[flag, value] for value in values] if several else [flags[start:end]])
    return [list(itertools.chain(*choice)) for choice in itertools.product(*axes)]


def plan(flags: list[str], world_sizes: list[int], group: str) -> list[Planned]:
    """Return the study's runs, each checked as train.py would, and named after its mode and whatever else varies.

    Raises InputError for the first run that train.py would refuse.
    """
    lines = grid(flags)
    runs = []
    for world_size, line in itertools.product(world_sizes, lines):
        config = parse(line)
        config.validate()
        config.shards(config.training_size(provide(config, fetching=True)), world_size)
        varied = [word.lstrip("-") for word in line if not all(word in other for other in lines)]
        told = config.default_run_name(world_size)
        name = "-".join([group, told, *(word for word in varied if word not in told.split("-"))])
        runs.append(Planned(world_size, [*line, "--group", group, "--run-name", name], config.out / name))
    return runs


def put_aside(run: Planned) -> None:
    """Move what an interrupted sweep left of a run out of the study's way."""
    if run.folder.exists():
        aside = run.folder.parent / ".unfinished" / f"{run.folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.parent.mkdir(exist_ok=True)
        run.folder.rename(aside)


def is_finished(run: Planned) -> bool:
    """Whether the run is there, whole. Raises InputError where a finished run of this name had other flags."""
    if not (run.folder / "summary.json").exists():
        return False
    made_by = json.loads((run.folder / "config.json").read_text())["argv"][1:]
    if made_by != run.line:
        raise InputError(f"{run.folder} was made with other flags ({' '.join(made_by)}): choose another --group")
    return True


def launch(world_size: int, runs: list[Planned], log: Path, bar: tqdm[None]) -> int:
    """Train the runs of one world size, one after the other, in one launch; return its exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as lines, log.open("w") as output:
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
            while process.poll() is None or any((run.folder / "summary.json").exists() for run in waiting):
                for run in [run for run in waiting if (run.folder / "summary.json").exists()]:
                    waiting.remove(run)
                    bar.update()
                time.sleep(POLL_S)
        except KeyboardInterrupt:  # the ranks got it, too, and stop together
            process.wait()
        return process.returncode


def work(lines: list[list[str]]) -> int:
    """Train on this rank, one run after the other; return the first exit code that is not 0."""
    import train

    for line in lines:
        sys.argv = ["train.py", *line]
        if exit_code := train.train(parse(line)):
            return exit_code
    return 0


def main() -> int:
    """Plan, skip what is finished, launch the rest, world size by world size."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag goes to train.py; given several values, it is an axis of the grid.",
        allow_abbrev=False,
    )
    parser.add_argument("--group", help="name of the study")
    parser.add_argument("--world-size", type=int, nargs="+", default=[1], metavar="W", help="ranks, on this machine")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.worker:
        return work(json.loads(args.worker.read_text()))
    try:
        if args.group is None:
            raise InputError("--group NAME is needed: it is what the study is found by")
        runs = plan(flags, args.world_size, args.group)
        todo = [run for run in runs if not is_finished(run)]
        for run in todo:
            put_aside(run)
    except InputError as error:
        print(f"scripts.sweep: error: {error}", file=sys.stderr)
        return 2
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", dynamic_ncols=True) as bar:
        for world_size in dict.fromkeys(run.world_size for run in todo):
            mine = [run for run in todo if run.world_size == world_size]
            log = mine[0].folder.parent / f"{args.group}-w{world_size}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            if exit_code := launch(world_size, mine, log, bar):
                print(f"scripts.sweep: stopped with {exit_code}; see {log}; the same call goes on", file=sys.stderr)
                return exit_code
    print(f"{len(runs)} runs in {runs[0].folder.parent}; to compare: python -m scripts.compare --group {args.group}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
