"""The data-parallel updater: one optimiser step out of the cells of all ranks, by loop/reduction.py's equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loop.book import sgd
from loop.config import Config
from loop.reduction import cell_scale, sgd_batch_size
from loop.shards import Cell


class CellUpdater:
    """Turns each cell's losses into its share of the step, and takes the step after the last (an `Updater`).

    net: as `accelerator.prepare` returned it. optimizer: None for the scratch updater.
    on_gradient: called as on_gradient(cell, divisor) once a step's gradient is whole (all-reduced, unscaled), before it
    is clipped. divisor: what this rank's update divides it by: 1 but for the scratch updater, 0 for no update.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        net: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config: Config,
        on_gradient: Callable[[Cell, int], None] | None = None,
    ) -> None:
        self.accelerator, self.net, self.optimizer, self.config = accelerator, net, optimizer, config
        self.on_gradient = on_gradient
        self.params = list(net.parameters())
        self.skipped_steps = 0  # by the fp16 scaler, on overflow

    def begin(self, cell: Cell) -> None:
        """Zero the gradient where a step begins; let DDP all-reduce in the step's last backward only."""
        self.cell = cell
        if isinstance(self.net, DistributedDataParallel):
            self.net.require_backward_grad_sync = cell.last  # what `no_sync()` sets for the length of a `with`
        if cell.first and self.optimizer:
            for param in self.params:  # `zero_grad()`, which costs ten times as much
                param.grad = None

    def backward(self, l: Tensor) -> None:
        """Back-propagate the cell's loss; DDP's all-reduce divides by W. l: one loss an example."""
        step, config = self.cell.step, self.config
        scale = cell_scale(
            config.reduction,
            config.normalize,
            n_local=l.numel(),
            n_global=step.n_global,
            averaged_over=len(step.sizes),
        )
        if isinstance(self.optimizer, AcceleratedOptimizer):  # its backward divides by K, and scales fp16's loss
            self.accelerator.backward(l.sum() * scale)  # `cell_loss`
        else:  # its gradient / K, one number for every loss, handed in: no graph is built above l
            l.backward(torch.full_like(l, float(scale / config.accumulate)))

    def step(self, batch_size: int) -> None:
        """Take the optimiser's step after the step's last cell. batch_size: examples in this rank's last cell."""
        if not self.cell.last:
            return
        if isinstance(self.optimizer, AcceleratedOptimizer):  # fp16: the gradient is scaled until here
            self.accelerator.unscale_gradients(self.optimizer)
        config, divisor = self.config, 1
        if self.optimizer is None:
            n_global = self.cell.step.n_global
            divisor = sgd_batch_size(config.reduction, config.normalize, n_last=batch_size, n_global=n_global)
        if self.on_gradient:
            self.on_gradient(self.cell, divisor)
        if self.optimizer is None:
            sgd(self.params, config.learning_rate, divisor)
            return
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.params, config.clip_norm)
        self.optimizer.step()
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.skipped_steps += self.optimizer.step_was_skipped


def settle_buckets(net: nn.Module, like: Tensor) -> None:
    """Have DDP lay out its gradient buckets for good, before the first step, fresh or resumed.

    It does so around its second backward. If that came in mid-run, a resumed run's gradients would be added up in
    another order than an uninterrupted one's, and at W >= 3 differ in the last bits. like: a batch, which is not seen.
    """
    if isinstance(net, DistributedDataParallel):
        for _ in range(2):
            net(like[:0]).sum().backward()
        net.zero_grad()


def make_updater(
    accelerator: Accelerator, net: nn.Module, config: Config, on_gradient: Callable[[Cell, int], None] | None = None
) -> CellUpdater:
    """Return the updater that the flags ask for. net: as `accelerator.prepare` returned it."""
    if config.updater == "scratch":
        return CellUpdater(accelerator, net, None, config, on_gradient)
    kind, momentum = {
        "sgd": (torch.optim.SGD, {"momentum": config.momentum}),
        "adam": (torch.optim.Adam, {}),
        "adamw": (torch.optim.AdamW, {}),
    }[config.optimizer]
    optimizer = kind(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **momentum)
    wrapped = accelerator.prepare_optimizer(optimizer)  # which makes it part of a checkpoint
    if accelerator.scaler:  # elsewhere Accelerate's wrapper does nothing for us, at a third of a softmax step's time
        optimizer = wrapped
    return CellUpdater(accelerator, net, optimizer, config, on_gradient)
