"""Whether a step waits for the device: between log steps none may. The watch of the tests and of scripts.verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loop.run.checkpoints import Checkpoints
from loop.updater import CellUpdater

WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}


class Watch(TorchDispatchMode):
    """Raises, while armed, for what would have the host wait for the device: on a GPU really, on a CPU as if.

    seen: how many operations it has looked at. Raises AssertionError, on a GPU also RuntimeError.
    """

    armed, seen = False, 0

    def arm(self, armed: bool) -> None:
        """Watch from here on, or no longer."""
        self.armed = armed
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if armed else "default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += self.armed
        if self.armed and func in WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def steps_watched() -> Iterator[Watch]:
    """Arm a watch in every step of train.py's loop that gets no row, and while the next batch is made."""
    begin, after_cell = CellUpdater.begin, Checkpoints.after_cell
    watch = Watch()  # type: ignore[no-untyped-call]

    def watched_begin(updater: CellUpdater, X: Any, y: Any, cell: Any) -> None:
        begin(updater, X, y, cell)
        watch.arm(not updater.config.logs(updater.progress.step + 1))

    def watched_after_cell(last_observer: Checkpoints, *cell: Any) -> None:
        after_cell(last_observer, *cell)
        watch.arm(last_observer.progress.epoch_steps < len(last_observer.run.shards.steps))

    with patch.object(CellUpdater, "begin", watched_begin), patch.object(Checkpoints, "after_cell", watched_after_cell):
        try:
            with watch:
                yield watch
        finally:
            watch.arm(False)
