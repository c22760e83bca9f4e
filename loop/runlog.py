"""Rows out of what the loop reports: which step gets one, what it holds, the same over all ranks."""

from __future__ import annotations

import signal

from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from loop.animator import Animator
from loop.audit import replica_drift
from loop.book import Accumulator, Epoch
from loop.config import Config
from loop.shards import Cell, Shards
from loop.stopping import Stopped, StopSignal


class RunLog:
    """Turns what the loop reports into step rows and epoch rows, reduced over all ranks, and a progress bar.

    `on_gradient`, `after_cell` and `after_epoch` are the loop's callbacks; every rank must make the same calls.
    A signal to any rank raises `Stopped` on all of them, after the next step row.
    summary: the last epoch's row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        shards: Shards,
        net: nn.Module,
        stop: StopSignal,
        animator: Animator | None = None,
    ) -> None:
        self.accelerator, self.config, self.shards, self.net = accelerator, config, shards, net
        self.stop, self.animator = stop, animator
        self.epoch, self.step, self.examples = 1, 0, 0
        self.sums = Accumulator(4)  # of the step being logged: loss sum, correct, examples, ranks told to stop
        self.bar = tqdm(
            total=config.epochs * len(shards.steps),
            unit="step",
            dynamic_ncols=True,
            disable=None if accelerator.is_main_process else True,  # None: quiet where stderr is no terminal
        )

    @property
    def due(self) -> bool:
        """Whether the step under way gets a row."""
        return (self.step + 1) % self.config.log_every == 0

    def on_gradient(self, cell: Cell) -> None:
        """Note the norm of the step's gradient, before clipping."""
        if self.due:
            self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])

    def after_cell(self, cell: Cell, *sums: Tensor | int) -> None:
        """Count a cell; after a step's last, advance the bar and, where a row is due, reduce and log it."""
        if self.due:
            self.sums.add(*sums)
        if not cell.last:
            return
        row_due = self.due
        self.step += 1
        self.examples += cell.step.n_global
        self.bar.update()
        if row_due:
            self._log_step(cell)

    def _log_step(self, cell: Cell) -> None:
        sizes = cell.step.sizes
        self.sums.add(0, 0, 0, self.stop.signum != 0)
        if self.accelerator.num_processes > 1:
            self.sums.all_reduce()
        loss, acc, stops = self.sums[0] / self.sums[2], self.sums[1] / self.sums[2], self.sums[3]
        self.sums.reset()
        rate = self.bar.format_dict["rate"] or 0.0
        self._show(loss, acc, rate * self.config.batch_size)
        self._log(
            {
                "step/loss": loss,
                "step/grad_norm": float(self.grad_norm),
                "step/n_global": cell.step.n_global,
                "step/n_min": min(sizes),
                "step/n_max": max(sizes),
                "step/lr_effective": self.config.effective_lr(sizes, self.shards.world_size),
            }
        )
        if stops:
            raise Stopped(self.stop.signum or signal.SIGTERM)

    def after_epoch(self, epoch: Epoch) -> None:
        """Log an epoch's row and draw its points."""
        census = self.shards.census
        self.summary = self._log(
            {
                "train/loss": epoch.train_loss,
                "train/acc": epoch.train_acc,
                "test/loss": epoch.test_loss,
                "test/acc": epoch.test_acc,
                "data/seen": census.seen,
                "data/duplicated": census.duplicated,
                "data/missing": census.missing,
                "audit/replica_drift": replica_drift(self.net),
                "time/epoch_s": epoch.seconds,
                "time/examples_per_s": (census.seen + census.duplicated) / epoch.seconds,
            }
        )
        self._show(epoch.train_loss, epoch.train_acc, self.summary["time/examples_per_s"])
        if self.animator:
            self.animator.add(epoch.number, (epoch.train_loss, epoch.train_acc, epoch.test_acc))
        self.epoch += 1

    def _show(self, loss: float, acc: float, examples_per_s: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, acc {acc:.3f}, {examples_per_s:,.0f} examples/s")

    def close(self) -> None:
        """End the progress bar."""
        self.bar.close()

    def _log(self, values: dict[str, float]) -> dict[str, float]:
        row = {"epoch": self.epoch, "step": self.step, "examples": self.examples, **values}
        self.accelerator.log(row, step=self.step)
        return row
