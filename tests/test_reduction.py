"""Reduction: each mode applies the gradient that its equation says, right or wrong by exactly the predicted amount."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from loop.config import Config
from loop.data import as_floats, epoch_order
from loop.effect import example_weights, sgd_divisor
from loop.nets import make_net
from loop.reduction import cell_backward, cell_loss, global_count
from tests.cases import flat_gradient, relative_distance, toy_config, toy_split, train_here
from tests.ranks import World

MODES = [("mean", "rank"), ("mean", "global"), ("sum", "rank"), ("sum", "global")]


def per_example_gradients(config: Config, examples: int) -> Tensor:
    """The gradient of each example's loss at the initial weights, in the first epoch's order: (N, parameters)."""
    torch.manual_seed(config.seed)
    net = make_net(config.net).to(torch.float64)
    split = toy_split(examples)
    rows = []
    for i in epoch_order(examples, config.seed, 0):
        net.zero_grad()
        F.cross_entropy(net(as_floats(split.images[i : i + 1], torch.float64)), split.labels[i : i + 1]).backward()
        rows.append(flat_gradient(net))
    return torch.stack(rows)


def cells_of(gradients: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The examples' gradients, cut into cells."""
    return list(gradients.split(list(sizes)))


def predicted(cells: list[Tensor], reduction: str, normalize: str) -> Tensor:
    """The table of loop/reduction.py, written out a second time, cell by cell."""
    n = sum(len(cell) for cell in cells)
    if normalize == "global":
        return sum(cell.sum(0) for cell in cells) / (n if reduction == "mean" else 1)
    share = [cell.sum(0) / max(len(cell), 1) if reduction == "mean" else cell.sum(0) for cell in cells]
    return sum(share) / len(cells)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tail", ["spread", "ragged", "pad"])
@pytest.mark.parametrize(("reduction", "normalize"), MODES)
def test_the_applied_gradient_is_the_predicted_one(
    world: Callable[[int], World], reduction: str, normalize: str, tail: str, world_size: int, accumulate: int
) -> None:
    examples = 17  # of a batch of 36: one short step, with idle ranks where cells are filled in order
    config = toy_config(
        reduction=reduction, normalize=normalize, tail=tail, batch_size=36, accumulate=accumulate, epochs=1
    )
    gradients = per_example_gradients(config, examples)
    if tail == "pad":
        gradients = gradients[torch.arange(36) % examples]
    cells = cells_of(gradients, config.shards(examples, world_size).steps[0].sizes)
    want = predicted(cells, reduction, normalize)
    exact = predicted(cells, reduction, "global")
    for ours in world(world_size).run(train_here, config, examples):
        applied = ours.gradients[0]
        assert (applied - want).norm() / want.norm() < 1e-12
        error = (applied - exact).norm() / exact.norm()
        uneven = len({len(cell) for cell in cells}) > 1
        if normalize == "rank" and reduction == "mean" and uneven:
            assert error > 1e-3, "the mean of means must be wrong, and this test able to see it"
        if normalize == "rank" and reduction == "sum":
            assert abs(error - (1 - 1 / (world_size * accumulate))) < 1e-12, "1/(WK) of the sum"


