"""What a loop that was right on one GPU gives on several: the wrong number, the right one, and one process's.

    python -m scripts.symptoms                                                           lists the symptoms
    torchrun --standalone --nproc_per_node 2 -m scripts.symptoms gather-count            the wrong number
    torchrun --standalone --nproc_per_node 2 -m scripts.symptoms gather-count --fixed    the right one

On real Accelerate and DistributedDataParallel, on CPU ranks, on examples small enough for mental arithmetic: example i
is the number i. Where there is a net it is a single weight w, and the loss of example i is w i: its gradient is i.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import tyro
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from loop.config import InputError
from loop.reduction import cell_loss, global_count
from loop.run.launch import launched_rank, launched_world_size, leave_ranks
from scripts.command import command

PATIENCE_S = 5.0  # a rank that waits longer has hung; by default a group waits 10 (NCCL) or 30 minutes (gloo)


class Shown(NamedTuple):
    """What is measured; what the loop gives on these ranks; what one process gives."""

    quantity: str
    here: float | str
    one_process: float


def gather_count(fixed: bool) -> Shown:
    """`gather_for_metrics` count wrong: one number a batch cannot be cut down to the examples that are no copies.

    Accelerate fills the last batches up with examples seen before; `gather_for_metrics` drops as many *rows* of what it
    has gathered. So it must be handed a row for each example. (huggingface/accelerate#226, #1674)
    """
    accelerator = Accelerator(cpu=True)
    counted = 0
    for x in accelerator.prepare(load(9, batch_size=4)):
        if fixed:
            counted += len(accelerator.gather_for_metrics(x))
        else:
            counted += int(accelerator.gather_for_metrics(torch.tensor([len(x)])).sum())
    return Shown("examples counted in an evaluation of 9", counted, 9)


def mean_of_means(fixed: bool) -> Shown:
    """Mean of means: a metric averaged over batches, then over ranks, gives a short batch's examples more weight."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    n = 2 * accelerator.num_processes + 1  # two examples a rank; then one more, rank 0's
    batches = list(accelerator.prepare(load(n, batch_size=2)))
    if fixed:
        mean = global_count(sum(x.sum() for x in batches), "cpu") / global_count(sum(len(x) for x in batches), "cpu")
    else:
        mean = accelerator.reduce(torch.stack([x.mean() for x in batches]).mean(), "mean")
    return Shown(f"mean loss of examples 1 to {n}", float(mean), (n + 1) / 2)


def loss_times_world_size(fixed: bool) -> Shown:
    """`loss *= world_size`: right for a sum over the count of all ranks, W times too much for a rank's own mean."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = 2 * world_size
    net = DistributedDataParallel(one_weight())
    losses = net(examples(n)[2 * rank : 2 * rank + 2])
    loss = losses.sum() / n if fixed else losses.mean()
    loss *= world_size
    loss.backward()
    return Shown(f"gradient of the mean of examples 1 to {n}", gradient(net), (n + 1) / 2)


def gathered_loss(fixed: bool) -> Shown:
    """A loss over embeddings that all ranks have gathered: each rank's own carry the gradient, so it needs times W.

    Every rank computes the same mean over all examples; DDP's average then divides each rank's share once more.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = 2 * world_size
    net = DistributedDataParallel(one_weight())
    own = net(examples(n)[2 * rank : 2 * rank + 2])
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own.detach())
    gathered[rank] = own
    loss = torch.cat(gathered).mean()
    if fixed:
        loss *= world_size
    loss.backward()
    return Shown(f"gradient of the mean of examples 1 to {n}, gathered", gradient(net), (n + 1) / 2)


