"""The book's own calls on plain objects, the agreement of its two branches, and the counts of evaluation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from loop.animator import Animator
from loop.book import Accumulator, BookUpdater, accuracy, evaluate_accuracy, sgd, train_ch3, train_epoch_ch3
from loop.data import EvalBatches
from tests.cases import toy_split
from tests.ranks import World


def separable(examples: int, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """An easy set in an ordinary DataLoader: class c lights up block c of 20 features."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (examples,), generator=generator)
    x = torch.rand(examples, 200, generator=generator, dtype=torch.float64) / 4
    x += nn.functional.one_hot(y, 10).repeat_interleave(20, dim=1)
    return DataLoader(TensorDataset(x, y), batch_size)


def fresh_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(200, 10)).to(torch.float64)


@pytest.fixture
def train_iter() -> DataLoader[tuple[Tensor, ...]]:
    return separable(500, 64)  # 500 = 7 x 64 + 52: the last batch is short


@pytest.fixture(autouse=True)
def pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """pyplot without a display, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_train_ch3_as_the_concise_section_calls_it(
    train_iter: DataLoader[tuple[Tensor, ...]], tmp_path: Path, pyplot: ModuleType
) -> None:
    net = fresh_net()
    updater = torch.optim.SGD(net.parameters(), lr=0.5)
    train_ch3(net, train_iter, separable(100, 64), nn.CrossEntropyLoss(), 3, updater)
    assert evaluate_accuracy(net, separable(100, 64)) > 0.7
    (loss, *_) = pyplot.gca().lines
    assert loss.get_xdata().tolist() == [1, 2, 3], "pyplot's current figure has every epoch"
    assert not list(tmp_path.iterdir()), "no file is written unasked"


def test_train_ch3_as_the_scratch_section_calls_it(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    W = torch.zeros(200, 10, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(10, dtype=torch.float64, requires_grad=True)

    def net(X: Tensor) -> Tensor:
        return X @ W + b

    loss = nn.CrossEntropyLoss(reduction="none")
    train_ch3(net, train_iter, separable(100, 64), loss, 3, lambda batch_size: sgd([W, b], 0.5, batch_size))


def test_train_ch3_insists_on_the_books_thresholds(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    net = fresh_net()
    with pytest.raises(AssertionError, match=r"train loss < 0\.5"):
        train_ch3(net, train_iter, train_iter, nn.CrossEntropyLoss(), 1, torch.optim.SGD(net.parameters(), lr=1e-6))


def test_the_two_branches_take_the_same_steps(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    mean_net, sum_net = fresh_net(), fresh_net()
    optimizer = torch.optim.SGD(mean_net.parameters(), lr=0.1)
    scratch = partial(sgd, list(sum_net.parameters()), 0.1)
    for _ in range(2):
        by_mean = train_epoch_ch3(mean_net, train_iter, nn.CrossEntropyLoss(), optimizer)
        by_sum = train_epoch_ch3(sum_net, train_iter, nn.CrossEntropyLoss(reduction="none"), scratch)
        assert by_mean == pytest.approx(by_sum, rel=1e-12)
    for a, b in zip(mean_net.parameters(), sum_net.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


class Summed(nn.Module):
    """A loss of the reader's own, which names its reduction."""

    reduction = "sum"

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(y_hat, y, reduction="none").sum()


