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
from loop.idx import IMAGE_SIZE, SetSize, classes_of, read_fashion_mnist, read_set
from loop.progress import Progress
from loop.shards import Cell, Shards


class Split(NamedTuple):
    """One half of a set. images: uint8, (N, 28, 28), 0 to 255. labels: int64, (N,). dtype: of batches made of it.

    size: the number of training examples, and of classes over both halves. remarks: what the user should know.
    """

    images: Tensor
    labels: Tensor
    dtype: torch.dtype = torch.float32
    size: SetSize = SetSize(0)
    remarks: tuple[str, ...] = ()


def load(config: Config, device: torch.device | str = "cpu") -> tuple[Split, Split]:
    """Return the training and the test half, the first cut to `--train-examples`; the files are there already.

    Raises InputError for a folder that holds no sound MNIST-like set, or too few examples.
    """
    fashion = config.dataset == FASHION_MNIST
    halves = read_fashion_mnist(config.data_dir) if fashion else read_set(Path(config.dataset))
    train, test = (
        Split(
            torch.frombuffer(bytearray(half.images), dtype=torch.uint8).view(half.examples, IMAGE_SIZE, IMAGE_SIZE),
            torch.frombuffer(bytearray(half.labels), dtype=torch.uint8).long(),
            getattr(torch, config.dtype),
        )
        for half in halves
    )
    n = config.training_size(halves[0].examples)
    size, remarks = SetSize(n, classes_of(halves)), tuple(_remarks(train, test))
    if not fashion:
        remarks = (f"its files: {', '.join(halves[0].files + halves[1].files)}", *remarks)
    return (
        Split(train.images[:n].to(device), train.labels[:n].to(device), train.dtype, size, remarks),
        test._replace(images=test.images.to(device), labels=test.labels.to(device), size=size),
    )


def _remarks(train: Split, test: Split) -> Iterator[str]:
    """Yield warnings about a set that can be read, but is hard to learn from."""
    for half, images in (("train", train.images), ("test", test.images)):
        low, high = int(images.min()), int(images.max())
        if high < 128 or low == high:
            yield f"warning: the {half} images' pixels range from {low} to {high}; the nets are made for 0 to 255"
    if train.labels.min() == train.labels.max():
        yield f"warning: all train labels are {int(train.labels[0])}"
    unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        yield f"warning: only the test set has the class(es) {', '.join(map(str, unknown))}"


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

    X: floats (B, 1, 28, 28). y: int64 (B,). cell: which share of which step they are (loop/shards.py).
    Where nothing advances `progress`, each pass is the first epoch's.
    """

    def __init__(self, split: Split, shards: Shards, rank: int = 0, seed: int = 0, progress: Progress | None = None):
        self.split, self.shards, self.rank, self.seed = split, shards, rank, seed
        self.progress = progress or Progress()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Cell]]:
        order = epoch_order(self.shards.examples, self.seed, self.progress.epoch - 1)
        last = self.shards.last_step
        end = last.start + last.n_global
        if end > len(order):  # `pad` wraps round
            order = order[torch.arange(end) % len(order)]
        order = order.to(self.split.images.device, non_blocking=True)
        for cell, positions in self.shards.of_rank(self.rank, self.progress.epoch_steps):
            chosen = order[positions.start : positions.stop]
            X = as_floats(self.split.images.index_select(0, chosen), self.split.dtype)
            yield X, self.split.labels.index_select(0, chosen), cell


class EvalBatches:
    """One rank's share of a test set, as (X, y) of at most `batch_size`: over all ranks, every example exactly once.

    virtual_ranks: the number of shares, where a rank has several; their batches come in turn.
    Every share has as many batches, the last perhaps empty, so that the watchdog can see which rank is late.
    """

    def __init__(
        self, split: Split, rank: int = 0, world_size: int = 1, batch_size: int = 1000, virtual_ranks: int = 0
    ) -> None:
        n, count = len(split.labels), virtual_ranks or world_size
        shares = [slice(n * i // count, n * (i + 1) // count) for i in range(rank, count, world_size)]
        self.shares = [(split.images[share], split.labels[share]) for share in shares]
        self.dtype, self.batch_size = split.dtype, batch_size
        self.end = -(-n // count)  # of the largest share

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.end, self.batch_size):
            for share in self.shares:
                images, labels = (half[start : start + self.batch_size] for half in share)
                yield as_floats(images, self.dtype), labels
