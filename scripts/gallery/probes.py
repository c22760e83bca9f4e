"""What the gallery's figures measure: in runs read back, and in this process, on the book's loop and real data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

from loop.book import BookUpdater, evaluate, train_epoch_ch3
from loop.config import Config, parse
from loop.data import EvalBatches, Split, TrainBatches, as_floats, epoch_order, load
from loop.effect import effect
from loop.nets import make_net
from loop.reduction import Normalize, Reduction, cell_loss
from loop.run.fetch import ensure_dataset
from loop.shards import Shards, Tail
from scripts.runs import Run, read_config
from scripts.runs import distance as between_folders

Runs = Mapping[str, Sequence[Run]]
BATCH, LR = Config().batch_size, Config().learning_rate
CLASSES = 10
TAIL = 60_000 % BATCH  # the book's last batch: 96 examples


class DoesNotHoldError(RuntimeError):
    """The runs do not show what the figure is there to show."""


def require(holds: bool, measured: str) -> None:
    """Raise DoesNotHoldError, with what was measured, unless the finding holds."""
    if not holds:
        raise DoesNotHoldError(measured)


# ---- runs, read back


def pick(runs: Iterable[Run], **config: object) -> Run:
    """Return the one run whose config has these values."""
    found = [run for run in runs if all(run.config[key] == str(value) for key, value in config.items())]
    require(len(found) == 1, f"{len(found)} runs with {config}, not one")
    return found[0]


def flags_of(run: Run) -> Config:
    """Return the configuration that a run was started with."""
    return parse(read_config(run.folder)["argv"][1:])


def last(run: Run, key: str) -> float:
    """Return the last value of a column."""
    return run.curves[key][-1][1]


def over(run: Run, axis: str, key: str) -> tuple[list[float], list[float]]:
    """Return a column over another: ([epochs or steps], [values])."""
    positions = dict(run.curves[axis])
    return [positions[examples] for examples, _ in run.curves[key]], [value for _, value in run.curves[key]]


def distance(run: Run, reference: Run) -> float:
    """Return |a - b| / |b| of two runs' final parameters."""
    return between_folders(run.folder, reference.folder)


def widest_gap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest difference of two equally long curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# ---- the data and the nets, in this process


@cache
def data() -> tuple[Split, Split]:
    """Return Fashion-MNIST's two halves, fetched if need be: a figure without runs has none to have fetched them."""
    ensure_dataset(Config(), fetching=True)
    return load(Config())


def first_examples(n: int) -> tuple[Tensor, Tensor]:
    """Return the first n training examples as (X, y)."""
    train, _ = data()
    return as_floats(train.images[:n], torch.float32), train.labels[:n]


def fresh(name: Any) -> nn.Sequential:
    """Return a net with the weights that seed 0 gives it."""
    torch.manual_seed(0)
    return make_net(name)


def net_of(run: Run) -> nn.Sequential:
    """Return a run's net, trained."""
    net = fresh(run.config["net"])
    net.load_state_dict(load_file(run.folder / "model.safetensors"))
    return net


def gradient(net: nn.Module, scalar: Tensor) -> Tensor:
    """Return the scalar's gradient in one vector."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(scalar, list(net.parameters()))])


def applied_weights(reduction: Reduction, normalize: Normalize, losses: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return what each example weighs in the step: the derivative of what the cells back-propagate, averaged."""
    losses = losses.detach().requires_grad_()
    for cell in losses.split(list(sizes)):
        cell_loss(
            cell, n_global=len(losses), averaged_over=len(sizes), reduction=reduction, normalize=normalize
        ).backward()
    assert losses.grad is not None
    return losses.grad / len(sizes)


class NeverZeroed(BookUpdater):
    """The book's updater with the line forgotten that zeroes the gradient."""

    def backward(self, l: Tensor) -> None:
        """Add to the gradient that is there."""
        l.mean().backward()


def book_losses(kind: Callable[[torch.optim.Optimizer], BookUpdater], batches: Iterable[Any]) -> list[float]:
    """Return each step's loss of an epoch of the book's loop: softmax regression, a torch optimiser, the mean."""
    net, losses = fresh("softmax"), list[float]()

    def keep(logits: Tensor, y: Tensor) -> Tensor:
        losses.append(float(loss := F.cross_entropy(logits, y)))
        return loss

    train_epoch_ch3(net, batches, keep, kind(torch.optim.SGD(net.parameters(), LR)))
    return losses


