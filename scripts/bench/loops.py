"""The loops that scripts/bench times: the same net, batch and updates each, an epoch a call.

- book: the book's own, over torchvision's `DataLoader` with so many workers.
- bare: over tensors in memory, written the usual way; with several ranks under plain DDP.
- Accelerate: the book's, with net, optimizer and `DataLoader` prepared. Lightning: as its guide has it.
- ours: as train.py trains, but for its log; "Accelerate's objects": with its optimizer wrapper and its `backward`.

All share one process group and take turns, so that a busy moment of the machine hits them alike.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from loop.book import train_epoch_ch3
from loop.config import Config
from loop.data import TrainBatches, load
from loop.nets import make_net
from loop.updater import CellUpdater, make_updater, settle_buckets

Epoch = Callable[[], float | None]  # returns the seconds it took where it knows better than its caller
BARE, OURS, WRAPPED = IN_MEMORY = ("bare", "ours", "ours, Accelerate's objects")


class Setting:
    """What the loops of one net share. config: net, batch size over all ranks, learning rate, data."""

    def __init__(self, accelerator: Accelerator, config: Config) -> None:
        self.accelerator, self.config = accelerator, config
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.device, self.share = accelerator.device, config.batch_size // accelerator.num_processes
        self.split = load(config, self.device)[0]
        self.shards = config.shards(len(self.split.labels), self.world_size)

    def net(self) -> nn.Module:
        """Return a fresh net on the device."""
        return make_net(self.config.net).to(self.device)

    def sgd(self, net: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer that all loops use."""
        return torch.optim.SGD(net.parameters(), lr=self.config.learning_rate)

    def loader(self, workers: int = 0) -> DataLoader[Any]:
        """Return torchvision's Fashion-MNIST as the book loads it: every image a PIL image, then a tensor."""
        to_tensor = torchvision.transforms.ToTensor()
        data: Any = torchvision.datasets.FashionMNIST(str(self.config.data_dir), train=True, transform=to_tensor)
        data = Subset(data, range(len(self.split.labels)))
        return DataLoader(data, self.share, shuffle=True, num_workers=workers)

    def wait(self) -> None:
        """Wait for the device and for the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.accelerator.wait_for_everyone()


def book_epoch(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> None:
    """Train for an epoch as the book does, with its metrics read at each step."""
    loss, sums = nn.CrossEntropyLoss(), [0.0, 0.0, 0.0]
    for X, y in batches:
        X, y = X.to(device), y.to(device)
        y_hat = net(X)
        l = loss(y_hat, y)
        optimizer.zero_grad()
        backward(l)
        optimizer.step()
        sums[0] += float(l.detach()) * len(y)
        sums[1] += float((y_hat.argmax(1) == y).sum())
        sums[2] += len(y)


def book(setting: Setting, workers: int) -> Epoch:
    """Return the book's loop over torchvision's DataLoader."""
    net = setting.net()
    return partial(book_epoch, net, setting.loader(workers), setting.sgd(net), setting.device)


def accelerate(setting: Setting) -> Epoch:
    """Return the book's loop with everything prepared."""
    accelerator, net = setting.accelerator, setting.net()
    net, optimizer, batches = accelerator.prepare(net, setting.sgd(net), setting.loader())
    return partial(book_epoch, net, batches, optimizer, setting.device, accelerator.backward)


