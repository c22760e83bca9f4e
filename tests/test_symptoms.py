"""Symptoms: each shows a number that is wrong by exactly what the mathematics predicts, and the right one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from scripts.symptoms import SYMPTOMS, Shown, main, uneven_hang
from tests.ranks import World


def shown(name: str, fixed: bool) -> Shown:
    """What a symptom shows on this rank; a hang is given up after a second."""
    return uneven_hang(fixed, patience_s=1) if name == "uneven-hang" else SYMPTOMS[name](fixed)


def wrong_number(name: str, W: int, rank: int) -> float:
    """What the loop must give, worked out example by example; n = 2 W, of which rank r holds 2 r + 1 and 2 r + 2."""
    mean = (2 * W + 1) / 2
    if name == "gather-count":  # batches of 4 until 9 are dealt; of the last W counts, as many as 9 mod 4 W are kept
        full, left = divmod(9, 4 * W)
        return 4 * (full * W + min(left, W))
    if name == "mean-of-means":  # rank 0 holds 2 W + 1, too, as a batch of its own
        means = [2 * r + 1.5 for r in range(W)]
        means[0] = (1.5 + 2 * W + 1) / 2
        return sum(means) / W
    if name == "sampler-copies":  # 10 W + 1 examples, and the first W - 1 once more
        n = 10 * W + 1
        return (n * (n + 1) / 2 + (W - 1) * W / 2) / (11 * W)
    if name == "sampler-seeded-by-rank":  # as torch's documentation says: a permutation by the seed, filled up, strided
        orders = [torch.randperm(64, generator=torch.Generator().manual_seed(r)).tolist() for r in range(W)]
        return len({i for r, order in enumerate(orders) for i in (order + order[: -64 % W])[r::W]})
    return {
        "loss-times-world-size": W * mean,
        "gathered-loss": mean / W,
        "bypassed-ddp": 2 * rank + 1.5,
        "norm-summed-twice": W**0.5 * mean,
        "skipped-alone": 1 if rank == W - 1 else math.nan,
        "one-task-a-rank": 1.5 / W,
        "set-epoch-forgotten": math.ceil(math.ceil(64 / W) / 4),
        "unsplit-stream": 8 * W,
        "scheduler-too-fast": 1 - 2 * W / 8,  # the schedule, W steps at a time
        "scheduler-per-micro-batch": 0,  # 8 of 8 steps, when the optimizer has taken 2
    }[name]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", [name for name in SYMPTOMS if name != "uneven-hang"])
def test_a_symptom_is_wrong_as_predicted_and_its_cure_right(
    world: Callable[[int], World], name: str, world_size: int
) -> None:
    wrong = world(world_size).run(shown, name, fixed=False)
    for rank, measured in enumerate(wrong):
        assert measured.here == pytest.approx(wrong_number(name, world_size, rank), rel=1e-6, nan_ok=True)
    assert wrong[0].here != pytest.approx(wrong[0].one_process, rel=1e-2)
    for rank in world(world_size).run(shown, name, fixed=True):
        assert rank.here == pytest.approx(rank.one_process, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_inputs_hang_and_empty_batches_cure_it(world: Callable[[int], World], world_size: int) -> None:
    first, *others = world(world_size).run(shown, "uneven-hang", fixed=False)
    assert first.here == "hung: rank 0 waited 1 s for ranks that have no second batch"
    assert all(isinstance(rank.here, float) for rank in others), "they took one step and left"
    for rank in world(world_size).run(shown, "uneven-hang", fixed=True):
        assert rank.here == rank.one_process == 2 * world_size + 1


def test_without_a_name_the_symptoms_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SYMPTOMS)


@pytest.mark.parametrize(
    ("args", "says"),
    [(["hang"], "there is no hang: choose from gather-count"), (["uneven-hang"], "needs ranks: torchrun")],
)
def test_bad_calls_get_one_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"scripts.symptoms: error: {says}")
    assert error.count("\n") == 1
