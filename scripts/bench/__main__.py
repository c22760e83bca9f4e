"""Time this project's training loop against others, interleaved, in one run: a table, and JSON.

    python -m scripts.bench --json bench.json                    everything on the CPU, in a quarter of an hour
    python -m scripts.bench --parts loops --nets softmax --world-sizes 1 --rounds 30
    python -m scripts.bench --device cuda                        the same on GPUs; what needs more of them is left out
    python -m scripts.bench --cost wandb --pairs 32              what W&B offline costs an epoch
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m scripts.bench --cost global --net mlp      the same on two ranks

Each number of ranks is a launch of its own, with one thread a rank where there are several. scripts/bench/loops.py has
the loops. Ratios are ratios of medians, over epochs taken in turns; an interval is of the mean log ratio of pairs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from loop.config import InputError
from loop.run.fetch import TRAINING_EXAMPLES
from loop.run.launch import launched_rank, launched_world_size
from scripts.command import command
from scripts.machine import processor, versions

Net = Literal["softmax", "mlp", "lenet"]
Part = Literal["loops", "memory", "startup", "costs"]
Cost = Literal["audit", "checkpoint", "wandb", "global", "virtual-ranks"]
COSTS: dict[
    Cost, tuple[list[str], list[str], Net, int]
] = {  # flags of train.py with what may cost, and without; on what net and how many ranks the full run measures it
    "audit": (["--audit-every", "1"], ["--audit-every", "0"], "softmax", 2),
    "checkpoint": ([], [], "mlp", 1),  # the one at an epoch's end, beside the epoch, in the same run
    "wandb": (["--wandb", "offline"], ["--wandb", "disabled"], "softmax", 1),
    "global": (["--normalize", "global"], ["--normalize", "rank"], "softmax", 2),
    "virtual-ranks": (["--virtual-ranks", "8"], ["--virtual-ranks", "0"], "softmax", 2),
}
PAIRS = {"global": 32, "audit": 12}  # of runs, where a full run takes more than 6
PACKAGES = ("torch", "torchvision", "accelerate", "lightning", "numpy")
IMPORTS = ("import torch", "import torch, torchvision, accelerate")
BENCH = [sys.executable, "-m", "scripts.bench"]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Flags:
    """The flags."""

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    nets: tuple[Net, ...] = get_args(Net)
    """On which nets."""
    world_sizes: tuple[int, ...] = (1, 2)
    """Numbers of ranks."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the ranks train on."""
    threads: int | None = None
    """Threads of a rank. Default: one process has as many as torch takes, several have 1 each."""
    rounds: int = 12
    """Epochs of each loop in memory (lenet: half)."""
    slow_rounds: int = 3
    """Epochs of each loop over a DataLoader (others than softmax: one)."""
    workers: tuple[int, ...] = (0, 2, 4)
    """Workers of the book's DataLoader."""
    examples: int | None = None
    """Examples of an epoch. Default: all."""
    tries: int = 3
    """Launches of each kind, to time start-up."""
    json: Path | None = None
    """Write the figures, with all single times, to this file."""
    cost: Cost | None = None
    """Only train pairs of runs with and without this, on these ranks."""
    pairs: int | None = None
    """Pairs of runs, for a cost. Default: 32 with --cost and for `global`, otherwise 6 or 12."""
    net: Net = "softmax"
    """The net of --cost."""
    time: Net | None = None
    """Given by this program to the ranks it starts: time the loops of a net."""
    memory: str | None = None
    """Likewise: measure the memory of a loop."""

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        least = {"rounds": 1, "slow_rounds": 1, "tries": 1, "threads": 1, "examples": 256, "pairs": 5}
        for name, smallest in least.items():
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise InputError(f"--{name.replace('_', '-')} must be at least {smallest}")
        if min(self.workers, default=0) < 0:
            raise InputError("--workers must be at least 0")
        if min(self.world_sizes) < 1 or any(256 % world_size for world_size in self.world_sizes):
            raise InputError("--world-sizes must divide the batch of 256: all loops take the same")
        if self.examples and self.examples > TRAINING_EXAMPLES:
            raise InputError(f"--examples {self.examples}: there are {TRAINING_EXAMPLES}")
        if self.json and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise InputError(f"--json {self.json}: not a file in a folder that there is")

    def needs(self) -> list[tuple[int, str]]:
        """Return how many ranks each thing to be measured takes."""
        parts = ", ".join(part for part in self.parts if part != "costs")
        costs = [(COSTS[name][-1], f"the cost of {name}") for name in COSTS if "costs" in self.parts]
        return [(ranks, parts) for ranks in self.world_sizes if parts] + costs

    def left_out(self) -> list[str]:
        """Return what is not measured, as there are too few GPUs. Raises InputError where nothing would be."""
        if self.device == "cpu":
            return []
        measuring = self.cost or self.time or self.memory  # on these ranks
        ranks = launched_world_size() if measuring else min(ranks for ranks, _ in self.needs())
        if not self.fits(ranks):
            raise InputError(f"--device cuda with {ranks} rank(s): {count_gpus()} GPU(s) here")
        return [f"{what} on {ranks} ranks" for ranks, what in self.needs() if not self.fits(ranks)]

    def fits(self, world_size: int) -> bool:
        """Whether there are GPUs for so many ranks, where they are asked for."""
        return self.device == "cpu" or world_size <= count_gpus()


