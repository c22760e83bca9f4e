"""A run's folder: made for one run, locked by one process at a time; its files are written whole."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loop.config import Config, InputError, numbered
from loop.files import remove_scratch, write_whole

FAILED = "failed.json"  # in place of a summary: why the training itself ended
LOCK_S = 20  # ranks whose launcher was killed end within this time


class RunFolder:
    """A run's folder with its metrics.jsonl, locked while it is open, so that two runs never mix.

    path: the folder. metrics: the open file of its rows. run_id: the run's own, for good; W&B's id too. new: whether it
    was made for this process.

    Raises InputError where the folder is held by another process, or is no run's.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self.path, self.new = path, new
        others = [each for each in path.iterdir() if each.name != "metrics.jsonl" and not each.name.startswith(".")]
        if others and not config_of(path):
            raise InputError(f"--resume: {path} has files, but no config.json: it is no run's folder")
        self.metrics = (path / "metrics.jsonl").open("ab", buffering=0)  # else close() would try a failed write again
        self._lock()
        remove_scratch(path)  # of a process that was killed, as the folder is locked
        config = config_of(path)  # none in the folder of a run that was killed before it began, which has no row
        if not config and self.metrics.tell():
            raise InputError(f"--resume: {path} has a metrics.jsonl, but no config.json: it is no run's folder")
        self.run_id: str = config.get("wandb_id") or secrets.token_hex(4)

    def _lock(self) -> None:
        try:
            self.lock = acquire(self.path / ".lock", f"the process that trains {self.path}", LOCK_S)
        except Timeout:
            raise InputError(f"--run-name {self.path.name}: another process is training this run") from None
        except OSError as error:
            if self.new:
                shutil.rmtree(self.path)
            raise InputError(
                f"--out {self.path.parent}: two runs could mix there, because {error}: choose a folder on another file "
                "system"
            ) from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl. Raises OSError where it cannot be kept."""
        self.write((json.dumps(plain(row), allow_nan=False) + "\n").encode())
        if not os.fstat(self.metrics.fileno()).st_nlink:
            raise OSError(f"{self.path} was deleted")

    def write(self, rows: bytes) -> None:
        """Add whole rows to metrics.jsonl. Raises OSError where it cannot hold them."""
        while rows:
            rows = rows[self.metrics.write(rows) :]

    def read(self) -> list[dict[str, Any]]:
        """Return the rows."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Release the folder."""
        self.metrics.close()
        self.lock.release()

    def discard(self) -> None:
        """Release the folder of a run that cannot begin, and remove it if it was made for that run."""
        self.close()
        if self.new:
            shutil.rmtree(self.path)


def config_of(path: Path) -> dict[str, Any]:
    """Return the config.json of the run in a folder, {} where there is none. Raises InputError for a damaged one."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return {**config, "wandb_id": str(config["wandb_id"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume: {path / 'config.json'} cannot be read ({error})") from None


def open_run(config: Config, world_size: int) -> RunFolder:
    """Make and open the run's folder, or under `--resume auto` open the one that is there.

    A generated name gets -2, -3, ... where it is taken. Raises InputError where --run-name is taken, or the folder
    cannot be had.
    """
    first = config.folder(world_size)
    attempt = 1
    while True:
        path = numbered(first, attempt)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if not path.is_dir():
                raise InputError(f"--out {config.out}: cannot make the run's folder: {error}") from None
            if config.resume == "auto":
                return RunFolder(path, new=False)
            config.refuse_existing_run()
            attempt += 1
        else:
            return RunFolder(path, new=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    write_whole(path, (json.dumps(plain(values), indent=2, allow_nan=False) + "\n").encode())


def acquire(path: Path, holder: str, timeout: float = -1) -> FileLock:
    """Return the file's lock, held by this process; after a second of waiting, print on stderr for whom it waits.

    timeout: seconds, after which it raises Timeout; -1: none; 0: it does not wait. Raises OSError where files cannot be
    locked.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=min(1, timeout) if timeout >= 0 else 1)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise OSError(f"its file system cannot lock files (flock: {error.strerror})") from None
        if timeout == 0 or not isinstance(error, Timeout):
            raise
        print(f"train.py: waiting for {holder}", file=sys.stderr, flush=True)
        lock.acquire(timeout=timeout)
    return lock


def plain(value: Any) -> Any:
    """Return the value in JSON's types; NaN and the infinities, which JSON has not, as the words that float() reads."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


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
