"""Trainings for `parity`: right ones of many kinds, and wrong ones with one fault each, under DDP and Accelerate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from loop import parity

MASKED = -100
CLASSES, FEATURES = 4, 6


def data() -> tuple[Tensor, Tensor]:
    """Examples (80, 6) in float64, and their classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (80,), generator=generator)


def token_data() -> tuple[Tensor, Tensor]:
    """Lines of tokens (80, 5), and each token's successor, a third of them masked."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CLASSES, (80, 6), generator=generator)
    y = tokens[:, 1:].masked_fill(torch.rand(80, 5, generator=generator) < 0.33, MASKED)
    return tokens[:, :-1], y


def masked_lines() -> tuple[Tensor, Tensor]:
    """Features (80, 6), and three labels for each, a third of them masked."""
    y = token_data()[1][:, :3]
    return data()[0], y


class Tokens(nn.Module):
    """Embedded tokens through a GRU. Returns (B * length, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(CLASSES, 6), nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0]).flatten(0, 1)


class Frozen(nn.Module):
    """A first layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, 8).requires_grad_(False), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu())


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
    "softmax": lambda: nn.Linear(FEATURES, CLASSES),
    "layer norm": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES, bias=False)
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, CLASSES)
    ),
    "dropout of 0": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.0), nn.ReLU(), nn.Linear(8, CLASSES)),
    "tokens": Tokens,
    "frozen": Frozen,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "sharded": lambda params: (
        ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.1)
        if dist.is_initialized()
        else torch.optim.SGD(params, lr=0.1)
    ),
    "groups": lambda params: torch.optim.SGD([{"params": [p], "lr": 0.1 / (1 + i)} for i, p in enumerate(params)]),
}

# A cell's loss out of its summed loss s, for its own count, its rank's, its micro-batch's and the whole step's.
SCALES: dict[str, Callable[..., Any]] = {
    "": lambda s, cell, rank, micro, step, W, K: s * W / step,
    "W": lambda s, cell, rank, micro, step, W, K: s * W * W / step,
    "1/W": lambda s, cell, rank, micro, step, W, K: s / step,
    "K": lambda s, cell, rank, micro, step, W, K: s * W * K / step,
    "1/K": lambda s, cell, rank, micro, step, W, K: s * W / step / K,
    "W K": lambda s, cell, rank, micro, step, W, K: s * W * W * K / step,
    "1/(W K)": lambda s, cell, rank, micro, step, W, K: s / step / K,
    "means": lambda s, cell, rank, micro, step, W, K: s / cell / K,
    "rank means": lambda s, cell, rank, micro, step, W, K: s / rank,
    "micro means": lambda s, cell, rank, micro, step, W, K: s * W / micro / K,
    "first rank": lambda s, cell, rank, micro, step, W, K: s * W / step * (2 if W > 1 and dist.get_rank() == 0 else 1),
}


def ranks() -> int:
    """W."""
    return int(os.environ["WORLD_SIZE"])


def joined(net: nn.Module, **how: Any) -> nn.Module:
    """Join the other ranks, if there are any, and return the net under DDP."""
    if ranks() == 1:
        return net
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return DistributedDataParallel(net, **how)


def summed(count: float) -> Tensor:
    total = torch.tensor(float(count), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def in_steps(
    batches: parity.Steps,
    *,
    scale: str = "",
    net: str = "mlp",
    optimizer: str = "sgd",
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    clip: float | None = None,
    closure: bool = False,
    accelerated: bool = False,
    fault: str = "",
    ddp: dict[str, Any] | None = None,
) -> Any:
    """Train on the steps that are dealt."""
    world_size = ranks()
    torch.manual_seed(0)
    module = NETS[net]().to(dtype)
    made = OPTIMIZERS[optimizer]([p for p in module.parameters() if p.requires_grad])
    backward: Callable[[Tensor], None] = Tensor.backward
    model: nn.Module = module
    if accelerated:
        accelerator = Accelerator()
        model, made = accelerator.prepare(module, made)
        backward = accelerator.backward
    else:
        model = joined(module, **(ddp or {}))
    if fault == "rate":
        made.param_groups[0]["lr"] *= world_size
    for micro_batches in batches:
        counts = [int((y != MASKED).sum()) for _, y in micro_batches]
        step, micro = summed(sum(counts)), [summed(count) for count in counts]
        rank = max(sum(counts), 1)

        def compute(micro_batches: Any = micro_batches, counts: Any = counts, step: Any = step, micro: Any = micro,
                    rank: int = rank) -> float:  # fmt: skip
            made.zero_grad()
            for k, (x, y) in enumerate(micro_batches):
                if fault == "last":
                    made.zero_grad()
                last = k == len(micro_batches) - 1
                waits = isinstance(model, DistributedDataParallel) and not last and fault != "last"
                with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    forward = model.module if fault == "unsynchronised" and world_size > 1 else model
                    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                        output = forward(x.to(dtype) if x.is_floating_point() else x)
                        losses = F.cross_entropy(output, y.flatten(), ignore_index=MASKED, reduction="none")
                    s = losses.sum()
                    if fault == "diverged":
                        backward(s)
                        continue
                    count = max(counts[k], 1), rank, micro[k].clamp(min=1), step
                    backward(SCALES[scale](s, *count, world_size, len(micro_batches)))
            if fault == "diverged":
                for param in module.parameters():
                    assert param.grad is not None
                    param.grad /= rank
            return 0.0

        if closure:
            made.step(compute)
            continue
        compute()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            if fault == "clip":  # clipped once more, to what all ranks' norms together would make of it
                for param in model.parameters():
                    param.grad *= 1 / (1 + float(norm)) if world_size > 1 else 1
        made.step()
    return model if not accelerated else module.state_dict()


def whole(fault: str = "") -> nn.Module:
    """Train on data of its own, dealt by a loader, with batch means: right where all shares are equal."""
    world_size, rank, batch_size = ranks(), int(os.environ["RANK"]), 12
    torch.manual_seed(rank if fault == "starts apart" else world_size if fault == "starts" else 0)
    module = NETS["mlp"]().to(torch.float64)
    x, y = data()
    n = 79 if fault == "twice" else 60  # 60: equal shares of 20 for 1, 2 and 3 ranks with 12, 6 and 4 in one
    examples = TensorDataset(x[:n], y[:n])
    all_of_them = fault in ("all see all", "each in its own order")
    seed = world_size if fault == "order" else rank if fault == "each in its own order" else 0
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    mine = order if all_of_them else order[rank::world_size]
    if fault == "twice" and world_size > 1:
        mine = [order[i] for i in DistributedSampler(examples, world_size, rank, shuffle=False)]
    elif fault == "missing" and world_size > 1:
        mine = order[rank : n - batch_size : world_size]
    share = batch_size if all_of_them or fault == "grew" else batch_size // world_size
    if fault == "starts apart" and world_size > 1:  # DDP would broadcast rank 0's weights
        dist.init_process_group("gloo")
    model = module if fault == "starts apart" else joined(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for X, Y in DataLoader(examples, share, sampler=mine):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        for param in module.parameters() if fault == "starts apart" and world_size > 1 else ():
            assert param.grad is not None
            dist.all_reduce(param.grad)
            param.grad /= world_size
        optimizer.step()
    return model


def hangs() -> nn.Module:
    """Rank 1 does not come to the all-reduce."""
    module = joined(nn.Linear(2, 2))
    while ranks() > 1 and dist.get_rank() == 1:
        time.sleep(1)
    module(torch.ones(1, 2)).sum().backward()
    return module


def raises() -> nn.Module:
    """Rank 1 has a fault of its own."""
    if os.environ["RANK"] == "1":
        raise KeyError("no such shard")
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def unseeded() -> nn.Module:
    """No seed."""
    torch.seed()
    return nn.Linear(2, 2)


def on_a_gpu() -> nn.Module:
    """As many scripts have it."""
    return nn.Linear(2, 2).to("cuda:0")


def over_nccl() -> nn.Module:
    """As many scripts have it."""
    dist.init_process_group("nccl")
    return nn.Linear(2, 2)


def take_step(net: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[parity.Batch]) -> None:
    """Take a right step."""
    step = summed(sum(len(x) for x, _ in micro_batches))
    optimizer.zero_grad()
    for x, y in micro_batches:
        (F.cross_entropy(net(x), y, reduction="sum") * ranks() / step).backward()
    optimizer.step()


def with_dropout(batches: parity.Steps) -> nn.Module:
    """Each rank draws numbers of its own."""
    torch.manual_seed(0)
    net = joined(nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for micro_batches in batches:
        take_step(net, optimizer, micro_batches)
    return net


IN_STEPS: dict[str, tuple[parity.Cause, dict[str, Any]]] = {
    **{f"wrong {name}": (cause, {"scale": name}) for name, cause in parity.FACTORS.items()},
    "wrong means": (parity.MEANS, {"scale": "means"}),
    "wrong means, adamw": (parity.MEANS, {"scale": "means", "optimizer": "adamw"}),
    "wrong means, accelerate": (parity.MEANS, {"scale": "means", "accelerated": True}),
    "wrong means, float32": (parity.MEANS, {"scale": "means", "dtype": torch.float32}),
    "wrong 1/W, adamw, clipped": (parity.FACTORS["1/W"], {"scale": "1/W", "optimizer": "adamw", "clip": 1e-3}),
    "wrong 1/W, closure": (parity.FACTORS["1/W"], {"scale": "1/W", "closure": True}),
    "wrong W, accelerate": (parity.FACTORS["W"], {"scale": "W", "accelerated": True}),
    "wrong rank means": (parity.RANK_MEANS, {"scale": "rank means"}),
    "wrong rank means, tokens": (parity.RANK_MEANS, {"scale": "rank means", "net": "tokens"}),
    "wrong micro means": (parity.MICRO_MEANS, {"scale": "micro means"}),
    "wrong last": (parity.LAST, {"fault": "last"}),
    "wrong unsynchronised": (parity.UNSYNCHRONISED, {"fault": "unsynchronised"}),
    "wrong diverged": (parity.DIVERGED, {"fault": "diverged"}),
    "wrong rate": (parity.UPDATE_W.of("W"), {"fault": "rate"}),
    "wrong clip": (parity.UPDATE, {"fault": "clip", "clip": 0.1}),
}  # fmt: skip
WHOLE = {
    "wrong grew": parity.GREW, "wrong each in its own order": parity.ALL_SEE_ALL, "wrong twice": parity.TWICE,
    "wrong missing": parity.MISSING, "wrong order": parity.ORDER, "wrong starts": parity.STARTS,
    "wrong starts apart": parity.STARTS_APART,
}  # fmt: skip
RIGHT: dict[str, dict[str, Any]] = {
    **{f"right {net}": {"net": net} for net in NETS},
    **{f"right {name}": {"optimizer": name} for name in OPTIMIZERS if name not in ("sgd", "sharded")},
    "right float32": {"dtype": torch.float32},
    "right float32 tokens, adam": {"dtype": torch.float32, "net": "tokens", "optimizer": "adam"},
    "right bfloat16": {"dtype": torch.bfloat16},
    "right autocast": {"dtype": torch.float32, "autocast": True},
    "right clipped": {"clip": 0.1, "optimizer": "adamw"},
    "right closure": {"closure": True},
    "right accelerate": {"accelerated": True},
    "right accelerate, float32, adamw": {"accelerated": True, "optimizer": "adamw", "dtype": torch.float32},
    "right bucket view": {"ddp": {"gradient_as_bucket_view": True}},
    "right unused parameters": {"ddp": {"find_unused_parameters": True}, "net": "layer norm"},
}


def through_workers(batches: parity.Steps) -> Any:
    """A loader that has a process of its own reads the examples."""
    fed = [[next(iter(DataLoader([pair], batch_size=None, num_workers=1))) for pair in step] for step in batches[:1]]
    return in_steps([*fed, *batches[1:]])


def lazily(batches: parity.Steps) -> nn.Module:
    """A lazy layer, made by a dummy batch that a transform of modules has prepared."""
    torch.manual_seed(0)
    flatten = nn.Flatten()
    net: nn.Module = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, CLASSES))
    net(flatten(torch.zeros(1, FEATURES)))
    net = joined(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for micro_batches in batches:
        take_step(net, optimizer, [(flatten(x.float()), y) for x, y in micro_batches])
    return net


def by_hand(batches: parity.Steps) -> dict[str, Any]:
    """Softmax regression from scratch: no module, no optimizer, no DDP."""
    if ranks() > 1:
        dist.init_process_group("gloo")
    w = torch.zeros(FEATURES, CLASSES, requires_grad=True)
    for micro_batches in batches:
        step = summed(sum(len(x) for x, _ in micro_batches))
        for x, y in micro_batches:
            (F.cross_entropy(x.float() @ w, y, reduction="sum") / step).backward()
        assert w.grad is not None
        if ranks() > 1:
            dist.all_reduce(w.grad)
        w.data -= 0.5 * w.grad
        w.grad = None
    return {"model": {"w": w.detach()}, "epoch": 3}


def two_nets(batches: parity.Steps, rate: bool = False) -> dict[str, Any]:
    """Two optimizers of nets of unequal size take turns in each step; rate: the second's is W times too high."""
    torch.manual_seed(0)
    nets = [joined(nn.Linear(FEATURES, outputs).double()) for outputs in (FEATURES, CLASSES)]
    rates = 0.1, 0.1 * (ranks() if rate else 1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net, lr in zip(nets, rates, strict=True)]
    for micro_batches in batches:
        for net, optimizer in zip(nets, optimizers, strict=True):
            take_step(net, optimizer, micro_batches)
    return {"nets": {str(i): net.state_dict() for i, net in enumerate(nets)}}


def two_nets_at_two_rates(batches: parity.Steps) -> dict[str, Any]:
    """The second net's rate grows with W."""
    return two_nets(batches, rate=True)


def in_shards(batches: parity.Steps) -> Any:
    """The optimizer's state is sharded: each rank's steps for its own parameters, within another's."""
    return in_steps(batches, optimizer="sharded")


def with_a_fixed_k(batches: parity.Steps) -> nn.Module:
    """Accelerate steps at every second micro-batch, whatever the step that was dealt has."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    net: nn.Module = nn.Linear(FEATURES, CLASSES).double()
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for x, y in (pair for step in batches for pair in step):
        with accelerator.accumulate(net):
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return net


def _define(name: str, train: Callable[..., Any], how: dict[str, Any]) -> None:
    """Make a training that can be imported by name."""

    def function(*batches: parity.Steps) -> Any:
        return train(*batches, **how)

    function.__qualname__, function.__module__ = name, __name__
    globals()[name] = function


for _name, _how in (RIGHT | {name: how for name, (_, how) in IN_STEPS.items()}).items():
    _define(_name, in_steps, _how)
for _name in [*WHOLE, "right whole", "right all see all"]:
    _define(_name, whole, {"fault": _name.partition(" ")[2]})