def accelerate_losses(accelerator: Accelerator, accumulate: int, zero_first: bool) -> list[float]:
    """Return this rank's loss of each step of an epoch under `accumulate()`.

    zero_first: zero where the book does, before every backward, instead of after the step.
    """
    train, _ = data()
    shards = Shards(len(train.labels) // BATCH * BATCH, BATCH, accelerator.num_processes, accumulate)
    net = fresh("softmax")
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), LR))
    losses = []
    for X, y, _ in TrainBatches(train, shards, rank=accelerator.process_index):
        with accelerator.accumulate(net):
            if zero_first:
                optimizer.zero_grad()
            l = F.cross_entropy(net(X), y)
            accelerator.backward(l)
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()
        losses.append(float(l.detach()))
    return [sum(losses[i : i + accumulate]) / accumulate for i in range(0, len(losses), accumulate)]


def both_zeroings(accumulate: int) -> list[list[float]]:
    """Return `accelerate_losses` with the zero after the step, and before each backward; to be called on every rank."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    return [accelerate_losses(accelerator, accumulate, zero_first) for zero_first in (False, True)]


def on_ranks(world_size: int, function: Callable[..., list[list[float]]], *args: object) -> list[list[float]]:
    """Call a function on every rank of a new group, as torchrun would; return the mean of its curves over the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the new processes
    settings = LaunchConfig(1, 1, world_size, run_id="gallery", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    results = elastic_launch(settings, function)(*args).values()
    return torch.tensor(list(results)).mean(dim=0).tolist()


def in_nats(gap: float) -> str:
    """Return in words how closely losses agree."""
    return f"to {gap:.0e} nats" if gap else "bit for bit"


def percent(value: float) -> str:
    """Return percents to two digits, as all captions have them."""
    return f"{value:.2g} %" if value < 99.5 else f"{value:.0f} %"


def effect_of_tail(world_size: int, n: int = TAIL, tail: Tail = "ragged", **mode: Any) -> Any:
    """Return `scripts.explain`'s effect of a plain loop's mean on a last batch of n."""
    config = replace(Config(normalize="rank", tail=tail), **mode)
    return effect(config, config.shards(BATCH + n, world_size).steps[-1].sizes, world_size)


def effect_cells(world_size: int, accumulate: int) -> int:
    """Return how many cells of the ragged last batch hold examples."""
    sizes = Config(tail="ragged", accumulate=accumulate).shards(BATCH + TAIL, world_size).steps[-1].sizes
    return sum(size > 0 for size in sizes)


def shrunken(net: nn.Sequential, factor: float) -> tuple[float, float]:
    """Return (test loss, test accuracy) of a net whose parameters were all multiplied."""
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(factor)
    return evaluate(net, EvalBatches(data()[1]), nn.CrossEntropyLoss(reduction="none"))


def dead_units(net: nn.Sequential) -> float:
    """Return the share of the mlp's hidden units that are 0 for every test image."""
    hidden = net[:3](as_floats(data()[1].images, torch.float32))
    return float((hidden == 0).all(dim=0).double().mean())


def reported_losses(losses: Tensor, orders: int = 20) -> dict[str, list[float]]:
    """Return how far off (relative) each way of reporting a loss is, one figure an epoch's order.

    losses: one an example, of a net that stands still.
    """
    off: dict[str, list[float]] = {}
    for epoch in range(orders):
        mine = losses[epoch_order(len(losses), 0, epoch)]
        true = float(mine.double().mean())
        means = [(float(batch.mean()), len(batch)) for batch in mine.split(BATCH)]
        reports = {
            "sum of float(l) x len(y), over N": sum(mean * n for mean, n in means) / len(mine),
            "mean of the batches' means": sum(mean for mean, _ in means) / len(means),
        }
        for world_size in (2, 4, 8):
            shards = Shards(len(mine), BATCH, world_size, tail="ragged")
            of_ranks = [[mine[list(positions)] for _, positions in shards.of_rank(r)] for r in range(world_size)]
            reports[f"{world_size} ranks"] = sum(float(torch.cat(c).double().mean()) for c in of_ranks) / world_size
        for name, report in reports.items():
            off.setdefault(name, []).append(abs(report / true - 1))
    return off


def lost_in_float16(grad: Tensor, scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return, for each loss scale, the shares of the gradient's nonzero entries that become infinite, and 0."""
    entries = grad[grad != 0].double()
    halves = [(entries * scale).to(torch.float16) for scale in scales]
    return [float(h.isinf().double().mean()) for h in halves], [float((h == 0).double().mean()) for h in halves]
