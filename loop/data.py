"""Batches in memory: the set stays on the device as uint8 and becomes floats a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loop.config import FASHION_MNIST, Config
from loop.idx import IMAGE_SIZE, raw_folder, read_idx_split
from loop.progress import Progress
from loop.shards import Cell, Shards


class Split(NamedTuple):
    """One half of a set. images: uint8, (N, 28, 28), 0 to 255. labels: int64, (N,). dtype: of batches made of it."""

    images: Tensor
    labels: Tensor
    dtype: torch.dtype = torch.float32


def load(config: Config, device: torch.device | str = "cpu") -> tuple[Split, Split]:
    """Return the training and the test half, the first cut to `--train-examples`; the files are there already.

    Raises InputError for a folder that holds no sound MNIST-like set, or too few examples.
    """
    folder = raw_folder(config.data_dir) if config.dataset == FASHION_MNIST else Path(config.dataset)
    train, test = (_idx_split(folder, prefix) for prefix in ("train", "t10k"))
    n, dtype = config.training_size(len(train.labels)), getattr(torch, config.dtype)
    return (
        Split(train.images[:n].to(device), train.labels[:n].to(device), dtype),
        Split(test.images.to(device), test.labels.to(device), dtype),
    )


def _idx_split(folder: Path, prefix: str) -> Split:
    count, images, labels = read_idx_split(folder, prefix)
    return Split(
        torch.frombuffer(bytearray(images), dtype=torch.uint8).view(count, IMAGE_SIZE, IMAGE_SIZE),
        torch.frombuffer(bytearray(labels), dtype=torch.uint8).long(),
    )


def as_floats(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images (B, 28, 28) of 0 to 255 as floats (B, 1, 28, 28) of 0 to 1, as ToTensor does."""
    return torch.div(images, _white(dtype)).unsqueeze(1)


@cache
def _white(dtype: torch.dtype) -> Tensor:
    return torch.tensor(255, dtype=dtype)


def epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    """Return the epoch's permutation of 0 .. N-1: a function of (seed, epoch) alone, the same on every rank."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(examples))


class TrainBatches:
    """One rank's cells of every step, as (X, y, cell); each pass is the rest of the epoch in which `progress` stands.

    X: floats (n_local, 1, 28, 28). y: int64 (n_local,). cell: which share of which step they are (loop/shards.py).
    """

    def __init__(self, split: Split, shards: Shards, rank: int = 0, seed: int = 0, progress: Progress | None = None):
        self.split, self.shards, self.rank, self.seed = split, shards, rank, seed
        self.progress = progress or Progress()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Cell]]:
        order = epoch_order(self.shards.examples, self.seed, self.progress.epoch - 1)
        end = max(step.start + step.n_global for step in self.shards.steps)
        if end > len(order):  # `pad` wraps round
            order = order[torch.arange(end) % len(order)]
        order = order.to(self.split.images.device, non_blocking=True)
        for cell, positions in self.shards.of_rank(self.rank, self.progress.epoch_steps):
            chosen = order[positions.start : positions.stop]
            X = as_floats(self.split.images.index_select(0, chosen), self.split.dtype)
            yield X, self.split.labels.index_select(0, chosen), cell


class EvalBatches:
    """One rank's share of a test set, as (X, y) of at most `batch_size`: over all ranks, every example exactly once.

    Every rank has as many batches, the last perhaps empty, so that one that has fallen behind can be told.
    """

    def __init__(self, split: Split, rank: int = 0, world_size: int = 1, batch_size: int = 1000) -> None:
        n = len(split.labels)
        mine = slice(n * rank // world_size, n * (rank + 1) // world_size)
        self.images, self.labels = split.images[mine], split.labels[mine]
        self.dtype, self.batch_size = split.dtype, batch_size
        self.end = -(-n // world_size)  # of the largest share

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.end, self.batch_size):
            images, labels = (half[start : start + self.batch_size] for half in (self.images, self.labels))
            yield as_floats(images, self.dtype), labels
