"""The training loop of Dive into Deep Learning, chapter 3, by its own names, on plain objects and data-parallel.

On plain objects it is the book's loop (d2l up to 0.17.6, sections 3.6 and 3.7):

    train_ch3(net, train_iter, test_iter, nn.CrossEntropyLoss(), 10, torch.optim.SGD(net.parameters(), lr=0.1))
    train_ch3(net, train_iter, test_iter, nn.CrossEntropyLoss(reduction="none"), 10,
              lambda batch_size: sgd(net.parameters(), 0.1, batch_size))

Data-parallel it is the same loop over this rank's cells: `train_iter` yields (X, y, cell) in place of (X, y), the
updater is a `CellUpdater` (loop/updater.py), which knows what to make of the cell, and `loss` is per example.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loop.animator import Animator
from loop.reduction import global_count

if TYPE_CHECKING:
    from loop.progress import Progress

Net = nn.Module | Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[Any]  # of (X, y), or of (X, y, cell)


class Accumulator:
    """n running sums (d2l 3.6.5) of numbers or device tensors; adding never waits for the device."""

    def __init__(self, n: int) -> None:
        self.data: list[Any] = [0.0] * n

    def add(self, *args: float | Tensor) -> None:
        """Add one number, or scalar tensor, to each sum."""
        for i, value in enumerate(args):
            self.data[i] += value.detach().to(widest(value.device)) if isinstance(value, Tensor) else value

    def reset(self) -> None:
        """Set every sum to 0."""
        self.data = [0.0] * len(self.data)

    def all_reduce(self, device: torch.device) -> None:
        """Replace each sum by its sum over all ranks: one collective, in which every rank must take part.

        device: the net's. It cannot be told from the sums: those of no batch are plain zeros.
        """
        sums = [
            v if isinstance(v, Tensor) else torch.full((), v, dtype=widest(device), device=device) for v in self.data
        ]
        self.data = list(global_count(torch.stack(sums), device))

    def __getitem__(self, i: int) -> float:
        return float(self.data[i])


def accuracy(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the *number* of correct predictions, a scalar tensor. y_hat: logits (B, C) or classes (B,). y: (B,)."""
    if y_hat.dim() > 1 and y_hat.shape[1] > 1:
        y_hat = y_hat.argmax(dim=1)
    return (y_hat == y).sum()


def sgd(params: Iterable[Tensor], lr: float, batch_size: int) -> None:
    """Take the book's step for a *summed* loss, p <- p - lr grad / batch_size, and zero the gradient (d2l 3.2.6).

    A batch_size of 0, a rank's empty share, makes no update.
    """
    with torch.no_grad():
        for param in params:
            assert param.grad is not None, "sgd comes after backward"
            if batch_size:
                param -= lr * param.grad / batch_size
            param.grad.zero_()


class Updater(Protocol):
    """The three verbs of a step. `cell` comes with data-parallel batches only."""

    def begin(self, X: Tensor, y: Tensor, *cell: Any) -> None:
        """Prepare for the forward pass: zero the gradient where a step begins."""

    def backward(self, l: Tensor) -> None:
        """Back-propagate the loss, a scalar or one a loss per example."""

    def step(self, batch_size: int) -> None:
        """Update the parameters, where a step ends."""


class Observer(Protocol):
    """What follows a training: the loop calls it with all that it knows."""

    def after_cell(self, *cell_and_sums: Any) -> None:
        """Note a batch: (cell, loss sum, correct, examples), without the cell where the batch came without."""

    def after_epoch(self, epoch: Epoch) -> None:
        """Note an epoch, trained and tested."""


class BookUpdater:
    """The book's two kinds of updater: an optimiser takes the mean's gradient, a function the sum's and the count."""

    def __init__(self, updater: torch.optim.Optimizer | Callable[[int], Any]) -> None:
        self.updater = updater

    def begin(self, X: Tensor, y: Tensor) -> None:
        """Zero the optimiser's gradient; a function zeroes its own."""
        if isinstance(self.updater, torch.optim.Optimizer):
            self.updater.zero_grad()

    def backward(self, l: Tensor) -> None:
        """Back-propagate the mean for an optimiser, the sum for a function."""
        (l.mean() if isinstance(self.updater, torch.optim.Optimizer) else l.sum()).backward()

    def step(self, batch_size: int) -> None:
        """Update; a function is handed the batch size, to divide by."""
        if isinstance(self.updater, torch.optim.Optimizer):
            self.updater.step()
        else:
            self.updater(batch_size)


class Epoch(NamedTuple):
    """What an epoch came to, over all examples of all ranks. number: from 1. seconds: of training alone."""

    number: int
    train_loss: float
    train_acc: float
    test_loss: float
    test_acc: float
    seconds: float


