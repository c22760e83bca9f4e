"""Which examples a rank gets, and when."""

from __future__ import annotations

import itertools
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from loop.reduction import cell_loss, global_count
from scripts.symptoms.toy import Shown, as_dataset, examples, gradient, load, one_weight

PATIENCE_S = 5.0  # a rank that waits longer has hung; by default a group waits 10 (NCCL) or 30 minutes (gloo)


def grown_batch(fixed: bool) -> Shown:
    """The global batch grew with W at the same learning rate: an epoch takes W times fewer steps, and learns less."""
    world_size = dist.get_world_size()
    n, batch_size = 6 * world_size, 6
    sampler: DistributedSampler[Tensor] = DistributedSampler(as_dataset(examples(n)), shuffle=False)
    net = DistributedDataParallel(one_weight())
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    for x in DataLoader(sampler.dataset, batch_size // world_size if fixed else batch_size, sampler=sampler):
        optimizer.zero_grad()
        net(x).mean().backward()
        optimizer.step()
    moved = 1 - next(net.parameters()).item()
    return Shown(f"how far an epoch of {n} examples moves the weight", moved, world_size * (n + 1) / 2)


def set_epoch_forgotten(fixed: bool) -> Shown:
    """`set_epoch` forgotten: a `DistributedSampler` then deals every epoch in the order of the first."""
    sampler: DistributedSampler[Tensor] = DistributedSampler(as_dataset(examples(64)), seed=0)
    epochs = []
    for epoch in range(2):
        if fixed:
            sampler.set_epoch(epoch)
        epochs.append(list(torch.tensor([*sampler]).split(4)))
    again = sum(torch.equal(a, b) for a, b in zip(*epochs, strict=True))
    return Shown(f"batches of this rank's second epoch that repeat the first's, of {len(epochs[0])}", again, 0)


def sampler_seeded_by_rank(fixed: bool) -> Shown:
    """A sampler seeded by rank: the ranks' orders are not shares of one order, so examples come twice or never."""
    n = 64
    seed = 0 if fixed else dist.get_rank()
    sampler: DistributedSampler[Tensor] = DistributedSampler(as_dataset(examples(n)), seed=seed)
    seen = torch.zeros(n)
    seen[list(sampler)] = 1
    return Shown(f"examples that an epoch sees, of {n}", float((global_count(seen, "cpu") > 0).sum()), n)


def unsplit_stream(fixed: bool) -> Shown:
    """A stream that is not split: each rank reads all of it, and an epoch sees every example W times."""
    rank, world_size, n = dist.get_rank(), dist.get_world_size(), 8
    stream = iter(examples(n))
    mine = itertools.islice(stream, rank, None, world_size) if fixed else stream
    return Shown(f"examples counted in an epoch of {n}", float(global_count(sum(1 for _ in mine), "cpu")), n)


def uneven_hang(fixed: bool, patience_s: float = PATIENCE_S) -> Shown:
    """Uneven inputs hang: a rank with one batch more waits in its next collective for ranks that have none left.

    The cure gives every rank as many batches, some empty. A net that reshapes by `view(B, -1)` takes an example with
    every label masked instead. (`join_uneven_inputs` does nothing on CPU ranks.)
    """
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    n = 2 * world_size + 1  # two examples a rank; then one more, rank 0's
    batches = list(accelerator.prepare(load(n, batch_size=2)))
    if fixed:
        most = int(accelerator.gather(torch.tensor([len(batches)])).max())
        batches += [torch.empty(0, 1)] * (most - len(batches))
    group = dist.new_group(timeout=timedelta(seconds=patience_s))
    net = DistributedDataParallel(one_weight(), process_group=group)
    try:
        for x in batches:
            net.zero_grad()
            losses = net(x)
            if fixed:
                loss = cell_loss(losses, n_global=global_count(len(x), "cpu"), averaged_over=world_size)
            else:
                loss = losses.mean()
            loss.backward()
        here: float | str = gradient(net)
    except RuntimeError as error:
        if "Timed out" not in str(error):
            raise
        here = f"hung: rank {rank} waited {patience_s:g} s for ranks that have no second batch"
    dist.barrier()  # a rank that left would break the connection, and the others would fail at once
    dist.destroy_process_group(group)
    return Shown(f"gradient of the second step, example {n} alone", here, n)
