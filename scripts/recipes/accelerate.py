"""Hugging Face Accelerate, with `accumulate`.

    torchrun --standalone --nproc_per_node 2 -m scripts.recipes.accelerate [--plain]

`Accelerator.backward` divides by K and DDP by W. So each micro-batch back-propagates the sum of its losses times W K
over the number of examples in the whole step. This is Accelerate's own recipe, "Gradient accumulation on training
samples of variable size" in its guide to gradient accumulation; here it also serves ranks without an example.

Not covered: an accumulation window of fewer than K micro-batches, which Accelerate ends only on a prepared loader.
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from loop.reduction import cell_loss
from scripts.recipes import LR, Batches, make_net, recipe


def train(batches: Batches, *, right: bool = True) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(next(iter(batches))))
    net = make_net(batches)
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    averaged_over = accelerator.num_processes * accelerator.gradient_accumulation_steps
    for step in batches:
        num_items_in_batch = accelerator.gather(torch.tensor(sum(len(y) for _, y in step))).sum().item()
        for x, y in step:
            with accelerator.accumulate(net):
                losses = F.cross_entropy(net(x), y, reduction="none")
                if right:
                    loss = cell_loss(losses, n_global=num_items_in_batch, averaged_over=averaged_over)
                else:
                    loss = losses.mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    whole: nn.Module = accelerator.unwrap_model(net)
    return whole


def plain(batches: Batches) -> nn.Module:
    return train(batches, right=False)


main = recipe(train, plain)

if __name__ == "__main__":
    sys.exit(main())
