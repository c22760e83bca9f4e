"""Rows out of what the loop reports: which step gets one, what it holds, the same over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from loop.animator import Animator
from loop.audit import Audit, Reading, replica_drift
from loop.book import Accumulator, Epoch
from loop.checkpoints import Checkpoints
from loop.config import Config
from loop.resume import Progress
from loop.shards import Cell, Shards
from loop.stopping import RunEnded, Stopped, StopSignal

AUDIT_KEYS = ("audit/grad_rel_err", "audit/grad_cosine", "audit/grad_scale", "audit/replica_drift")


class AuditFailed(RunEnded):
    """An audited step was further off than `--audit-fail` allows."""


class NotFinite(RunEnded):
    """The loss has become infinite, or no number."""

    goes_on = False  # its last checkpoint's weights are on their way there


class RunLog:
    """Turns what the loop reports into step rows, epoch rows, checkpoints, and a progress bar.

    `on_cell`, `on_gradient`, `after_cell` and `after_epoch` are the loop's callbacks: the same calls on every rank. A
    step gets a row every `--log-every` steps, and where it is audited. All ranks together raise `Stopped` after the
    first kind of row or a checkpoint, if any had a signal, with a checkpoint saved; `AuditFailed` after the second
    kind, if the audit found too much; `NotFinite` at the next row or checkpoint once a loss is.

    summary: the last epoch's row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        shards: Shards,
        net: nn.Module,
        audit: Audit,
        checkpoints: Checkpoints,
        stop: StopSignal,
        animator: Animator | None = None,
    ) -> None:
        self.accelerator, self.config, self.shards, self.net = accelerator, config, shards, net
        self.audit, self.checkpoints, self.stop, self.animator = audit, checkpoints, stop, animator
        self.epoch, self.epoch_steps, self.step, self.examples = 1, 0, 0, 0
        self.examples_before = 0  # those of the epoch under way came after these, or were trained before a resume
        self.unread: list[dict[str, float]] = []  # rows that wait for their audit: it is read with the next step row
        self.sums = Accumulator(4)  # of the step being logged: loss sum, correct, examples, ranks told to stop
        self.bar = tqdm(
            total=config.epochs * len(shards.steps),
            unit="step",
            dynamic_ncols=True,
            disable=None if accelerator.is_main_process else True,  # None: quiet where stderr is no terminal
        )

    def go_on(self, progress: Progress, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stand where a checkpoint was saved; rows: the run's so far, on the main process."""
        self.epoch, self.epoch_steps = progress.epoch, progress.epoch_steps
        self.step, self.examples = progress.step, progress.examples
        self.examples_before = self.examples
        self.bar.update(self.step)
        for row in rows:
            if "train/loss" in row:
                self._show_epoch(row)

    def on_cell(self, X: Tensor, y: Tensor, cell: Cell) -> None:
        """Decide, where a step begins, whether it gets a row and an audit, which is shown all its cells."""
        if cell.first:
            number, audit_every = self.step + 1, self.config.audit_every
            self.audited = audit_every > 0 and (number % audit_every == 0 or len(set(cell.step.sizes)) > 1)
            self.due = number % self.config.log_every == 0
        if self.audited:
            self.audit.saw(X, y, last=cell.last)

    def on_gradient(self, cell: Cell, divisor: int) -> None:
        """Compare the step's gradient and note its norm, before clipping."""
        if self.audited:
            self.audit.compare(divisor)
        if self.due:
            self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])

    def after_cell(self, cell: Cell, *sums: Tensor | int) -> None:
        """Count a cell; after a step's last, advance the bar and log the row that the step gets, if any."""
        if self.due:
            self.sums.add(*sums)
        if not cell.last:
            return
        self.epoch_steps += 1
        self.step += 1
        self.examples += cell.step.n_global
        self.bar.update()
        if self.due or self.audited:
            self._log_step(cell.step.sizes)
        every = self.config.checkpoint_every
        if every and self.step % every == 0 and self.epoch_steps < len(self.shards.steps):
            self._save()

    def _log_step(self, sizes: tuple[int, ...]) -> None:
        stops, row = 0.0, self._numbered({})
        if self.due:
            self.sums.add(0, 0, 0, self.stop.signum != 0)
            self.sums.all_reduce(self.accelerator.device)
            loss, acc, stops = self.sums[0] / self.sums[2], self.sums[1] / self.sums[2], self.sums[3]
            self.sums.reset()
            self._show(loss, acc, (self.bar.format_dict["rate"] or 0.0) * self.config.batch_size)
            row |= {"step/loss": loss, "step/grad_norm": float(self.grad_norm)}
        row |= {
            "step/n_global": sum(sizes),
            "step/n_min": min(sizes),
            "step/n_max": max(sizes),
        }
        if self.config.steps_by_lr:
            row["step/lr_effective"] = self.config.effective_lr(sizes, self.shards.world_size)
        if self.audited:
            self.unread.append(row)
        if self.due or self.config.audit_fail is not None:
            self._read_audit()
        if self.due and not self.audited:
            self._log(row)
        if self.due:
            self._check_loss(loss)
        if stops:
            self._save()

    def _check_loss(self, loss: float) -> None:
        """Raise NotFinite for a loss that is not, with what to try."""
        if math.isfinite(loss):
            return
        config, times = self.config, float(self.shards.batch_size)
        if config.normalize == "rank":
            times /= self.shards.cells
        if config.intended == "sum" and config.steps_by_lr:
            lr = f"{config.learning_rate / times:.3g}"
            remedy = f"--lr {lr} (a sum's step is {times:g} times the mean's), or --reduction mean"
        else:
            remedy = f"a smaller --lr than {config.learning_rate:g}"
        raise NotFinite(
            f"the loss is {loss}, under --reduction {config.reduction} --normalize {config.normalize}: "
            f"start a new run with {remedy}; ended"
        )

    def _read_audit(self) -> None:
        """Log the rows that have waited for what their audits found."""
        rows, self.unread = self.unread, []
        for row, reading in zip(rows, self.audit.collect(), strict=True):
            self._log(row | dict(zip(AUDIT_KEYS, reading[:-1], strict=True)))
            self._check_audit(int(row["step"]), reading)

    def _save(self) -> None:
        """Save a checkpoint; stop there if any rank was told to."""
        self._read_audit()
        if not self.checkpoints.save(Progress(self.epoch, self.epoch_steps, self.step, self.examples)):
            self._check_loss(math.nan)
        stops = Accumulator(1)
        stops.add(self.stop.signum != 0)
        stops.all_reduce(self.accelerator.device)
        if stops[0]:
            raise Stopped(self.stop)

    def _check_audit(self, step: int, reading: Reading) -> None:
        """Raise AuditFailed for more than `--audit-fail` allows, but in a step that fp16's overflow skips."""
        config, excess = self.config, max(reading.grad_rel_err, reading.replica_drift)
        skipped = self.accelerator.scaler is not None and not math.isfinite(excess)
        if config.audit_fail is not None and not excess <= config.audit_fail and not skipped:
            raise AuditFailed(
                f"audit failed: at step {step} rank {reading.rank}'s gradient is {reading.grad_rel_err:.3g} (relative) "
                f"off one process's, the replicas {reading.replica_drift:.3g} apart, more than --audit-fail allows "
                f"({config.audit_fail:g}), under --reduction {config.reduction} --normalize {config.normalize} "
                f"--tail {config.tail} --updater {config.updater},"
            )

    def after_epoch(self, epoch: Epoch) -> None:
        """Log an epoch's row, draw its points, save a checkpoint."""
        self._read_audit()
        census = self.shards.census
        row = self._numbered(
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
                "time/examples_per_s": (self.examples - self.examples_before) / epoch.seconds,
            }
        )
        self._log(row)
        self._show(epoch.train_loss, epoch.train_acc, row["time/examples_per_s"])
        self._show_epoch(row)
        self._check_loss(epoch.train_loss + epoch.test_loss)
        self.epoch, self.epoch_steps, self.examples_before = self.epoch + 1, 0, self.examples
        self._save()

    def _show_epoch(self, row: Mapping[str, Any]) -> None:
        self.summary = dict(row)
        if self.animator:
            self.animator.add(row["epoch"], tuple(float(row[key]) for key in ("train/loss", "train/acc", "test/acc")))

    def _show(self, loss: float, acc: float, examples_per_s: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, acc {acc:.3f}, {examples_per_s:,.0f} examples/s")

    def close(self) -> None:
        """End the progress bar."""
        self.bar.close()

    def _numbered(self, values: dict[str, float]) -> dict[str, float]:
        return {"epoch": self.epoch, "step": self.step, "examples": self.examples, **values}

    def _log(self, row: dict[str, float]) -> None:
        self.accelerator.log(row, step=int(row["step"]))
