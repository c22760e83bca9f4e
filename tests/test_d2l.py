"""Programs written for the book's seven names, run with d2l 0.17.6's and with ours.

Weights, counts, curves and what is printed are equal, losses within 1e-6: d2l adds them in float32. Of a loss that
returns a mean the book's editions report different numbers, and the one expected is d2l 0.16's, `float(l) * len(y)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import loop.book

pytestmark = pytest.mark.slow

NAMES = ["Accumulator", "Animator", "accuracy", "evaluate_accuracy", "sgd", "train_ch3", "train_epoch_ch3"]
OURS = SimpleNamespace(**{name: getattr(loop.book, name) for name in NAMES})

Program = Callable[[Any], dict[str, Any]]
PROGRAMS: dict[str, Program] = {}


def program(run: Program) -> Program:
    """Enter a program: it takes the seven names and returns what it came to, losses under names that begin so."""
    PROGRAMS[run.__name__] = run
    return run


def batches(examples: int = 500, batch_size: int = 64, dtype: torch.dtype = torch.int64) -> Any:
    """An easy set, shuffled: class c lights up block c of 20 features. The last batch is short."""
    generator = torch.Generator().manual_seed(examples)
    y = torch.randint(10, (examples,), generator=generator)
    x = torch.rand(examples, 200, generator=generator) / 4 + F.one_hot(y, 10).repeat_interleave(20, dim=1)
    return DataLoader(TensorDataset(x, y.to(dtype)), batch_size, shuffle=True, generator=generator)


def softmax() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(200, 10))


def weights(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


class Meaned:
    """A loss that returns a mean, and keeps the sums that d2l 0.16 would report."""

    def __init__(self, mean: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> None:
        self.mean, self.total, self.examples = mean, 0.0, 0

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        l = self.mean(y_hat, y)
        self.total, self.examples = self.total + float(l) * len(y), self.examples + len(y)
        return l

    def report(self, reported: float) -> dict[str, float]:
        return {"loss": reported, "loss in 0.16": self.total / self.examples}


@program
def concise(d: Any) -> dict[str, Any]:
    net = softmax()
    updater = torch.optim.SGD(net.parameters(), lr=0.5)
    d.train_ch3(net, batches(), batches(100), nn.CrossEntropyLoss(reduction="none"), 3, updater)
    loss, train, test = (line.get_ydata().tolist() for line in pyplot.gca().lines)
    return {"weights": weights(net), "losses": loss, "train": train, "test": test}


@program
def from_scratch(d: Any) -> dict[str, Any]:
    W, b = torch.randn(200, 10).mul_(0.01).requires_grad_(), torch.zeros(10, requires_grad=True)

    def net(X: Tensor) -> Tensor:
        exps = (X.reshape(-1, 200) @ W + b).exp()
        return exps / exps.sum(1, keepdim=True)

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return -torch.log(y_hat[range(len(y_hat)), y])

    d.train_ch3(net, batches(), batches(100), loss, 3, lambda batch_size: d.sgd([W, b], 0.5, batch_size))
    loss, train, test = (line.get_ydata().tolist() for line in pyplot.gca().lines)
    return {"weights": [W, b], "losses": loss, "train": train, "test": test}


@program
def a_mean(d: Any) -> dict[str, Any]:
    net, loss = softmax(), Meaned()
    found, acc = d.train_epoch_ch3(net, batches(), loss, torch.optim.SGD(net.parameters(), lr=0.5))
    return {"weights": weights(net), "acc": acc, **loss.report(found)}


@program
def a_mean_that_says_so_with_a_function(d: Any) -> dict[str, Any]:
    net, loss = softmax(), Meaned()
    loss.reduction = "mean"
    found, acc = d.train_epoch_ch3(net, batches(), loss, lambda n: d.sgd(net.parameters(), 20.0, n))
    return {"weights": weights(net), "acc": acc, **loss.report(found)}


@program
def log_probabilities_and_a_mean(d: Any) -> dict[str, Any]:
    layer, loss = nn.Linear(200, 10), Meaned(nn.NLLLoss())

    def net(X: Tensor) -> Tensor:
        return layer(X).log_softmax(1)

    found, acc = d.train_epoch_ch3(net, batches(), loss, torch.optim.Adam(layer.parameters(), lr=0.01))
    return {"weights": weights(layer), "acc": acc, "test": d.evaluate_accuracy(net, batches(100)), **loss.report(found)}


@program
def a_sum_with_an_optimiser(d: Any) -> dict[str, Any]:
    net = softmax()
    updater = torch.optim.SGD(net.parameters(), lr=0.5 / 64)
    loss, acc = d.train_epoch_ch3(net, batches(), nn.CrossEntropyLoss(reduction="sum"), updater)
    return {"weights": weights(net), "loss": loss, "acc": acc}


@program
def a_sum_with_a_function(d: Any) -> dict[str, Any]:
    net = softmax()

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(y_hat, y, reduction="sum")

    found, acc = d.train_epoch_ch3(net, batches(), loss, lambda n: d.sgd(net.parameters(), 0.5, n))
    return {"weights": weights(net), "loss": found, "acc": acc}


@program
def lazy_layers_evaluated_first(d: Any) -> dict[str, Any]:
    net = nn.Sequential(nn.LazyLinear(32), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Dropout(0.1), nn.LazyLinear(10))
    before = d.evaluate_accuracy(net, batches(100))
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)
    figures = []
    for _ in range(2):
        figures.append(d.train_epoch_ch3(net, batches(), nn.CrossEntropyLoss(reduction="none"), optimiser))
        scheduler.step()
    losses, accs = zip(*figures, strict=True)
    return {
        "weights": weights(net), "losses": losses, "accs": accs, "before": before,
        "after": d.evaluate_accuracy(net, batches(100)), "training": net.training,
    }  # fmt: skip


@program
def a_net_that_remembers(d: Any) -> dict[str, Any]:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cache = nn.Linear(200, 10), {}

        def forward(self, X: Tensor) -> Tensor:
            y_hat = self.layer(X) * self.cache.get("scale", 1.0)
            self.cache["scale"] = 1 + 0.1 * y_hat.mean(0).detach()
            return y_hat

    net, accs = Remembers(), []
    for _ in range(2):
        accs.append(d.evaluate_accuracy(net, batches(100)))
        d.train_epoch_ch3(net, batches(), nn.CrossEntropyLoss(reduction="none"), torch.optim.SGD(net.parameters(), 0.1))
    return {"weights": weights(net), "cache": net.cache["scale"], "accs": accs}


@program
def two_inputs_in_a_list(d: Any) -> dict[str, Any]:
    left, right = nn.Linear(100, 10), nn.Linear(100, 10)
    halves = [([X[:, :100], X[:, 100:]], y) for X, y in batches()]
    updater = torch.optim.SGD([*left.parameters(), *right.parameters()], 0.5, momentum=0.9)
    net = lambda X: left(X[0]) + right(X[1])  # noqa: E731
    loss, acc = d.train_epoch_ch3(net, halves, nn.CrossEntropyLoss(reduction="none"), updater)
    return {"weights": weights(left) + weights(right), "loss": loss, "acc": d.evaluate_accuracy(net, halves), "a": acc}


@program
def a_loss_that_needs_gradients_and_records(d: Any) -> dict[str, Any]:
    net, norms = softmax(), []

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        norms.append(None if net[1].weight.grad is None else float(net[1].weight.grad.norm()))
        l = F.cross_entropy(y_hat, y, reduction="none")
        (slope,) = torch.autograd.grad(l.sum(), y_hat, create_graph=True)
        return l + 0.1 * slope.square().sum(1)

    d.train_ch3(net, batches(), batches(100), loss, 3, torch.optim.SGD(net.parameters(), lr=0.5))
    return {"weights": weights(net), "norms": norms}


@program
def a_test_label_that_training_never_saw(d: Any) -> dict[str, Any]:
    net, test = softmax(), batches(100)
    test.dataset.tensors[1][:3] = 10
    d.train_ch3(net, batches(), test, nn.CrossEntropyLoss(reduction="none"), 3, torch.optim.SGD(net.parameters(), 0.5))
    return {"weights": weights(net), "test": d.evaluate_accuracy(net, test)}


@program
def logistic_regression_with_float_labels(d: Any) -> dict[str, Any]:
    net, loss = nn.Linear(200, 1), nn.BCEWithLogitsLoss(reduction="none")
    binary = [(X, (y > 4).float().reshape(-1, 1)) for X, y in batches()]
    found, _ = d.train_epoch_ch3(net, binary, loss, lambda n: d.sgd(net.parameters(), 0.1, n))
    predict = lambda X: (net(X) > 0).int()  # noqa: E731
    return {"weights": weights(net), "loss": found, "acc": d.evaluate_accuracy(predict, binary)}


@program
def labels_per_token(d: Any) -> dict[str, Any]:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(20, 16, batch_first=True), nn.Linear(16, 10)

        def forward(self, X: Tensor) -> Tensor:
            return self.head(self.rnn(X.reshape(-1, 10, 20))[0]).transpose(1, 2)

    net = Tagger()
    tagged = [(X, y[:, None].repeat(1, 10)) for X, y in batches()]
    updater = torch.optim.RMSprop(net.parameters(), lr=0.01)
    loss, acc = d.train_epoch_ch3(net, tagged, nn.CrossEntropyLoss(reduction="none"), updater)
    return {"weights": weights(net), "loss": loss, "acc": acc, "test": d.evaluate_accuracy(net, tagged)}


@program
def accuracy_in_every_type(d: Any) -> dict[str, Any]:
    y_hat = torch.randn(300, 10)
    labels = torch.arange(300) % 10
    scores = torch.rand(300) * 3
    types = [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool]
    counts = [[d.accuracy(y_hat, labels.to(to)), d.accuracy(scores, (labels % 3).to(to))] for to in types]
    return {"counts": counts, "kinds": [type(count) for pair in counts for count in pair]}


@program
def sums_of_everything(d: Any) -> dict[str, Any]:
    metric = d.Accumulator(3)
    for value in (np.float16(60000), np.int64(3), torch.tensor([1.5]), torch.tensor(2, dtype=torch.uint8), True, 0.1):
        metric.add(value, value, 1, "surplus")
    first, *others = metric
    before, total = metric.data, metric[0] / metric[-1]
    metric.add(1, 1, 1)
    kinds = [type(value) for value in metric.data]
    return {"all": [first, others, before, total, metric[:2], metric[1:], metric.data], "kinds": kinds}


@program
def training_of_chapter_6(d: Any) -> dict[str, Any]:
    """An own loop over the Accumulator and the Animator, with what it prints."""
    net, train_iter = softmax(), batches()
    optimizer, loss = torch.optim.SGD(net.parameters(), lr=0.5), nn.CrossEntropyLoss()
    animator = d.Animator(xlabel="epoch", xlim=[1, 2], legend=["train loss", "train acc", "test acc"])
    for epoch in range(2):
        metric = d.Accumulator(3)
        net.train()
        for i, (X, y) in enumerate(train_iter):
            optimizer.zero_grad()
            y_hat = net(X)
            l = loss(y_hat, y)
            l.backward()
            optimizer.step()
            with torch.no_grad():
                metric.add(l * X.shape[0], d.accuracy(y_hat, y), X.shape[0])
            if i % 3 == 0:
                animator.add(epoch + i / len(train_iter), (metric[0] / metric[2], metric[1] / metric[2], None))
        animator.add(epoch + 1, (None, None, d.evaluate_accuracy(net, batches(100))))
    print(f"loss {metric[0] / metric[2]:.3f}, train acc {metric[1] / metric[2]:.3f}, test acc {animator.Y[2][-1]:.3f}")
    return {"weights": weights(net), "losses": animator.Y[0], "Y": animator.Y[1:], "X": animator.X}


@program
def a_gans_two_pictures(d: Any) -> dict[str, Any]:
    animator = d.Animator("epoch", "loss", ["D", "G"], [1, 3], None, "linear", "log", ("b^--", "ro"), 2, 1, (5, 5))
    animator.fig.subplots_adjust(hspace=0.3)
    for epoch in (1, 2):
        animator.axes[1].cla()
        animator.axes[1].scatter(np.arange(epoch), np.arange(epoch))
        animator.add(epoch, np.array([1.0, 0.5]) / epoch)
    upper, lower = animator.fig.axes
    lines = [(line.get_xydata().tolist(), line.get_marker(), line.get_linestyle()) for line in upper.lines]
    limits = upper.get_xlim(), upper.get_xlabel(), upper.get_yscale(), [t.get_text() for t in upper.get_legend().texts]
    return {"lines": lines, "limits": limits, "lower": len(lower.collections), "size": animator.fig.get_size_inches()}


@program
def points_of_many_kinds(d: Any) -> dict[str, Any]:
    animator = d.Animator(fmts=("-", "r:"))
    animator.add([1, 2], [0.1, 0.2])
    animator.add(np.array([3, 4]), torch.tensor([0.25, 0.5]))
    animator.add(torch.tensor([5, 6]), (None, np.float64(0.5)))
    animator.config_axes()
    return {"lines": [line.get_xydata().tolist() for line in animator.axes[0].lines], "X": animator.X}


@program
def thresholds_not_met(d: Any) -> dict[str, Any]:
    net = softmax()
    loss, updater = nn.CrossEntropyLoss(reduction="none"), torch.optim.SGD(net.parameters(), lr=1e-6)
    with pytest.raises(AssertionError):
        d.train_ch3(net, batches(), batches(100), loss, 1, updater)
    return {"weights": weights(net)}


@program
def pictures_of_bytes_and_labels_of_bytes(d: Any) -> dict[str, Any]:
    net = nn.Sequential(nn.Conv1d(1, 4, 5, stride=2), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(10))
    bytes_ = [((X * 200).to(torch.uint8).float()[:, None] / 255, y) for X, y in batches(dtype=torch.uint8)]
    loss = lambda y_hat, y: F.cross_entropy(y_hat, y.long(), reduction="none")  # noqa: E731
    before = d.evaluate_accuracy(net, bytes_)
    found, acc = d.train_epoch_ch3(net, bytes_, loss, torch.optim.Adagrad(net.parameters()))
    return {"weights": weights(net), "loss": found, "acc": acc, "before": before}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """d2l itself, with pyplot and no display: in a script, it would print the type of each picture."""
    d2l = pytest.importorskip("d2l.torch", reason="d2l is not installed (tests/requirements-d2l.txt)")
    matplotlib.use("Agg")
    monkeypatch.setattr(d2l, "display", SimpleNamespace(display=lambda _: None, clear_output=lambda wait: None))
    monkeypatch.setattr(d2l, "use_svg_display", lambda: None)
    yield d2l
    pyplot.close("all")


def plain(value: Any) -> Any:
    """Tensors and arrays as lists, so that == compares bit for bit."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_comes_to_the_same(name: str, theirs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(names: Any) -> tuple[dict[str, Any], str]:
        torch.manual_seed(1)
        return PROGRAMS[name](names), capsys.readouterr().out

    (expected, printed), (found, printed_by_ours) = run(theirs), run(OURS)
    assert printed_by_ours == printed
    if "loss in 0.16" in expected:
        expected["loss"] = expected["loss in 0.16"]
    for key, value in plain(expected).items():
        assert plain(found)[key] == (pytest.approx(value, rel=1e-6) if key.startswith("loss") else value), key


