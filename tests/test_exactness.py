"""The exactness matrix: under `--normalize global` the weights, and the metrics, are those of one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.cases import assert_one_process, toy_config
from tests.ranks import World

# (examples, batch size): a last step of 3, so that ranks idle; of 1, in an epoch of batches that W = 3 and 4 do not
# divide; of 22, nearly full; and an epoch of less than one batch.
SIZES = [(67, 16), (61, 10), (70, 24), (5, 8)]
SIZES_TO_PAD = [(75, 36), (71, 36), (5, 36)]  # 36 is divisible by every W K tried
UPDATERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    "clipped": {"clip_norm": 0.5},
    "scratch": {"updater": "scratch"},
}


CHOICES = [1, 3], ["spread", "ragged", "pad", "drop"], ["mean", "sum"], list(UPDATERS)
GRID = [  # each mode at one number of ranks, each choice at all of them; the rest where the suite may take long: 70 s
    pytest.param(world_size, *mode, marks=[] if sum(places) % 4 == world_size - 1 else pytest.mark.slow)
    for places in itertools.product(*(range(len(values)) for values in CHOICES))
    for mode in [[values[place] for values, place in zip(CHOICES, places, strict=True)]]
    for world_size in (1, 2, 3, 4)
]


@pytest.mark.parametrize(("world_size", "accumulate", "tail", "reduction", "updater"), GRID)
def test_global_takes_the_steps_of_one_process(
    world: Callable[[int], World], world_size: int, accumulate: int, tail: str, reduction: str, updater: str
) -> None:
    for examples, batch_size in SIZES_TO_PAD if tail == "pad" else SIZES:
        if tail == "drop" and examples < batch_size:
            continue
        config = toy_config(
            batch_size=batch_size, accumulate=accumulate, tail=tail, reduction=reduction, **UPDATERS[updater]
        )
        assert_one_process(world(world_size), config, examples)


@pytest.mark.parametrize("tail", ["spread", "ragged"])
@pytest.mark.parametrize("updater", ["momentum", "scratch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("net", ["mlp", "lenet"])
def test_the_deeper_nets_are_exact_too(
    world: Callable[[int], World], net: str, reduction: str, updater: str, tail: str
) -> None:
    config = toy_config(net=net, batch_size=16, accumulate=2, reduction=reduction, tail=tail, **UPDATERS[updater])
    assert_one_process(world(3), config, 67)


@pytest.mark.parametrize("net", ["softmax", "mlp", "lenet"])
def test_float32_stays_within_rounding_of_one_process(world: Callable[[int], World], net: str) -> None:
    config = toy_config(net=net, dtype="float32", batch_size=16, accumulate=3)
    assert_one_process(world(4), config, 67, weights=1e-6, figures=1e-5)