@pytest.mark.parametrize(("reduction", "normalize"), MODES)
def test_example_weights_are_those_of_the_equation(reduction: str, normalize: str) -> None:
    sizes = (4, 3, 0, 1)
    cells = cells_of(torch.eye(8, dtype=torch.float64), sizes)  # gradient i is the i-th unit vector: weights show bare
    weights = example_weights(reduction, normalize, sizes)
    by_example = [weight for weight, size in zip(weights, sizes, strict=True) for _ in range(size)]
    assert predicted(cells, reduction, normalize).tolist() == pytest.approx(by_example, rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scratch_replicas_drift_by_rank_and_not_globally(world: Callable[[int], World], reduction: str) -> None:
    def drift(normalize: str) -> float:
        config = toy_config(
            updater="scratch", reduction=reduction, normalize=normalize, tail="ragged", batch_size=16, lr=0.5
        )
        replicas = [ours.weights for ours in world(3).run(train_here, config, 67)]  # 67 = 4 x 16 + 3: cells 3, 0, 0
        return max(relative_distance(replica, replicas[0]) for replica in replicas)

    assert drift("global") == 0
    assert drift("rank") > 1e-3


def test_sgd_divisor_is_the_mode_table() -> None:
    table = {mode: [sgd_divisor(*mode, n_last=n, n_global=7) for n in (3, 0)] for mode in MODES}
    assert table == {
        ("mean", "rank"): [1, 0],
        ("mean", "global"): [1, 1],
        ("sum", "rank"): [3, 0],
        ("sum", "global"): [7, 7],
    }


def test_a_count_that_is_an_integer_tensor_scales_in_float64() -> None:
    losses = torch.ones(1, dtype=torch.float64)
    for n in (3, 3.0, torch.tensor(3), torch.tensor(3, dtype=torch.int32), torch.tensor(3.0, dtype=torch.float64)):
        assert float(cell_loss(losses, n_global=n, averaged_over=2)) == pytest.approx(2 / 3, rel=1e-15)


def test_an_empty_cell_gives_zero_and_a_gradient() -> None:
    for reduction, normalize in MODES:
        weights = torch.ones(3, requires_grad=True)
        loss = cell_loss((weights * torch.ones(0, 3)).sum(1), n_global=0, averaged_over=2, reduction=reduction, normalize=normalize)  # fmt: skip  # noqa: E501
        loss.backward()
        assert float(loss.detach()) == 0
        assert weights.grad.tolist() == [0, 0, 0]


# --- losses whose count no sampler knows -----------------------------------------------------------------------------

TOKENS, CLASSES, IGNORED = 12, 5, -100


class Reshaping(nn.Module):
    """A linear net that flattens as many nets do. Takes (B, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(len(x), -1))


def gradient_of_the_last_share(stand_in: str) -> Tensor:
    """The gradient on two ranks, of which the second has no example and brings a stand-in for one."""
    torch.manual_seed(0)
    net = DistributedDataParallel(Reshaping())
    has_examples = torch.distributed.get_rank() == 0
    x, y = torch.arange(12, dtype=torch.float64).view(3, 2, 2), torch.tensor([0, 1, 2])
    if not has_examples:
        x, y = x[:1], y[:1]
    if not has_examples and stand_in == "masked labels":
        y = torch.full_like(y, -100)
    n = global_count(len(x) if has_examples else 0, "cpu")
    losses = F.cross_entropy(net(x), y, ignore_index=-100, reduction="none")
    if not has_examples and stand_in == "losses times 0":
        losses = losses * 0
    cell_backward(losses, n_global=n, averaged_over=2)
    return flat_gradient(net)


@pytest.mark.parametrize("stand_in", ["masked labels", "losses times 0"])
def test_a_rank_without_examples_takes_part_with_one_that_counts_nothing(
    world: Callable[[int], World], stand_in: str
) -> None:
    torch.manual_seed(0)
    net = Reshaping()
    F.cross_entropy(net(torch.arange(12, dtype=torch.float64).view(3, 2, 2)), torch.tensor([0, 1, 2])).backward()
    want = flat_gradient(net)
    for gradient in world(2).run(gradient_of_the_last_share, stand_in):
        assert (gradient - want).norm() < 1e-14 * want.norm()
    with pytest.raises(RuntimeError, match="reshape tensor of 0 elements"):
        net(torch.empty(0, 2, 2, dtype=torch.float64))


def sequences(rank: int, accumulate: int, empty: bool) -> list[tuple[Tensor, Tensor]]:
    """A rank's micro-batches of token features and labels, a random share of the labels ignored."""
    generator = torch.Generator().manual_seed(100 + rank)
    batches = []
    for k in range(accumulate):
        x = torch.randn(3, TOKENS, 4, dtype=torch.float64, generator=generator)
        y = torch.randint(CLASSES, (3, TOKENS), generator=generator)
        ignored = torch.rand(3, TOKENS, generator=generator) < (1.0 if empty else 0.2 + 0.25 * rank + 0.1 * k)
        batches.append((x, y.masked_fill(ignored, IGNORED)))
    return batches


def token_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, CLASSES).to(torch.float64)


