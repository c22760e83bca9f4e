"""Numbers that are logged wrong, while the training may be right."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DistributedSampler

from scripts.symptoms.toy import Shown, as_dataset, examples, load, mean_over_ranks, two_each


def logged_loss(fixed: bool) -> Shown:
    """The logged loss is rank 0's: `loss.item()` is the mean of one rank's examples."""
    own = two_each()
    losses = own.net(own.x).detach()
    mean = mean_over_ranks(losses) if fixed else losses.mean().item()
    return Shown(f"logged loss of a step of examples 1 to {own.n}", mean, (own.n + 1) / 2)


def eval_loss_summed(fixed: bool) -> Shown:
    """The evaluation loss is W times too large: `Accelerator.reduce` sums unless it is told "mean"."""
    own = two_each()
    mean = mean_over_ranks(own.x) if fixed else Accelerator(cpu=True).reduce(own.x.mean())
    return Shown(f"evaluation loss of examples 1 to {own.n}", float(mean), (own.n + 1) / 2)


def mean_of_means(fixed: bool) -> Shown:
    """Mean of means: a metric averaged over batches, then over ranks, gives a short batch's examples more weight."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    n = 2 * accelerator.num_processes + 1  # two examples a rank; then one more, rank 0's
    batches = list(accelerator.prepare(load(n, batch_size=2)))
    if fixed:
        mean = mean_over_ranks(torch.cat(batches))
    else:
        mean = float(accelerator.reduce(torch.stack([x.mean() for x in batches]).mean(), "mean"))
    return Shown(f"mean loss of examples 1 to {n}", mean, (n + 1) / 2)


def gather_count(fixed: bool) -> Shown:
    """`gather_for_metrics` count wrong: one number a batch cannot be cut down to the examples that are no copies.

    Accelerate fills the last batches up with examples seen before; `gather_for_metrics` drops as many *rows* of what it
    has gathered. So it must be handed a row for each example.
    """
    accelerator = Accelerator(cpu=True)
    counted = 0
    for x in accelerator.prepare(load(9, batch_size=4)):
        if fixed:
            counted += len(accelerator.gather_for_metrics(x))
        else:
            counted += int(accelerator.gather_for_metrics(torch.tensor([len(x)])).sum())
    return Shown("examples counted in an evaluation of 9", counted, 9)


def sampler_copies(fixed: bool) -> Shown:
    """`DistributedSampler` copies examples so that all ranks have equally many, and a metric counts the copies."""
    rank, world_size, n = dist.get_rank(), dist.get_world_size(), 10 * dist.get_world_size() + 1
    copying: DistributedSampler[Tensor] = DistributedSampler(as_dataset(examples(n)), shuffle=False)
    mean = mean_over_ranks(examples(n)[list(range(rank, n, world_size) if fixed else copying)])
    return Shown(f"mean loss of examples 1 to {n}", mean, (n + 1) / 2)


def floored_mean(fixed: bool) -> Shown:
    """An integer's mean over ranks is floored: counts are to be summed, or turned into floating point before."""
    correct = torch.tensor(int(dist.get_rank() > 0))  # of one example a rank
    if fixed:
        correct = correct.double()
    world_size = dist.get_world_size()
    dist.all_reduce(correct)
    correct.copy_(correct / world_size)  # in place, as Lightning does
    return Shown("accuracy where rank 0 is wrong and each other rank is right", float(correct), 1 - 1 / world_size)
