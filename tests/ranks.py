"""Worlds of gloo ranks for the tests: one process group a size, kept for the whole session, running any function."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from loop.parity import Ranks

HANG_S = 30  # a collective that takes longer has hung


class World:
    """`world.run(f, ...)` calls f on every rank and returns the results in rank order; size 1 is this process."""

    def __init__(self, size: int) -> None:
        self.ranks = Ranks(size, preload=["tests.ranks", "tests.cases"]) if size > 1 else None
        if self.ranks:
            self.ranks.run(_join)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function, one that can be imported by name, on every rank; fail with a rank's traceback."""
        if self.ranks is None:
            return [function(*args, **kwargs)]
        return self.ranks.run(_call, function, args, kwargs, timeout=2 * HANG_S)

    @property
    def usable(self) -> bool:
        """Whether every rank is ready for a call."""
        return self.ranks is None or self.ranks.usable

    def close(self) -> None:
        """End the ranks."""
        if self.ranks:
            self.ranks.close()


def _join() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG_S))


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)
