"""A run's folder and its rows: what happened at which step, over all ranks, written as it happens."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn
from tqdm import tqdm

from loop.animator import Animator
from loop.book import Accumulator, Epoch
from loop.config import Config, InputError
from loop.shards import Cell, Shards

PACKAGES = ("torch", "torchvision", "accelerate", "numpy")


def new_folder(config: Config, world_size: int) -> Path:
    """Make and return the run's folder, which no other run has: a generated name gets -2, -3, ... where it is taken.

    Raises InputError where --run-name is taken, or the folder cannot be made.
    """
    name = config.run_name or config.default_run_name(world_size)
    attempt = 1
    while True:
        folder = config.out / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.is_dir():
                raise InputError(f"--out {config.out}: cannot make the run's folder: {error}") from None
            config.refuse_existing_run()
            attempt += 1


class JsonlTracker(GeneralTracker):  # type: ignore[misc]  # untyped
    """Writes config.json and, row by row, metrics.jsonl into a run's folder, behind Accelerate's `log_with`.

    JSON has no NaN and no infinity: they are written as the strings that float() reads, "nan", "inf" and "-inf".
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def start(self) -> None:
        """Make the run's folder; called by `init_trackers`, on the main process only, as all that follows."""
        self.folder = new_folder(self.config, PartialState().num_processes)
        self.rows: TextIO = (self.folder / "metrics.jsonl").open("x", encoding="utf-8", buffering=1)

    @property
    def tracker(self) -> Path:
        """The run's folder."""
        return self.folder

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write config.json."""
        write_json(self.folder / "config.json", values)

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Append a row."""
        self.rows.write(json.dumps(_plain(values), allow_nan=False) + "\n")

    def finish(self) -> None:
        """Close metrics.jsonl."""
        self.rows.close()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(_plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def describe(config: Config, shards: Shards, accelerator: Accelerator) -> dict[str, Any]:
    """Return what config.json holds: every flag, what follows from them, and what the run runs on."""
    device = accelerator.device
    return {
        **asdict(config),
        "lr": config.learning_rate,
        "train_examples": shards.examples,
        "world_size": shards.world_size,
        "cells": shards.cells,
        "steps_per_epoch": len(shards.steps),
        "tail_examples": shards.tail_examples,
        "last_step_sizes": list(shards.steps[-1].sizes),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads_per_rank": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": git_commit(),
        "argv": sys.argv,
    }


def git_commit() -> str | None:
    """Return the commit of this project's checkout, with "-dirty" where it has changes; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class RunLog:
    """Turns what the loop reports into step rows and epoch rows, reduced over all ranks, and a progress bar.

    `on_gradient`, `after_cell` and `after_epoch` are the loop's callbacks; every rank must make the same calls.
    summary: the last epoch's row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        shards: Shards,
        net: nn.Module,
        animator: Animator | None = None,
    ) -> None:
        self.accelerator, self.config, self.shards, self.net, self.animator = accelerator, config, shards, net, animator
        self.epoch, self.step, self.examples = 1, 0, 0
        self.sums = Accumulator(3)  # of the step being logged: loss sum, correct, examples
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
        if self.accelerator.num_processes > 1:
            self.sums.all_reduce()
        loss, acc = self.sums[0] / self.sums[2], self.sums[1] / self.sums[2]
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


def _plain(value: Any) -> Any:
    """Return the value in JSON's types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
