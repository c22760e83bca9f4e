"""Shards: every example goes where the tail says, on every rank, and as Accelerate deals where the two agree."""

from __future__ import annotations

from collections import Counter

from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from loop.shards import Shards

plans = st.builds(
    dict,
    examples=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    world_size=st.integers(1, 9),
    accumulate=st.integers(1, 4),
)


def positions(shards: Shards) -> list[list[int]]:
    """The positions that each rank takes in an epoch, modulo N."""
    ranks = range(shards.world_size)
    return [[p % shards.examples for _, part in shards.of_rank(rank) for p in part] for rank in ranks]


@given(plans, st.sampled_from(["spread", "ragged"]))
def test_spread_and_ragged_deal_every_example_once(plan: dict[str, int], tail: str) -> None:
    dealt = Counter(p for part in positions(Shards(**plan, tail=tail)) for p in part)
    assert dealt == Counter(range(plan["examples"]))


@given(plans)
def test_pad_deals_the_first_examples_again(plan: dict[str, int]) -> None:
    assume(plan["batch_size"] % (plan["world_size"] * plan["accumulate"]) == 0)
    shards = Shards(**plan, tail="pad")
    dealt = Counter(p for part in positions(shards) for p in part)
    missing = -plan["examples"] % plan["batch_size"]
    assert dealt == Counter(i % plan["examples"] for i in range(plan["examples"] + missing))
    assert shards.census == (plan["examples"], missing, 0)
    assert {size for step in shards.steps for size in step.sizes} == {shards.capacity}


@given(plans)
def test_drop_never_deals_the_incomplete_batch(plan: dict[str, int]) -> None:
    assume(plan["examples"] >= plan["batch_size"])
    shards = Shards(**plan, tail="drop")
    dealt = Counter(p for part in positions(shards) for p in part)
    whole = plan["examples"] - plan["examples"] % plan["batch_size"]
    assert dealt == Counter(range(whole))
    assert shards.census == (whole, 0, plan["examples"] - whole)


@given(plans, st.sampled_from(["spread", "ragged"]))
def test_ranks_agree_on_every_step_and_meet_in_every_backward(plan: dict[str, int], tail: str) -> None:
    shards = Shards(**plan, tail=tail)
    per_rank = [list(shards.of_rank(rank)) for rank in range(plan["world_size"])]
    assert len({len(cells) for cells in per_rank}) == 1, "an idle rank still has its cells"
    for same_time in zip(*per_rank, strict=True):
        steps = {cell.step for cell, _ in same_time}
        assert len(steps) == 1
    for step in shards.steps:
        mine = [len(part) for cells in per_rank for cell, part in cells if cell.step is step]
        assert sum(mine) == step.n_global == sum(step.sizes)
        assert sorted(mine) == sorted(step.sizes)


@given(plans)
def test_full_batches_are_dealt_evenly_under_every_tail(plan: dict[str, int]) -> None:
    assume(plan["examples"] >= plan["batch_size"])
    for tail in ("spread", "ragged", "drop"):
        sizes = Shards(**plan, tail=tail).steps[0].sizes
        assert max(sizes) - min(sizes) <= 1
        assert list(sizes) == sorted(sizes, reverse=True)


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8), st.sampled_from(["pad", "ragged", "drop"]))
def test_equal_to_accelerates_batch_sampler_shard(examples: int, cell: int, world_size: int, tail: str) -> None:
    batch_size = cell * world_size
    assume(tail != "drop" or examples >= batch_size)
    sampler = BatchSampler(range(examples), batch_size, drop_last=tail == "drop")
    shards = Shards(examples, batch_size, world_size, 1, tail)
    for rank in range(world_size):
        theirs = BatchSamplerShard(sampler, world_size, rank, split_batches=True, even_batches=tail == "pad")
        ours = ([p % examples for p in part] for _, part in shards.of_rank(rank))
        assert [batch for batch in ours if batch] == list(theirs)


@given(plans, st.sampled_from(["spread", "ragged", "drop"]))
def test_the_last_step_needs_none_of_the_others(plan: dict[str, int], tail: str) -> None:
    assume(tail != "drop" or plan["examples"] >= plan["batch_size"])
    shards = Shards(**plan, tail=tail)
    assert (shards.step_count, shards.last_step) == (len(shards.steps), shards.steps[-1])
