"""What the recipes share: a net, a small data set dealt unevenly, one process's weights, and the command line.

A recipe is a module with two functions of `batches`, an iterable that can be read more than once. It yields one
optimiser step at a time: the K micro-batches (x, y) of this rank, some perhaps empty. `train` trains on them so that
the weights are those of one process. `plain` takes the mean of each micro-batch, and the framework averages those means
over K and W. Both return the net.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from loop.run.launch import launched_rank, launched_world_size, leave_ranks
from scripts.command import Main, command

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Sequence[Batch]]
Train = Callable[[Batches], nn.Module]

CLASSES = 10
IGNORED = -100  # cross_entropy's own default: a label that does not count
LR = 0.5
MICRO_BATCHES = 2
STEPS = (24, 17, 7)  # examples; over 2 ranks 12 + 12, 12 + 5, 7 + 0; over 3 ranks 8 + 8 + 8, 8 + 8 + 1, 7 + 0 + 0


def make_net(batches: Batches) -> nn.Module:
    """Return the net, equal on all ranks: from x (n, d) to logits (n, CLASSES), or (n, t CLASSES) for labels (n, t)."""
    x, y = next(iter(batches))[0]
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, y.shape[1:].numel() * CLASSES)).to(x.dtype)


def deal(rank: int, world_size: int, *, masked: bool = False) -> list[list[Batch]]:
    """Return a rank's share of the data set; masked: with labels for 4 tokens an example, half of which do not count.

    Each cell takes as many examples as it does in a full step, until none is left. The last examples of the first step
    have no token that counts.
    """
    generator = torch.Generator().manual_seed(1)
    size = -(-STEPS[0] // (world_size * MICRO_BATCHES))
    steps = []
    for n in STEPS:
        x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (n, 4) if masked else (n,), generator=generator)
        if masked:
            y[torch.rand(y.shape, generator=generator) < 0.5] = IGNORED
            y[18:] = IGNORED
        cells = zip(x.split(size), y.split(size), strict=True)
        empty = [(x[:0], y[:0])] * (world_size * MICRO_BATCHES)
        steps.append([*cells, *empty][rank * MICRO_BATCHES : (rank + 1) * MICRO_BATCHES])
    return steps


def one_process(batches: Batches) -> nn.Module:
    """Train one process on each step's examples as a single batch, of which cross_entropy's own mean is right."""
    net = make_net(batches)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for step in batches:
        x, y = (torch.cat(parts) for parts in zip(*step, strict=True))
        F.cross_entropy(net(x).view(-1, CLASSES), y.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def distance(train: Train, *, masked: bool = False) -> float:
    """Return how far the weights end from one process's, over the distance those travelled. Every rank must call."""
    ours = train(deal(launched_rank(), launched_world_size(), masked=masked))
    everything = deal(0, 1, masked=masked)
    start, end, ours_end = (
        nn.utils.parameters_to_vector(net.parameters()).detach()
        for net in (make_net(everything), one_process(everything), ours)
    )
    return float((ours_end - end).norm() / (end - start).norm())


def open_group() -> None:
    """Join the launched ranks' gloo group, a group of one without a launcher, unless one is open; leave it at exit."""
    if dist.is_initialized():
        return
    if launched_world_size() > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    atexit.register(leave_ranks)  # not before: a second group, opened through torchrun's store, hangs


@dataclass(frozen=True)
class Flags:
    """The flags."""

    plain: bool = False
    """Take the mean of the micro-batches' means, as a plain loop does: the wrong weights."""


def recipe(train: Train, plain: Train, *, masked: bool = False) -> Main:
    """Return a recipe's command: train on the launched ranks, and print on rank 0 how far that is from one process."""

    def run(flags: Flags) -> None:
        with redirect_stdout(sys.stderr):  # what the frameworks print
            far = distance(plain if flags.plain else train, masked=masked)
        leave_ranks()
        if launched_rank() == 0:
            way = f"{'plain' if flags.plain else 'right'}, W = {launched_world_size()}"
            print(f"{way}: {far:.3g} of the distance travelled away from one process's weights")

    run.__module__ = train.__module__  # whose docstring is the usage
    return command(run)
