"""Checkpoints of a run: written whole or not at all, the last two kept. loop/run/resume.py describes their files.

A checkpoint is written beside its place, synced, and renamed. Nothing in it is loaded by unrestricted pickle:
Accelerate loads with `weights_only=True`, the rest is safetensors and JSON.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loop.audit import bare
from loop.book import widest
from loop.config import InputError
from loop.files import sync
from loop.progress import Progress
from loop.reduction import global_count
from loop.run.folder import write_json
from loop.run.resume import CHECKPOINTS, STATE, mathematics, state_of
from loop.run.run import Run
from loop.run.watchdog import first_line, is_from_backend
from loop.shards import Cell
from loop.updater import Audited, CellUpdater

KEPT = 2
FULL = 2**16  # bytes free: with fewer, a write failed because the disk is full


class Checkpoints:
    """Saves a run and brings it back: an observer, which makes the same calls on every rank.

    It saves at the end of each epoch, every `--checkpoint-every` steps, and where the ranks have agreed to stop.
    """

    def __init__(self, run: Run, updater: CellUpdater | Audited, progress: Progress) -> None:
        self.run, self.config, self.progress = run, run.config, progress
        self.module = bare(updater.net)
        self.good: list[Path] = []  # those known to be whole, oldest first
        self.replicas_differ = self.config.updater == "scratch" and self.config.normalize == "rank"
        # Under DDP's prefix a checkpoint would load on the same kind of launch only.
        run.accelerator.register_save_state_pre_hook(lambda models, weights, _: _put(weights, self.module.state_dict()))
        run.accelerator.register_load_state_pre_hook(lambda models, _: _put(models, self.module))

    def after_cell(self, cell: Cell, *_: object) -> None:
        """Save after a step's last cell, where one is due."""
        due = self.config.saves(self.progress.step) and self.progress.epoch_steps < len(self.run.shards.steps)
        if cell.last and (due or self.run.stopping):
            self.run.saved_in_epoch_s += self.save()

    def after_epoch(self, _: object) -> None:
        """Save an epoch's end."""
        self.run.saved_between_epochs_s += self.save()

    def save(self) -> float:
        """Write a checkpoint, then stop the run if any rank had a signal; return the seconds that it took.

        Raises OSError where it cannot be kept, with the earlier ones untouched; and as `Run.decide` does.
        """
        started = time.perf_counter()
        run, folder = self.run, self.run.folder / "checkpoints"
        scratch = folder / ".writing"
        if run.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            scratch.mkdir()
        # Each rank's sums and its signal, in one reduce, in which the others wait for the folder.
        mine = [[*sums, run.told_to_stop] for sums in self.progress.sums.shares]
        of_ranks = torch.zeros(len(mine) * run.world_size, 4, dtype=widest(run.device), device=run.device)
        of_ranks[run.rank :: run.world_size] = torch.tensor(mine, dtype=of_ranks.dtype)
        run.watchdog.advance()
        of_ranks = global_count(of_ranks, run.device).cpu()
        sums, stops = of_ranks[:, :3], of_ranks[:, 3]
        run.decide(loss=float(sums.sum()))
        with failing_as_os_error(scratch):
            run.accelerator.save_state(str(scratch))
            if self.replicas_differ:
                save_file(self.module.state_dict(), self._replica(scratch))
        run.watchdog.advance()
        run.accelerator.wait_for_everyone()
        if run.is_main:
            self._complete(scratch, sums.tolist())
        run.decide(stops=float(stops.sum()), saved=True)
        return time.perf_counter() - started

    def _complete(self, scratch: Path, sums: list[list[float]]) -> None:
        """Add the run's position to what the ranks have written, sync it all, and rename it."""
        rows = self.run.folder / "metrics.jsonl"
        sync(rows)
        progress = {**self.progress.position(), "rows": rows.stat().st_size, "sums": sums}
        decisive = mathematics(self.config, self.run.size, self.run.world_size)
        state = {"progress": progress, "mathematics": decisive, "identity": self.run.files.run_id}
        write_json(scratch / STATE, {**state, "bytes": {path.name: path.stat().st_size for path in scratch.iterdir()}})
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        final = scratch.parent / f"epoch-{progress['epoch']:04}-step-{progress['step']:08}"
        shutil.rmtree(final, ignore_errors=True)  # one that was torn
        scratch.rename(final)
        sync(scratch.parent)
        self.good = [*(path for path in self.good if path != final), final][-KEPT:]
        for other in set(scratch.parent.glob(CHECKPOINTS)) - set(self.good):  # older, or left out
            shutil.rmtree(other, ignore_errors=True)

    def resume(self) -> None:
        """Bring weights, optimizer, scaler, random states and progress back from the checkpoint to go on from, if any.

        Raises InputError where its files are whole, but not what is expected in them.
        """
        run, checkpoint = self.run, self.run.resume_from
        if checkpoint is None:
            return
        try:
            # From the CPU: Adam keeps its step counts where they are loaded, and would wait for a GPU's at every step.
            run.accelerator.load_state(str(checkpoint), map_location="cpu")
            if self.replicas_differ:
                self.module.load_state_dict(load_file(self._replica(checkpoint)))
        except OSError as error:
            raise InputError(f"{checkpoint} cannot be read ({first_line(error)}): try again") from error
        except Exception as error:
            if is_from_backend(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"{checkpoint} cannot be loaded ({first_line(error)}): remove it, and its run goes on without"
            ) from error
        self.progress.restore(state_of(checkpoint)["progress"], run.rank, run.world_size)
        self.good = [checkpoint]
        run.say(f"going on from {checkpoint}: {self.progress.step} steps are done")

    def _replica(self, checkpoint: Path) -> Path:
        return checkpoint / f"replica_{self.run.rank}.safetensors"


@contextmanager
def failing_as_os_error(where: Path) -> Iterator[None]:
    """Turn the errors of torch and safetensors into OSError, with the reason where the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = where.is_dir() and shutil.disk_usage(where).free < FULL
        reason = os.strerror(errno.ENOSPC) if full else first_line(error)
        raise OSError(f"{where}: {reason}") from error


def _put(items: list[Any], item: object) -> None:
    items[:] = [item]