def train_epoch_ch3(
    net: Net,
    train_iter: Batches,
    loss: Loss,
    updater: Any,
    metric: Accumulator | None = None,
    observers: Sequence[Observer] = (),
) -> tuple[float, float]:
    """Train for one epoch (d2l 3.6.5); return (loss per example, share correct), over all ranks.

    updater: a torch optimiser, a function of the batch size, or an `Updater`.
    metric: the sums of loss, correct predictions and examples to go on from, in an epoch that was begun before.
    """
    if isinstance(net, nn.Module):
        net.train()
    updater = updater if hasattr(updater, "backward") else BookUpdater(updater)
    metric = metric or Accumulator(3)  # loss sum, correct predictions, examples
    for X, y, *cell in train_iter:
        updater.begin(X, y, *cell)
        y_hat = net(X)
        l = loss(y_hat, y)
        updater.backward(l)
        updater.step(X.shape[0])
        sums = _loss_sum(l, y), accuracy(y_hat, y), y.numel()
        metric.add(*sums)
        for observer in observers:
            observer.after_cell(*cell, *sums)
    if isinstance(net, DistributedDataParallel):
        metric.all_reduce(next(net.parameters()).device)
    return metric[0] / metric[2], metric[1] / metric[2]


def evaluate(net: Net, data_iter: Batches, loss: Loss | None = None) -> tuple[float, float]:
    """Return (loss per example, share correct) over all of data_iter; with a DDP net, of every rank's data_iter.

    Sums over examples, not means over batches, so shares of unequal size weigh as they should.
    """
    if isinstance(net, nn.Module):
        net.eval()
    module = net.module if isinstance(net, DistributedDataParallel) else net
    metric = Accumulator(3)
    with torch.inference_mode():
        for X, y in data_iter:
            y_hat = module(X)
            metric.add(_loss_sum(loss(y_hat, y), y) if loss else 0.0, accuracy(y_hat, y), y.numel())
    if isinstance(net, DistributedDataParallel):
        metric.all_reduce(next(net.parameters()).device)
    return metric[0] / metric[2], metric[1] / metric[2]


def evaluate_accuracy(net: Net, data_iter: Batches) -> float:
    """Return the share of correct predictions (d2l 3.6.4)."""
    return evaluate(net, data_iter)[1]


def train_ch3(
    net: Net,
    train_iter: Batches,
    test_iter: Batches,
    loss: Loss,
    num_epochs: int,
    updater: Any,
    *,
    progress: Progress | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """Train for num_epochs epochs, each followed by a test (d2l 3.6.5).

    progress: where the training stands, and goes on from: the first observer. Without it this is the book's call: an
    Animator draws the curves, and the result must meet the book's thresholds, or AssertionError is raised with the
    figure that does not.
    """
    if progress is None:
        animator = Animator(xlabel="epoch", xlim=(1, max(num_epochs, 2)), legend=CURVES)
        first, metric = 1, None
    else:
        first, metric, observers = progress.epoch, progress.sums, (progress, *observers)
    for number in range(first, num_epochs + 1):
        started = time.perf_counter()
        train_loss, train_acc = train_epoch_ch3(net, train_iter, loss, updater, metric, observers)
        seconds = time.perf_counter() - started
        epoch = Epoch(number, train_loss, train_acc, *evaluate(net, test_iter, loss), seconds)
        for observer in observers:
            observer.after_epoch(epoch)
        if progress is None:
            animator.add(number, (train_loss, train_acc, epoch.test_acc))
    if progress is None:
        animator.save()
        unmet = unmet_thresholds(train_loss, train_acc, epoch.test_acc)
        assert not unmet, f"not met: {unmet}: {epoch}"


CURVES = ("train loss", "train acc", "test acc")


def unmet_thresholds(train_loss: float, train_acc: float, test_acc: float) -> list[str]:
    """Return which of the book's three demands on a finished training are not met."""
    demands = {
        "train loss < 0.5": train_loss < 0.5,
        "0.7 < train acc <= 1": 0.7 < train_acc <= 1,
        "0.7 < test acc <= 1": 0.7 < test_acc <= 1,
    }
    return [demand for demand, met in demands.items() if not met]


def _loss_sum(l: Tensor, y: Tensor) -> Tensor:
    """Return the sum of a batch's losses, of one loss an example or regained from their mean (`float(l) * len(y)`)."""
    return l.detach().sum(dtype=widest(l.device)) if l.dim() else l.detach() * len(y)


def widest(device: torch.device) -> torch.dtype:
    """Return the device's widest float: float64, but on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
