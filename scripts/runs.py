"""Runs read back from the folders that `loop.run` writes. Loads no torch."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loop.config import InputError
from loop.run.folder import FAILED

Curve = list[tuple[float, float]]
"""(examples, value), in order of examples; the value may be NaN or infinite."""

NAMES = {
    "argv",
    "check",
    "command",
    "data_dir",
    "notes",
    "out",
    "run_name",
}  # say where or why a run was made, not what it does
DERIVED = {
    "cells",
    "devices",
    "last_step_sizes",
    "steps_per_epoch",
    "tail_examples",
    "threads_per_rank",
}  # follow
RUN = "run"
"""Stands for a config key by which every run is a group of its own."""


@dataclass(frozen=True)
class Run:
    """A run, as far as it went.

    config: flat, values as text: {"versions": {"torch": "2.15.0"}} is "versions.torch". curves: one for each column of
    metrics.jsonl that holds numbers. finished: whether it came to write its summary. failure: why the training failed.
    weights: the SHA-256 of the final ones, of a run with --virtual-ranks.
    """

    name: str
    folder: Path
    config: Mapping[str, str]
    curves: Mapping[str, Curve]
    finished: bool
    failure: str | None = None
    weights: str | None = None

    @property
    def label(self) -> str:
        """The run's name, and whether it is unfinished, or has failed."""
        if self.failure:
            return f"{self.name} (failed)"
        return self.name if self.finished else f"{self.name} (unfinished)"


def distance(run: Path, reference: Path) -> float:
    """Return |a - b| / |b| over all parameters, in float64, of the final weights in two runs' folders."""
    from safetensors.numpy import load_file

    a, b = (load_file(folder / "model.safetensors") for folder in (run, reference))
    gap = sum(float(((a[name].astype("d") - b[name]) ** 2).sum()) for name in b)
    return math.sqrt(gap / sum(float((its.astype("d") ** 2).sum()) for its in b.values()))


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read runs, each folder once, and name them so that no two share a name; say on stderr what is left out.

    Raises InputError where none of them is a run.
    """
    runs: list[Run] = []
    refusals: list[InputError] = []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            runs.append(_read(folder, read_config(folder)))
        except InputError as error:
            refusals.append(error)
    if not runs:
        raise refusals[0]
    for refusal in refusals:
        print(f"left out: {refusal}", file=sys.stderr)
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def study(out: Path, group: str) -> list[Path]:
    """Return the folders in `out` of all runs whose config has this group.

    Says on stderr which configs it could not read. Raises InputError where there is no such run.
    """
    if not out.is_dir():
        raise InputError(f"--out {out} is no folder: give the one that holds the runs")
    groups: dict[Path, object] = {}
    for path in sorted(out.glob("*/config.json")):
        try:
            groups[path.parent] = read_config(path.parent).get("group")
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    found = [folder for folder, its_group in groups.items() if its_group == group]
    if not found:
        others = sorted({str(other) for other in groups.values() if other is not None})
        remedy = f"choose from: {', '.join(others)}" if others else "name run folders instead"
        raise InputError(f"--group {group}: none of the {len(groups)} run(s) in {out} is of this study: {remedy}")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return a run's config.json. Raises InputError where there is none, or it is broken."""
    config = _object(folder / "config.json")
    if config is None:
        what = "is no run: it has no config.json" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {what}: name the folders of runs, such as runs/*-w2-*")
    return config


def _object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object that a file holds, None where there is no file. Raises InputError where it is broken."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): leave this run out") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no object: leave this run out")
    return values


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the config keys that tell the runs apart, in the order of config.json, what follows from others last."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    told = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    return sorted((key for key in told if key not in NAMES and not key.startswith("wandb")), key=DERIVED.__contains__)


def grouped(runs: Sequence[Run], key: str) -> dict[str, list[Run]]:
    """Return the runs by their value of a config key, or of RUN; numbers in order, then words, then runs without it."""
    if key == RUN:
        return {run.label: [run] for run in runs}
    by_value: dict[str, list[Run]] = {}
    for run in runs:
        by_value.setdefault(run.config.get(key, ""), []).append(run)
    return {value or "not in its config": by_value[value] for value in sorted(by_value, key=_rank)}


def _rank(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), value
    except ValueError:
        return True, float(not value), value


def _read(folder: Path, config: Mapping[str, Any]) -> Run:
    summary, failed = _object(folder / "summary.json"), _object(folder / FAILED)
    return Run(
        readable(folder.resolve().name),
        folder,
        dict(_flat(config)),
        _curves(folder / "metrics.jsonl"),
        summary is not None,
        str(failed.get("reason")) if failed else None,
        (summary or {}).get("weights_sha256"),
    )


def _curves(path: Path) -> dict[str, Curve]:
    """Read metrics.jsonl. A row that a resumed run wrote again replaces the earlier one.

    A last line torn by a kill is no row; of another line that is none, stderr says that it is left out.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:  # killed before its first row
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): leave this run out") from None
    points: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = {key: _number(value) for key, value in json.loads(line).items()}
        except (ValueError, AttributeError, OverflowError):
            if number < len(lines):
                print(f"left out: {path}, line {number}: no row of numbers", file=sys.stderr)
            continue
        examples = row.get("examples", math.nan)
        for key, value in row.items():
            if value is not None and examples is not None and math.isfinite(examples):
                points.setdefault(key, {})[examples] = value
    return {key: sorted(curve.items()) for key, curve in points.items()}


def _number(value: object) -> float | None:
    """Return a number, "nan", "inf" or "-inf" as a float, and None for anything else."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric or value in ("nan", "inf", "-inf") else None  # type: ignore[arg-type]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _text(value)


def _text(value: object) -> str:
    """Return a value of config.json for people: lists without brackets, commits short."""
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    text = readable(value) if isinstance(value, str) else json.dumps(value).replace("null", "none")
    return re.sub(r"^([0-9a-f]{9})[0-9a-f]{31}", r"\1", text)


def readable(text: str) -> str:
    """Return the text with what no encoding has, such as a file name's stray bytes, written out."""
    return text.encode("utf-8", "backslashreplace").decode()
