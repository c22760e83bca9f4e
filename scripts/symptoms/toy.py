"""What the symptoms share: the examples, the net of one weight, and what is shown of them."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from loop.reduction import global_count


class Shown(NamedTuple):
    """What is measured; what the loop gives on these ranks; what is right, and by which reference."""

    quantity: str
    here: float | str
    right: float
    reference: str = "one process"


class Share(NamedTuple):
    """A rank, the number of ranks, the examples of all ranks (n) and of this one (x, one a row), and the net."""

    rank: int
    world_size: int
    n: int
    x: Tensor
    net: DistributedDataParallel

    def mean_gradient(self, of: str = "") -> Shown:
        """Show the net's gradient, which is to be the mean of all examples'."""
        return Shown(f"gradient of the mean of examples 1 to {self.n}{of}", gradient(self.net), (self.n + 1) / 2)


def two_each() -> Share:
    """Return this rank's share of n = 2 W examples, two: 1 and 2 on rank 0, 3 and 4 on rank 1."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = examples(2 * world_size).split(2)[rank]
    return Share(rank, world_size, 2 * world_size, x, DistributedDataParallel(one_weight()))


def examples(n: int) -> Tensor:
    """Return the examples 1 to n, (n, 1)."""
    return torch.arange(1.0, n + 1).unsqueeze(1)


def as_dataset(x: Tensor) -> Dataset[Tensor]:
    """Return the tensor, which is a data set but for its type."""
    return cast("Dataset[Tensor]", x)


def load(n: int, batch_size: int) -> DataLoader[Tensor]:
    """Return a loader of the examples 1 to n, in order."""
    return DataLoader(as_dataset(examples(n)), batch_size)


def one_weight() -> nn.Linear:
    """Return the net whose output for example i, taken as its loss, is w i; w = 1."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    return net


def gradient(net: nn.Module) -> float:
    """Return the gradient of the net's one weight."""
    (weight,) = net.parameters()
    assert weight.grad is not None
    return float(weight.grad)


def mean_over_ranks(losses: Tensor) -> float:
    """Return the mean over the examples of all ranks, from their sum and their count."""
    return float(global_count(losses.sum(), "cpu") / global_count(losses.numel(), "cpu"))
