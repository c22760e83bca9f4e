"""The gallery's figures: each function draws one, and returns what it found in numbers that it computed.

Left, one process; right, several ranks. A finding that does not hold is never drawn: `DoesNotHoldError` says what was
measured instead.
"""

from scripts.gallery.figures.batches import accumulation, batch_size, cost, overlay, tail, weights
from scripts.gallery.figures.beyond import fp16, optimizers
from scripts.gallery.figures.bits import bits
from scripts.gallery.figures.last_batch import hero
from scripts.gallery.figures.rates import blow_up, divided_lr, lr, same_lr, training
from scripts.gallery.figures.scalars import scalar, zeroing
from scripts.gallery.figures.sums import drift, metrics

__all__ = [
    "accumulation",
    "batch_size",
    "bits",
    "blow_up",
    "cost",
    "divided_lr",
    "drift",
    "fp16",
    "hero",
    "lr",
    "metrics",
    "optimizers",
    "overlay",
    "same_lr",
    "scalar",
    "tail",
    "training",
    "weights",
    "zeroing",
]