LOSSES: dict[str, tuple[Any, bool]] = {  # the loss, and whether an optimiser follows (else a function)
    "mean": (nn.CrossEntropyLoss(), True),
    "mean, function": (nn.CrossEntropyLoss(), False),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), True),
    "sum, function": (nn.CrossEntropyLoss(reduction="sum"), False),
    "per example": (nn.CrossEntropyLoss(reduction="none"), True),
    "per example, function": (nn.CrossEntropyLoss(reduction="none"), False),
    "own sum": (Summed(), True),
    "partial sum": (partial(cross_entropy, reduction="sum"), True),
    "plain mean": (cross_entropy, True),
    "plain sum, function": (lambda y_hat, y: cross_entropy(y_hat, y, reduction="sum"), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_weigh_every_example_of_a_short_batch_alike(
    train_iter: DataLoader[tuple[Tensor, ...]], name: str
) -> None:
    net, (loss, optimised) = fresh_net(), LOSSES[name]
    frozen = torch.optim.SGD(net.parameters(), lr=0) if optimised else partial(sgd, list(net.parameters()), 0)
    x, y = train_iter.dataset.tensors
    truth = float(cross_entropy(net(x), y).detach()), float((net(x).argmax(1) == y).double().mean())
    for updater in (frozen, BookUpdater(frozen)):
        assert train_epoch_ch3(net, train_iter, loss, updater) == pytest.approx(truth, rel=1e-12)


class KeepsTheLast(nn.Module):
    """A net that keeps a tensor between calls, and whose layer is made in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.LazyLinear(10), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y_hat = self.layer(x.float()) * (1 + self.last)
        self.last = y_hat.detach().mean()
        return y_hat


@pytest.mark.parametrize("updater", ["optimiser", "function"])
def test_a_net_that_was_evaluated_first_trains(train_iter: DataLoader[tuple[Tensor, ...]], updater: str) -> None:
    net = KeepsTheLast()
    evaluate_accuracy(net, train_iter)
    before = net.layer.weight.detach().clone()
    optimised = torch.optim.SGD(net.parameters(), lr=0.1)
    scratch = partial(sgd, list(net.parameters()), 0.1)
    loss = nn.CrossEntropyLoss(reduction="none")
    train_epoch_ch3(net, train_iter, loss, optimised if updater == "optimiser" else scratch)
    assert (net.layer.weight != before).any()


def test_train_ch3_takes_no_test_loss(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    """As the book: a loss of the reader's own may need a gradient, or have no answer to a label of the test set."""
    net, asked = fresh_net(), 0

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        l = cross_entropy(y_hat, y, reduction="none")
        (slope,) = torch.autograd.grad(l.sum(), y_hat, create_graph=True)
        return l + 0 * slope.square().sum(1)

    x, y = separable(100, 64).dataset.tensors
    test_iter = DataLoader(TensorDataset(x, torch.cat([torch.tensor([10]), y[1:]])), 64)
    train_ch3(net, train_iter, test_iter, loss, 3, torch.optim.SGD(net.parameters(), lr=0.5))
    assert asked == 3 * 8


def test_an_optimiser_needs_no_batch_size(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    net = fresh_net()
    pairs = [((x, x), y) for x, y in train_iter]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    train_epoch_ch3(lambda X: net(X[0] + X[1]), pairs, nn.CrossEntropyLoss(), optimiser)
    with pytest.raises(AttributeError, match="shape"):
        train_epoch_ch3(lambda X: net(X[0] + X[1]), pairs, nn.CrossEntropyLoss(), partial(sgd, net.parameters(), 0.5))


def test_the_last_steps_gradient_is_there_until_the_next_backward(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    net, seen = fresh_net(), []

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        seen.append(net[1].weight.grad is not None)
        return cross_entropy(y_hat, y)

    train_epoch_ch3(net, train_iter, loss, torch.optim.SGD(net.parameters(), lr=0.5))
    assert seen == [False] + [True] * 7


def test_accuracy_counts_and_takes_logits_or_classes() -> None:
    y = torch.tensor([0, 2, 1])
    assert accuracy(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]), y) == 2
    assert accuracy(torch.tensor([0, 2, 2]), y) == 2
    assert type(accuracy(y, y)) is float


def test_accuracy_compares_in_the_labels_type() -> None:
    assert accuracy(torch.tensor([0.0, 2.7, 1.2]), torch.tensor([0, 2, 0])) == 2, "2.7 is class 2"
    assert accuracy(torch.tensor([[0.1, 0.9]] * 300), torch.ones(300, dtype=torch.uint8)) == 300


def test_sgd_divides_by_the_batch_size_and_zeroes_the_gradient() -> None:
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    (param * torch.tensor([4.0, 8.0])).sum().backward()
    sgd([param], lr=0.5, batch_size=4)
    assert param.tolist() == [0.5, 1.0]
    assert param.grad.tolist() == [0, 0]
    param.sum().backward()
    sgd([param], lr=0.5, batch_size=0)
    assert param.tolist() == [0.5, 1.0], "a rank with nothing makes no update"
    assert param.grad.tolist() == [0, 0]


def test_accumulator_adds_numbers_and_tensors_in_float64() -> None:
    metric = Accumulator(2)
    start = torch.tensor(2.0**25)
    metric.add(start, 1)
    metric.add(torch.tensor(1.0), 2)
    assert [metric[0], metric[1]] == [2.0**25 + 1, 3], "float32 would have lost the 1"
    assert float(start) == 2.0**25, "the caller's tensor is not the sum"
    metric.reset()
    assert metric[0] == 0


def test_accumulator_shows_floats() -> None:
    metric = Accumulator(3)
    for _ in range(2):
        metric.add(np.float16(60000), torch.tensor([0.5]), True, "a surplus value")
    assert metric.data == [120000.0, 1.0, 2.0], "float16 ends at 65504"
    assert {type(value) for value in metric.data} == {float}
    assert metric[1:] == [1.0, 2.0]
    before = metric.data
    metric.add(1)
    assert (before[0], [*metric]) == (120000.0, [120001.0, 1.0, 2.0])
    metric.data = [0.0, 0.0, 7.0]
    assert metric[-1] == 7


def test_sums_of_a_callers_inference_mode_go_on_outside_of_it() -> None:
    metric = Accumulator(1)
    with torch.inference_mode():
        metric.add(torch.tensor(2.0))
    metric.add(torch.tensor(3.0))
    metric.all_reduce(torch.device("cpu"))
    assert metric[0] == 5


class Counting(nn.Module):
    """A net that always answers class 3, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.largest = 0, 0
        self.weight = nn.Parameter(torch.zeros(1))  # DDP wants something to train

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        self.largest = max(self.largest, len(x))
        return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()


def evaluate_share(examples: int) -> tuple[float, int, int]:
    """Evaluate on this rank's share; return (share correct, examples asked here, largest batch)."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    counting = Counting()
    share = EvalBatches(toy_split(examples), rank=rank, world_size=world_size, batch_size=4)
    return evaluate_accuracy(DistributedDataParallel(counting), share), counting.asked, counting.largest


@pytest.mark.parametrize("examples", [2, 3, 30, 31])
@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_asks_every_example_once_whatever_the_ranks(
    world: Callable[[int], World], world_size: int, examples: int
) -> None:
    results = world(world_size).run(evaluate_share, examples)
    assert sum(asked for _, asked, _ in results) == examples
    assert max(largest for _, _, largest in results) <= 4, "in bounded memory"
    truth = float((toy_split(examples).labels == 3).double().mean())
    assert [share for share, _, _ in results] == pytest.approx([truth] * world_size, rel=1e-12)


def toy(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net of one seed, and images and labels for it."""
    split = toy_split(examples)
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double(), split.images.double() / 255, split.labels


def plain_batches(examples: int) -> tuple[float, float, float]:
    """Train at rate 0, and evaluate, a DDP net on plain batches: 16 examples on rank 0, the others on rank 1."""
    net, x, y = toy(examples)
    mine = slice(16) if torch.distributed.get_rank() == 0 else slice(16, None)
    batches = DataLoader(TensorDataset(x[mine], y[mine]), 8)
    replica = DistributedDataParallel(net)
    frozen = torch.optim.SGD(net.parameters(), lr=0)
    return *train_epoch_ch3(replica, batches, nn.CrossEntropyLoss(), frozen), evaluate_accuracy(replica, batches)


def test_figures_of_plain_batches_are_over_all_ranks(world: Callable[[int], World]) -> None:
    net, x, y = toy(27)
    loss, share = float(cross_entropy(net(x), y).detach()), float((net(x).argmax(1) == y).double().mean())
    for figures in world(2).run(plain_batches, 27):
        assert figures == pytest.approx((loss, share, share), rel=1e-12)


def test_animator_has_the_books_signature() -> None:
    book = "xlabel ylabel legend xlim ylim xscale yscale fmts nrows ncols figsize"  # d2l 3.6.5
    assert " ".join(inspect.signature(Animator).parameters) == f"{book} path"


def drawn(animator: Animator) -> list[tuple[list[float], list[float]]]:
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in animator.axes[0].lines]


@pytest.mark.parametrize("kind", [tuple, list, np.array, lambda v: torch.tensor(v, requires_grad=True)])
def test_animator_draws_what_was_added(kind: Callable[[Any], Any]) -> None:
    animator = Animator("epoch", legend=["a", "b"])
    animator.add(1, (0.5, None))
    animator.add(kind([2.0, 3.0]), kind([0.25, 0.75]))
    animator.add(kind([4.0, 5.0])[0], kind([0.25, 0.75])[1])
    assert drawn(animator) == [([1, 2, 4], [0.5, 0.25, 0.75]), ([3], [0.75])]
    assert (animator.X, animator.Y) == ([[1, 2, 4], [3]], [[0.5, 0.25, 0.75], [0.75]])


def test_animator_keeps_the_markers_of_its_formats() -> None:
    animator = Animator(fmts=("b^--", "ro", "-"))
    for points in (1, 2):
        animator.add(points, [1, 2, 3])
        lone = "." if points == 1 else "None"  # a line of one point would be invisible
        assert [line.get_marker() for line in animator.axes[0].lines] == ["^", "o", lone]
    assert [line.get_linestyle() for line in animator.axes[0].lines] == ["--", "None", "-"]


def test_animator_has_axes_for_pictures_of_the_readers_own(pyplot: ModuleType) -> None:
    """As the book's section on GANs uses it."""
    animator = Animator("epoch", "loss", None, [1, 5], None, "linear", "log", ("-", "r:"), 2, 1, (5, 5))
    animator.fig.subplots_adjust(hspace=0.3)
    animator.axes[1].imshow(np.eye(3))
    animator.add(1, [1.0, 0.1])
    assert pyplot.gcf() is animator.fig
    assert animator.fig.get_size_inches().tolist() == [5, 5]
    upper, lower = animator.axes
    assert (upper.get_xlim(), upper.get_yscale(), upper.get_ylabel()) == ((1, 5), "log", "loss")
    assert (len(upper.lines), len(lower.images)) == (2, 1)


def test_an_animators_path_is_written_without_pyplot(tmp_path: Path, pyplot: ModuleType) -> None:
    animator = Animator("epoch", path=tmp_path / "c.png")
    animator.add(1, 0.5)
    animator.add(2, 0.4)
    animator.save()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
    assert not pyplot.get_fignums()
    with pytest.raises(ValueError, match=r"plt\.savefig"):
        Animator("epoch").save()


@pytest.mark.parametrize(("kernel", "pictures"), [("Jupyter", 2), ("Colab", 2), ("terminal", 0)])
def test_animator_shows_a_picture_in_a_notebook(kernel: str, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernel is in tests/test_notebook.py."""
    jupyter = type("ZMQInteractiveShell", (), {})
    shells = {
        "Jupyter": jupyter,
        "Colab": type("Shell", (jupyter,), {}),
        "terminal": type("TerminalInteractiveShell", (), {}),
    }
    shown: list[bytes] = []
    shell = shells[kernel]()
    display = SimpleNamespace(display=shown.append, Image=bytes, clear_output=lambda wait: None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))
    animator = Animator("epoch")
    animator.add(1, 0.5)
    animator.add(2, 0.4)
    assert [picture[:4] for picture in shown] == [b"\x89PNG"] * pictures
