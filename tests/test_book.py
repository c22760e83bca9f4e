"""The book's own calls on plain objects, the agreement of its two branches, and the counts of evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from loop.animator import Animator
from loop.book import Accumulator, accuracy, evaluate_accuracy, sgd, train_ch3, train_epoch_ch3
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


def test_train_ch3_as_the_concise_section_calls_it(
    train_iter: DataLoader[tuple[Tensor, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = fresh_net()
    updater = torch.optim.SGD(net.parameters(), lr=0.5)
    train_ch3(net, train_iter, separable(100, 64), nn.CrossEntropyLoss(), 3, updater)
    assert evaluate_accuracy(net, separable(100, 64)) > 0.7
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_train_ch3_as_the_scratch_section_calls_it(
    train_iter: DataLoader[tuple[Tensor, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    W = torch.zeros(200, 10, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(10, dtype=torch.float64, requires_grad=True)

    def net(X: Tensor) -> Tensor:
        return X @ W + b

    loss = nn.CrossEntropyLoss(reduction="none")
    train_ch3(net, train_iter, separable(100, 64), loss, 3, lambda batch_size: sgd([W, b], 0.5, batch_size))


def test_train_ch3_insists_on_the_books_thresholds(
    train_iter: DataLoader[tuple[Tensor, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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


def test_metrics_weigh_every_example_of_a_short_batch_alike(train_iter: DataLoader[tuple[Tensor, ...]]) -> None:
    net = fresh_net()
    frozen = torch.optim.SGD(net.parameters(), lr=0)
    loss, share = train_epoch_ch3(net, train_iter, nn.CrossEntropyLoss(), frozen)
    x, y = train_iter.dataset.tensors
    assert loss == pytest.approx(float(nn.functional.cross_entropy(net(x), y).detach()), rel=1e-12)
    assert share == float(accuracy(net(x), y)) / 500


def test_accuracy_counts_and_takes_logits_or_classes() -> None:
    y = torch.tensor([0, 2, 1])
    assert accuracy(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]), y) == 2
    assert accuracy(torch.tensor([0, 2, 2]), y) == 2


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


def test_animator_draws_what_was_added(tmp_path: Path) -> None:
    animator = Animator("epoch", legend=("a", "b"), path=tmp_path / "c.png")
    animator.add(1, (0.5, None))
    animator.add(2, (0.4, 0.9))
    assert animator.curves == [([1, 2], [0.5, 0.4]), ([2], [0.9])]
    animator.save()
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_animator_shows_a_picture_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bytes] = []
    kernel = type("ZMQInteractiveShell", (), {})()
    display = SimpleNamespace(display=shown.append, Image=bytes, clear_output=lambda wait: None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel, display=display))
    animator = Animator("epoch")
    animator.add(1, 0.5)
    animator.add(2, 0.4)
    assert [picture[:4] for picture in shown] == [b"\x89PNG"] * 2
