"""Rows out of what the loop reports: which step gets one, and what it holds; the progress bar and the curves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor
from tqdm import tqdm

from loop.animator import Animator
from loop.audit import or_infinite, replica_drift
from loop.book import CURVES, Epoch
from loop.effect import effect, steps_by_lr
from loop.progress import Progress
from loop.run.console import worst_audit
from loop.run.run import Run
from loop.shards import Cell
from loop.updater import Audited, CellUpdater

AUDIT_KEYS = ("audit/grad_rel_err", "audit/grad_cosine", "audit/grad_scale", "audit/replica_drift")


class Recorder:
    """Logs step rows and epoch rows, and draws a progress bar and curves: an observer, the same on every rank.

    Every `--log-every`-th step gets a row, and every audited one. What a row's reduce brings from the other ranks goes
    to `Run.decide`.
    summary: the last epoch's row.
    """

    def __init__(self, run: Run, updater: CellUpdater | Audited, progress: Progress) -> None:
        self.run, self.config, self.updater, self.progress = run, run.config, updater, progress
        self.sums = progress.accumulator(4)  # of the step being logged: loss sum, correct, examples, signals to stop
        self.worst: tuple[int, float] | None = None  # audited step, and its error
        self.unread: list[dict[str, float]] = []  # rows that wait for their audit: it is read with the next step row
        self.examples_before = progress.examples  # when this process began the epoch under way
        run.at_end.callback(self._say_worst)  # the last line, also of a run that `--audit-fail` ends
        self.summary: dict[str, Any] = {}
        self.bar = tqdm(
            total=self.config.epochs * len(run.shards.steps),
            initial=progress.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if run.is_main else True,  # None: quiet where stderr is no terminal
        )
        if run.is_main:
            for row in run.files.read():  # of a run that goes on
                if "train/loss" in row:
                    self._show_epoch(row)
        run.at_end.callback(self.bar.close)

    @cached_property
    def animator(self) -> Animator:
        """The curves; made with their first point, as they import matplotlib."""
        xlim = (1, max(self.config.epochs, 2))
        return Animator("epoch", xlim=xlim, legend=CURVES, figsize=(5.0, 3.5), path=self.run.folder / "curves.png")

    def after_cell(self, cell: Cell, loss_sum: Tensor, correct: Tensor, examples: int) -> None:
        """Add up the step that gets a row; after its last cell, log it. The progress has counted it by then."""
        due = self.config.logs(self.progress.step + (not cell.last))
        if due:
            self.sums.add(loss_sum, correct, examples, self.run.told_to_stop if cell.last else 0.0)
        if cell.last:
            self.bar.update()
            audited = self.config.audits(self.progress.step, cell.step.sizes)
            if due or audited:
                self._log_step(cell.step.sizes, due, audited)
            if self.config.saves(self.progress.step):  # the rows so far belong to the checkpoint
                self._read_audit()

    def _log_step(self, sizes: tuple[int, ...], due: bool, audited: bool) -> None:
        stops, row = 0.0, self._numbered({})
        if due:
            self.run.watchdog.advance()  # this rank has come to where it waits for the others
            self.sums.all_reduce(self.run.device)
            loss, acc, stops = self.sums[0] / self.sums[2], self.sums[1] / self.sums[2], self.sums[3]
            self.sums.reset()
            self._show(loss, acc, (self.bar.format_dict["rate"] or 0.0) * self.config.batch_size)
            row |= {"step/loss": loss, "step/grad_norm": float(self.updater.grad_norm)}
        row |= {"step/n_global": sum(sizes), "step/n_min": min(sizes), "step/n_max": max(sizes)}
        if steps_by_lr(self.config):
            row["step/lr_effective"] = effect(self.config, sizes, self.run.world_size).lr_effective
        if audited:
            self.unread.append(row)
        if due or self.config.audit_fail is not None:
            self._read_audit()
        if due:
            if not audited:
                self.run.log(row)
            self.run.decide(loss=loss, stops=stops)

    def _read_audit(self) -> None:
        """Log the rows that have waited for their audits' readings: one collective, if there are any."""
        rows, self.unread = self.unread, []
        if rows:
            assert self.updater.audit
            for row, reading in zip(rows, self.updater.audit.collect(), strict=True):
                step, error = int(row["step"]), or_infinite(reading.grad_rel_err)
                if self.worst is None or error > self.worst[1]:
                    self.worst = step, error
                self.run.log(row | dict(zip(AUDIT_KEYS, reading[:-1], strict=True)))
                self.run.decide(reading=reading, step=step)

    def after_epoch(self, epoch: Epoch) -> None:
        """Log an epoch's row and draw its points."""
        self._read_audit()
        run, census = self.run, self.run.shards.census
        seconds = epoch.seconds - run.saved_in_epoch_s
        row = self._numbered(
            {
                "epoch": epoch.number,
                "train/loss": epoch.train_loss,
                "train/acc": epoch.train_acc,
                "test/loss": epoch.test_loss,
                "test/acc": epoch.test_acc,
                "data/seen": census.seen,
                "data/duplicated": census.duplicated,
                "data/missing": census.missing,
                "audit/replica_drift": replica_drift(self.updater.net),
                "time/epoch_s": seconds,
                "time/examples_per_s": (self.progress.examples - self.examples_before) / seconds,
                "time/checkpoint_s": run.saved_in_epoch_s + run.saved_between_epochs_s,
            }
        )
        self.examples_before = self.progress.examples
        run.saved_in_epoch_s = run.saved_between_epochs_s = 0.0
        self.run.log(row)
        self._show(epoch.train_loss, epoch.train_acc, row["time/examples_per_s"])
        self._show_epoch(row)
        self.run.decide(loss=epoch.train_loss + epoch.test_loss)

    def close(self) -> dict[str, Any]:
        """End the bar, draw the curves whole, and return the last epoch's row."""
        self.bar.close()
        if self.run.is_main:
            self.animator.save()
        return self.summary

    def _say_worst(self) -> None:
        if self.worst:
            self.run.say(worst_audit(self.config, *self.worst))

    def _show_epoch(self, row: Mapping[str, Any]) -> None:
        self.summary = dict(row)
        if self.run.is_main:
            self.animator.add(row["epoch"], tuple(float(row[key]) for key in ("train/loss", "train/acc", "test/acc")))

    def _show(self, loss: float, acc: float, examples_per_s: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, acc {acc:.3f}, {examples_per_s:,.0f} examples/s")

    def _numbered(self, values: dict[str, float]) -> dict[str, float]:
        progress = self.progress
        return {"epoch": progress.epoch, "step": progress.step, "examples": progress.examples, **values}
