"""The training loop of Dive into Deep Learning, chapter 3, by its own names, on plain objects and data-parallel.

On plain objects it is the book's loop (d2l up to 0.17.6, sections 3.6 and 3.7):

    train_ch3(net, train_iter, test_iter, nn.CrossEntropyLoss(), 10, torch.optim.SGD(net.parameters(), lr=0.1))
    train_ch3(net, train_iter, test_iter, nn.CrossEntropyLoss(reduction="none"), 10,
              lambda batch_size: sgd(net.parameters(), 0.1, batch_size))

Data-parallel it is the same loop over this rank's cells: `train_iter` yields (X, y, cell) in place of (X, y), the
updater is a `CellUpdater` (loop/updater.py), which knows what to make of the cell, and `loss` is per example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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
    """n running sums (d2l 3.6.5) of numbers or one-element tensors, read as floats.

    Adding never waits for the device: tensors are added up there, in its widest float, until a sum is read.
    """

    def __init__(self, n: int) -> None:
        self.kept: list[Any] = [0.0] * n  # floats, and tensors that nobody has read yet

    def add(self, *args: float | Tensor) -> None:
        """Add one value to each sum; surplus values are ignored, as in the book."""
        added = [a + _widened(b) for a, b in zip(self.kept, args, strict=False)]
        self.kept = added + self.kept[len(added) :]

    def reset(self) -> None:
        """Set every sum to 0."""
        self.data = [0.0] * len(self.kept)

    @property
    def data(self) -> list[float]:
        """The sums, as the book keeps them."""
        self.kept = [float(value) for value in self.kept]
        return self.kept

    @data.setter
    def data(self, sums: Sequence[float]) -> None:
        self.kept = list(sums)

    def all_reduce(self, device: torch.device) -> None:
        """Replace each sum by its sum over all ranks: one collective, in which every rank must take part.

        device: the net's. It cannot be told from the sums: those of no batch are plain zeros.
        """
        self.kept = list(global_count(self.on(device), device))

    def on(self, device: torch.device) -> Tensor:
        """Return the sums on the device, without waiting for it."""
        sums = [
            v if isinstance(v, Tensor) else torch.full((), v, dtype=widest(device), device=device) for v in self.kept
        ]
        return torch.stack(sums)

    @property
    def shares(self) -> list[list[float]]:
        """The sums of each share of the examples that is added up by itself: here of one share, all there are."""
        return [self.data]

    def __getitem__(self, i: Any) -> Any:
        return self.data[i]


def accuracy(y_hat: Tensor, y: Tensor) -> float:
    """Return the *number* of correct predictions (d2l 3.6.4). y_hat: logits (B, C) or classes (B,). y: (B,)."""
    return float(correct(y_hat, y))


def correct(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return `accuracy`'s number as a scalar tensor, without waiting for the device."""
    if y_hat.dim() > 1 and y_hat.shape[1] > 1:
        y_hat = y_hat.argmax(dim=1)
    return (y_hat.to(y.dtype) == y).sum()


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


class Observer(Protocol):
    """Is told of each batch and each epoch of a training."""

    def after_cell(self, *cell_and_sums: Any) -> None:
        """Note a batch: (cell, loss sum, correct, examples), without the cell where the batch came without."""

    def after_epoch(self, epoch: Epoch) -> None:
        """Note an epoch, trained and tested."""


