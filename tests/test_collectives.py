"""The price of being exact: not one collective more than plain DDP, but for the metrics, once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch.profiler import ProfilerActivity, profile

from loop.config import Config
from tests.cases import toy_config, train_here
from tests.ranks import World


def count_collectives(config: Config, examples: int) -> int:
    """How many collectives of any kind a whole training takes on this rank, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train_here(config, examples)
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("gloo:"))


@pytest.mark.parametrize("tail", ["spread", "ragged"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("normalize", ["global", "rank"])
def test_a_step_costs_one_collective_and_an_epoch_two_more(
    world: Callable[[int], World], normalize: str, accumulate: int, tail: str
) -> None:
    config = toy_config(batch_size=16, accumulate=accumulate, tail=tail, normalize=normalize)
    examples, steps = 67, 5
    one, two = (world(3).run(count_collectives, replace(config, epochs=n), examples) for n in (1, 2))
    assert [b - a for a, b in zip(one, two, strict=True)] == [steps + 2] * 3, "metrics of training and of testing"


@pytest.mark.parametrize(
    ("world_size", "gathered"),
    [(4, 1), (2, 1), (3, 4)],  # gradients of a rank: of V = 12 = 3 x 2 x 2 the tree ends on a rank where W is 2 or 4
)
def test_with_virtual_ranks_a_step_gathers_one_gradient_a_rank_where_the_tree_allows(
    world: Callable[[int], World], world_size: int, gathered: int
) -> None:
    config = toy_config(batch_size=16, virtual_ranks=12)
    examples, steps = 67, 5
    one, two = (world(world_size).run(count_collectives, replace(config, epochs=n), examples) for n in (1, 2))
    assert [b - a for a, b in zip(one, two, strict=True)] == [gathered * steps + 2] * world_size