def chapter_6(d2l: Any) -> list[Tensor]:
    net = nn.Sequential(nn.Linear(200, 16), nn.Sigmoid(), nn.Linear(16, 10))
    d2l.train_ch6(net, batches(), batches(100), 2, 0.5, "cpu")
    return weights(net)


def chapter_8(d2l: Any) -> list[Tensor]:
    tokens = list("the time traveller for so it will be convenient to speak of him " * 40)
    vocab = d2l.Vocab(tokens)
    text = torch.tensor(vocab[tokens][:2560]).reshape(8, 32, 10)
    net = d2l.RNNModel(nn.GRU(len(vocab), 16), len(vocab))
    d2l.train_ch8(net, list(zip(text[:, :-1], text[:, 1:], strict=True)), vocab, 1.0, 20, "cpu")
    return weights(net)


def chapter_11(d2l: Any) -> list[Tensor]:
    torch.manual_seed(2)
    x = torch.randn(500, 5)
    data = DataLoader(TensorDataset(x, x @ torch.arange(5.0)), 10)
    d2l.train_concise_ch11(torch.optim.SGD, {"lr": 0.05}, data, num_epochs=2)
    d2l.train_ch11(lambda params, _, rates: d2l.sgd(params, rates["lr"], 1), None, {"lr": 0.05}, data, 5)
    return []  # the curves show its training


def chapter_13(d2l: Any) -> list[Tensor]:
    net = softmax()
    updater = torch.optim.Adam(net.parameters(), lr=0.01)
    d2l.train_ch13(net, batches(), batches(100), nn.CrossEntropyLoss(reduction="none"), updater, 2, ["cpu"])
    return weights(net)


@pytest.mark.parametrize("chapter", [chapter_6, chapter_8, chapter_11, chapter_13])
def test_the_books_later_chapters_run_on_our_names(
    chapter: Callable[[Any], list[Tensor]], theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(1)
        trained = chapter(theirs)
        figures = map(pyplot.figure, pyplot.get_fignums())
        curves = [line.get_xydata().tolist() for figure in figures for line in figure.axes[0].lines]
        pyplot.close("all")
        return trained, curves

    expected_weights, expected_curves = run()
    for name in NAMES:
        monkeypatch.setattr(theirs, name, getattr(OURS, name))
    found_weights, found_curves = run()
    assert plain(found_weights) == plain(expected_weights)
    assert expected_curves
    assert [len(curve) for curve in found_curves] == [len(curve) for curve in expected_curves]
    for found, expected in zip(found_curves, expected_curves, strict=True):
        assert found == [pytest.approx(point, rel=1e-6) for point in expected]