class BookUpdater:
    """The book's two kinds of updater: an optimiser takes the mean's gradient, a function the sum's and the count."""

    def __init__(self, updater: torch.optim.Optimizer | Callable[[int], Any]) -> None:
        self.updater, self.takes_mean = updater, isinstance(updater, torch.optim.Optimizer)

    def begin(self, X: Tensor, y: Tensor) -> None:
        """Do nothing: the book zeroes the gradient after the forward pass and the loss, which may read it."""

    def backward(self, l: Tensor) -> None:
        """Back-propagate the mean for an optimiser, whose gradient is zeroed, and the sum for a function."""
        if isinstance(self.updater, torch.optim.Optimizer):
            self.updater.zero_grad()
            l.mean().backward()
        else:
            l.sum().backward()

    def step(self, X: Tensor) -> None:
        """Update; a function is handed the batch size, to divide by."""
        if isinstance(self.updater, torch.optim.Optimizer):
            self.updater.step()
        else:
            self.updater(X.shape[0])


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

    A scalar loss is taken for the mean or the sum that the loss's `reduction` names; of a function without one, for a
    mean with an optimiser and a sum with an updater function. The loss per example is d2l 0.16's, which multiplies a
    mean by `len(y)`; d2l 0.17.6 does not, and reports a mean loss too small by the batch size.

    updater: a torch optimiser, a function of the batch size, or what has the verbs of a `BookUpdater`.
    metric: the sums of loss, correct predictions and examples to go on from, in an epoch that was begun before.
    """
    if isinstance(net, nn.Module):
        net.train()
    updater = updater if hasattr(updater, "begin") else BookUpdater(updater)
    mean = getattr(updater, "takes_mean", True)
    metric = metric or Accumulator(3)  # loss sum, correct predictions, examples
    for X, y, *cell in train_iter:
        updater.begin(X, y, *cell)
        y_hat = net(X)
        l = loss(y_hat, y)
        updater.backward(l)
        updater.step(X)
        sums = _loss_sum(l, y, loss, mean), correct(y_hat, y), y.numel()
        metric.add(*sums)
        for observer in observers:
            observer.after_cell(*cell, *sums)
    if isinstance(net, DistributedDataParallel):
        metric.all_reduce(next(net.parameters()).device)
    return metric[0] / metric[2], metric[1] / metric[2]


def evaluate(
    net: Net, data_iter: Batches, loss: Loss | None = None, metric: Accumulator | None = None
) -> tuple[float, float]:
    """Return (loss per example, share correct) over all of data_iter; with a DDP net, of every rank's data_iter.

    Sums over examples, not means over batches, so shares of unequal size weigh as they should. Without a loss, the
    loss per example is NaN. metric: the sums to add to.
    """
    if isinstance(net, nn.Module):
        net.eval()
    module = net.module if isinstance(net, DistributedDataParallel) else net
    metric = metric or Accumulator(3)
    with torch.no_grad():  # under inference_mode, what the net creates or keeps here could never be trained
        for X, y in data_iter:
            y_hat = module(X)
            metric.add(_loss_sum(loss(y_hat, y), y, loss) if loss else math.nan, correct(y_hat, y), y.numel())
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
    figure that does not. The test loss is computed for observers only.
    """
    if progress is None:
        animator = Animator(xlabel="epoch", xlim=(1, max(num_epochs, 2)), legend=CURVES)
        first, metric, test_metric = 1, None, None
    else:
        first, metric, test_metric = progress.epoch, progress.sums, progress.test_sums
        observers = (progress, *observers)
    for number in range(first, num_epochs + 1):
        started = time.perf_counter()
        train_loss, train_acc = train_epoch_ch3(net, train_iter, loss, updater, metric, observers)
        seconds = time.perf_counter() - started
        tested = evaluate(net, test_iter, loss if observers else None, test_metric)
        epoch = Epoch(number, train_loss, train_acc, *tested, seconds)
        for observer in observers:
            observer.after_epoch(epoch)
        if progress is None:
            animator.add(number, (train_loss, train_acc, epoch.test_acc))
    if progress is None:
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


def _loss_sum(l: Tensor, y: Tensor, loss: Loss, mean: bool = True) -> Tensor | float:
    """Return the sum of a batch's losses, of one loss an example or recovered from their mean (`float(l) * len(y)`).

    mean: whether a scalar is a mean where the loss names no reduction.
    """
    if l.dim():
        return l.detach().sum(dtype=widest(l.device))
    named = loss.keywords.get("reduction") if isinstance(loss, partial) else getattr(loss, "reduction", None)
    mean = {"mean": True, "batchmean": True, "sum": False}.get(str(named), mean)
    loss_sum: Tensor | float = _widened(l) * (len(y) if mean else 1)
    return loss_sum


def _widened(value: Any) -> Any:
    """Return a number as a float, a tensor of one element as a scalar of the device's widest float."""
    if isinstance(value, Tensor):
        value = value.detach().to(widest(value.device))
        return value.reshape(()) if value.dim() else value
    return float(value)


def widest(device: torch.device) -> torch.dtype:
    """Return the device's widest float: float64, but on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
