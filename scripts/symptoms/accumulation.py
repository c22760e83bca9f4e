"""Micro-batches, and the schedule that counts steps."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.optim.lr_scheduler import LinearLR

from loop.reduction import cell_loss
from scripts.symptoms.toy import Shown, examples, gradient, load, one_weight, two_each

K = 4  # micro-batches in a step


def short_window(fixed: bool) -> Shown:
    """A short accumulation window: an epoch's last step has 2 of 4 micro-batches, and is divided by 4 all the same."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    world_size = accelerator.num_processes
    net, batches = accelerator.prepare(one_weight(), load(6 * world_size, batch_size=1))  # 6 micro-batches a rank
    for k, x in enumerate(batches):
        in_window = min(K, len(batches) - k // K * K)
        with accelerator.accumulate(net):
            loss = net(x).mean()
            accelerator.backward(loss * K / in_window if fixed else loss)
        if k == K - 1:
            net.zero_grad()  # after the first step
    first, last = 4 * world_size + 1, 6 * world_size
    return Shown(f"gradient of the mean of examples {first} to {last}", gradient(net), (first + last) / 2)


def penalty_per_micro_batch(fixed: bool) -> Shown:
    """A loss term without a count, such as a penalty on the weights, is added in each micro-batch: K times too much."""
    own = two_each()
    micro_batches = own.x.split(1)
    for x in micro_batches:
        penalty = 10 * next(own.net.parameters()).sum()
        if fixed:
            penalty = penalty / len(micro_batches)
        (cell_loss(own.net(x), n_global=own.n, averaged_over=own.world_size) + penalty).backward()
    right = (own.n + 1) / 2 + 10
    return Shown(f"gradient of the mean of examples 1 to {own.n}, plus 10 w", gradient(own.net), right)


def no_sync_around_backward(fixed: bool) -> Shown:
    """`no_sync` around the backward alone does nothing: DDP decides in the forward whether it will all-reduce."""
    own = two_each()
    reduced: list[int] = []
    own.net.register_comm_hook(reduced, _counted)
    for k in range(K):
        quiet = own.net.no_sync if k < K - 1 else nullcontext
        with quiet() if fixed else nullcontext():
            loss = own.net(own.x).mean()
            with quiet():
                loss.backward()
    return Shown(f"all-reduces in a step of {K} micro-batches", len(reduced), 1, "needed")


def _counted(reduced: list[int], bucket: GradBucket) -> Future[Tensor]:
    """All-reduce as DDP does, and note it. DDP reads the annotations: here they must not be strings."""
    reduced.append(bucket.index())
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def scheduler_per_micro_batch(fixed: bool) -> Shown:
    """A scheduler beside the optimizer in `accumulate()` steps at every micro-batch, the optimizer at every K-th."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    net, optimizer, scheduler = _eight_steps()
    net, optimizer = accelerator.prepare(net, optimizer)
    for _ in range(2 * K):
        with accelerator.accumulate(net):
            accelerator.backward(net(examples(1)).mean())
            optimizer.step()
            if accelerator.sync_gradients or not fixed:
                scheduler.step()
            optimizer.zero_grad()
    return Shown(f"learning rate after 2 of 8 steps of {K} micro-batches", float(scheduler.get_last_lr()[0]), 0.75)


def scheduler_too_fast(fixed: bool) -> Shown:
    """Scheduler steps too fast on many GPUs: a prepared one takes W steps at each step of the optimizer.

    Accelerate supposes the schedule was counted in one process's smaller batches; with `split_batches=True` it takes
    one step. Where the schedule was counted in the optimizer's steps, leave it out of `prepare`, and step it where
    `sync_gradients` is true.
    """
    accelerator = Accelerator(cpu=True)
    net, optimizer, scheduler = _eight_steps()
    net, optimizer = accelerator.prepare(net, optimizer)
    if not fixed:
        scheduler = accelerator.prepare(scheduler)
    for _ in range(2):
        accelerator.backward(net(examples(1)).mean())
        optimizer.step()
        scheduler.step()
    return Shown("learning rate after 2 of 8 steps from 1 down to 0", float(scheduler.get_last_lr()[0]), 0.75)


def _eight_steps() -> tuple[torch.nn.Module, torch.optim.Optimizer, LinearLR]:
    """Return a net, its optimizer, and a learning rate that goes from 1 to 0 in 8 steps."""
    net = one_weight()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    return net, optimizer, LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=8)
