"""Reads a run's .wandb file back: the LevelDB log format over wandb's Record messages."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

MAGIC = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
HEADER = struct.Struct("<IHB")  # checksum, length, and which part of a record this is
BLOCK = 32768  # a header never crosses a multiple of this
FULL, FIRST, LAST = 1, 2, 4  # 3 is a middle


def records(path: Path) -> Iterator[Any]:
    """Yield the file's records, up to the torn one that a killed run may have left at its end."""
    data, position, record = path.read_bytes(), len(MAGIC), b""
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path}: not a .wandb file")
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        checksum, length, part = HEADER.unpack_from(data, position)
        position += HEADER.size
        chunk = data[position : position + length]
        position += length
        if len(chunk) < length or zlib.crc32(bytes([part]) + chunk) != checksum:
            return
        record = chunk if part in (FULL, FIRST) else record + chunk
        if part in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(record)


def read_run(run_dir: Path | str) -> dict[str, Any]:
    """Return what a run's folder (or its .wandb file) holds.

    config, summary: as logged. history: a dict a row. metrics: each define_metric's step. artifacts: (name, type,
    aliases). alerts: (title, text). run: name, group, job_type, tags, notes. exit_code: None where it never ended.
    """
    path = Path(run_dir)
    if path.is_dir():
        (path,) = path.glob("*.wandb")
    found: dict[str, Any] = {name: {} for name in ("config", "summary", "metrics", "run")}
    found |= {"history": [], "artifacts": [], "alerts": [], "exit_code": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        _take(found, kind, getattr(record, kind))
    return found


def _take(found: dict[str, Any], kind: str, record: Any) -> None:
    if kind == "run":
        _update(found["config"], record.config.update)
        found["run"] = {
            "name": record.display_name, "group": record.run_group, "job_type": record.job_type,
            "tags": list(record.tags), "notes": record.notes,
        }  # fmt: skip
    elif kind == "config":
        _update(found["config"], record.update)
    elif kind == "history":
        found["history"].append(_update({}, record.item))
    elif kind == "summary":
        _update(found["summary"], record.update)
        for item in record.remove:
            found["summary"].pop(item.key, None)
    elif kind == "metric":
        found["metrics"][record.name or record.glob_name] = record.step_metric
    elif kind == "artifact":
        found["artifacts"].append((record.name, record.type, list(record.aliases)))
    elif kind == "alert":
        found["alerts"].append((record.title, record.text))
    elif kind == "exit":
        found["exit_code"] = record.exit_code


def _update(values: dict[str, Any], items: Any) -> dict[str, Any]:
    for item in items:
        *outer, last = getattr(item, "nested_key", None) or [item.key]
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return values
