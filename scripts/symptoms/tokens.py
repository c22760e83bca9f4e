"""Tokens that are masked, shifted, or unequally many: what a mean divides by."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from loop.reduction import cell_loss, global_count
from scripts.symptoms.toy import Shown, examples, gradient, one_weight, two_each

IGNORED = -100


def token_mean(fixed: bool) -> Shown:
    """Token mean or sequence mean: the mean of each rank's own mean weighs its sequences alike, not their tokens."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = world_size * (world_size + 1) // 2
    x = examples(n).split(list(range(1, world_size + 1)))[rank]  # 1 token on rank 0, 2 on rank 1, ...
    net = DistributedDataParallel(one_weight())
    losses = net(x)
    if fixed:
        cell_loss(losses, n_global=global_count(len(x), "cpu"), averaged_over=world_size).backward()
    else:
        losses.mean().backward()
    return Shown(
        f"gradient of the mean of tokens 1 to {n}, in sequences of 1 to {world_size} tokens", gradient(net), (n + 1) / 2
    )


def all_masked(fixed: bool) -> Shown:
    """NaN where every token is masked: a mean over no token is 0 / 0, and the all-reduce takes it to every rank."""
    own = two_each()
    mask = torch.full_like(own.x, float(own.rank < own.world_size - 1))
    losses = own.net(own.x) * mask
    if fixed:
        cell_loss(losses, n_global=global_count(mask.sum(), "cpu"), averaged_over=own.world_size).backward()
    else:
        (losses.sum() / mask.sum()).backward()
    seen = own.n - 2
    return Shown(
        f"gradient of the mean of tokens 1 to {seen}, the last rank's masked", gradient(own.net), (seen + 1) / 2
    )


def causal_shift(fixed: bool) -> Shown:
    """The causal shift: a sequence's first token is never predicted, so that `labels` counts one token too many."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    labels = examples(5 * world_size).view(world_size, 5)[rank : rank + 1]
    net = DistributedDataParallel(one_weight())
    losses = net(labels[..., 1:].unsqueeze(-1))
    counted = labels[..., 1:] if fixed else labels
    n = global_count((counted != IGNORED).sum(), "cpu")
    cell_loss(losses, n_global=n, averaged_over=world_size).backward()
    right = sum(5 * r + 3.5 for r in range(world_size)) / world_size
    return Shown(f"gradient of the mean of tokens 2 to 5 of {world_size} sequences of 5", gradient(net), right)
