"""Masked tokens over micro-batches and ranks, under DistributedDataParallel.

    torchrun --standalone --nproc_per_node 2 -m scripts.recipes.masked_tokens [--plain]

No sampler knows how many tokens count (label other than -100), and cross_entropy's own mean divides by the count of one
micro-batch: a token then counts more when its micro-batch has few others. So the tokens of the whole step are counted
over all ranks first. A micro-batch that is masked altogether has the loss 0, where cross_entropy's mean is NaN.

Not covered: labels that the model shifts by itself, of which `labels[..., 1:]` are to be counted.
"""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from loop.reduction import cell_backward, global_count
from scripts.recipes import CLASSES, IGNORED, LR, Batches, make_net, ranks, recipe


@ranks()
def train(batches: Batches, *, right: bool = True) -> nn.Module:
    net = DistributedDataParallel(make_net(batches))
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for step in batches:
        n = global_count(sum((y != IGNORED).sum() for _, y in step), "cpu")
        for k, (x, y) in enumerate(step, start=1):
            with nullcontext() if k == len(step) else net.no_sync():  # one all-reduce, in the last backward
                logits, labels = net(x).view(-1, CLASSES), y.flatten()
                if right:
                    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
                    cell_backward(losses, n_global=n, averaged_over=dist.get_world_size())
                else:
                    (F.cross_entropy(logits, labels, ignore_index=IGNORED) / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole: nn.Module = net.module
    return whole


def plain(batches: Batches) -> nn.Module:
    return train(batches, right=False)


main = recipe(train, plain, masked=True)

if __name__ == "__main__":
    sys.exit(main())
