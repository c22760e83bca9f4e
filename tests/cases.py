"""What the ranks of a test run, and the plain loops of one process that they are held against.

The oracles use nothing of `loop` but the order of examples and the nets: plain torch, to be read and believed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from loop.audit import Reading
from loop.book import Epoch, train_ch3
from loop.config import Config
from loop.data import EvalBatches, Split, TrainBatches, as_floats, epoch_order
from loop.nets import make_net
from loop.progress import make_progress
from loop.updater import Audited, make_updater
from tests.ranks import World

TEST_EXAMPLES = 37
Weights = dict[str, Tensor]


def toy_split(examples: int, seed: int = 0) -> Split:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (examples, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(10, (examples,), generator=generator))


@dataclass
class Trained:
    """What a training leaves: weights, one Epoch an epoch, and the gradient of each step as it was applied."""

    weights: Weights
    epochs: list[Epoch]
    gradients: list[Tensor]
    readings: list[Reading]


def train_here(config: Config, examples: int) -> Trained:
    """Train on this rank's cells of the toy set, as train.py does, auditing all or none; call it on every rank."""
    AcceleratorState._reset_state()  # of an earlier test's precision; the group of ranks stays
    accelerator = Accelerator(
        cpu=True, mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulate
    )
    rank, world_size, dtype = accelerator.process_index, accelerator.num_processes, getattr(torch, config.dtype)
    torch.manual_seed(config.seed)
    net = accelerator.prepare(make_net(config.net).to(dtype))
    shards = config.shards(examples, world_size)
    loss = nn.CrossEntropyLoss(reduction="none")
    progress = make_progress(config, rank, world_size)
    train_iter = TrainBatches(toy_split(examples)._replace(dtype=dtype), shards, rank, config.seed, progress)
    test_set = toy_split(TEST_EXAMPLES, 1)._replace(dtype=dtype)
    test_iter = EvalBatches(test_set, rank, world_size, batch_size=5, virtual_ranks=config.virtual_ranks)
    gradients: list[Tensor] = []
    epochs: list[Epoch] = []
    updater = make_updater(accelerator, net, config, progress)
    apply = updater.apply

    def keep_gradient(divisor: int) -> None:
        gradients.append(flat_gradient(net))
        apply(divisor)

    updater.apply = keep_gradient
    audited = Audited(updater, loss) if config.audit_every else None
    keep_epochs = SimpleNamespace(after_cell=lambda *_: None, after_epoch=epochs.append)
    how = {"progress": progress, "observers": [keep_epochs]}
    train_ch3(net, train_iter, test_iter, loss, config.epochs, audited or updater, **how)
    readings = audited.audit.collect() if audited else []
    AcceleratorState._reset_state()
    return Trained(accelerator.unwrap_model(net).state_dict(), epochs, gradients, readings)


def flat_weights(net: nn.Module) -> Tensor:
    """All parameters in one vector, a copy."""
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def flat_gradient(net: nn.Module) -> Tensor:
    """The gradient of all parameters in one vector, a copy."""
    return torch.cat([param.grad.flatten() for param in net.parameters()]).clone()


def train_plainly(config: Config, examples: int) -> Trained:
    """One process, whole batches, no cells: what every rank's weights must be under `global`."""
    train, test = toy_split(examples), toy_split(TEST_EXAMPLES, 1)
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(config.seed)
    net = make_net(config.net).to(dtype)
    optimizer = {
        "sgd": lambda: torch.optim.SGD(net.parameters(), lr=config.learning_rate, momentum=config.momentum),
        "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay),
    }[config.optimizer]()
    epochs, gradients = [], []
    for epoch in range(config.epochs):
        loss_sum, correct, count = torch.zeros((), dtype=torch.float64), 0, 0
        for batch in plain_batches(config, examples, epoch):
            x, y = as_floats(train.images[batch], dtype), train.labels[batch]
            logits = net(x)
            losses = F.cross_entropy(logits, y, reduction="none")
            scratch_or_mean = config.reduction == "mean" or config.updater == "scratch"
            optimizer.zero_grad()
            (losses.mean() if scratch_or_mean else losses.sum()).backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            gradients.append(flat_gradient(net))
            optimizer.step()
            loss_sum += losses.detach().sum(dtype=torch.float64)
            correct += int((logits.argmax(1) == y).sum())
            count += len(y)
        with torch.no_grad():
            logits = net(as_floats(test.images, dtype))
            test_loss = F.cross_entropy(logits, test.labels, reduction="none").double().mean()
            test_acc = (logits.argmax(1) == test.labels).double().mean()
        epochs.append(
            Epoch(epoch + 1, float(loss_sum) / count, correct / count, float(test_loss), float(test_acc), 0.0)
        )
    return Trained(net.state_dict(), epochs, gradients, [])


def plain_batches(config: Config, examples: int, epoch: int) -> list[Tensor]:
    """The epoch's batches of example numbers: the incomplete one whole, dropped, or filled up from the start."""
    order = epoch_order(examples, config.seed, epoch)
    batches = list(order.split(config.batch_size))
    missing = config.batch_size - len(batches[-1])
    if missing and config.tail == "drop":
        batches.pop()
    if missing and config.tail == "pad":
        batches[-1] = torch.cat([batches[-1], order.repeat(1 + missing // examples)[:missing]])
    return batches


def relative_distance(a: Weights, b: Weights) -> float:
    """|a - b| / |b|, over all parameters together."""
    difference = sum(float(((a[name] - b[name]).double() ** 2).sum()) for name in b)
    return (difference / sum(float((b[name].double() ** 2).sum()) for name in b)) ** 0.5


def worst_metric_error(ours: list[Epoch], plain: list[Epoch]) -> float:
    """The largest relative difference of a loss or an accuracy over all epochs."""
    pairs = [(a, b) for x, y in zip(ours, plain, strict=True) for a, b in zip(x[1:5], y[1:5], strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-300) if a != b else 0.0 for a, b in pairs)


def assert_one_process(
    ranks: World, config: Config, examples: int, *, weights: float = 1e-12, figures: float = 1e-12
) -> None:
    """Every rank's weights and figures are, to these relative errors, those of one process."""
    plain = train_plainly(config, examples)
    for rank, ours in enumerate(ranks.run(train_here, config, examples)):
        case = f"N = {examples}, batch {config.batch_size}, rank {rank}"
        assert relative_distance(ours.weights, plain.weights) < weights, case
        assert worst_metric_error(ours.epochs, plain.epochs) < figures, case


def toy_config(**flags: Any) -> Config:
    """A float64 configuration of two epochs, with a sum's learning rate scaled down to stay stable."""
    config = Config(dtype="float64", epochs=2, lr=0.05)
    config = replace(config, **flags)
    if config.reduction == "sum" and config.updater == "torch" and config.optimizer == "sgd" and "lr" not in flags:
        config = replace(config, lr=0.05 / config.batch_size)
    return config
