"""Who gets which examples at every step: pure arithmetic, the same on every rank, with no communication.

An epoch is one order of N examples, cut into *steps* of `batch_size`; the last may be incomplete (the *tail*). A step
is dealt to W K *cells*, one for each micro-batch k of each rank r, in the order micro-batch by micro-batch, rank by
rank: cell k W + r. A cell is a contiguous range of the epoch's positions. Empty cells are real cells: their rank takes
part in every backward, which is what keeps the ranks' all-reduces in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate as running_sum
from itertools import groupby
from typing import Literal, NamedTuple

Tail = Literal["spread", "ragged", "pad", "drop"]


def spread(n: int, cells: int) -> tuple[int, ...]:
    """Deal n examples so that the cells' sizes differ by at most one, the larger ones first."""
    each, left = divmod(n, cells)
    return (each + 1,) * left + (each,) * (cells - left)


def ragged(n: int, cells: int, capacity: int) -> tuple[int, ...]:
    """Fill the cells in order up to `capacity`; the last ones stay short or empty."""
    return tuple(min(max(n - i * capacity, 0), capacity) for i in range(cells))


class Census(NamedTuple):
    """How often an epoch sees its examples: distinct ones seen, extra copies, never seen."""

    seen: int
    duplicated: int
    missing: int


@dataclass(frozen=True)
class Step:
    """One optimiser step: the epoch's positions from `start` on, dealt to cells of these sizes.

    offsets: where each cell starts, and where the last one ends, counted from `start`; full steps share one tuple.
    """

    start: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def n_global(self) -> int:
        """Examples in the step, over all ranks and micro-batches, copies included."""
        return self.offsets[-1]


class Cell(NamedTuple):
    """One rank's part of one micro-batch of a step."""

    step: Step
    first: bool  # of the step's micro-batches on this rank
    last: bool


@dataclass(frozen=True)
class Shards:
    """The plan of an epoch.

    examples: N. batch_size: examples in a full step, over all ranks and micro-batches. accumulate: micro-batches in a
    step, K. tail: what becomes of an incomplete last batch; `spread` deals it evenly, `pad` wraps round to the epoch's
    first examples, as Accelerate's `even_batches=True` does, `ragged` is its `even_batches=False`, `drop` any loader's
    `drop_last`. (At K = 1: with K > 1 Accelerate fills up the last *micro-batch*, and drops or keeps it alone.)

    Raises ValueError where the plan is impossible, with the flag to change.
    """

    examples: int
    batch_size: int
    world_size: int = 1
    accumulate: int = 1
    tail: Tail = "spread"

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "world_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tail == "pad" and self.batch_size % self.cells:
            raise ValueError(
                f"--tail pad needs ranks x micro-batches ({self.world_size} x {self.accumulate} = {self.cells}) "
                f"to divide --batch-size {self.batch_size}: choose a multiple of {self.cells}, or --tail spread"
            )
        if self.tail == "drop" and self.examples < self.batch_size:
            raise ValueError(
                f"--tail drop leaves an epoch without a step: {self.examples} examples make no batch of "
                f"{self.batch_size}: lower --batch-size, or use --tail spread"
            )

    @property
    def cells(self) -> int:
        """Cells in a step, W K."""
        return self.world_size * self.accumulate

    @property
    def capacity(self) -> int:
        """The most a cell of a step can hold, ceil(batch size / W K)."""
        return -(-self.batch_size // self.cells)

    @property
    def tail_examples(self) -> int:
        """Examples left for the incomplete last batch: N mod batch size."""
        return self.examples % self.batch_size

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every optimiser step of an epoch, in order."""
        return tuple(map(self._step, range(self.step_count)))

    @property
    def step_count(self) -> int:
        """How many optimiser steps an epoch has."""
        return self.examples // self.batch_size + (self.tail_examples > 0 and self.tail != "drop")

    @property
    def last_step(self) -> Step:
        """The last step of an epoch, without all those before it."""
        return self._step(self.step_count - 1)

    def _step(self, i: int) -> Step:
        start = i * self.batch_size
        if self.examples - start >= self.batch_size:
            return Step(start, *self._full)
        sizes = self._tail_sizes()
        return Step(start, sizes, tuple(running_sum(sizes, initial=0)))

    @cached_property
    def _full(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = spread(self.batch_size, self.cells)
        return sizes, tuple(running_sum(sizes, initial=0))

    def _tail_sizes(self) -> tuple[int, ...]:
        if self.tail == "spread":
            return spread(self.tail_examples, self.cells)
        if self.tail == "ragged":
            return ragged(self.tail_examples, self.cells, self.capacity)
        return (self.capacity,) * self.cells

    def of_rank(self, rank: int, first_step: int = 0) -> Iterator[tuple[Cell, range]]:
        """Yield a rank's cells in order, from a step on, each with its positions in the epoch's order.

        Positions at or past N (under `pad` only) stand for the epoch's first examples again: take them modulo N.
        """
        for step in self.steps[first_step:]:
            for k in range(self.accumulate):
                i = k * self.world_size + rank
                positions = range(step.start + step.offsets[i], step.start + step.offsets[i + 1])
                yield Cell(step, first=k == 0, last=k == self.accumulate - 1), positions

    @property
    def census(self) -> Census:
        """How often one epoch sees its examples."""
        positions = (self.step_count - 1) * self.batch_size + self.last_step.n_global
        seen = min(positions, self.examples)
        return Census(seen, duplicated=positions - seen, missing=self.examples - seen)


def sizes_in_words(sizes: Sequence[int]) -> str:
    """Return sizes in order, equal neighbours together: (33, 33, 32, 0) is "2 x 33, 32, 0"."""
    runs = [(size, len(list(group))) for size, group in groupby(sizes)]
    return ", ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)
