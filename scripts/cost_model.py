"""What a step costs, and what it would on thousands of ranks: a model, checked against this machine, then extended.

    python -m scripts.cost_model                    measures W = 1 to 4 here (under a minute), then extends
    python -m scripts.cost_model --alpha-us 5 --beta-gbs 50 --gradient-mb 1400 --compute-ms 300    another network

    step(W) = slots compute(B / W) + allreduce(W, bytes) + metrics + waiting(W)
    slots = max(1, W / cores): ranks share cores       waiting: for the slowest rank, and for a core to wake up on
    ring:  allreduce = 2 (W - 1) alpha + 2 (W - 1) / W bytes / beta     tree:  2 log2(W) alpha + 2 bytes / beta

A figure is a first quartile over single steps: on a machine that others use too, the quiet steps show what one costs.
The waiting is what the first net's step takes beyond the rest; the second net's step is then predicted.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

from loop.config import Config, InputError
from loop.effect import effect
from loop.parity import Ranks
from loop.shards import Shards, Tail
from scripts.command import command

NETS: tuple[Literal["softmax", "mlp"], ...] = ("softmax", "mlp")
BATCH, EXAMPLES, EPOCHS = 256, 8192, 9
SIZES = (24, 4096, 32_768, 262_144, 1_048_576)  # bytes to all-reduce; 24 are a metrics reduce
LOG_EVERY = 50
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
IMAGENET = 1_281_167
TAILS: tuple[Tail, ...] = ("ragged", "spread")


class Measured(NamedTuple):
    """Seconds on rank 0: a step by (net, batch), an all-reduce by bytes. gradients: bytes by net."""

    steps: dict[tuple[str, int], float]
    reduces: dict[int, float]
    gradients: dict[str, int]


def seconds(once: Callable[[], Any], times: int) -> float:
    """Return the time of a call, after one that does not count."""
    stamps = []
    for _ in range(times + 2):
        stamps.append(time.perf_counter())
        once()
    return first_quartile(stamps[1:])


def first_quartile(stamps: list[float]) -> float:
    """Return the first quartile of the times between neighbouring stamps."""
    return float(np.quantile(np.diff(stamps), 0.25))


def measure_rank() -> Measured:
    """Measure on this rank, under DDP even where it is the only one."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from loop.book import train_epoch_ch3
    from loop.data import Split, TrainBatches
    from loop.nets import make_net
    from loop.updater import make_updater

    dist.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    images = torch.randint(256, (EXAMPLES, 28, 28), dtype=torch.uint8)
    split, loss = Split(images, torch.randint(10, (EXAMPLES,))), nn.CrossEntropyLoss(reduction="none")
    found = Measured({}, {}, {})
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name in NETS:
        net = DistributedDataParallel(make_net(name))
        found.gradients[name] = sum(p.numel() * p.element_size() for p in net.parameters())
        updater = make_updater(accelerator, net, Config())
        for batch in (BATCH, BATCH // 2, BATCH // 3, BATCH // 4) if world_size == 1 else (BATCH,):
            batches = TrainBatches(split, Shards(EXAMPLES, batch, world_size), rank=rank)
            stamps: list[float] = []
            clock: Any = SimpleNamespace(after_cell=lambda *_, to=stamps: to.append(time.perf_counter()))
            for _ in range(EPOCHS + 1):
                train_epoch_ch3(net, batches, loss, updater, observers=[clock])
            found.steps[name, batch] = first_quartile(stamps[len(batches.shards.steps) :])
    for size in SIZES:
        found.reduces[size] = seconds(partial(dist.all_reduce, torch.zeros(size // 4)), 200)
    return found


def measure(world_size: int) -> Measured:
    """Start so many ranks here, and return what rank 0 measured."""
    with Ranks(world_size) as ranks:
        found: Measured = ranks.run(measure_rank, timeout=120)[0]
    return found


def ring(world_size: int, size: float, alpha: float, beta: float) -> float:
    """Return a ring all-reduce's seconds. size: bytes. alpha: seconds a hop. beta: bytes/s."""
    return 2 * (world_size - 1) * alpha + 2 * (world_size - 1) / world_size * size / beta


def tree(world_size: int, size: float, alpha: float, beta: float) -> float:
    """Return a tree all-reduce's seconds: up and down again, in pieces that follow each other."""
    return 2 * math.log2(world_size) * alpha + 2 * size / beta


def fit(world_size: int, reduces: dict[int, float]) -> tuple[float, float]:
    """Return the ring's (alpha, beta) that come closest, by least squares of the relative errors."""
    parts = [[ring(world_size, s, 1 / took, math.inf), ring(world_size, s, 0, took)] for s, took in reduces.items()]
    alpha, per_byte = np.linalg.lstsq(np.array(parts), np.ones(len(parts)), rcond=None)[0]
    return float(alpha), 1 / float(per_byte)


def check() -> None:
    """Print the model's step at W = 1 to 4 beside what was measured here."""
    worlds = {W: measure(W) for W in (1, 2, 3, 4)}
    network = {W: fit(W, found.reduces) for W, found in worlds.items() if W > 1}
    print(f"gloo on {CORES} cores; all-reduce measured (model), us:")
    for W, (alpha, beta) in network.items():
        pairs = [f"{s:,} B {t * 1e6:.0f} ({ring(W, s, alpha, beta) * 1e6:.0f})" for s, t in worlds[W].reduces.items()]
        print(f"  W = {W}: {', '.join(pairs)}: alpha {alpha * 1e6:.0f} us, beta {beta / 1e9:.2f} GB/s")
    columns = {"compute": 9, "all-reduce": 12, "metrics": 9, "waiting": 9, "model": 8, "measured": 10}
    print(f"\n{'ms a step':<9}{'W':>2}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    waiting: dict[int, float] = {}
    for name in NETS:
        lone = {batch: took for (net, batch), took in worlds[1].steps.items() if net == name}
        slope, fixed = np.polyfit(list(lone), list(lone.values()), 1)
        for W, found in worlds.items():
            alpha, beta = network.get(W, (0, math.inf))
            parts = [
                max(1, W / CORES) * float(fixed + slope * BATCH / W),
                ring(W, found.gradients[name], alpha, beta),
                ring(W, 24, alpha, beta) * (1 / LOG_EVERY + BATCH / EXAMPLES),
            ]
            took = found.steps[name, BATCH]
            parts.append(waiting.setdefault(W, took - sum(parts)))
            times = zip([*parts, sum(parts), took], columns.values(), strict=True)
            verdict = "tells the waiting" if name == NETS[0] else f"model {sum(parts) / took - 1:+.0%}"
            print(f"{name:<9}{W:>2}" + "".join(f"{1e3 * x:>{width}.2f}" for x, width in times) + f"   {verdict}")


def extend(alpha: float, beta: float, size: float, compute: float) -> None:
    """Print steps of a fixed share a rank, with nothing overlapped, on ever more ranks."""
    print(
        f"\nAssumed: alpha {alpha * 1e6:g} us a hop, beta {beta / 1e9:g} GB/s, {size / 1e6:g} MB of gradients, "
        f"{compute * 1e3:g} ms of compute on each rank"
    )
    print(f"{'W':>6}{'ring ms':>9}{'tree ms':>9}   step with the better")
    for W in (2**i for i in range(3, 13)):
        both = ring(W, size, alpha, beta), tree(W, size, alpha, beta)
        step = compute + min(both)
        share = f"{step * 1e3:.1f} ms, {min(both) / step:.0%} of it all-reduce"
        print(f"{W:>6}{both[0] * 1e3:>9.1f}{both[1] * 1e3:>9.1f}   {share}")
    bound = next((W for W in range(2, 10**6) if ring(W, size, alpha, beta) > compute), None)
    print(f"A ring takes longer than the compute from W = {bound} on." if bound else "A ring is never the longer part.")


def sampler() -> None:
    """Print what the order of an epoch and a rank's share of it cost."""
    print(f"\n{'N':>14}{'permutation':>13}{'its bytes, on every rank':>26}")
    for n in (60_000, IMAGENET, 20_000_000):
        took = seconds(partial(np.random.default_rng(0).permutation, n), 5)
        print(f"{n:>14,}{took:>11.4f} s{8 * n / 1e6:>23,.1f} MB")
    print(f"{10**9:>14,}{took * 50:>11.0f} s{8e3:>23,.1f} MB   (50 times the line above)")
    shards = Shards(IMAGENET, 32_768, 4096)
    walk = seconds(partial(_walk, shards), 20) / len(shards.steps)
    print(f"W = 4096: a rank finds its cell of a step in {walk * 1e6:.1f} us")


def _walk(shards: Shards) -> int:
    return sum(len(positions) for _, positions in shards.of_rank(0))


def bias() -> None:
    """Print what a plain loop's mean of means does to ImageNet's last step."""
    print(f"\nImageNet, N = {IMAGENET:,}, --normalize rank: weight of an example in the last step, times n; its length")
    for batch, W in ((256, 8), (256, 64), (1024, 64), (8192, 64), (8192, 256), (8192, 1024), (65_536, 1024)):
        said = []
        for tail in TAILS:
            config = Config(normalize="rank", batch_size=batch, tail=tail)
            sizes = config.shards(IMAGENET, W).steps[-1].sizes
            made = effect(config, sizes, W)
            said.append(f"{tail} {made.lightest:.3f} to {made.heaviest:.3f}, {made.length:.3f}, {sizes.count(0)} idle")
        print(f"  batch {batch:>6}, W {W:>4}, n = {IMAGENET % batch:>5}: {'; '.join(said)}")


@dataclass(frozen=True)
class Flags:
    """The flags."""

    alpha_us: float = 10
    """Latency of a hop, microseconds (assumed)."""
    beta_gbs: float = 25
    """Bandwidth of a link, GB/s (200 Gb/s InfiniBand)."""
    gradient_mb: float = 102
    """Megabytes to all-reduce (ResNet-50 in float32)."""
    compute_ms: float = 80
    """Milliseconds of a rank's forward and backward (assumed)."""


@command
def main(flags: Flags) -> None:
    """Measure, compare, extend."""
    if not all(0 < assumed < math.inf for assumed in astuple(flags)):
        raise InputError("every flag must be a finite number above 0")
    check()
    extend(flags.alpha_us / 1e6, flags.beta_gbs * 1e9, flags.gradient_mb * 1e6, flags.compute_ms / 1e3)
    sampler()
    bias()


if __name__ == "__main__":
    sys.exit(main())
