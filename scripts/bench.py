"""Time an epoch of softmax regression: the book's loop, a bare loop over tensors, and this project's, interleaved.

python -m scripts.bench                                      one process, and each loop's peak memory
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m scripts.bench    two ranks, against a bare DDP loop
    python -m scripts.bench --cost wandb --pairs 32                   what W&B offline costs an epoch
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import train
from loop.book import train_epoch_ch3
from loop.config import Config, parse
from loop.data import Split, TrainBatches, load
from loop.fetch import provide
from loop.launch import launched_rank, launched_world_size
from loop.nets import make_net
from loop.updater import make_updater

BATCH_SIZE = 256
COSTS = {  # flags of train.py with what may cost, and without
    "audit": (["--audit-every", "1"], ["--audit-every", "0"]),
    "global": (["--normalize", "global"], ["--normalize", "rank"]),
    "wandb": (["--wandb", "offline"], ["--wandb", "disabled"]),
}
Epoch = Callable[[], object]


def book(data_dir: Path) -> Epoch:
    """The book's own loop over torchvision's DataLoader, with its float(l) and per-example transform."""
    to_tensor = torchvision.transforms.ToTensor()
    data = torchvision.datasets.FashionMNIST(str(data_dir), train=True, transform=to_tensor)
    batches = DataLoader(data, BATCH_SIZE, shuffle=True)
    net, loss = make_net("softmax"), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def epoch() -> None:
        sums = [0.0, 0.0, 0.0]
        for X, y in batches:
            y_hat = net(X)
            l = loss(y_hat, y)
            optimizer.zero_grad()
            l.backward()
            optimizer.step()
            sums[0] += float(l.detach()) * len(y)
            sums[1] += float((y_hat.argmax(1) == y).sum())
            sums[2] += len(y)

    return epoch


def bare(split: Split, rank: int, world_size: int) -> Epoch:
    """A loop over tensors in memory, written the usual way; under DDP where there are ranks."""
    images, labels = split
    net: nn.Module = make_net("softmax")
    if world_size > 1:
        net = DistributedDataParallel(net)
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1)
    share = BATCH_SIZE // world_size

    def epoch() -> float:
        total = 0.0
        mine = torch.randperm(len(labels))[rank::world_size]
        for j in mine.split(share):
            l = loss(net(images[j].float().div_(255)), labels[j])
            optimizer.zero_grad()
            l.backward()
            optimizer.step()
            total += float(l.detach()) * len(j)
        return total / len(mine)

    return epoch


def ours(split: Split, accelerator: Accelerator) -> Epoch:
    """This project's loop, as train.py sets it up, but for the log."""
    config = Config(batch_size=BATCH_SIZE)
    net = accelerator.prepare(make_net("softmax"))
    shards = config.shards(len(split.labels), accelerator.num_processes)
    batches = TrainBatches(split, shards, rank=accelerator.process_index)
    updater = make_updater(accelerator, net, config)
    loss = nn.CrossEntropyLoss(reduction="none")
    return lambda: train_epoch_ch3(net, batches, loss, updater)


def cost(of: str, pairs: int, net: str) -> None:
    """Train pairs of runs, with and without what may cost, in turn; print the ratio of their epoch times."""
    seconds: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as out, Path(os.devnull).open("w") as devnull:
        for i in range(pairs + 1):
            for side in (0, 1) if i % 2 else (1, 0):
                folder = Path(out) / f"{i}-{side}"
                place = ["--out", out, "--run-name", folder.name]
                with contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
                    train.train(parse(["--epochs", "3", "--wandb", "disabled", "--net", net, *COSTS[of][side], *place]))
                if i and launched_rank() == 0:  # the first pair is a warm-up
                    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                    seconds[side].append(statistics.median(row["time/epoch_s"] for row in rows if "train/loss" in row))
    if launched_rank() == 0:
        logs = [math.log(a / b) for a, b in zip(*seconds, strict=True)]
        mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(pairs)
        low, high = (math.exp(mean + t * error) for t in (-2.04, 2.04))  # Student's t, some 30 degrees of freedom
        sides = " / ".join(" ".join(flags) for flags in COSTS[of])
        print(f"{net}, {launched_world_size()} rank(s): {sides}, epoch time: {math.exp(mean):.3f}, "
              f"95 % from {low:.3f} to {high:.3f}, n = {pairs}")  # fmt: skip


def main() -> None:
    """Time the loops, each once in turn, and print medians and ratios; with --only, one epoch and its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="epochs of each loop")
    parser.add_argument("--only", choices=["bare", "ours"], help="run two epochs of this loop, print peak memory in MB")
    parser.add_argument("--cost", choices=COSTS, help="train pairs of runs with and without this instead")
    parser.add_argument("--pairs", type=int, default=32, help="of --cost; 30 or more")
    parser.add_argument("--net", choices=["softmax", "mlp", "lenet"], default="softmax", help="of --cost")
    args = parser.parse_args()
    if args.cost:
        cost(args.cost, args.pairs, args.net)
        return
    config = Config()
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    provide(config, fetching=accelerator.is_local_main_process)
    split, _ = load(config)

    loops: dict[str, Callable[[], Epoch]] = {
        "bare": lambda: bare(split, rank, world_size),
        "ours": lambda: ours(split, accelerator),
    }
    if args.only:
        epoch = loops[args.only]()
        epoch(), epoch()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    if world_size == 1:
        loops["book"] = lambda: book(config.data_dir)

    epochs = {name: make() for name, make in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(args.rounds + 1):
        for name, epoch in epochs.items():
            if name == "book" and round_ > 3:
                continue  # it is slow, and three rounds tell
            accelerator.wait_for_everyone()
            started = time.perf_counter()
            epoch()
            seconds[name] += [time.perf_counter() - started] if round_ else []  # the first is a warm-up
    if not accelerator.is_main_process:
        return
    print(f"softmax, batch {BATCH_SIZE}, {world_size} rank(s), {torch.get_num_threads()} thread(s) each, "
          f"{os.cpu_count()} cores, torch {torch.__version__}")  # fmt: skip
    reference = statistics.median(seconds["bare"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<6}{median:>8.3f} s an epoch (min {min(times):.3f}, max {max(times):.3f}, n = {len(times)})"
              f"{median / reference:>8.2f} x bare")  # fmt: skip
    if world_size == 1:
        for name in ("bare", "ours"):
            command = [sys.executable, "-m", "scripts.bench", "--only", name]
            peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            print(f"{name:<6}{peak:>8} MB peak memory")


if __name__ == "__main__":
    main()
