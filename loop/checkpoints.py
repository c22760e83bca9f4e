"""Checkpoints of a run: written whole or not at all, the last two kept; loop/resume.py says what is in one.

A checkpoint is written beside its place, synced, and renamed. Nothing in it is loaded by unrestricted pickle:
Accelerate loads with `weights_only=True`, the rest is safetensors and JSON.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loop.audit import bare
from loop.book import Accumulator, widest
from loop.config import Config, InputError
from loop.folder import write_json
from loop.heartbeat import is_from_backend
from loop.resume import MANIFEST, NAMES, STATE, Progress, digest, mathematics, progress_of
from loop.updater import CellUpdater

KEPT = 2
FULL = 2**16  # bytes: with fewer left a write that failed did so for want of space


class Checkpoints:
    """Saves a run and brings it back; every rank must make the same calls.

    metric: the epoch's running sums on this rank. examples: trained on. run: the run's folder. identity: the run's own.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        updater: CellUpdater,
        metric: Accumulator,
        config: Config,
        examples: int,
        run: Path,
        identity: str,
    ) -> None:
        self.accelerator, self.updater, self.metric, self.run, self.identity = (
            accelerator,
            updater,
            metric,
            run,
            identity,
        )
        self.module = bare(updater.net)
        self.good: list[Path] = []  # those known to be whole, oldest first
        self.mathematics = mathematics(config, examples, accelerator.num_processes)
        self.replicas_differ = config.updater == "scratch" and config.normalize == "rank"
        # Under DDP's prefix a checkpoint would load on the same kind of launch only.
        accelerator.register_save_state_pre_hook(lambda models, weights, _: _put(weights, self.module.state_dict()))
        accelerator.register_load_state_pre_hook(lambda models, _: _put(models, self.module))

    def save(self, progress: Progress) -> bool:
        """Write a checkpoint, with rows, sums and skipped steps added to `progress`; False where a sum is not finite.

        Raises OSError where it cannot be kept, with the earlier ones untouched.
        """
        folder = self.run / "checkpoints"
        scratch = folder / ".writing"
        main, device = self.accelerator.is_main_process, self.accelerator.device
        if main:
            shutil.rmtree(scratch, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            scratch.mkdir()
        mine = torch.tensor([self.metric[i] for i in range(3)], dtype=widest(device), device=device)
        sums = self.accelerator.gather(mine).view(-1, 3).tolist()  # here the others wait for the folder
        if not all(math.isfinite(value) for of_rank in sums for value in of_rank):
            return False
        with failing_as_os_error(scratch):
            self.accelerator.save_state(str(scratch))
            if self.replicas_differ:
                save_file(self.module.state_dict(), self._replica(scratch))
        self.accelerator.wait_for_everyone()
        if main:
            rows = self.run / "metrics.jsonl"
            sync(rows)
            progress = replace(progress, rows=rows.stat().st_size, sums=sums, skipped_steps=self.updater.skipped_steps)
            state = {"progress": asdict(progress), "mathematics": self.mathematics, "identity": self.identity}
            write_json(scratch / STATE, state)
            write_json(scratch / MANIFEST, {path.name: digest(path) for path in sorted(scratch.iterdir())})
            for path in (*scratch.iterdir(), scratch):
                sync(path)
            final = folder / f"epoch-{progress.epoch:04}-step-{progress.step:08}"
            shutil.rmtree(final, ignore_errors=True)  # one that was no good
            scratch.rename(final)
            sync(folder)
            self.good = [*(path for path in self.good if path != final), final][-KEPT:]
            for other in set(folder.glob(NAMES)) - set(self.good):  # older, or left out
                shutil.rmtree(other, ignore_errors=True)
        return True

    def load(self, checkpoint: Path) -> Progress:
        """Bring weights, optimizer, scaler, random states and running sums back; return where the run stood.

        Raises InputError where its files are whole, but not what is expected in them.
        """
        try:
            self.accelerator.load_state(str(checkpoint))
            if self.replicas_differ:
                self.module.load_state_dict(load_file(self._replica(checkpoint)))
        except Exception as error:
            if isinstance(error, RuntimeError) and is_from_backend(error):
                raise
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{checkpoint} cannot be loaded ({reason}): remove it, and its run goes on without"
            ) from error
        progress = progress_of(checkpoint)
        self.good = [checkpoint]
        self.updater.skipped_steps = progress.skipped_steps
        self.metric.add(*progress.sums_of(self.accelerator.process_index, self.accelerator.num_processes))
        return progress

    def _replica(self, checkpoint: Path) -> Path:
        return checkpoint / f"replica_{self.accelerator.process_index}.safetensors"


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failing_as_os_error(where: Path) -> Iterator[None]:
    """Have torch and safetensors fail to write as everything else does, and say so where the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = where.is_dir() and shutil.disk_usage(where).free < FULL
        reason = os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
        raise OSError(f"{where}: {reason}") from error


def _put(items: list[Any], item: object) -> None:
    items[:] = [item]
