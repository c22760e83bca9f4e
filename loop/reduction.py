"""What a rank must back-propagate so that the step is the one a single process would take.

One optimiser step covers n examples with losses l and gradients g. They lie in cells: one for each rank and
micro-batch, n_rk examples in cell (r, k), some cells perhaps empty. The framework then *averages* over cells: over
the W ranks under DistributedDataParallel, over W K under Accelerate, whose `backward` divides by K as well. Call that
number `averaged_over`. A cell that back-propagates s_rk Σ l contributes s_rk / averaged_over of its summed gradient,
so its scale s_rk decides everything:

    reduction  normalize  s_rk                the step applies
    mean       rank       1 / n_rk            1/(W K) Σ_rk (1/n_rk) Σ g   a mean of means
    mean       global     averaged_over / n   (1/n) Σ g                   the mean
    sum        rank       1                   1/(W K) Σ g                 neither the sum nor the mean
    sum        global     averaged_over       Σ g                         the sum

The last column is for averaged_over = W K, as in `Accelerator.backward`; under DDP alone W K is W there.

The file needs nothing but torch and is made to be copied. In a loop of your own, with W ranks under DDP:

    n = global_count(sum(len(y) for x, y in micro_batches), device)      # over ranks and micro-batches
    for x, y in micro_batches:
        losses = cross_entropy(net(x), y, reduction="none")
        cell_backward(losses, n_global=n, averaged_over=W)

`cell_loss` is the same as a scalar, for a framework that back-propagates by itself (`accelerator.backward`).

Where losses are masked or weighted, count weights instead of examples: `losses` holds weighted losses (0 where masked)
and `n_global` the sum of the weights. A rank that has run out of examples still takes part: with one example whose
labels are all masked, or whose losses are multiplied by 0. An empty batch (`x[:0]`) does as well, unless the net
reshapes by `view(B, -1)`, which fails without examples.

The classical statement is Goyal et al. 2017 (arXiv:1706.02677), remark 3.

From chapter3-data-parallel, under the MIT licence: copyright (c) 2026, the authors of that project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the arithmetic below also serves programs that never load torch
    import torch

    Count = int | float | torch.Tensor

Reduction = Literal["mean", "sum"]
Normalize = Literal["global", "rank"]


def cell_scale(
    reduction: Reduction, normalize: Normalize, *, n_local: Count, n_global: Count, averaged_over: int
) -> Count:
    """Return s_rk of the table above: finite even for a count of 0, so that an empty cell's loss is 0, never NaN."""
    if normalize == "global":
        return averaged_over / _nonzero(n_global) if reduction == "mean" else averaged_over
    return 1 / _nonzero(n_local) if reduction == "mean" else 1


def cell_loss(
    losses: torch.Tensor,
    *,
    n_global: Count,
    averaged_over: int,
    reduction: Reduction = "mean",
    normalize: Normalize = "global",
) -> torch.Tensor:
    """Return the scalar that a cell back-propagates.

    losses: per-example (or per-token) losses of this cell, any shape, possibly empty; already weighted, 0 where masked.
    n_global: examples (or summed weights) of the whole step, over all ranks and micro-batches.
    averaged_over: how many gradients the framework averages: 1, W, or W K (module docstring).
    """
    scale = cell_scale(reduction, normalize, n_local=losses.numel(), n_global=n_global, averaged_over=averaged_over)
    return losses.sum() * scale


def cell_backward(
    losses: torch.Tensor,
    *,
    n_global: Count,
    averaged_over: int,
    reduction: Reduction = "mean",
    normalize: Normalize = "global",
) -> None:
    """Back-propagate a cell: `cell_loss(losses, ...).backward()`, without building the sum and the product first.

    The gradient of each loss is one number, s_rk; it is handed to `losses.backward`.
    """
    import torch

    scale = cell_scale(reduction, normalize, n_local=losses.numel(), n_global=n_global, averaged_over=averaged_over)
    losses.backward(torch.ones_like(losses) * scale)


def global_count(
    local: Count, device: torch.device | str, group: torch.distributed.ProcessGroup | None = None
) -> torch.Tensor:
    """Sum a count over all ranks: the one tiny all-reduce a step needs when no sampler knows n.

    local: this rank's examples, tokens or summed weights over *all* micro-batches of the step, or a tensor of several
    such counts, summed one by one. Every rank must call.
    device: the net's. A group that NCCL serves sums tensors on GPUs only.
    group: the ranks that hold different examples, by default all. It is the group that the framework averages over, and
    `averaged_over` is its size: where other ranks hold copies (tensor or pipeline parallelism), the data-parallel one.
    Returns a tensor on `device` in local's shape, of float64 (float32 on MPS, which has no wider type), without a wait
    for the device if local is a number or on that device already.

    Raises ValueError where the process group does not serve the device.
    """
    import torch
    import torch.distributed as dist

    device = torch.device(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(local, torch.Tensor):
        total = local.detach().to(device, dtype, copy=True)
    else:
        total = torch.full((), local, dtype=dtype, device=device)  # as_tensor(local) would wait for a GPU
    if dist.is_available() and dist.is_initialized():
        backends = dist.get_backend_config(group)  # such as "cuda:nccl"
        if f"{device.type}:" not in backends:
            raise ValueError(f"cannot sum over ranks on {device}: the process group serves {backends} only")
        dist.all_reduce(total, group=group)
    return total


def _nonzero(count: Count) -> Count:
    """Return the count, or 1 for 0: arithmetic rather than a branch, so a device tensor causes no host sync."""
    if not isinstance(count, (int, float)) and not count.is_floating_point():
        count = count.float() if count.device.type == "mps" else count.double()  # torch would divide in float32
    return count + (count == 0)
