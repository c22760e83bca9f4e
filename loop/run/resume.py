"""Which checkpoint a run goes on from, and whether it may: found, verified, compared. Imports no torch.

A checkpoint is a folder, `<run>/checkpoints/epoch-0002-step-00000235`: what Accelerate's `save_state` writes (weights
in safetensors, optimizer, scaler, random states) and `state.json` (where the run stood, what decides the weights, the
run's id, the bytes of every other file). One that is torn, or another run's, is named and left out.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from loop.config import FASHION_MNIST, Config, InputError, parse
from loop.idx import SetSize
from loop.run.folder import RunFolder, config_of, plain

CHECKPOINTS, STATE = "epoch-*-step-*", "state.json"
# What a resumed run may change: where it is kept, how it is watched, and how long and on which device it trains.
MAY_CHANGE_ON_RESUME = {
    "accumulate", "epochs", "data_dir", "cpu", "out", "run_name", "group", "tags", "notes", "log_every", "audit_every",
    "audit_fail", "wandb", "wandb_project", "wandb_entity", "check", "checkpoint_every", "resume", "ddp_timeout",
}  # fmt: skip


def with_kept_flags(config: Config, args: list[str], world_size: int) -> Config:
    """Return the configuration of a run that goes on by `--resume auto`: flags that are not given keep their value.

    args: the command line. Raises InputError for a damaged run.
    """
    written = config_of(config.folder(world_size)) if config.resume == "auto" else {}
    if not written:
        return config
    switches = {"cpu", "tf32", "check"}  # which no flag would turn off again
    kept = {field.name for field in fields(Config)} - switches
    before = {name: written[name] for name in kept if name in written}
    before |= {"resume": "auto", "run_name": config.run_name, "out": config.out}
    if before.get("virtual_ranks"):
        del before["accumulate"]  # which follows from the number of ranks
    before |= {"data_dir": Path(before["data_dir"]), "tags": tuple(before["tags"])}
    told = parse(args, quiet=True, default=Config(**before))
    return replace(told, tf32=told.tf32 or written.get("tf32", False))  # it decides the weights, and cannot change


def mathematics(config: Config, size: SetSize, world_size: int) -> dict[str, Any]:
    """Return what decides a run's weights. Under `rank` the ranks and the micro-batches are part of it."""
    decisive = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in MAY_CHANGE_ON_RESUME
    }
    decisive |= {"lr": config.learning_rate, "train_examples": size.examples, "classes": size.classes}
    if config.dataset != FASHION_MNIST:
        decisive["dataset"] = Path(config.dataset).resolve()
    if config.normalize == "rank":
        decisive |= {"accumulate": config.accumulate, "world_size": world_size}
    return {key: plain(value) for key, value in decisive.items()}


def is_finished(config: Config, size: SetSize, world_size: int, *, quiet: bool) -> bool:
    """Whether `--resume auto` has nothing left to train.

    quiet: name no checkpoint that is left out. Raises InputError as `prepare_resume` will.
    """
    if config.resume == "never":
        return False
    run = config.folder(world_size)
    _choose(config, run, size, world_size, quiet=quiet or config.resume == "auto")
    summary = run / "summary.json"
    return config.resume == "auto" and summary.is_file() and json.loads(summary.read_text())["epoch"] >= config.epochs


def prepare_resume(config: Config, run: RunFolder, size: SetSize, world_size: int) -> tuple[Path | None, Path | None]:
    """Return the checkpoint that a run goes on from, None to start anew; metrics.jsonl is cut, or copied, to its rows.

    And that of another run from which this one began (`--resume PATH`), now or earlier, or None.
    Raises InputError where `--resume` names no good checkpoint, or one that was trained by other rules.
    """
    if config.resume == "never":
        return None, None
    checkpoint = _choose(config, run.path, size, world_size)
    before = config_of(run.path).get("begun_from")
    origin = Path(before) if before else None
    rows = state_of(checkpoint)["progress"]["rows"] if checkpoint else 0
    if checkpoint and checkpoint.resolve().parent.parent != run.path.resolve():
        origin = checkpoint.resolve()
        with rows_beside(checkpoint).open("rb") as source:
            run.write(source.read(rows))
    run.metrics.truncate(rows)  # what follows will be written again
    return checkpoint, origin


