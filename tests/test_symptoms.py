"""Symptoms: each shows a number that is wrong by exactly what the mathematics predicts, and the right one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from scripts.symptoms.__main__ import SYMPTOMS, main
from scripts.symptoms.loaders import uneven_hang
from scripts.symptoms.toy import Shown
from tests.ranks import World

NAN, LN, ROOT = math.nan, math.log, math.sqrt


def examples_seen(seeded_by_rank: int) -> int:
    """Of 64, by samplers as torch's documentation describes them: a permutation by the seed, filled up, strided."""
    W = seeded_by_rank
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(r)).tolist() for r in range(W)]
    return len({i for r, order in enumerate(orders) for i in (order + order[: -64 % W])[r::W]})


# What the loop must give, and what one process gives, by hand: on 2 ranks, then on 3. A list has a number a rank.
# Unless it says otherwise, rank r holds examples 2 r + 1 and 2 r + 2, whose mean is 2 r + 1.5; all ranks', W + 0.5.
BY_HAND: dict[str, tuple[tuple[float | list[float], float], tuple[float | list[float], float]]] = {
    # one step of 6 W examples for W steps of 6
    "grown-batch": ((6.5, 3.5 + 9.5), (9.5, 3.5 + 9.5 + 15.5)),
    # 2 W of 8 steps of the schedule
    "scheduler-too-fast": ((1 - 4 / 8, 1 - 2 / 8), (1 - 6 / 8, 1 - 2 / 8)),
    "logged-loss": (([1.5, 3.5], 2.5), ([1.5, 3.5, 5.5], 3.5)),
    "eval-loss-summed": ((1.5 + 3.5, 2.5), (1.5 + 3.5 + 5.5, 3.5)),
    # rank 0 has a batch more, of one example: 2 W + 1
    "mean-of-means": ((((1.5 + 5) / 2 + 3.5) / 2, 3), (((1.5 + 7) / 2 + 3.5 + 5.5) / 3, 4)),
    # batches of 4: one of each of 2 ranks, then one of 2 more; or one of each of 3
    "gather-count": ((4 + 4 + 4, 9), (4 + 4 + 4, 9)),
    # 1 to 21, and 1 again; 1 to 31, and 1 and 2 again
    "sampler-copies": (((231 + 1) / 22, 11), ((496 + 1 + 2) / 33, 16)),
    "floored-mean": ((0, 1 / 2), (0, 2 / 3)),
    # sequences (1), (2, 3), (4, 5, 6)
    "token-mean": (((1 + 2.5) / 2, 6 / 3), ((1 + 2.5 + 5) / 3, 21 / 6)),
    "all-masked": ((NAN, 1.5), (NAN, 2.5)),
    # 2 to 5, 7 to 10, 12 to 15, whose sums are 14, 34, 54
    "causal-shift": ((48 / 10, 48 / 8), (102 / 15, 102 / 12)),
    # 9 to 12 and 13 to 18, over 4 micro-batches for 2
    "short-window": ((42 / 4 / 2, 42 / 4), (93 / 6 / 2, 93 / 6)),
    "penalty-per-micro-batch": ((2.5 + 2 * 10, 2.5 + 10), (3.5 + 2 * 10, 3.5 + 10)),
    # 8 of 8 steps of the schedule, where the optimizer has taken 2
    "scheduler-per-micro-batch": ((0, 1 - 2 / 8), (0, 1 - 2 / 8)),
    "no-sync-around-backward": ((4, 1), (4, 1)),
    "loss-times-world-size": ((2 * 2.5, 2.5), (3 * 3.5, 3.5)),
    "reduce-without-gradient": ((2.5 / 2, 2.5), (3.5 / 3, 3.5)),
    "gathered-loss": ((2.5 / 2, 2.5), (3.5 / 3, 3.5)),
    "own-negatives": ((LN(2), LN(4)), (LN(2), LN(6))),
    "bypassed-ddp": (([1.5, 3.5], 2.5), ([1.5, 3.5, 5.5], 3.5)),
    "norm-summed-twice": ((ROOT(2) * 2.5, 2.5), (ROOT(3) * 3.5, 3.5)),
    # W of W² ones
    "shard-norm": ((ROOT(2), 2), (ROOT(3), 3)),
    "skipped-alone": (([NAN, 1], 1), ([NAN, NAN, 1], 1)),
    "one-task-a-rank": ((1.5 / 2, 1.5), (1.5 / 3, 1.5)),
    # 32 and 22 examples in batches of 4
    "set-epoch-forgotten": ((8, 0), (6, 0)),
    "sampler-seeded-by-rank": ((examples_seen(2), 64), (examples_seen(3), 64)),
    "unsplit-stream": ((2 * 8, 8), (3 * 8, 8)),
}


def shown(fixed: bool, names: list[str]) -> list[Shown]:
    """What the symptoms show on this rank; a hang is given up after a second."""
    return [uneven_hang(fixed, patience_s=1) if name == "uneven-hang" else SYMPTOMS[name](fixed) for name in names]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_symptom_is_wrong_as_predicted_and_its_cure_right(
    world: Callable[[int], World], fixed: bool, world_size: int
) -> None:
    for rank, measured in enumerate(world(world_size).run(shown, fixed, list(BY_HAND))):
        off = {}
        for (name, numbers), (_, *given, _) in zip(BY_HAND.items(), measured, strict=True):
            wrong, right = numbers[world_size - 2]
            by_hand = [right if fixed else wrong[rank] if isinstance(wrong, list) else wrong, right]
            if given != pytest.approx(by_hand, rel=1e-6, nan_ok=True):
                off[name] = (given, by_hand)
        assert not off, f"rank {rank}: given, by hand"


def test_each_symptom_but_the_hang_has_numbers_by_hand_that_differ() -> None:
    assert {*BY_HAND, "uneven-hang"} == set(SYMPTOMS)
    for name, numbers in BY_HAND.items():
        for wrong, right in numbers:
            assert (wrong[0] if isinstance(wrong, list) else wrong) != pytest.approx(right, rel=1e-2), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_inputs_hang_and_empty_batches_cure_it(world: Callable[[int], World], world_size: int) -> None:
    (first,), *others = world(world_size).run(shown, False, ["uneven-hang"])
    assert first.here == "hung: rank 0 waited 1 s for ranks that have no second batch"
    assert all(isinstance(rank.here, float) for (rank,) in others), "they took one step and left"
    for (rank,) in world(world_size).run(shown, True, ["uneven-hang"]):
        assert rank.here == rank.right == 2 * world_size + 1


def test_without_a_name_the_symptoms_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SYMPTOMS)
