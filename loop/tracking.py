"""A run's folder: what ran, with what, and its rows, written as they come."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object

from loop.config import Config
from loop.folder import RunFolder, write_json
from loop.shards import Shards

PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy")


class JsonlTracker(GeneralTracker):  # type: ignore[misc]  # untyped
    """Writes config.json and, row by row, metrics.jsonl into a run's folder, behind Accelerate's `log_with`.

    run: the open folder, to be set before `init_trackers`, on the main process only, as all that follows.
    """

    name = "jsonl"
    requires_logging_directory = False
    run: RunFolder

    def start(self) -> None:
        """Do nothing: the folder is open."""

    @property
    def tracker(self) -> Path:
        """The run's folder."""
        return self.run.path

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write config.json."""
        write_json(self.run.path / "config.json", values)

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Append a row."""
        self.run.append(values)

    def finish(self) -> None:
        """Close metrics.jsonl."""
        self.run.close()

    def count(self) -> int:
        """Return how many whole rows metrics.jsonl holds."""
        return (self.run.path / "metrics.jsonl").read_bytes().count(b"\n")


def finish(accelerator: Accelerator, exit_code: int, sparing: GeneralTracker | None = None) -> None:
    """End the run's trackers, once: what `Accelerator.end_training` does, with an exit code, sparing the group."""
    with ExitStack() as each:  # one that fails keeps no other from its end
        for tracker in [tracker for tracker in accelerator.trackers if tracker is not sparing]:
            accelerator.trackers.remove(tracker)
            tracker.exit_code = exit_code
            each.callback(tracker.finish)


def describe(config: Config, shards: Shards, accelerator: Accelerator, identity: str) -> dict[str, Any]:
    """Return what config.json holds: every flag, what follows, what the run runs on. Every rank must call."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        **asdict(config),
        "lr": config.learning_rate,
        "train_examples": shards.examples,
        "world_size": shards.world_size,
        "cells": shards.cells,
        "steps_per_epoch": len(shards.steps),
        "tail_examples": shards.tail_examples,
        "last_step_sizes": list(shards.steps[-1].sizes),
        "devices": gather_object([name]),  # one a rank
        "threads_per_rank": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in PACKAGES},
        "git_commit": git_commit(),
        "argv": sys.argv,
        "wandb_id": identity,
    }


def installed(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of this project's checkout, with "-dirty" where it has changes; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
