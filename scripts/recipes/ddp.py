"""Plain DistributedDataParallel, with micro-batches.

    torchrun --standalone --nproc_per_node 2 -m scripts.recipes.ddp [--plain]

DDP averages gradients over the W ranks, however many examples each holds. So each micro-batch back-propagates the sum
of its losses times W over the number of examples in the whole step, which one all-reduce of a single number counts.

Not covered: BatchNorm, dropout, and losses that are no sum over examples (README.md, "What `global` does not fix").
"""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from loop.reduction import cell_backward, global_count
from scripts.recipes import LR, Batches, make_net, ranks, recipe


@ranks()
def train(batches: Batches, *, right: bool = True) -> nn.Module:
    net = DistributedDataParallel(make_net(batches))
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for step in batches:
        n = global_count(sum(len(y) for _, y in step), "cpu")
        for k, (x, y) in enumerate(step, start=1):
            with nullcontext() if k == len(step) else net.no_sync():  # one all-reduce, in the last backward
                losses = F.cross_entropy(net(x), y, reduction="none")
                if right:
                    cell_backward(losses, n_global=n, averaged_over=dist.get_world_size())
                else:
                    (losses.mean() / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole: nn.Module = net.module
    return whole


def plain(batches: Batches) -> nn.Module:
    return train(batches, right=False)


main = recipe(train, plain)

if __name__ == "__main__":
    sys.exit(main())