def _choose(config: Config, run: Path, size: SetSize, world_size: int, *, quiet: bool = False) -> Path | None:
    if config.resume != "auto":
        checkpoint: Path | None = checkpoint_at(Path(config.resume), quiet=quiet)
    else:
        written = config_of(run)
        checkpoint = newest(run, written.get("wandb_id"), quiet=quiet)
        if checkpoint is None and written.get("begun_from"):
            checkpoint = checkpoint_at(Path(written["begun_from"]), quiet=quiet)
    if checkpoint:
        refuse_unfit(checkpoint, config, size, world_size)
    return checkpoint


def checkpoint_at(path: Path, *, quiet: bool = False) -> Path:
    """Return the checkpoint at a path: itself, or a run's newest. Raises InputError where none is good."""
    if (path / "checkpoints").is_dir():
        checkpoint = newest(path, quiet=quiet)
        if checkpoint is None:
            raise InputError(f"--resume {path}: there is no good checkpoint in {path / 'checkpoints'}")
        return checkpoint
    flaw = find_flaw(path)
    if flaw:
        raise InputError(f"--resume {path}: {flaw}")
    return path


def newest(run: Path, run_id: str | None = None, *, quiet: bool = False) -> Path | None:
    """Return a run's newest good checkpoint; says on stderr which newer ones are left out, and why."""
    for checkpoint in sorted((run / "checkpoints").glob(CHECKPOINTS), reverse=True):
        flaw = find_flaw(checkpoint, run_id)
        if flaw is None:
            return checkpoint
        if not quiet:
            print(f"train.py: left out {checkpoint}: {flaw}", file=sys.stderr)
    return None


def find_flaw(checkpoint: Path, run_id: str | None = None) -> str | None:
    """Return in a few words why a checkpoint cannot be used, None if it is whole; run_id: the run's it must be."""
    try:
        state = state_of(checkpoint)
        sizes = state.get("bytes", {})  # none in an earlier version's, which is whole since it has its name
        torn = [name for name, size in sizes.items() if (checkpoint / name).stat().st_size != size]
        if torn:
            return f"torn: {', '.join(torn)} is not what was written"
        if run_id not in (None, state["identity"]):
            return "another run's"
        if rows_beside(checkpoint).stat().st_size < state["progress"]["rows"]:
            return f"{rows_beside(checkpoint)} has lost rows since"
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"no checkpoint, or torn ({error})"
    return None


def refuse_unfit(checkpoint: Path, config: Config, size: SetSize, world_size: int) -> None:
    """Raise InputError where the checkpoint was trained by other rules, saying which, or for longer."""
    state = state_of(checkpoint)
    before = {"virtual_ranks": 0, **state["mathematics"]}  # 0: in an earlier version's
    now = mathematics(config, size, world_size)
    differences = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    if differences:
        raise InputError(
            f"--resume {config.resume}: {checkpoint} was trained with other mathematics ({', '.join(differences)}): "
            "give the same flags, or start a new run by another --run-name"
        )
    progress = state["progress"]
    begun = progress["epoch"] - (progress["epoch_steps"] == 0)
    if begun > config.epochs:
        raise InputError(f"--epochs {config.epochs}: {checkpoint} is from epoch {begun}")


def how_to_go_on(run: Path | None) -> str:
    """Return in one sentence what is kept of a run that failed."""
    kept = newest(run, quiet=True) if run else None
    if run is None or kept is None:
        return "It has no checkpoint"
    return f"Its last checkpoint, {kept}, is kept. To go on: {command_to_go_on(run.name)}"


def command_line(args: list[str]) -> str:
    """Return the command that trains on as many ranks as this process's machine has, with these flags, for a shell."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = os.environ.get("LAUNCHED_BY")  # as scripts/train.sh has it
    if launcher is None:
        launcher = f"torchrun --nproc_per_node {ranks} {shlex.quote(sys.argv[0])}"
        if ranks == "1":
            launcher = f"python {shlex.quote(sys.argv[0])}"
    return f"{launcher} {shlex.join(args)}".rstrip()


def command_to_go_on(run_name: str) -> str:
    """Return the command line that goes on with this process's run, for a shell."""
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        flag, equals, _ = word.replace("_", "-").partition("=")
        if flag not in ("--resume", "--run-name"):
            kept.append(word)
        elif not equals:
            next(words, None)
    return command_line([*kept, "--run-name", run_name, "--resume", "auto"])


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint's state.json holds: where the run stood, how many bytes its rows took, ..."""
    return dict(json.loads((checkpoint / STATE).read_text()))


def rows_beside(checkpoint: Path) -> Path:
    """Return the metrics.jsonl of a checkpoint's run."""
    return checkpoint.parent.parent / "metrics.jsonl"
