"""What a loop that was right on one GPU gives on several: the wrong number, the right one, and one process's.

    python -m scripts.symptoms                                                           lists the symptoms
    torchrun --standalone --nproc_per_node 2 -m scripts.symptoms gather-count            the wrong number
    torchrun --standalone --nproc_per_node 2 -m scripts.symptoms gather-count --fixed    the right one

On real Accelerate and DistributedDataParallel, on CPU ranks, on examples small enough for mental arithmetic: example i
is the number i. Where there is a net it is a single weight w, and the loss of example i is w i: its gradient is i.
"""

from __future__ import annotations

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
from torch.utils.data import DataLoader, Dataset

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


def scheduler_too_fast(fixed: bool) -> Shown:
    """Scheduler steps too fast on many GPUs: a prepared one takes W steps at each step of the optimizer.

    Accelerate supposes the schedule was counted in one process's smaller batches (`split_batches=False`). Where it was
    counted in the optimizer's steps, leave it out of `prepare`. (huggingface/accelerate#2926, transformers#24088)
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

    The cure gives every rank as many batches, some empty. (`join_uneven_inputs` does nothing on CPU ranks.)
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
    "scheduler-too-fast": scheduler_too_fast,
    "uneven-hang": uneven_hang,
}


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
