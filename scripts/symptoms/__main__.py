"""What a loop that was right on one GPU gives on several: the wrong number, the right one, and one process's.

    python -m scripts.symptoms                                                           lists the symptoms
    torchrun --standalone --nproc_per_node 2 -m scripts.symptoms gather-count            the wrong number
    torchrun --standalone --nproc_per_node 2 -m scripts.symptoms gather-count --fixed    the right one

On real Accelerate, DistributedDataParallel and FSDP2, on CPU ranks, on examples small enough for mental arithmetic:
example i is the number i. The net is a single weight w, 1 at the start, and the loss of example i is w i: its gradient
is i. scripts/symptoms/README.md is the page of all symptoms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
import tyro
from accelerate import Accelerator

from loop.config import InputError
from loop.run.launch import launched_rank, launched_world_size, leave_ranks
from scripts.command import command
from scripts.symptoms import accumulation, gradients, loaders, metrics, tokens
from scripts.symptoms.toy import Shown

SYMPTOMS: dict[str, Callable[[bool], Shown]] = {
    show.__name__.replace("_", "-"): show
    for show in (  # as on the page, the most likely first
        loaders.grown_batch,
        accumulation.scheduler_too_fast,
        metrics.logged_loss,
        metrics.eval_loss_summed,
        metrics.mean_of_means,
        metrics.gather_count,
        metrics.sampler_copies,
        metrics.floored_mean,
        tokens.token_mean,
        tokens.all_masked,
        tokens.causal_shift,
        accumulation.short_window,
        accumulation.penalty_per_micro_batch,
        accumulation.scheduler_per_micro_batch,
        accumulation.no_sync_around_backward,
        gradients.loss_times_world_size,
        gradients.reduce_without_gradient,
        gradients.gathered_loss,
        gradients.own_negatives,
        gradients.bypassed_ddp,
        gradients.norm_summed_twice,
        gradients.shard_norm,
        gradients.skipped_alone,
        gradients.one_task_a_rank,
        loaders.uneven_hang,
        loaders.set_epoch_forgotten,
        loaders.sampler_seeded_by_rank,
        loaders.unsplit_stream,
    )
}


def report(name: str, fixed: bool) -> str:
    """Show a symptom on all ranks, and say what came of it on this one."""
    quantity, here, right, reference = SYMPTOMS[name](fixed)
    ranks = f"{dist.get_world_size()} ranks" + (", fixed" if fixed else "")
    return f"{quantity}\n{ranks}: {here if isinstance(here, str) else f'{here:g}'}\n{reference}: {right:g}"


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
        print("\n".join(f"{name:<26} {str(show.__doc__).splitlines()[0]}" for name, show in SYMPTOMS.items()))
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