def bypassed_ddp(fixed: bool) -> Shown:
    """The forward bypasses DDP (`net.module(x)`): nothing is all-reduced, and each rank trains a net of its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = 2 * world_size
    net = DistributedDataParallel(one_weight())
    x = examples(n)[2 * rank : 2 * rank + 2]
    (net(x) if fixed else net.module(x)).mean().backward()
    return Shown(f"gradient of the mean of examples 1 to {n}", gradient(net), (n + 1) / 2)


def norm_summed_twice(fixed: bool) -> Shown:
    """The gradient's norm is summed over ranks: each rank has all of it already, so it gets sqrt(W) long."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = 2 * world_size
    net = DistributedDataParallel(one_weight())
    net(examples(n)[2 * rank : 2 * rank + 2]).mean().backward()
    norm = nn.utils.get_total_norm([torch.tensor(gradient(net))])
    if not fixed:
        norm = global_count(norm**2, "cpu").sqrt()
    return Shown(f"norm of the gradient of the mean of examples 1 to {n}", float(norm), (n + 1) / 2)


def skipped_alone(fixed: bool) -> Shown:
    """A rank whose loss is NaN skips the step alone: the others apply a gradient that the all-reduce has made NaN.

    The cure decides on every rank alike, by one small reduce.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net = DistributedDataParallel(one_weight())
    weight = next(net.parameters())
    nn.init.ones_(weight)
    loss = net(examples(1)).mean() * (float("nan") if rank == world_size - 1 else 1)
    loss.backward()
    bad = torch.tensor(float(not torch.isfinite(loss)))
    if not (global_count(bad, "cpu") if fixed else bad):
        torch.optim.SGD(net.parameters(), lr=1).step()
    return Shown("weight, 1 before a step in which the last rank's loss is NaN", float(weight), 1)


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


def sampler_copies(fixed: bool) -> Shown:
    """`DistributedSampler` copies examples so that all ranks have equally many, and a metric counts the copies.

    For an evaluation each rank takes `range(rank, N, W)` instead. (pytorch#25162)
    """
    rank, world_size, n = dist.get_rank(), dist.get_world_size(), 10 * dist.get_world_size() + 1
    copying: DistributedSampler[Tensor] = DistributedSampler(cast("Dataset[Tensor]", examples(n)), shuffle=False)
    x = examples(n)[list(range(rank, n, world_size) if fixed else copying)]
    mean = global_count(x.sum(), "cpu") / global_count(len(x), "cpu")
    return Shown(f"mean loss of examples 1 to {n}", float(mean), (n + 1) / 2)


def set_epoch_forgotten(fixed: bool) -> Shown:
    """`set_epoch` forgotten: a `DistributedSampler` then deals every epoch in the order of the first."""
    sampler: DistributedSampler[Tensor] = DistributedSampler(cast("Dataset[Tensor]", examples(64)), seed=0)
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
    sampler: DistributedSampler[Tensor] = DistributedSampler(cast("Dataset[Tensor]", examples(n)), seed=seed)
    seen = torch.zeros(n)
    seen[list(sampler)] = 1
    return Shown(f"examples that an epoch sees, of {n}", float((global_count(seen, "cpu") > 0).sum()), n)


def unsplit_stream(fixed: bool) -> Shown:
    """A stream that is not split: each rank reads all of it, and an epoch sees every example W times."""
    rank, world_size, n = dist.get_rank(), dist.get_world_size(), 8
    stream = iter(examples(n))
    mine = itertools.islice(stream, rank, None, world_size) if fixed else stream
    return Shown(f"examples counted in an epoch of {n}", float(global_count(sum(1 for _ in mine), "cpu")), n)


def scheduler_per_micro_batch(fixed: bool) -> Shown:
    """A scheduler beside the optimizer in `accumulate()`: it steps at every micro-batch, the optimizer at every K-th.

    It is stepped where `sync_gradients` is true. (accelerate#963)
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    net = one_weight()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=8)
    net, optimizer = accelerator.prepare(net, optimizer)
    for _ in range(8):
        with accelerator.accumulate(net):
            accelerator.backward(net(examples(1)).mean())
            optimizer.step()
            if accelerator.sync_gradients or not fixed:
                scheduler.step()
            optimizer.zero_grad()
    return Shown("learning rate after 2 of 8 steps of 4 micro-batches", float(scheduler.get_last_lr()[0]), 0.75)


def scheduler_too_fast(fixed: bool) -> Shown:
    """Scheduler steps too fast on many GPUs: a prepared one takes W steps at each step of the optimizer.

    Accelerate supposes the schedule was counted in one process's smaller batches; with `split_batches=True` it takes
    one step. Where the schedule was counted in the optimizer's steps, leave it out of `prepare`, and step it where
    `sync_gradients` is true. (huggingface/accelerate#2926, transformers#24088)
    """
    accelerator = Accelerator(cpu=True)
    net = one_weight()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=8)
    net, optimizer = accelerator.prepare(net, optimizer)
    if not fixed:
        scheduler = accelerator.prepare(scheduler)
    for _ in range(2):
        accelerator.backward(net(examples(1)).mean())
        optimizer.step()
        scheduler.step()
    return Shown("learning rate after 2 of 8 steps from 1 down to 0", float(scheduler.get_last_lr()[0]), 0.75)


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


