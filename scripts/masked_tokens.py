"""Masked tokens over micro-batches and ranks: the mean of a step whose token count nobody knows beforehand.

    torchrun --standalone --nproc_per_node 2 -m scripts.masked_tokens --accumulate 2 --way mean-per-batch
    torchrun --standalone --nproc_per_node 2 -m scripts.masked_tokens --accumulate 2 --way global

A small GRU learns to predict the next byte of the lines of loop/reduction.py, which are padded to a common length and
masked there. Printed is how far one epoch's weights end from those of one process that takes each step in one batch,
over how far they travelled. `train_step` is the code to copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from loop import reduction
from loop.config import InputError
from loop.reduction import cell_loss, global_count
from loop.run.launch import launched_rank, launched_world_size, leave_ranks
from scripts.command import command

Way = Literal["global", "mean-per-batch"]
Batch = tuple[Tensor, Tensor]
IGNORED = -100  # cross_entropy's own default


class NextByte(nn.Module):
    """A GRU over bytes. Takes (lines, length), returns logits (lines, length, 256)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each byte's successor."""
        return cast(Tensor, self.head(self.gru(self.embedding(x))[0]))


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Batch], way: Way) -> None:
    """Take one optimiser step. micro_batches: this rank's, as many on every rank, some perhaps without a token."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    device = next(net.parameters()).device
    n_global = global_count(sum((y != IGNORED).sum() for _, y in micro_batches), device)
    optimizer.zero_grad()
    for k, (x, y) in enumerate(micro_batches, start=1):
        with net.no_sync() if isinstance(net, DistributedDataParallel) and k < len(micro_batches) else nullcontext():
            logits, y = net(x).flatten(0, 1), y.flatten()
            if way == "global":
                losses = F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="none")
                loss = cell_loss(losses, n_global=n_global, averaged_over=world_size)
            else:  # what a plain loop does: the mean of this micro-batch's own tokens, over K
                loss = F.cross_entropy(logits, y, ignore_index=IGNORED) / len(micro_batches)
            loss.backward()
    optimizer.step()


def padded(lines: Sequence[bytes]) -> Batch:
    """Return (x, y), each int64 (lines, longest - 1): bytes, and their successors; y is IGNORED past a line's end."""
    length = max([1, *(len(line) - 1 for line in lines)])  # 1: a GRU takes no shorter sequence
    x = torch.zeros(len(lines), length, dtype=torch.int64)
    y = torch.full_like(x, IGNORED)
    for row, line in enumerate(lines):
        x[row, : len(line) - 1] = torch.tensor(list(line[:-1]))
        y[row, : len(line) - 1] = torch.tensor(list(line[1:]))
    return x, y


def deal(lines: Sequence[bytes], cells: int) -> list[Batch]:
    """Deal the lines in turn to so many cells, some perhaps empty; return each padded."""
    return [padded(lines[cell::cells]) for cell in range(cells)]


def weights_after(steps: Sequence[Sequence[bytes]], rank: int, world_size: int, accumulate: int, way: Way) -> Tensor:
    """Return all weights, in one vector, after one pass over the steps' lines, dealt to W ranks x K micro-batches."""
    torch.manual_seed(0)
    net: nn.Module = NextByte().to(torch.float64)
    net = DistributedDataParallel(net) if world_size > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for lines in steps:
        train_step(net, optimizer, deal(lines, world_size * accumulate)[rank::world_size], way)
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def distance(way: Way, accumulate: int, steps: Sequence[Sequence[bytes]]) -> float:
    """Return how far the weights end from one process's, over the distance those travelled. Every rank must call."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ours = weights_after(steps, rank, world_size, accumulate, way)
    start = weights_after([], 0, 1, 1, way)
    one_process = weights_after(steps, 0, 1, 1, "mean-per-batch")  # of a single batch, cross_entropy's mean is right
    return float((ours - one_process).norm() / (one_process - start).norm())


def text_in_steps(size: int = 16) -> list[list[bytes]]:
    """Return the lines of loop/reduction.py, so many a step; a blank line is a lone newline: no byte to predict."""
    lines = Path(reduction.__file__).read_bytes().splitlines(keepends=True)
    return [lines[i : i + size] for i in range(0, len(lines), size)]


@dataclass(frozen=True)
class Flags:
    """The flags."""

    way: Way = "global"
    """How a token's loss is weighed."""
    accumulate: int = 1
    """Micro-batches, 1 to 16."""


@command
def main(flags: Flags) -> None:
    """Train, compare, print on rank 0."""
    if not 1 <= flags.accumulate <= 16:
        raise InputError(f"--accumulate {flags.accumulate}: must be from 1 to 16")
    world_size = launched_world_size()
    if world_size > 1:
        dist.init_process_group("gloo")
    steps = text_in_steps()
    far = distance(flags.way, flags.accumulate, steps)
    leave_ranks()
    if launched_rank() == 0:
        tokens = [int((y != IGNORED).sum()) for _, y in deal(steps[0], world_size * flags.accumulate)]
        print(f"{len(steps)} steps of {len(steps[0])} lines; tokens in the first step's cells: {str(tokens)[1:-1]}")
        print(f"--way {flags.way}: {far:.3g} of the distance travelled away from one process's weights")


if __name__ == "__main__":
    sys.exit(main())
