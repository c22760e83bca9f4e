"""The same bits on any number of ranks: V fixed cells a step, and one fixed tree that adds their gradients.

The gradients of W ranks add up to one process's only to rounding, because floating-point addition is not associative,
and the order of additions depends on W in an all-reduce, and in `.grad` where micro-batches are added up. Here a step
has V cells whatever W is. Cell k W + r is micro-batch k of rank r, for k = 0 ... K - 1 with K = V / W, so that a cell
holds the same examples for every W that divides V. Each cell's gradient is taken by itself, and the V of them are added
level by level, one level for each prime factor p of V, the largest first. A level turns m entries into m / p:

    V = 8      0      1      2      3      4      5      6      7        one cell's gradient each
    p = 2      0+4    1+5    2+6    3+7                                  W = 4: up to here, each on one rank
    p = 2      04+26  15+37                                              W = 2
    p = 2      0426+1537                                                 W = 1

    V = 6      0      1      2      3      4      5
    p = 3      0+2+4  1+3+5                                              W = 2; W = 3 and 6 begin by gathering
    p = 2      024+135                                                   W = 1

A level adds the entries j, j + m/p, j + 2m/p, ... in this order. While W divides m/p, these numbers leave the same
remainder modulo W, so the entries lie on one rank, m/(p W) places apart in its list, and the rank makes the tree's
additions among its own entries by the same rule. Where W no longer divides m/p, an all-gather gives every rank all m
entries in order, and each rank makes the remaining additions as one process does. So every W makes the same additions.

The gather brings W gradients where W is a power of 2 (for which the largest factor comes first), and at most V. No tree
brings one gradient a rank both for W = 2 and for W = 3: cells 0, 2, 4 and cells 0, 3 cannot both be a subtree of it.
A rank keeps its K gradients until the step's last cell. To keep log K, it would have to go through its cells in another
order, because a cell lies V/p places from those that it is added to.

The file needs nothing but torch and is made to be copied. In a loop of your own, with the same weights at the start:

    shares = VirtualRanks(net.parameters(), 8)
    for batch in order.split(256):                            # the step's example numbers, the same on every rank
        for cell in batch.tensor_split(8)[rank::world_size]:
            losses = cross_entropy(net(x[cell]), y[cell], reduction="none")
            shares.add(losses.sum() / len(batch))
        shares.reduce()                                       # sets .grad, on every rank
        optimizer.step()

A net under DistributedDataParallel goes forward under `no_sync()`. What the file cannot give:

- Dropout must draw from a generator of each cell's own, and BatchNorm keep statistics for each cell.
- A rank computes in one CPU thread, or on a GPU under `torch.use_deterministic_algorithms(True)`: more threads split a
  matrix product in another way.
- Other chips, another version of torch, another batch size or another V give other bits.

From chapter3-data-parallel, under the MIT licence: copyright (c) 2026, the authors of that project.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor


class VirtualRanks:
    """The gradients of a rank's cells, kept apart until they are added to those of all other cells of the step.

    params: the net's; where a cell does not use one, its gradient is 0. virtual_ranks: V. group: the ranks that share a
    step, by default all.

    Raises ValueError where the number of ranks does not divide V.
    """

    def __init__(self, params: Iterable[Tensor], virtual_ranks: int, group: dist.ProcessGroup | None = None) -> None:
        self.params, self.group = [param for param in params if param.requires_grad], group
        self.cells, left = divmod(virtual_ranks, world_size(group))  # K
        if left or not self.cells:
            raise ValueError(f"{world_size(group)} ranks do not divide {virtual_ranks} virtual ranks")
        self.gradients: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the gradient of the rank's next cell. loss: a scalar, the sum over the cell divided by the step's n."""
        gradients = torch.autograd.grad(loss, self.params, materialize_grads=True)
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))

    def reduce(self) -> None:
        """Set each parameter's `.grad` to the sum over all V cells. Every rank must call, after its K cells.

        Raises ValueError after another number of cells: the tree would be another one.
        """
        if len(self.gradients) != self.cells:
            raise ValueError(f"a step has {self.cells} cells on each rank, not {len(self.gradients)}")
        total = tree_sum(self.gradients, self.group)
        self.gradients = []
        for param, gradient in zip(self.params, total.split([p.numel() for p in self.params]), strict=True):
            param.grad = gradient.view_as(param).to(param.dtype)


def tree_sum(parts: list[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of all ranks' parts, added in the tree above: the same bits on every rank, for every W.

    parts: this rank's K, of which the k-th is number k W + r; overwritten. With one rank there is no collective.
    """
    for p in prime_factors(len(parts) * world_size(group)):
        if len(parts) % p:  # W does not divide m / p
            parts = gather(parts, group)
        m = len(parts) // p
        parts = [reduce(Tensor.add_, parts[j::m]) for j in range(m)]
    return parts[0]


def gather(parts: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return all ranks' parts in the order of their numbers. Every rank must call, with as many parts."""
    gathered = []
    for part in parts:
        of_ranks = [torch.empty_like(part) for _ in range(world_size(group))]
        dist.all_gather(of_ranks, part, group=group)
        gathered += of_ranks
    return gathered


def prime_factors(n: int) -> list[int]:
    """Return the prime factors of n, the largest first: [3, 2, 2, 2] for 24."""
    if n == 1:
        return []
    smallest = next(p for p in range(2, n + 1) if n % p == 0)
    return [*prime_factors(n // smallest), smallest]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return W, the number of ranks in the group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
