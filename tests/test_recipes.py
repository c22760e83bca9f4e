"""Recipes: right on any number of ranks, and wrong without their few lines by what the mathematics predicts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from loop import parity
from scripts import recipes
from scripts.recipes import CLASSES, IGNORED, LR, Batch, deal, make_net
from tests.cases import flat_weights
from tests.launches import environment
from tests.ranks import World

PACKAGES = {
    "ddp": "torch", "accelerate": "accelerate", "trainer": "transformers", "lightning": "lightning", "fsdp2": "torch",
    "masked_tokens": "torch",
}  # fmt: skip
SLOW_TO_IMPORT = ("trainer", "lightning")  # 15 to 30 s of imports on three ranks
SIZES = [  # of step, rank and micro-batch
    [(3, 2), (1, 4), (5, 1)],
    [(2, 3), (0, 0), (1, 0)],  # rank 1 has no example
    [(4, 0), (2, 2), (0, 0)],  # rank 2 has none
]
FOLDER = Path(recipes.__file__).parent


def cells(step: int, rank: int, masked: bool) -> list[Batch]:
    """A rank's micro-batches of a step; masked: with three labels an example, all masked in the very first one."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    batches = []
    for k, n in enumerate(SIZES[step][rank]):
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (n, 3) if masked else (n,), generator=generator)
        if masked:
            y[torch.rand(y.shape, generator=generator) < 0.4] = IGNORED
        if masked and (step, rank, k) == (0, 0, 0):
            y[:] = IGNORED
        batches.append((x, y))
    return batches


def by_hand(world_size: int, masked: bool, right: bool) -> tuple[Tensor, Tensor]:
    """One process's weights, before and after; right: by the mean over all labels, else by the mean of means."""
    steps = [[cell for rank in range(world_size) for cell in cells(step, rank, masked)] for step in range(len(SIZES))]
    net = make_net(steps)
    start = flat_weights(net)
    for step in steps:
        counts = [int((y != IGNORED).sum()) for _, y in step]
        gradient = torch.zeros_like(start)
        for (x, y), n in zip(step, counts, strict=True):
            net.zero_grad()
            F.cross_entropy(net(x).view(-1, CLASSES), y.flatten(), reduction="sum").backward()
            weight = 1 / sum(counts) if right else 1 / (max(n, 1) * len(step))
            gradient += weight * torch.cat([param.grad.flatten() for param in net.parameters()])
        nn.utils.vector_to_parameters(flat_weights(net) - LR * gradient, net.parameters())
    return start, flat_weights(net)


def trained(recipe: str, right: bool) -> Tensor:
    """The weights that a recipe ends with on this rank."""
    AcceleratorState._reset_state()  # of an earlier test's precision
    module = importlib.import_module(f"scripts.recipes.{recipe}")
    rank = torch.distributed.get_rank()
    batches = [cells(step, rank, recipe == "masked_tokens") for step in range(len(SIZES))]
    ours = flat_weights((module.train if right else module.plain)(batches))
    AcceleratorState._reset_state()
    return ours


@pytest.mark.parametrize("right", [True, False], ids=["right", "plain"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_TO_IMPORT)) for name in PACKAGES]
)
def test_a_recipe_is_right_and_without_its_lines_wrong_as_predicted(
    world: Callable[[int], World], recipe: str, world_size: int, right: bool
) -> None:
    pytest.importorskip(PACKAGES[recipe])
    start, want = by_hand(world_size, recipe == "masked_tokens", right)
    _, one_process = by_hand(world_size, recipe == "masked_tokens", right=True)
    assert right or (want - one_process).norm() > 1e-2 * (one_process - start).norm()
    for rank, ours in enumerate(world(world_size).run(trained, recipe, right)):
        assert (ours - want).norm() <= 1e-12 * (want - start).norm(), f"rank {rank}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_example_is_dealt_once_and_in_order(world_size: int, masked: bool) -> None:
    (whole, *ranks) = (deal(rank, size, masked=masked) for size in (1, world_size) for rank in range(size))
    for step, *shares in zip(whole, *ranks, strict=True):
        for part in (0, 1):
            everything = torch.cat([cell[part] for cell in step])
            assert torch.equal(torch.cat([cell[part] for share in shares for cell in share]), everything)


def test_the_set_has_the_shares_that_break_loops() -> None:
    for world_size in (2, 3):
        shares = [[sum(len(y) for _, y in step) for step in deal(rank, world_size)] for rank in range(world_size)]
        assert [min(n) for n in zip(*shares, strict=True)][1:] == [{2: 5, 3: 1}[world_size], 0]
        labels = [y for rank in range(world_size) for _, y in deal(rank, world_size, masked=True)[0]]
        assert any(len(y) and bool((y == IGNORED).all()) for y in labels), "a micro-batch that is masked altogether"


def test_the_mean_of_no_token_is_nan_though_its_gradient_is_zero() -> None:
    logits = nn.Parameter(torch.randn(3, 5))
    loss = F.cross_entropy(logits, torch.full((3,), IGNORED), ignore_index=IGNORED)
    loss.backward()
    assert loss.isnan()
    assert not logits.grad.any()


@pytest.mark.parametrize("recipe", PACKAGES)
def test_a_recipe_is_short(recipe: str) -> None:
    assert len((FOLDER / f"{recipe}.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow  # 10 s each
@pytest.mark.parametrize(("ranks", "flag"), [(1, ""), (2, ""), (2, "--plain")])
@pytest.mark.parametrize("recipe", PACKAGES)
def test_a_recipe_runs_as_it_stands(recipe: str, ranks: int, flag: str) -> None:
    pytest.importorskip(PACKAGES[recipe])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", f"scripts.recipes.{recipe}", *flag.split()],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    far = float(line.split(": ")[1].split()[0])
    assert far > 1e-2 if flag else far < 1e-12


@pytest.mark.slow  # 10 to 110 s each
@pytest.mark.parametrize("recipe", PACKAGES)
def test_parity_passes_the_recipe_and_names_what_is_wrong_with_the_plain_loop(recipe: str) -> None:
    module = pytest.importorskip(f"scripts.recipes.{recipe}", exc_type=ImportError)
    masked = recipe == "masked_tokens"
    x, y = (
        torch.cat(part) for part in zip(*(cell for step in deal(0, 1, masked=masked) for cell in step), strict=True)
    )
    how: dict[str, Any] = {"data": (x, y), "batch_size": 16, "masked": IGNORED if masked else None}
    parity.assert_parity(module.train, **how)
    report = parity.parity(module.plain, **how)
    assert report.causes == {ranks: [parity.MEANS.name] for ranks in (1, 2, 3)}, str(report)
