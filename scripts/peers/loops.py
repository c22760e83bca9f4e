"""The training loops that scripts/peers measures: each as its documentation says, on the same examples in one order.

The order of the epoch is fixed beforehand: `Task.dataset` is the data already permuted, and every loader reads it from
front to back. With b = 64 examples a rank and W ranks, all deal out the same full steps, positions sWb to (s+1)Wb:

- one process: batches of Wb, in order.
- DistributedSampler: rank r takes positions r, r + W, ..., so its b of step s are every W-th of those Wb.
- Accelerate: batch i of b examples goes to rank i mod W; with `split_batches` a batch of Wb is cut in W.
- Lightning would put in a DistributedSampler that shuffles, even for a loader that does not; as documented, it is
  given its own, unshuffled, and `use_distributed_sampler=False`.
- transformers' Trainer shuffles, clips to norm 1, and lowers the learning rate linearly unless told otherwise; it is
  told otherwise, and deals as Accelerate does.
- this project permutes by itself, by the same `epoch_order`.

What is left to differ is the epoch's last step: who gets which of its examples, and what the gradient is divided by.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate

from loop.book import sgd, train_epoch_ch3
from loop.config import Config
from loop.data import TrainBatches, as_floats, epoch_order, load
from loop.nets import make_net
from loop.updater import make_updater

BATCH_SIZE = 64  # examples a rank
LR = 0.1
ORPHANED_S = 120  # ranks whose parent is gone end at a collective that takes longer


class Task:
    """Softmax regression on the first N examples of Fashion-MNIST, in float64, for one epoch.

    net: freshly initialised, the same on every rank; a loop trains it in place. dataset: (X, y) in the epoch's order.
    """

    def __init__(self, examples: int, world_size: int, data_dir: Path) -> None:
        self.world_size = world_size
        self.config = Config(
            batch_size=BATCH_SIZE * world_size, lr=LR, dtype="float64", train_examples=examples, data_dir=data_dir
        )
        self.split, _ = load(self.config)
        order = epoch_order(examples, self.config.seed, epoch=0)
        self.dataset = TensorDataset(as_floats(self.split.images[order], torch.float64), self.split.labels[order])
        torch.manual_seed(self.config.seed)
        self.net = make_net(self.config.net).double()

    def sgd(self) -> torch.optim.Optimizer:
        """Return plain SGD over the net."""
        return torch.optim.SGD(self.net.parameters(), lr=LR)

    def strided(self) -> DataLoader[Any]:
        """Return this rank's loader, as DistributedSampler deals."""
        sampler: DistributedSampler[Any] = DistributedSampler(self.dataset, shuffle=False)
        return DataLoader(self.dataset, BATCH_SIZE, sampler=sampler)

    def weights(self) -> NDArray[np.float64]:
        """Return a copy of all parameters in one vector."""
        return torch.cat([param.detach().flatten() for param in self.net.parameters()]).numpy().copy()


Loop = Callable[[Task], None]


def train(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """Take the steps that every tutorial takes: by default the mean loss of a batch, back-propagated."""
    for X, y in batches:
        optimizer.zero_grad()
        backward(loss(net(X), y))
        optimizer.step()


def one_process(task: Task) -> None:
    """Train on whole batches: what all others are held against."""
    train(task.net, DataLoader(task.dataset, task.config.batch_size), task.sgd())


def ddp(task: Task) -> None:
    """Train as torch's DDP tutorial does: a DistributedSampler repeats examples until ranks have equally many."""
    train(DistributedDataParallel(task.net), task.strided(), task.sgd())


def prepare(task: Task, *, split: bool = False, even: bool = True) -> tuple[Accelerator, Any, Any, Any]:
    """Return what Accelerate makes of net, optimizer and loader."""
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=split, even_batches=even)
    )
    loader = DataLoader(task.dataset, task.config.batch_size if split else BATCH_SIZE)
    return accelerator, *accelerator.prepare(task.net, task.sgd(), loader)


def accelerate(task: Task, *, split: bool = False, even: bool = True, join: bool = False) -> None:
    """Train as Accelerate's quicktour does. join: in `join_uneven_inputs`, which has no effect on CPUs."""
    accelerator, net, optimizer, loader = prepare(task, split=split, even=even)
    with accelerator.join_uneven_inputs([net]) if join else nullcontext():
        train(net, loader, optimizer, accelerator.backward)


