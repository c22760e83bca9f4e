"""Losses and gradients that meet the average over ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from loop.reduction import cell_loss, global_count
from scripts.symptoms.toy import Shown, examples, gradient, one_weight, two_each


def loss_times_world_size(fixed: bool) -> Shown:
    """`loss *= world_size`: right for a sum over the count of all ranks, W times too much for a rank's own mean."""
    own = two_each()
    losses = own.net(own.x)
    loss = losses.sum() / own.n if fixed else losses.mean()
    loss *= own.world_size
    loss.backward()
    return own.mean_gradient()


def reduce_without_gradient(fixed: bool) -> Shown:
    """An `all_reduce` inside a loss: autograd does not see it, and the gradient is W times too small."""
    own = two_each()
    total = own.net(own.x).sum()
    if fixed:
        total = differentiable.all_reduce(total)
    else:
        dist.all_reduce(total)
    (total / own.n).backward()
    return own.mean_gradient(", whose sum is all-reduced")


def gathered_loss(fixed: bool) -> Shown:
    """A loss over embeddings that all ranks have gathered: each rank's own carry the gradient, so it needs times W.

    Every rank computes the same mean over all examples; DDP's average then divides each rank's share once more.
    """
    own = two_each()
    z = own.net(own.x)
    gathered = [torch.empty_like(z) for _ in range(own.world_size)]
    dist.all_gather(gathered, z.detach())
    gathered[own.rank] = z
    loss = torch.cat(gathered).mean()
    if fixed:
        loss *= own.world_size
    loss.backward()
    return own.mean_gradient(", gathered")


def own_negatives(fixed: bool) -> Shown:
    """A contrastive loss has only its rank's negatives: with more ranks of smaller batches it becomes easier."""
    own = two_each()
    z = own.net(0 * own.x)
    candidates = torch.cat(differentiable.all_gather(z)) if fixed else z
    positives = torch.arange(2) + (2 * own.rank if fixed else 0)
    loss = F.cross_entropy(z @ candidates.T, positives)
    return Shown(f"InfoNCE of {own.n} equal embeddings, ln {own.n}", loss.item(), math.log(own.n))


def bypassed_ddp(fixed: bool) -> Shown:
    """The forward bypasses DDP (`net.module(x)`): nothing is all-reduced, and each rank trains a net of its own."""
    own = two_each()
    (own.net(own.x) if fixed else own.net.module(own.x)).mean().backward()
    return own.mean_gradient()


def norm_summed_twice(fixed: bool) -> Shown:
    """The gradient's norm is summed over ranks: each rank has all of it already, so it gets sqrt(W) long."""
    own = two_each()
    own.net(own.x).mean().backward()
    norm = nn.utils.get_total_norm([torch.tensor(gradient(own.net))])
    if not fixed:
        norm = global_count(norm**2, "cpu").sqrt()
    return Shown(f"norm of the gradient of the mean of examples 1 to {own.n}", float(norm), (own.n + 1) / 2)


def shard_norm(fixed: bool) -> Shown:
    """The norm of a shard is logged as the gradient's: under FSDP2 a rank holds 1/W of it, so it is sqrt(W) short."""
    world_size = dist.get_world_size()
    net = nn.Linear(1, world_size**2, bias=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    net(torch.ones(1, 1)).sum().backward()
    grad = net.weight.grad
    assert isinstance(grad, DTensor)
    norm = (grad.full_tensor() if fixed else grad.to_local()).norm()
    return Shown(f"norm of a gradient of {world_size**2} ones", float(norm), world_size)


def skipped_alone(fixed: bool) -> Shown:
    """A rank whose loss is NaN skips the step alone: the others apply a gradient that the all-reduce has made NaN."""
    own = two_each()
    loss = own.net(own.x).mean() * (math.nan if own.rank == own.world_size - 1 else 1)
    loss.backward()
    bad = torch.tensor(float(not torch.isfinite(loss)))
    if not (global_count(bad, "cpu") if fixed else bad):
        torch.optim.SGD(own.net.parameters(), lr=1).step()
    return Shown("weight, 1 before a step in which the last rank's loss is NaN", next(own.net.parameters()).item(), 1)


def one_task_a_rank(fixed: bool) -> Shown:
    """One task a rank: the ranks without a task average their zeros into its head. Each task has a count of its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    heads = nn.ModuleList(one_weight() for _ in range(world_size))
    net = DistributedDataParallel(_Heads(heads), find_unused_parameters=True)
    losses = net(rank, examples(2))
    if fixed:
        counts = global_count(2 * torch.eye(world_size, dtype=torch.float64)[rank], "cpu")  # of each task
        cell_loss(losses, n_global=counts[rank], averaged_over=world_size).backward()
    else:
        losses.mean().backward()
    return Shown("gradient of the first task's head, examples 1 and 2", gradient(heads[0]), 1.5)


class _Heads(nn.Module):
    """A head for each task, of which a rank uses one."""

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, task: int, x: Tensor) -> Tensor:
        out: Tensor = self.heads[task](x)
        return out
