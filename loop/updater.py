"""The data-parallel updater: one optimiser step out of the cells of all ranks, by loop/reduction.py's equations."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loop.audit import Audit
from loop.book import Loss, sgd
from loop.config import Config
from loop.effect import sgd_divisor, target_reduction
from loop.progress import Progress
from loop.reduction import cell_backward, cell_loss
from loop.shards import Cell
from loop.virtual_ranks import VirtualRanks


class CellUpdater:
    """Turns each cell's losses into its part of the gradient, and takes the step after the last.

    net: as `accelerator.prepare` returned it. optimizer: None for the scratch updater.
    grad_norm: of the gradient of the last `--log-every` step, before clipping and dividing. audit: see `Audited`.
    """

    audit: Audit | None = None

    def __init__(
        self,
        accelerator: Accelerator,
        net: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config: Config,
        progress: Progress | None = None,
    ) -> None:
        self.accelerator, self.net, self.optimizer, self.config = accelerator, net, optimizer, config
        self.progress = progress or Progress()
        self.params = list(net.parameters())
        self.grad_norm = torch.zeros(())

    def begin(self, X: Tensor, y: Tensor, cell: Cell) -> None:
        """Drop an optimizer's gradient where a step begins; let DDP all-reduce in the step's last backward only."""
        self.cell = cell
        if isinstance(self.net, DistributedDataParallel):
            self.net.require_backward_grad_sync = cell.last  # what `no_sync()` sets for the length of a `with`
        if cell.first and self.optimizer:
            for param in self.params:  # `zero_grad()`, which costs ten times as much
                param.grad = None

    def backward(self, l: Tensor) -> None:
        """Back-propagate the cell's loss; DDP's all-reduce divides by W. l: one loss per example."""
        config, n_global, cells = self.config, self.cell.step.n_global, len(self.cell.step.sizes)
        mode: Any = {"reduction": config.reduction, "normalize": config.normalize, "n_global": n_global}
        if isinstance(self.optimizer, AcceleratedOptimizer):  # its backward divides by K, and scales fp16's loss
            self.accelerator.backward(cell_loss(l, averaged_over=cells, **mode))
            return
        if config.normalize == "rank" and config.accumulate > 1:  # here we divide by K, as Accelerate would
            l = l / config.accumulate
        cell_backward(l, averaged_over=cells // config.accumulate, **mode)

    def step(self, X: Tensor) -> None:
        """Take the optimiser's step after the step's last cell."""
        if self.cell.last:
            self.apply(self.finish_gradient(X.shape[0]))

    def finish_gradient(self, n_last: int) -> int:
        """Unscale the step's gradient, which is all-reduced, and note its norm where --log-every asks for a row.

        n_last: examples in this rank's last cell.
        Returns what this rank's update divides it by: 1 but for the scratch updater, 0 for no update.
        """
        if isinstance(self.optimizer, AcceleratedOptimizer):  # fp16: the gradient is scaled until here
            self.accelerator.unscale_gradients(self.optimizer)
        if self.config.logs(self.progress.step + 1):
            self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.optimizer:
            return 1
        n_global = self.cell.step.n_global
        return sgd_divisor(self.config.reduction, self.config.normalize, n_last=n_last, n_global=n_global)

    def apply(self, divisor: int) -> None:
        """Clip the gradient and update the parameters."""
        if self.optimizer is None:
            sgd(self.params, self.config.learning_rate, divisor)
            return
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.params, self.config.clip_norm)
        self.optimizer.step()
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.progress.skipped_steps += self.optimizer.step_was_skipped


class VirtualRankUpdater(CellUpdater):
    """Adds the gradients of `--virtual-ranks` cells in an order that does not depend on the number of ranks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shares = VirtualRanks(self.params, self.config.virtual_ranks)
        if isinstance(self.net, DistributedDataParallel):
            self.net.require_backward_grad_sync = False  # the tree takes the place of its all-reduce

    def begin(self, X: Tensor, y: Tensor, cell: Cell) -> None:
        """Note the cell."""
        self.cell = cell

    def backward(self, l: Tensor) -> None:
        """Take the cell's gradient by itself. l: one loss per example."""
        self.shares.add(
            cell_loss(l, n_global=self.cell.step.n_global, averaged_over=1, reduction=self.config.reduction)
        )

    def finish_gradient(self, n_last: int) -> int:
        """Add the step's gradients, of all ranks; then as without virtual ranks."""
        self.shares.reduce()
        return super().finish_gradient(n_last)


class Audited:
    """An updater whose gradients are audited, every `--audit-every` steps and on uneven ones, before they are applied.

    audit: holds what was measured and not collected yet. due: whether the step under way is audited.
    """

    def __init__(self, updater: CellUpdater, loss: Loss) -> None:
        self.updater, self.net = updater, updater.net
        self.audit = Audit(updater.net, loss, target=target_reduction(updater.config))

    @property
    def grad_norm(self) -> Tensor:
        """What the updater has noted."""
        return self.updater.grad_norm

    def begin(self, X: Tensor, y: Tensor, cell: Cell) -> None:
        """Show the audit each cell of a step that is audited."""
        self.updater.begin(X, y, cell)
        self.due = self.updater.config.audits(self.updater.progress.step + 1, cell.step.sizes)
        if self.due:
            self.audit.add(X, y)

    def backward(self, l: Tensor) -> None:
        """Back-propagate the cell's loss."""
        self.updater.backward(l)

    def step(self, X: Tensor) -> None:
        """Compare the step's gradient with what one process would apply; then apply it."""
        if not self.updater.cell.last:
            return
        divisor = self.updater.finish_gradient(X.shape[0])
        if self.due:
            self.audit.compare(divisor)
        self.updater.apply(divisor)


def settle_buckets(net: nn.Module, empty: Tensor) -> None:
    """Make DDP lay out its gradient buckets for good, before the first step, fresh or resumed.

    DDP does so around its second backward. In the middle of a run, this would add a resumed run's gradients in another
    order than an uninterrupted one's, and at W >= 3 they would differ in the last bits. empty: a batch of no example.
    """
    if isinstance(net, DistributedDataParallel):
        for _ in range(2):
            net(empty).sum().backward()
        net.zero_grad()


def make_updater(
    accelerator: Accelerator, net: nn.Module, config: Config, progress: Progress | None = None
) -> CellUpdater:
    """Return the updater that the flags ask for, not audited yet. net: as `accelerator.prepare` returned it."""
    updater = VirtualRankUpdater if config.virtual_ranks else CellUpdater
    if config.updater == "scratch":
        return updater(accelerator, net, None, config, progress)
    kind, momentum = {
        "sgd": (torch.optim.SGD, {"momentum": config.momentum}),
        "adam": (torch.optim.Adam, {}),
        "adamw": (torch.optim.AdamW, {}),
    }[config.optimizer]
    optimizer = kind(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **momentum)
    wrapped = accelerator.prepare_optimizer(optimizer)  # which makes it part of a checkpoint
    if accelerator.scaler:  # elsewhere Accelerate's wrapper does nothing for us, at a third of a softmax step's time
        optimizer = wrapped
    return updater(accelerator, net, optimizer, config, progress)
