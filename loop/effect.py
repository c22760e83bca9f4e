"""What a mode does to a step: the weight of an example, the updaters' divisors, the effective learning rate. No torch.

A step's sizes are the examples in each of its cells, micro-batch by micro-batch, rank by rank (loop/shards.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from loop.config import Config
from loop.reduction import Normalize, Reduction, cell_scale


class Effect(NamedTuple):
    """What a mode does to a step.

    lightest, heaviest: weight of an example, times n. length: of the step, over the exact mean's. lr_effective: the
    learning rate at which plain one-process mean SGD would take a step as long (meaningful where `steps_by_lr` holds).
    drifts: whether the ranks' updaters divide by different numbers; the other figures are rank 0's then.
    """

    lightest: float
    heaviest: float
    length: float
    lr_effective: float
    drifts: bool


def effect(config: Config, sizes: Sequence[int], world_size: int) -> Effect:
    """Return what the configuration's mode does to a step of these sizes."""
    n, weights = sum(sizes), applied_weights(config, sizes, world_size)
    applied = [weight * n for weight, size in zip(weights, sizes, strict=True) if size]
    length = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    drifts = len(set(divisors(config, sizes, world_size))) > 1
    return Effect(min(applied), max(applied), length, config.learning_rate * length, drifts)


def example_weights(reduction: Reduction, normalize: Normalize, sizes: Sequence[int]) -> list[float]:
    """Return the weight of one example of each cell in the step's gradient; 1/n is an exact mean's.

    The weights times the sizes add up to the step's length in units of the mean gradient's where all examples agree:
    under `global` 1 for a mean, n for a sum.
    """
    n, cells = sum(sizes), len(sizes)
    scales = (cell_scale(reduction, normalize, n_local=s, n_global=n, averaged_over=cells) for s in sizes)
    return [float(scale) / cells for scale in scales]


def sgd_divisor(reduction: Reduction, normalize: Normalize, *, n_last: int, n_global: int) -> int:
    """Return what the book's `sgd(params, lr, batch_size)` is to divide by; 0 means: make no update.

    After a sum, `global` divides by n on every rank, which gives the exact mean; `rank` by the rank's own last
    micro-batch, n_last: where those differ the replicas drift apart. After a mean loss nothing is left to divide by,
    but under `rank` a rank whose last micro-batch is empty makes no update, as a plain loop would skip it.
    """
    if normalize == "global":
        return n_global if reduction == "sum" else 1
    return n_last if reduction == "sum" else min(n_last, 1)


def divisors(config: Config, sizes: Sequence[int], world_size: int) -> list[int]:
    """Return what each rank's updater divides the gradient by: torch's by 1; 0 stands for no update."""
    if config.updater == "torch":
        return [1] * world_size
    n, last = sum(sizes), sizes[-world_size:]
    return [sgd_divisor(config.reduction, config.normalize, n_last=n_last, n_global=n) for n_last in last]


def applied_weights(config: Config, sizes: Sequence[int], world_size: int) -> list[float]:
    """Return the weight of one example of each cell in rank 0's update; other ranks' differ where `divisors` do."""
    divisor = divisors(config, sizes, world_size)[0] or math.inf
    return [weight / divisor for weight in example_weights(config.reduction, config.normalize, sizes)]


def target_reduction(config: Config) -> Reduction:
    """Return what a step is meant to apply; the scratch updater divides its sum by n, which makes it the mean."""
    return "sum" if config.reduction == "sum" and config.updater == "torch" else "mean"


def steps_by_lr(config: Config) -> bool:
    """Whether a step's length is the learning rate times the gradient's: not under Adam, AdamW or clipping."""
    return config.optimizer == "sgd" and config.clip_norm is None
