"""FSDP2 (`fully_shard`), with micro-batches.

    torchrun --standalone --nproc_per_node 2 -m scripts.recipes.fsdp2 [--plain]

FSDP2's reduce-scatter averages gradients over the ranks of its mesh, as DDP's all-reduce does. So the same factor puts
it right: W over the number of examples in the whole step.

Not covered: meshes of more than one dimension (scripts/recipes/README.md), and mixed precision.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from loop.reduction import cell_backward, global_count
from scripts.recipes import LR, Batches, make_net, ranks, recipe


@ranks()
def train(batches: Batches, *, right: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = make_net(batches)
    sharded = fully_shard(net, mesh=mesh)  # the net itself, by another type
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for step in batches:
        n = global_count(sum(len(y) for _, y in step), "cpu", mesh.get_group())
        for k, (x, y) in enumerate(step, start=1):
            sharded.set_requires_gradient_sync(k == len(step))  # one reduce-scatter, in the last backward
            losses = F.cross_entropy(net(x), y, reduction="none")
            if right:
                cell_backward(losses, n_global=n, averaged_over=mesh.size())
            else:
                (losses.mean() / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = make_net(batches)
    whole.load_state_dict(get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)))
    return whole


def plain(batches: Batches) -> nn.Module:
    return train(batches, right=False)


main = recipe(train, plain)

if __name__ == "__main__":
    sys.exit(main())
