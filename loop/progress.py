"""Where a run stands: advanced by the loop, saved and restored by checkpoints, read by everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from loop.book import Accumulator, widest
from loop.config import Config
from loop.reduction import global_count
from loop.shards import Cell


class ShareAccumulator(Accumulator):
    """n running sums of each of V shares, added up in the shares' order: the same bits on any number of ranks.

    Share k W + r is the k-th of rank r. Each call of `add` is for the next of this rank's K shares, in turn. `data` is
    the sums of one share after the other: of this rank's, and after `all_reduce` of all V, until `reset`.
    """

    def __init__(self, rank: int, world_size: int, virtual_ranks: int, n: int) -> None:
        self.of_rank, self.virtual_ranks, self.n = slice(rank, None, world_size), virtual_ranks, n
        self.reset()

    def add(self, *args: float | torch.Tensor) -> None:
        """Add one value to each sum of the next share."""
        super().add(*args)
        self.kept = self.kept[self.n :] + self.kept[: self.n]  # the share goes to the end of the queue

    def reset(self) -> None:
        """Set every sum to 0."""
        self.data = [0.0] * self.n * len(range(self.virtual_ranks)[self.of_rank])

    @property
    def shares(self) -> list[list[float]]:
        """The sums of each share."""
        return [self.data[i : i + self.n] for i in range(0, len(self.kept), self.n)]

    def all_reduce(self, device: torch.device) -> None:
        """Get the sums of all V shares: one collective, which adds zeros to them, and so is exact."""
        every = torch.zeros(self.virtual_ranks, self.n, dtype=widest(device), device=device)
        every[self.of_rank] = self.on(device).view(-1, self.n)
        self.data = global_count(every, device).flatten().tolist()

    def __getitem__(self, i: Any) -> Any:
        return sum(self.data[i :: self.n])


class Progress:
    """A run's position, between two steps; the loop's first observer.

    epoch: the one under way, from 1. epoch_steps: how many of its steps are taken. step, examples: over the whole run.
    skipped_steps: by the fp16 scaler. sums: (loss sum, correct, examples) of the epoch so far, on this rank; after
    its last step over all ranks, until `after_epoch`. test_sums: the same of its evaluation. accumulator: makes n sums.
    """

    def __init__(self, accumulator: Callable[[int], Accumulator] = Accumulator) -> None:
        self.epoch, self.epoch_steps, self.step, self.examples, self.skipped_steps = 1, 0, 0, 0, 0
        self.accumulator, self.sums, self.test_sums = accumulator, accumulator(3), accumulator(3)

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
        self.test_sums.reset()

    def position(self) -> dict[str, int]:
        """Return everything but the sums, as a checkpoint keeps it."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def restore(self, saved: dict[str, Any], rank: int, world_size: int) -> None:
        """Return to a saved position.

        saved: the position, and "sums", those of each share: a rank's, or a virtual rank's. If the number of ranks has
        changed, each share's still go to one of them.
        """
        vars(self).update({name: saved[name] for name in self.position()})
        self.sums.reset()
        for share in saved["sums"][rank::world_size]:
            self.sums.add(*(float(value) for value in share))


def make_progress(config: Config, rank: int, world_size: int) -> Progress:
    """Return the start of a run, with the kind of sums that the flags ask for."""
    if config.virtual_ranks:
        return Progress(partial(ShareAccumulator, rank, world_size, config.virtual_ranks))
    return Progress()