def accelerate_counting(task: Task) -> None:
    """Train as Accelerate's guide to batches of varying size does: a sum over the items counted on all ranks."""
    accelerator, net, optimizer, loader = prepare(task, even=False)

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        num_items_in_batch = int(accelerator.gather(torch.tensor(len(y))).sum())
        return F.cross_entropy(y_hat, y, reduction="sum") * int(accelerator.num_processes) / num_items_in_batch

    train(net, loader, optimizer, accelerator.backward, loss)


def torch_join(task: Task) -> None:
    """Train on Accelerate's uneven batches in torch's own Join, which lets a rank without a batch give zeros."""
    accelerator, net, optimizer, loader = prepare(task, even=False)
    with Join([net]):
        train(net, loader, optimizer, accelerator.backward)


def book(task: Task) -> None:
    """Train with the book's updater on Accelerate's uneven batches: each rank divides a sum by its own batch size."""
    accelerator, net, _, loader = prepare(task, even=False)
    for X, y in loader:
        accelerator.backward(F.cross_entropy(net(X), y, reduction="sum"))
        sgd(net.parameters(), LR, len(y))


def lightning(task: Task) -> None:
    """Train as Lightning's guide does."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.sgd()

    Trainer(
        accelerator="cpu", devices=task.world_size, strategy="ddp", max_epochs=1, use_distributed_sampler=False,
        barebones=True,
    ).fit(Module(), task.strided())  # fmt: skip


def transformers(task: Task, *, count_items: bool = False) -> None:
    """Train with transformers' Trainer.

    count_items: uneven batches, and a loss divided by `num_items_in_batch`, which the Trainer counts over all ranks.
    """
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net

        def forward(self, X: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(X)
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def loss_by_count(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1, learning_rate=LR, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0, train_sampling_strategy="sequential", use_cpu=True,
            accelerator_config={"even_batches": not count_items},
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Trainer(
            Model(), args, train_dataset=task.dataset,
            data_collator=lambda examples: dict(zip(("X", "labels"), default_collate(examples), strict=True)),
            compute_loss_func=loss_by_count if count_items else None,
        ).train()  # fmt: skip


def ours(task: Task, **flags: Any) -> None:
    """Train as train.py does, with these flags."""
    accelerator = Accelerator(cpu=True)
    config = replace(task.config, **flags)
    net = accelerator.prepare(task.net)
    batches = TrainBatches(
        task.split._replace(dtype=torch.float64),
        config.shards(len(task.dataset), task.world_size),
        accelerator.process_index,
        config.seed,
    )
    train_epoch_ch3(net, batches, nn.CrossEntropyLoss(reduction="none"), make_updater(accelerator, net, config))


class Peer(NamedTuple):
    """A row of the table. package: what must be installed, by its import name."""

    loop: Loop
    package: str = "torch"


OURS = "this project"
PEERS = {
    OURS: Peer(ours),
    f"{OURS}, ragged": Peer(partial(ours, tail="ragged")),
    f"{OURS}, book's sgd": Peer(partial(ours, reduction="sum", updater="scratch")),
    "DDP, DistributedSampler": Peer(ddp),
    "Lightning": Peer(lightning, "lightning"),
    "Accelerate": Peer(accelerate),
    "Accelerate, split": Peer(partial(accelerate, split=True)),
    "Accelerate, ragged": Peer(partial(accelerate, even=False)),
    "Accelerate, ragged, join": Peer(partial(accelerate, even=False, join=True)),
    "Accelerate, ragged, num_items": Peer(accelerate_counting),
    "torch's Join, ragged": Peer(torch_join),
    "book's sgd, ragged": Peer(book),
    "Trainer": Peer(transformers, "transformers"),
    "Trainer, ragged, num_items": Peer(partial(transformers, count_items=True), "transformers"),
}


class Trained(NamedTuple):
    """What a rank has in the end. seen: examples that went forward on it."""

    weights: NDArray[np.float64]
    seen: int


def train_rank(loop: Loop, examples: int, data_dir: Path = Path("data")) -> Trained:
    """Train on this rank of the process group."""
    task = Task(examples, dist.get_world_size(), data_dir)
    seen = 0

    def count(_: nn.Module, batch: tuple[Tensor]) -> None:
        nonlocal seen
        seen += len(batch[0])

    task.net.register_forward_pre_hook(count)
    loop(task)
    return Trained(task.weights(), seen)


def join() -> None:
    """Join the ranks' group. No rank leaves it, so one that still waits for another is seen to wait."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=ORPHANED_S))