def token_losses(net: nn.Module, x: Tensor, y: Tensor, class_weights: Tensor | None) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten(), class_weights, ignore_index=IGNORED, reduction="none")


def token_weights(y: Tensor, class_weights: Tensor | None) -> Tensor:
    kept = y[y != IGNORED]
    return torch.tensor(float(len(kept))) if class_weights is None else class_weights[kept].sum()


def masked_gradient(accumulate: int, class_weights: Tensor | None, through: str, idle_rank: int) -> Tensor:
    """The gradient of one step over all ranks' tokens, each loop written as a user would."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    world_size, rank = accelerator.num_processes, accelerator.process_index
    batches = sequences(rank, accumulate, empty=rank == idle_rank)
    n = global_count(sum(token_weights(y, class_weights) for _, y in batches), "cpu")
    if through == "accelerate":
        net = accelerator.prepare(token_model())
        for x, y in batches:
            with accelerator.accumulate(net):
                losses = token_losses(net, x, y, class_weights)
                accelerator.backward(cell_loss(losses, n_global=n, averaged_over=world_size * accumulate))
    else:
        net = token_model()
        net = DistributedDataParallel(net) if world_size > 1 else net
        for x, y in batches:
            cell_loss(token_losses(net, x, y, class_weights), n_global=n, averaged_over=world_size).backward()
    return flat_gradient(net)


@pytest.mark.parametrize("through", ["accelerate", "torch.distributed"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("idle_rank", [-1, 0])
def test_masked_losses_are_exact_over_ranks_and_micro_batches(
    world: Callable[[int], World], world_size: int, accumulate: int, weighted: bool, through: str, idle_rank: int
) -> None:
    class_weights = torch.tensor([0.1, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64) if weighted else None
    everything = [b for rank in range(world_size) for b in sequences(rank, accumulate, empty=rank == idle_rank)]
    x, y = torch.cat([x for x, _ in everything]), torch.cat([y for _, y in everything])
    net = token_model()
    if (y != IGNORED).any():
        F.cross_entropy(net(x).flatten(0, 1), y.flatten(), class_weights, ignore_index=IGNORED).backward()
        want = flat_gradient(net)
    else:
        want = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64)  # torch's mean would be NaN
    for got in world(world_size).run(masked_gradient, accumulate, class_weights, through, idle_rank):
        assert (got - want).norm() <= 1e-12 * want.norm()


def counted(local: Any) -> Tensor:
    return global_count(local, "cpu")


def test_global_count_sums_over_ranks_and_leaves_the_callers_tensor(world: Callable[[int], World]) -> None:
    local = torch.tensor(2.5)
    assert [float(n) for n in world(3).run(counted, local)] == [7.5] * 3
    assert [int(n) for n in world(2).run(counted, 2**40 + 1)] == [2**41 + 2] * 2
    assert float(counted(local)) == float(local) == 2.5


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize(("reduction", "normalize"), MODES)
def test_a_cell_handed_in_is_the_cells_loss_back_propagated(reduction: str, normalize: str, size: int) -> None:
    """By hand: 12 examples on 4 cells, this one of `size`; the loss of example i is w i, and its gradient i."""
    scale = {
        ("mean", "rank"): 1 / 3, ("mean", "global"): 4 / 12, ("sum", "rank"): 1, ("sum", "global"): 4,
    }[reduction, normalize]  # fmt: skip
    for n_global in (12, torch.tensor(12.0, dtype=torch.float64)):
        mode: Any = {"n_global": n_global, "averaged_over": 4, "reduction": reduction, "normalize": normalize}
        weights = [torch.ones((), requires_grad=True) for _ in range(2)]
        losses = [weight * torch.arange(size, dtype=torch.float32) for weight in weights]
        cell_loss(losses[0], **mode).backward()
        cell_backward(losses[1], **mode)
        assert [float(w.grad) for w in weights] == pytest.approx([scale * sum(range(size))] * 2, rel=1e-6)
