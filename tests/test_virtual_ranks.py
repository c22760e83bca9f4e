"""Virtual ranks: the weights are the same bits on any number of ranks that divides V, and the sum is the gradient."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loop import virtual_ranks
from loop.data import as_floats, epoch_order
from loop.nets import make_net
from loop.progress import ShareAccumulator
from loop.virtual_ranks import VirtualRanks, prime_factors, tree_sum, world_size
from tests.cases import assert_one_process, toy_config, toy_split, train_here
from tests.launches import forked_ranks, launch
from tests.ranks import World

BATCH = 96
EXAMPLES = 3 * BATCH + 5  # in the last step most cells are empty


def all_reduced(parts: list[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum as a plain loop has it: micro-batch by micro-batch, then the backend's all-reduce."""
    total = torch.stack(parts).sum(0)
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def sha256(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def train(net_name: str, v: int, *, tree: bool = True, groups: tuple[tuple[int, ...], ...] = ()) -> str:
    """Train for an epoch on this rank's cells; return the hash of its weights. groups: of ranks that train alone."""
    made = [(ranks, dist.new_group(list(ranks))) for ranks in groups]
    group = next((each for ranks, each in made if dist.get_rank() in ranks), None)
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    split = toy_split(EXAMPLES)
    torch.manual_seed(0)
    net = make_net(net_name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    shares = VirtualRanks(net.parameters(), v, group)
    with mock.patch.object(virtual_ranks, "tree_sum", tree_sum if tree else all_reduced):
        for batch in epoch_order(EXAMPLES, 0, 0).split(BATCH):
            for cell in batch.tensor_split(v)[rank :: world_size(group)]:
                losses = cross_entropy(
                    net(as_floats(split.images[cell], torch.float32)), split.labels[cell], reduction="none"
                )
                shares.add(losses.sum() / len(batch))
            shares.reduce()
            optimizer.step()
    return sha256(net)


@pytest.mark.parametrize("net", ["softmax", "mlp", "lenet"])
def test_with_the_backends_all_reduce_the_bits_depend_on_the_number_of_ranks(
    world: Callable[[int], World], net: str
) -> None:
    hashes = {w: world(w).run(train, net, 24, tree=False) for w in (1, 2, 3, 4)}
    assert all(len(set(of_ranks)) == 1 for of_ranks in hashes.values()), "the replicas of one training are equal"
    assert len({of_ranks[0] for of_ranks in hashes.values()}) == 4, hashes


def test_two_groups_train_each_by_itself(world: Callable[[int], World]) -> None:
    (alone,) = world(1).run(train, "softmax", 8)
    assert world(4).run(train, "softmax", 8, groups=((0, 1), (2, 3))) == [alone] * 4


def cells(v: int) -> list[Tensor]:
    """V vectors of float32 whose sum depends on the order of additions."""
    generator = torch.Generator().manual_seed(v)
    return [torch.randn(1000, generator=generator) * 10.0 ** (i % 5) for i in range(v)]


def sum_here(v: int) -> Tensor:
    """Return the tree's sum of `cells(v)`, of which this rank holds its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return tree_sum(cells(v)[rank :: world_size()])


def test_the_tree_is_the_one_that_is_drawn(world: Callable[[int], World]) -> None:
    a, b, c, d, e, f, g, h = cells(8)
    eight = ((a + e) + (c + g)) + ((b + f) + (d + h))
    assert not torch.equal(eight, sum(cells(8))), "another order must show"
    for w in (1, 2, 4):
        assert all(torch.equal(ours, eight) for ours in world(w).run(sum_here, 8)), w
    a, b, c, d, e, f = cells(6)
    six = ((a + c) + e) + ((b + d) + f)
    assert not torch.equal(six, sum(cells(6)))
    for w in (1, 2, 3):
        assert all(torch.equal(ours, six) for ours in world(w).run(sum_here, 6)), w


@pytest.mark.parametrize("v", [1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 24, 30, 36])
def test_the_sum_is_that_of_float64_to_rounding_and_the_same_for_every_divisor(
    world: Callable[[int], World], v: int
) -> None:
    exact = torch.stack(cells(v)).double()
    sums = {w: world(w).run(sum_here, v) for w in (1, 2, 3, 4) if v % w == 0}
    additions = sum(p - 1 for p in prime_factors(v))  # on a cell's way to the root, each off by half an ulp
    bound = 1.01 * additions * 2.0**-24 * exact.abs().sum(0)
    for w, of_ranks in sums.items():
        for ours in of_ranks:
            assert torch.equal(ours, sums[1][0]), w
            assert ((ours.double() - exact.sum(0)).abs() <= bound).all()


def test_the_gradient_is_the_batchs_also_of_what_a_cell_does_not_use() -> None:
    torch.manual_seed(0)
    used, frozen, unused = (torch.randn(3, dtype=torch.float64, requires_grad=i != 1) for i in range(3))
    x = torch.randn(4, 3, dtype=torch.float64)
    shares = VirtualRanks([used, frozen, unused], 2)
    for half in (x[:2], x[2:]):
        shares.add((half * used * frozen).sum() / 4)
    shares.reduce()
    torch.testing.assert_close(used.grad, x.mean(0) * frozen, rtol=1e-14, atol=1e-15)
    assert frozen.grad is None
    assert torch.equal(unused.grad, torch.zeros(3, dtype=torch.float64))


def refusal(v: int) -> str:
    with pytest.raises(ValueError) as refused:
        VirtualRanks([torch.ones(1, requires_grad=True)], v)
    return str(refused.value)


def test_ranks_that_do_not_divide_and_cells_that_are_missing_are_refused(world: Callable[[int], World]) -> None:
    assert world(3).run(refusal, 8) == ["3 ranks do not divide 8 virtual ranks"] * 3
    assert world(2).run(refusal, 0) == ["2 ranks do not divide 0 virtual ranks"] * 2
    weight = torch.ones(1, requires_grad=True)
    shares = VirtualRanks([weight], 2)
    shares.add(weight.sum())
    with pytest.raises(ValueError, match="a step has 2 cells on each rank, not 1"):
        shares.reduce()


@pytest.mark.slow  # 7 s each
@pytest.mark.parametrize("told", ["", "3"])
def test_a_rank_computes_in_one_thread_whatever_the_environment_says(tmp_path: Path, told: str) -> None:
    """Where it says nothing, Accelerate divides the cores by the ranks."""
    program = tmp_path / "on_64_cores.py"
    on_64_cores = "import runpy, psutil; psutil.cpu_count = lambda logical=True: 64; "
    program.write_text(on_64_cores + "runpy.run_path('train.py', run_name='__main__')")
    flags = ["--virtual-ranks", "2", "--epochs", "1", "--train-examples", "300", "--cpu", "--run-name", "run"]
    done = launch([*forked_ranks(2)[:-1], str(program)], tmp_path, *flags, OMP_NUM_THREADS=told)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["threads_per_rank"] == 1


LOSSES = [1e16, 1.0, -1e16, 3.0, 1e-8, 7.0]  # of six shares: their sum depends on the order of additions


def add_up_losses() -> list[float]:
    """Add this rank's shares, in two steps; return the sums over all ranks of losses and of ones."""
    rank, w = (dist.get_rank(), world_size()) if dist.is_initialized() else (0, 1)
    sums = ShareAccumulator(rank, w, len(LOSSES), 2)
    for _ in range(2):
        for loss in LOSSES[rank::w]:
            sums.add(torch.tensor(loss, dtype=torch.float64), 1)
    sums.all_reduce(torch.device("cpu"))
    return [sums[0], sums[1]]


@pytest.mark.parametrize("w", [1, 2, 3])
def test_sums_are_added_in_the_order_of_the_shares(world: Callable[[int], World], w: int) -> None:
    # 2e16 + 2 lies half-way between two numbers and becomes 2e16, so that the first three shares add up to 0.
    assert world(w).run(add_up_losses) == [[6.0 + 2e-8 + 14.0, 12.0]] * w


CHOICES: list[dict[str, Any]] = [
    {},
    {"net": "mlp"},
    {"net": "lenet"},
    {"reduction": "sum"},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "adamw", "lr": 1e-3},
    {"clip_norm": 0.5},
    {"updater": "scratch"},
    {"updater": "scratch", "reduction": "sum"},
    {"tail": "ragged"},
    {"tail": "pad"},
    {"tail": "drop"},
    {"mixed_precision": "bf16"},
    {"dtype": "float64"},
    {"audit_every": 1},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_training_gives_the_same_weights_and_figures_on_any_number_of_ranks(
    world: Callable[[int], World], choice: dict[str, Any]
) -> None:
    config = toy_config(**{"dtype": "float32", "virtual_ranks": 12, "batch_size": 36, **choice})
    examples = 2 * 36 + 5
    results = [trained for w in (1, 2, 3, 4) for trained in world(w).run(train_here, config, examples)]
    for trained in results:
        assert {name: value.numpy().tobytes() for name, value in trained.weights.items()} == {
            name: value.numpy().tobytes() for name, value in results[0].weights.items()
        }
        assert [epoch[:5] for epoch in trained.epochs] == [epoch[:5] for epoch in results[0].epochs]
        assert all(reading.grad_rel_err < 1e-5 for reading in trained.readings)


@pytest.mark.parametrize("choice", [{}, {"reduction": "sum"}, {"updater": "scratch"}, {"tail": "pad"}], ids=str)
def test_training_takes_the_steps_of_one_process(world: Callable[[int], World], choice: dict[str, Any]) -> None:
    config = toy_config(virtual_ranks=12, batch_size=36, **choice)
    assert_one_process(world(3), config, 75)