SYMPTOMS: dict[str, Callable[[bool], Shown]] = {
    "gather-count": gather_count,
    "mean-of-means": mean_of_means,
    "loss-times-world-size": loss_times_world_size,
    "gathered-loss": gathered_loss,
    "bypassed-ddp": bypassed_ddp,
    "norm-summed-twice": norm_summed_twice,
    "skipped-alone": skipped_alone,
    "one-task-a-rank": one_task_a_rank,
    "sampler-copies": sampler_copies,
    "set-epoch-forgotten": set_epoch_forgotten,
    "sampler-seeded-by-rank": sampler_seeded_by_rank,
    "unsplit-stream": unsplit_stream,
    "scheduler-too-fast": scheduler_too_fast,
    "scheduler-per-micro-batch": scheduler_per_micro_batch,
    "uneven-hang": uneven_hang,
}


class _Heads(nn.Module):
    """A head for each task, of which a rank uses one."""

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, task: int, x: Tensor) -> Tensor:
        out: Tensor = self.heads[task](x)
        return out


def examples(n: int) -> Tensor:
    """Return the examples 1 to n, (n, 1)."""
    return torch.arange(1.0, n + 1).unsqueeze(1)


def load(n: int, batch_size: int) -> DataLoader[Tensor]:
    """Return a loader of the examples 1 to n, in order."""
    return DataLoader(cast("Dataset[Tensor]", examples(n)), batch_size)


def one_weight() -> nn.Module:
    """Return the net whose output for example i, taken as its loss, is w i."""
    return nn.Linear(1, 1, bias=False)


def gradient(net: nn.Module) -> float:
    """Return the gradient of the net's one weight."""
    (weight,) = net.parameters()
    assert weight.grad is not None
    return float(weight.grad)


def report(name: str, fixed: bool) -> str:
    """Show a symptom on all ranks, and say what came of it on this one."""
    quantity, here, one_process = SYMPTOMS[name](fixed)
    ranks = f"{dist.get_world_size()} ranks" + (", fixed" if fixed else "")
    return f"{quantity}\n{ranks}: {here if isinstance(here, str) else f'{here:g}'}\none process: {one_process:g}"


@dataclass(frozen=True)
class Flags:
    """The flags."""

    name: tyro.conf.Positional[str] = ""
    """The symptom; without one, all are listed."""
    fixed: bool = False
    """The right number in place of the wrong one."""


@command
def main(flags: Flags) -> None:
    """List the symptoms, or show one."""
    if not flags.name:
        print("\n".join(f"{name:<22} {str(show.__doc__).splitlines()[0]}" for name, show in SYMPTOMS.items()))
        return
    if flags.name not in SYMPTOMS:
        raise InputError(f"there is no {flags.name}: choose from {', '.join(SYMPTOMS)}")
    if launched_world_size() < 2:
        raise InputError(f"needs ranks: torchrun --standalone --nproc_per_node 2 -m scripts.symptoms {flags.name}")
    Accelerator(cpu=True)  # joins the ranks
    said = report(flags.name, flags.fixed)
    leave_ranks()
    if launched_rank() == 0:
        print(said)


if __name__ == "__main__":
    sys.exit(main())
