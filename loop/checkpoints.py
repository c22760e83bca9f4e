"""Checkpoints of a run: written whole or not at all, verified before they are believed, the last two kept.

A checkpoint is a folder, `<run>/checkpoints/epoch-0002-step-00000235`, of what Accelerate's `save_state` writes
(weights in safetensors, optimizer, scaler, random states), `state.json` (Progress, what decides the weights, the run's
id) and `manifest.json` (the SHA-256 of every file, written last). It is written beside its place, synced, and renamed.
Nothing in it is loaded by unrestricted pickle: Accelerate loads with `weights_only=True`, the rest is JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loop.audit import bare
from loop.book import Accumulator, widest
from loop.config import Config, InputError
from loop.folder import RunFolder, plain, write_json
from loop.updater import CellUpdater

KEPT = 2
FULL = 2**16  # bytes: with fewer left a write that failed did so for want of space
NAMES, MANIFEST, STATE = "epoch-*-step-*", "manifest.json", "state.json"
# What a resumed run may change: where and how it is kept and watched, and how long and on what it trains.
FREE = {
    "accumulate", "epochs", "data_dir", "cpu", "out", "run_name", "group", "tags", "notes", "log_every", "audit_every",
    "audit_fail", "wandb", "wandb_project", "wandb_entity", "check", "checkpoint_every", "resume", "ddp_timeout",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """Where a run stands, between two steps.

    epoch: the one under way, from 1. epoch_steps: how many of its steps are taken. step, examples: over the whole run.
    rows: bytes of metrics.jsonl that belong to what was done. skipped_steps: by the fp16 scaler.
    sums: the epoch's running (loss sum, correct, examples) of each rank.
    """

    epoch: int = 1
    epoch_steps: int = 0
    step: int = 0
    examples: int = 0
    rows: int = 0
    skipped_steps: int = 0
    sums: tuple[tuple[float, ...], ...] = ()

    def sums_of(self, rank: int, world_size: int) -> tuple[float, ...]:
        """Return what a rank's sums go on from: its own, or on another number of ranks all of them on rank 0."""
        if len(self.sums) == world_size:
            return self.sums[rank]
        total = tuple(map(sum, zip(*self.sums, strict=True)))
        return total if rank == 0 else (0.0,) * len(total)


def mathematics(config: Config, examples: int, world_size: int) -> dict[str, Any]:
    """Return what decides a run's weights. Under `rank` the ranks and the micro-batches are part of it."""
    decisive = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in FREE}
    decisive |= {"lr": config.learning_rate, "train_examples": examples}
    if config.normalize == "rank":
        decisive |= {"accumulate": config.accumulate, "world_size": world_size}
    return {key: plain(value) for key, value in decisive.items()}


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
            for old in sorted(folder.glob(NAMES))[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        return True

    def load(self, checkpoint: Path) -> Progress:
        """Bring weights, optimizer, scaler, random states and running sums back; return where the run stood."""
        self.accelerator.load_state(str(checkpoint))
        if self.replicas_differ:
            self.module.load_state_dict(load_file(self._replica(checkpoint)))
        progress = progress_of(checkpoint)
        self.updater.skipped_steps = progress.skipped_steps
        self.metric.add(*progress.sums_of(self.accelerator.process_index, self.accelerator.num_processes))
        return progress

    def _replica(self, checkpoint: Path) -> Path:
        return checkpoint / f"replica_{self.accelerator.process_index}.safetensors"


def beginning(config: Config, run: RunFolder, examples: int, world_size: int) -> Path | None:
    """Return the checkpoint that a run goes on from, None to start anew; metrics.jsonl is cut, or copied, to its rows.

    Raises InputError where `--resume` names no good checkpoint, or one that was trained by other rules.
    """
    if config.resume == "never":
        return None
    checkpoint = newest(run.path, run.identity) if config.resume == "auto" else given(Path(config.resume))
    if checkpoint:
        refuse_other_mathematics(checkpoint, config, examples, world_size)
    rows = progress_of(checkpoint).rows if checkpoint else 0
    if checkpoint and config.resume != "auto":
        with (checkpoint.parent.parent / "metrics.jsonl").open(encoding="utf-8") as source:
            run.rows.write(source.read(rows))
    run.cut(rows)
    return checkpoint


def given(path: Path) -> Path:
    """Return the checkpoint at a path: itself, or a run's newest. Raises InputError where there is no good one."""
    if (path / "checkpoints").is_dir():
        for checkpoint in sorted((path / "checkpoints").glob(NAMES), reverse=True):
            if find_flaw(checkpoint) is None:
                return checkpoint
        raise InputError(f"--resume {path}: there is no good checkpoint in {path / 'checkpoints'}")
    flaw = find_flaw(path)
    if flaw:
        raise InputError(f"--resume {path}: {flaw}")
    return path


def progress_of(checkpoint: Path) -> Progress:
    """Return where the run stood at a checkpoint that is whole."""
    progress = json.loads((checkpoint / STATE).read_text())["progress"]
    return Progress(**{**progress, "sums": tuple(tuple(map(float, sums)) for sums in progress["sums"])})


def newest(run: Path, identity: str) -> Path | None:
    """Return a run's newest good checkpoint; says on stderr which newer ones are torn, or another run's."""
    for checkpoint in sorted((run / "checkpoints").glob(NAMES), reverse=True):
        flaw = find_flaw(checkpoint) or ("another run's" if identity_of(checkpoint) != identity else None)
        if flaw is None:
            return checkpoint
        print(f"train.py: left out {checkpoint}: {flaw}", file=sys.stderr)
    return None


def how_to_go_on(run: Path | None) -> str:
    """Return in one sentence what is left of a run that failed."""
    kept = sorted((run / "checkpoints").glob(NAMES)) if run else []
    return f"Its last checkpoint, {kept[-1]}, is kept: --resume auto goes on" if kept else "It has no checkpoint"


def identity_of(checkpoint: Path) -> str:
    """Return which run's a checkpoint is."""
    return str(json.loads((checkpoint / STATE).read_text())["identity"])


def find_flaw(checkpoint: Path) -> str | None:
    """Return in a few words why a checkpoint cannot be used, None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        torn = [name for name, its_digest in manifest.items() if digest(checkpoint / name) != its_digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"no checkpoint, or torn ({error})"
    return f"torn: {', '.join(torn)} is not what was written" if torn else None


def refuse_other_mathematics(checkpoint: Path, config: Config, examples: int, world_size: int) -> None:
    """Raise InputError, with what differs, where going on from here would train by other rules than before."""
    before = json.loads((checkpoint / STATE).read_text())["mathematics"]
    now = mathematics(config, examples, world_size)
    differences = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    if differences:
        raise InputError(
            f"--resume {config.resume}: {checkpoint} was trained with other mathematics ({', '.join(differences)}): "
            "give the same flags, or start a new run"
        )


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
