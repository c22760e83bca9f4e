"""A run's folder: what ran, with what, and its rows, written as they come."""

from __future__ import annotations

import json
import math
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object

from loop.config import Config, InputError
from loop.shards import Shards

PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy")


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
        self.rows: TextIO | None = None

    def start(self) -> None:
        """Make the run's folder; called by `init_trackers`, on the main process only, as all that follows."""
        self.folder = new_folder(self.config, PartialState().num_processes)
        self.rows = (self.folder / "metrics.jsonl").open("x", encoding="utf-8", buffering=1)

    @property
    def tracker(self) -> Path:
        """The run's folder."""
        return self.folder

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write config.json."""
        write_json(self.folder / "config.json", values)

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Append a row."""
        assert self.rows, "rows come after the start"
        self.rows.write(json.dumps(plain(values), allow_nan=False) + "\n")

    def finish(self) -> None:
        """Close metrics.jsonl."""
        if self.rows:
            self.rows.close()

    def count(self) -> int:
        """Return how many whole rows metrics.jsonl holds."""
        return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")

    def discard(self) -> None:
        """Remove the folder of a run that cannot begin."""
        self.finish()
        shutil.rmtree(self.folder)


def finish(accelerator: Accelerator, exit_code: int) -> None:
    """End the run's trackers, once: what `Accelerator.end_training` does, with an exit code, sparing the group."""
    with ExitStack() as each:  # one that fails keeps no other from its end
        while accelerator.trackers:
            tracker = accelerator.trackers.pop(0)
            tracker.exit_code = exit_code
            each.callback(tracker.finish)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def describe(config: Config, shards: Shards, accelerator: Accelerator) -> dict[str, Any]:
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
        "wandb_id": secrets.token_hex(4),
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


def plain(value: Any) -> Any:
    """Return the value in JSON's types, as `JsonlTracker` says."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
