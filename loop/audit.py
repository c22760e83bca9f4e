"""Measures of what should be equal on all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def replica_drift(net: nn.Module) -> float:
    """Return the largest difference of a parameter between any rank and rank 0; every rank must call. 0 on one rank.

    Two collectives: rank 0's parameters are broadcast, the largest difference is reduced.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0.0
    mine = nn.utils.parameters_to_vector(net.parameters()).detach()
    first = mine.clone()
    dist.broadcast(first, src=0)
    drift = (mine - first).abs().max()
    dist.all_reduce(drift, op=dist.ReduceOp.MAX)
    return float(drift)