def bare(setting: Setting) -> Epoch:
    """Return the loop that one writes over tensors in memory: a strided share of a permutation, `x[j]`, `float(l)`."""
    images, labels = setting.split.images.unsqueeze(1), setting.split.labels
    net = setting.net()
    if setting.world_size > 1:
        net = DistributedDataParallel(net)
    loss, optimizer = nn.CrossEntropyLoss(), setting.sgd(net)

    def epoch() -> None:
        total = 0.0
        order = torch.randperm(len(labels), device=setting.device)
        order = order[: len(order) // setting.world_size * setting.world_size]  # else ranks wait for each other
        for j in order[setting.rank :: setting.world_size].split(setting.share):
            l = loss(net(images[j].float().div_(255)), labels[j])
            optimizer.zero_grad()
            l.backward()
            optimizer.step()
            total += float(l.detach()) * len(j)

    return epoch


def ours(setting: Setting, *, wrapped: bool = False, profiled: bool = False) -> Epoch:
    """Return this project's loop. wrapped: with Accelerate's optimizer and `backward`, which only fp16 needs.

    profiled: with the parts of a step by name, for torch's profiler.
    """
    config, accelerator = setting.config, setting.accelerator
    net = accelerator.prepare(setting.net())
    batches: Any = TrainBatches(setting.split, setting.shards, rank=setting.rank)
    updater = make_updater(accelerator, net, config)
    if wrapped:
        updater = CellUpdater(accelerator, net, accelerator.prepare_optimizer(setting.sgd(net)), config)
    settle_buckets(net, torch.empty(0, 1, 28, 28, device=setting.device))
    loss: Any = nn.CrossEntropyLoss(reduction="none")
    if profiled:
        net, loss, batches = named("forward", net), named("forward", loss), NamedBatches(batches)
        for verb, part in {"begin": "update", "backward": "backward", "step": "update"}.items():
            setattr(updater, verb, named(part, getattr(updater, verb)))

    def epoch() -> None:
        train_epoch_ch3(net, batches, loss, updater)

    return epoch


def named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function so that the profiler sees its calls as this part of a step."""

    def call(*args: Any) -> Any:
        with record_function(part):
            return function(*args)

    return call


class NamedBatches:
    """Batches that the profiler sees made as the part "data"."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        make = named("data", partial(next, iter(self.batches), None))
        return iter(make, None)


def lightning(setting: Setting) -> Epoch:
    """Return Lightning's loop, which takes the time between its first and last batch by itself."""
    warnings.filterwarnings("ignore")
    from lightning.pytorch import LightningModule, Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # not before the import, which sets it

    class Module(LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seconds = setting.net(), 0.0

        def on_train_epoch_start(self) -> None:
            setting.wait()
            self.seconds -= time.perf_counter()

        def on_train_epoch_end(self) -> None:
            setting.wait()
            self.seconds += time.perf_counter()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setting.sgd(self)

    kind = "cpu" if setting.device.type == "cpu" else "gpu"

    def epoch() -> float:
        module, loader = Module(), setting.loader()
        strategy: dict[str, Any] = {"strategy": "ddp"} if setting.world_size > 1 else {}
        Trainer(accelerator=kind, devices=setting.world_size, max_epochs=1, barebones=True, **strategy).fit(
            module, loader
        )
        return module.seconds

    return epoch


def loops_of(setting: Setting, workers: Iterable[int]) -> dict[str, Callable[[], Epoch]]:
    """Return how each loop is made, the fast ones first."""
    loops: dict[str, Callable[[], Epoch]] = {
        BARE: partial(bare, setting),
        OURS: partial(ours, setting),
        WRAPPED: partial(ours, setting, wrapped=True),
        "Accelerate": partial(accelerate, setting),
    }
    if importlib.util.find_spec("lightning"):
        loops["Lightning"] = partial(lightning, setting)
    if setting.world_size == 1:
        loops |= {f"book, {n} workers": partial(book, setting, n) for n in workers}
    return loops


def take_turns(
    setting: Setting, loops: dict[str, Callable[[], Epoch]], rounds: dict[str, int]
) -> dict[str, list[float]]:
    """Return the seconds of each loop's epochs, in an order that is drawn anew for every round.

    A loop in memory takes one epoch before, which does not count: what is slow at first shows there. On a GPU all do.
    """
    order = random.Random(0)
    epochs = {name: make() for name, make in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    warmed = set(names if setting.device.type == "cuda" else IN_MEMORY)
    total = sum(rounds[name] + (name in warmed) for name in names)
    title = f"{setting.config.net}, {setting.world_size} rank(s)"
    with tqdm(total=total, desc=title, unit="epoch", disable=setting.rank > 0, leave=False) as bar:
        for round_ in range(max(rounds.values()) + 1):
            for name in order.sample(names, len(names)):
                if round_ > rounds[name] or not (round_ or name in warmed):
                    continue
                setting.wait()
                started = time.perf_counter()
                own = epochs[name]()
                setting.wait()
                taken = own or time.perf_counter() - started
                seconds[name] += [taken] if round_ else []
                bar.update()
    return seconds


def split_epoch(setting: Setting) -> dict[str, float]:
    """Return the microseconds that each part of a step takes in an epoch of ours, on the host, by torch's profiler.

    An all-reduce runs while the backward waits for it, which is counted apart.
    """
    epoch = ours(setting, profiled=True)
    epoch()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("epoch"):
        epoch()
        setting.wait()
    micros = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    split = {part: micros[part] for part in ("data", "forward", "backward", "update")}
    split["all-reduce"] = sum(time for key, time in micros.items() if key in ("gloo:all_reduce", "nccl:all_reduce"))
    split["backward"] -= split["all-reduce"]
    split["metrics and loop"] = micros["epoch"] - sum(split.values())
    return split