def count_gpus() -> int:
    """Return how many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()


@command
def main(flags: Flags) -> None:
    """Measure part after part, in processes of their own; print tables, write JSON."""
    flags.check()
    left_out = flags.left_out()
    if flags.cost or flags.time or flags.memory:
        measured = cost(flags) if flags.cost else time_loops(flags) if flags.time else memory(flags)
        if flags.json and os.environ.get("RANK", "0") == "0":
            flags.json.write_text(json.dumps(measured))
        return
    figures: Figures = environment(flags.device) | {"left_out": left_out}

    def keep() -> None:
        figures["load_after"] = os.getloadavg()[0]
        if flags.json:
            flags.json.write_text(json.dumps(figures, indent=1) + "\n")

    print("{device}, {cores} cores, load {load}, {versions}".format_map(figures), flush=True)
    if left_out:
        print(f"left out, as there are too few GPUs: {'; '.join(left_out)}", flush=True)
    if "loops" in flags.parts:
        figures["loops"] = []
        for world_size in filter(flags.fits, flags.world_sizes):
            for net in flags.nets:
                figures["loops"].append(in_ranks(world_size, flags, "--time", net))
                print(loops_in_words(figures["loops"][-1]), flush=True)
                keep()
    if "memory" in flags.parts:
        figures["memory"] = [
            in_ranks(world_size, flags, "--memory", loop)
            for world_size in filter(flags.fits, flags.world_sizes)
            for loop in ("bare", "ours")
        ]
        print("\nresident memory of each rank, softmax")
        for figure in figures["memory"]:
            gpu = f", at most {max(figure['gpu_mb'])} MB on its GPU" if "gpu_mb" in figure else ""
            print(
                "  {loop}, {world_size} rank(s): {mb} MB, before the training {mb_before} MB".format_map(figure) + gpu
            )
    if "startup" in flags.parts:
        print("\nseconds from the command to the end of the first step, or of the import", flush=True)
        figures["startup"] = startup(flags)
        for command, seconds in figures["startup"].items():
            print(f"  {command:<62}{spread(seconds)}", flush=True)
        keep()
    if "costs" in flags.parts:
        print("\nratio of epoch times with and without, 95 % interval", flush=True)
        figures["costs"] = []
        for name, (*_, net, world_size) in COSTS.items():
            if not flags.fits(world_size):
                continue
            told = ("--cost", name, "--net", net, "--pairs", str(flags.pairs or PAIRS.get(name, 6)))
            figures["costs"].append(in_ranks(world_size, flags, *told))
            keep()
    keep()


def environment(device: str) -> Figures:
    """Return what the figures depend on."""
    name = processor()
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    return {
        "versions": versions(PACKAGES), "device": name, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv[1:],
    }  # fmt: skip


def in_ranks(world_size: int, args: Flags, *flags: str) -> Figures:
    """Run this program on so many ranks to measure one thing; return its figures."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [sys.executable, *(launcher if world_size > 1 else []), *BENCH[1:], *flags]
    command += ["--device", args.device, "--rounds", str(args.rounds), "--slow-rounds", str(args.slow_rounds)]
    command += ["--workers", *map(str, args.workers)]
    command += ["--examples", str(args.examples)] if args.examples else []
    threads = args.threads or (1 if world_size > 1 else None)
    environ = os.environ | {"KINETO_LOG_LEVEL": "99"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures.json"
        subprocess.run([*command, "--json", str(written)], env=environ, check=True)
        figures: Figures = json.loads(written.read_text())
    return figures


def join(args: Flags, net: Any) -> Any:
    """Join the ranks that were started; return the loops' Setting."""
    from accelerate import Accelerator

    from loop.config import Config
    from loop.run.fetch import ensure_dataset
    from loop.run.launch import keep_freed_memory
    from scripts.bench.loops import Setting

    keep_freed_memory()  # for all loops alike
    accelerator = Accelerator(cpu=args.device == "cpu")
    config = Config(net=net, train_examples=args.examples)
    ensure_dataset(config, fetching=accelerator.is_local_main_process)
    return Setting(accelerator, config)


def time_loops(args: Flags) -> Figures:
    """Time the loops of a net; then profile an epoch of ours, and split its steps."""
    import torch

    from scripts.bench.loops import IN_MEMORY, loops_of, split_epoch, take_turns

    setting = join(args, args.time)
    loops = loops_of(setting, args.workers)
    fast, slow = args.rounds, args.slow_rounds
    if args.time != "softmax":
        fast, slow = -(-fast // 2) if args.time == "lenet" else fast, min(slow, 1)
    seconds = take_turns(setting, loops, {name: fast if name in IN_MEMORY else slow for name in loops})
    steps = len(setting.shards.steps)
    split = split_epoch(setting)
    return {
        "net": args.time, "world_size": setting.world_size, "batch_size": setting.config.batch_size, "steps": steps,
        "examples": setting.shards.examples, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "seconds": seconds, "split_us": {part: micros / steps for part, micros in split.items()},
    }  # fmt: skip


def memory(args: Flags) -> Figures:
    """Train two epochs of a loop; return each rank's resident memory before and after, or its GPU's peak."""
    import psutil
    import torch
    from accelerate.utils import gather_object

    from scripts.bench.loops import loops_of

    def resident() -> list[int]:
        return gather_object([psutil.Process().memory_info().rss // 2**20])  # type: ignore[no-any-return]

    setting = join(args, "softmax")
    figures = {"loop": args.memory, "world_size": setting.world_size, "mb_before": resident()}
    epoch = loops_of(setting, [])[str(args.memory)]()
    epoch()
    epoch()
    if args.device == "cuda":
        figures["gpu_mb"] = gather_object([torch.cuda.max_memory_allocated() // 2**20])
    return figures | {"mb": resident()}


def startup(args: Flags) -> dict[str, list[float]]:
    """Return how many seconds each command takes to its first step, or its import to its end, in turns."""
    bench = ["-m", "scripts.bench", "--first-step"]
    said = "; import os, time; os.write(1, f'done {time.time()}'.encode()); os._exit(0)"  # an exit takes a second, too
    commands = {f'python -c "{statement}"': [sys.executable, "-c", statement + said] for statement in IMPORTS}
    commands["python train.py"] = [sys.executable, *bench]
    for world_size in filter(args.fits, args.world_sizes):
        launch = f"accelerate launch --multi_gpu --num_processes {world_size}"
        if world_size > 1:
            commands[f"{launch} train.py"] = [sys.executable, "-m", "accelerate.commands.launch", *launch.split()[2:],
                                              *bench]  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    for _ in range(args.tries):
        for name, words in commands.items():
            with tempfile.TemporaryDirectory() as out:
                started = time.time()
                flags = ["--out", out, *(["--cpu"] if args.device == "cpu" else [])]
                flags = flags if "--first-step" in words else []
                done = subprocess.run([*words, *flags], env=environ, capture_output=True, text=True, check=True)
            times = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("done")]
            seconds[name].append(max(times) - started)
    return seconds


def first_step() -> None:
    """Be train.py with the flags that follow `--first-step`, and end after the first step, saying when that was."""
    sys.argv[1:] = sys.argv[sys.argv.index("--first-step") + 1 :]
    import train
    from loop.progress import Progress

    def end(*_: object) -> None:
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        os.write(1, f"done {time.time()}\n".encode())  # whole, beside other ranks
        os._exit(0)

    setattr(Progress, "after_cell", end)  # noqa: B010  # what the type checker would not have
    train.main()


def cost(args: Flags) -> Figures:
    """Train pairs of runs, with and without what may cost, in turn; print the ratio of their epoch times."""
    from loop.config import Config
    from loop.run.fetch import ensure_dataset
    from loop.run.launch import launched_local_rank

    ensure_dataset(Config(), fetching=launched_local_rank() == 0)
    assert args.cost
    with_it, without, *_ = COSTS[args.cost]
    pairs = args.pairs or 32
    seconds: list[list[float]] = [[], []]
    for i in range(pairs + 1):
        if args.cost == "checkpoint":
            epoch, save = train_once(args, [])
            found = [epoch + save, epoch]
        elif i % 2:
            found = [train_once(args, flags)[0] for flags in (with_it, without)]
        else:
            found = [train_once(args, flags)[0] for flags in (without, with_it)][::-1]
        if i:  # the first pair is a warm-up
            seconds[0].append(found[0])
            seconds[1].append(found[1])
    if launched_rank() > 0:
        return {}
    ratio, low, high = interval(seconds)
    words = " / ".join((" ".join(with_it) or "with the checkpoint", " ".join(without) or "without"))
    print(f"  {args.net}, {launched_world_size()} rank(s), {words}: {ratio:.3f} ({low:.3f} to {high:.3f}), n = {pairs}",
          flush=True)  # fmt: skip
    return {"cost": args.cost, "net": args.net, "world_size": launched_world_size(), "ratio": ratio,
            "interval": [low, high], "seconds": seconds}  # fmt: skip


def train_once(args: Flags, flags: Sequence[str]) -> tuple[float, float]:
    """Train for three epochs; return the median seconds of an epoch, and of a checkpoint at an epoch's end."""
    import train
    from loop.config import parse

    common = ["--epochs", "3", "--wandb", "disabled", "--net", args.net, *(["--cpu"] if args.device == "cpu" else [])]
    common += ["--train-examples", str(args.examples)] if args.examples else []
    with (
        tempfile.TemporaryDirectory() as out,
        Path(os.devnull).open("w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
        if train.train(parse([*common, *flags, "--out", out])):
            raise RuntimeError(f"a run with {' '.join(flags) or 'no flags'} failed")
        if launched_rank() > 0:
            return math.nan, math.nan
        (written,) = Path(out).glob("*/metrics.jsonl")
        rows = [row for row in map(json.loads, written.open()) if "time/epoch_s" in row]
    epochs = [row["time/epoch_s"] for row in rows]
    return statistics.median(epochs), statistics.median(row["time/checkpoint_s"] for row in rows[1:])


def interval(seconds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the geometric mean ratio of pairs, and the ends of its 95 % interval (Student's t)."""
    logs = [math.log(a / b) for a, b in zip(*seconds, strict=True)]
    freedom = len(logs) - 1
    t = 1.96 + 2.37 / freedom + 2.82 / freedom**2  # within 2 % of Student's from 4 degrees of freedom on
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - t * error), math.exp(mean + t * error)


def loops_in_words(figures: Figures) -> str:
    """Return a table of the loops of a net, and the split of a step of ours."""
    seconds: dict[str, list[float]] = figures["seconds"]
    reference = statistics.median(seconds["bare"])
    head = "{net}, batch {batch_size}, {world_size} rank(s) of {threads} thread(s), load {load:.1f}".format_map(figures)
    lines = [f"\n{head:<66}s an epoch      x bare"]
    for name, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
        lines.append(f"  {name:<30}{spread(times):>48}{statistics.median(times) / reference:>10.2f}")
    split = figures["split_us"]
    parts = ", ".join(f"{part} {micros:.0f}" for part, micros in split.items())
    return "\n".join([*lines, f"  a step of ours, on the host, under the profiler, µs: {parts}"])


def spread(times: Sequence[float]) -> str:
    """Return median, smallest, largest and number."""
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f}, n = {len(times)})"


if __name__ == "__main__":
    if "--first-step" in sys.argv:
        first_step()
    sys.exit(main())
