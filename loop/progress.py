"""Where a run stands: advanced by the loop, saved and restored by checkpoints, read by everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loop.book import Accumulator
from loop.shards import Cell


class Progress:
    """A run's position, between two steps; the loop's first observer.

    epoch: the one under way, from 1. epoch_steps: how many of its steps are taken. step, examples: over the whole run.
    skipped_steps: by the fp16 scaler. sums: (loss sum, correct, examples) of the epoch so far, on this rank; at its end
    of all ranks, until `after_epoch`.
    """

    def __init__(self) -> None:
        self.epoch, self.epoch_steps, self.step, self.examples, self.skipped_steps = 1, 0, 0, 0, 0
        self.sums = Accumulator(3)

    def after_cell(self, cell: Cell, *_: object) -> None:
        """Count a step after its last cell."""
        if cell.last:
            self.epoch_steps += 1
            self.step += 1
            self.examples += cell.step.n_global

    def after_epoch(self, _: object) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.epoch_steps = self.epoch + 1, 0
        self.sums.reset()

    def position(self) -> dict[str, int]:
        """Return everything but the sums, as a checkpoint keeps it."""
        return {name: value for name, value in vars(self).items() if name != "sums"}

    def restore(self, saved: dict[str, Any], rank: int, world_size: int) -> None:
        """Return to a saved position.

        saved: the position, and "sums", those of each rank; if the number of ranks has changed, rank 0 gets the total.
        """
        sums: Sequence[Sequence[float]] = [[float(value) for value in of_rank] for of_rank in saved["sums"]]
        if len(sums) != world_size:
            sums = [[sum(of_ranks) for of_ranks in zip(*sums, strict=True)], *[[0.0] * 3] * (world_size - 1)]
        vars(self).update({name: saved[name] for name in self.position()})
        self.sums.reset()
        self.sums.add(*sums[rank])
