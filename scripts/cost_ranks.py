"""Ranks on this machine, timed for scripts/cost_model.py: steps of the project's own loop, and bare all-reduces.

Each figure is a first quartile over single steps: on a machine that others use too, the quiet ones tell what a step
costs, and an epoch is never quiet throughout.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

from loop.config import Config
from loop.shards import Shards

NETS: tuple[Literal["softmax", "mlp"], ...] = ("softmax", "mlp")
BATCH, EXAMPLES, EPOCHS = 256, 8192, 9
SIZES = (24, 4096, 32_768, 262_144, 1_048_576)  # bytes to all-reduce; 24 are a metrics reduce


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
    return quiet(stamps[1:])


def quiet(stamps: list[float]) -> float:
    """Return the first quartile of the times between neighbouring stamps."""
    return float(np.quantile(np.diff(stamps), 0.25))


def rank_main(rank: int, world_size: int, port: int, answer: Any) -> None:
    """Be a rank, under DDP even where it is the only one; rank 0 answers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from loop.book import train_epoch_ch3
    from loop.data import Split, TrainBatches
    from loop.nets import make_net
    from loop.run.launch import leave_ranks
    from loop.updater import make_updater

    dist.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    images = torch.randint(256, (EXAMPLES, 28, 28), dtype=torch.uint8)
    split, loss = Split(images, torch.randint(10, (EXAMPLES,))), nn.CrossEntropyLoss(reduction="none")
    found = Measured({}, {}, {})
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
            found.steps[name, batch] = quiet(stamps[len(batches.shards.steps) :])
    for size in SIZES:
        found.reduces[size] = seconds(partial(dist.all_reduce, torch.zeros(size // 4)), 200)
    if rank == 0:
        answer.put(found)
    leave_ranks()


def measure(world_size: int) -> Measured:
    """Start so many ranks here, and return what rank 0 measured."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = context.Queue()
    ranks = [context.Process(target=rank_main, args=(r, world_size, port, answer)) for r in range(world_size)]
    for each in ranks:
        each.start()
    try:
        found: Measured = answer.get(timeout=120)
    finally:
        for each in ranks:
            each.join(10)
            each.kill()
    return found
