"""The audit says what is wrong by exactly as much as it is, changes nothing, and refuses what has no one gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import loop.audit
import loop.book
from loop.audit import COUNTS, Audit, Reading, Shown, audit, replica_drift
from loop.config import Config
from loop.data import as_floats, epoch_order
from loop.nets import make_net
from loop.shards import Shards
from tests.cases import toy_config, toy_split, train_here
from tests.launches import LAUNCHES, launch, rows_of
from tests.ranks import World

EXAMPLES, BATCH_SIZE = 29, 12  # steps of 12, 12 and 5, which ragged deals as 3, 2, 0, 0 to four ranks


def simulated(config: Config, world_size: int) -> list[list[Tensor]]:
    """What the audit must say of each step of softmax regression: (error, cosine, scale, drift) of each rank.

    One process plays all ranks: a weight matrix each, so that those of the scratch updater may drift apart.
    """
    split, order = toy_split(EXAMPLES), epoch_order(EXAMPLES, config.seed, 0)
    torch.manual_seed(config.seed)
    replicas = [torch.cat([p.detach().double().flatten() for p in make_net("softmax").parameters()])] * world_size
    steps = []
    for step in Shards(EXAMPLES, BATCH_SIZE, world_size, config.accumulate, config.tail).steps:
        cells = [order[step.start + a : step.start + b] for a, b in zip(step.offsets, step.offsets[1:], strict=False)]
        summed = [
            summed_gradient(replicas[i % world_size], as_floats(split.images[cell], torch.float64), split.labels[cell])
            for i, cell in enumerate(cells)
        ]
        n, count = step.n_global, len(cells)
        scale = {
            ("mean", "rank"): [1 / max(size, 1) / count for size in step.sizes],
            ("mean", "global"): [1 / n] * count,
            ("sum", "rank"): [1 / count] * count,
            ("sum", "global"): [1] * count,
        }[config.reduction, config.normalize]
        gradient = sum(s * g for s, g in zip(scale, summed, strict=True))
        mean = sum(summed) / n
        reference = mean * n if config.reduction == "sum" and config.updater == "torch" else mean
        last_sizes = step.sizes[-world_size:]
        said, updates = [], []
        for rank in range(world_size):
            divisor = 1
            if config.updater == "scratch" and config.normalize == "rank":
                divisor = last_sizes[rank] if config.reduction == "sum" else min(last_sizes[rank], 1)
            elif config.updater == "scratch" and config.reduction == "sum":
                divisor = n
            applied = gradient / divisor if divisor else torch.zeros_like(gradient)
            cosine = F.cosine_similarity(applied, reference, dim=0, eps=1e-300)
            drift = (replicas[rank] - replicas[0]).abs().max()
            error = (applied - reference).norm() / reference.norm()
            said.append(torch.stack([error, cosine, applied.norm() / mean.norm(), drift]))
            updates.append(config.learning_rate * applied)
        replicas = [replica - update for replica, update in zip(replicas, updates, strict=True)]
        steps.append(said)
    return steps


def summed_gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of softmax regression: weights (10 x 784 and 10, flat), x (B, 1, 28, 28), y (B,)."""
    off = (x.flatten(1) @ weights[:7840].view(10, 784).T + weights[7840:]).softmax(1) - F.one_hot(y, 10)
    return torch.cat([(off.T @ x.flatten(1)).flatten(), off.sum(0)])


@pytest.mark.parametrize("updater", ["torch", "scratch"])
@pytest.mark.parametrize("normalize", ["global", "rank"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_audit_says_of_every_mode_what_arithmetic_predicts(
    world: Callable[[int], World], world_size: int, accumulate: int, reduction: str, normalize: str, updater: str
) -> None:
    config = toy_config(
        reduction=reduction, normalize=normalize, updater=updater, accumulate=accumulate,
        batch_size=BATCH_SIZE, tail="ragged", epochs=1, audit_every=1,
    )  # fmt: skip
    ranks = world(world_size).run(train_here, config, EXAMPLES)
    for step, said in enumerate(simulated(config, world_size)):
        errors = [float(measured[0]) for measured in said]
        for trained in ranks:
            reading = trained.readings[step]
            if max(errors) > 1e-12:
                assert errors[reading.rank] == pytest.approx(max(errors), rel=1e-9)
                expected = [*said[reading.rank][:3].tolist(), max(float(measured[3]) for measured in said)]
                assert list(reading[:4]) == pytest.approx(expected, rel=1e-9, abs=1e-12), f"step {step + 1}"
            else:
                assert reading.grad_rel_err < 1e-12
                assert reading.replica_drift == 0
    if normalize == "global":
        assert all(reading.grad_rel_err < 1e-12 for trained in ranks for reading in trained.readings)


@pytest.mark.parametrize(
    "flags",
    [
        {"net": "lenet", "momentum": 0.9},
        {"net": "mlp", "updater": "scratch", "reduction": "sum", "normalize": "rank"},
        {"net": "lenet", "dtype": "float32", "mixed_precision": "bf16", "optimizer": "adamw", "clip_norm": 0.1},
    ],
)
def test_an_audited_run_is_bit_equal_to_one_that_is_not(world: Callable[[int], World], flags: dict[str, Any]) -> None:
    config = toy_config(batch_size=BATCH_SIZE, accumulate=2, tail="ragged", **flags)
    plain, audited = (world(2).run(train_here, replace(config, audit_every=every), EXAMPLES) for every in (0, 1))
    assert [len(trained.readings) for trained in audited] == [6, 6]  # 3 steps an epoch
    assert [len(trained.readings) for trained in plain] == [0, 0]
    for ours, theirs in zip(audited, plain, strict=True):
        assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)


@pytest.mark.parametrize(
    ("net", "flags", "bound"),
    [
        ("mlp", {"clip_norm": 1e-3}, 1e-12),
        ("lenet", {}, 1e-12),
        ("mlp", {"dtype": "float32"}, 1e-5),
        ("lenet", {"dtype": "float32"}, 1e-5),
        ("softmax", {"dtype": "float32", "mixed_precision": "bf16"}, 2e-2),
        ("mlp", {"dtype": "float32", "mixed_precision": "bf16"}, 2e-2),
    ],
)
def test_a_right_gradient_is_off_by_rounding_alone(
    world: Callable[[int], World], net: str, flags: dict[str, Any], bound: float
) -> None:
    config = toy_config(net=net, batch_size=256, epochs=1, audit_every=1, **flags)
    for trained in world(2).run(train_here, config, 300):
        assert len(trained.readings) == 2
        for reading in trained.readings:
            assert reading.grad_rel_err < bound
            assert reading.grad_scale == pytest.approx(1, abs=bound)  # clipping comes after
            assert reading.replica_drift == 0


def plain_ddp(clip_norm: float | None, compare_first: bool) -> list[Reading]:
    """A loop that is not ours, as torch's documentation has it: 9 examples, W ranks, batches of 4 a rank."""
    torch.manual_seed(0)
    net: nn.Module = nn.Linear(3, 2).double()
    if torch.distributed.is_initialized():
        net = DistributedDataParallel(net)
    data = TensorDataset(torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2)
    sampler = DistributedSampler(data, shuffle=False, drop_last=False) if torch.distributed.is_initialized() else None
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.5)
    with audit(net, loss, optimizer) as a:
        for x, y in DataLoader(data, 4, sampler=sampler):
            a.saw(x, y)
            optimizer.zero_grad()
            loss(net(x), y).backward()
            if compare_first:
                a.compare()
            if clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
            optimizer.step()
    return a.readings


def test_another_loop_is_audited_around_its_optimizer_and_clipping_shows_unless_compared_before(
    world: Callable[[int], World],
) -> None:
    for readings in world(2).run(plain_ddp, None, False):  # 4 and 4, then 1 and 1: one of the 10 is a duplicate
        assert len(readings) == 2
        assert all(reading.grad_rel_err < 1e-12 for reading in readings)
    for readings in world(2).run(plain_ddp, 1e-3, False):
        assert all(reading.grad_scale < 0.1 and reading.grad_cosine == pytest.approx(1) for reading in readings)
    for readings in world(2).run(plain_ddp, 1e-3, True):
        assert [reading.grad_scale for reading in readings] == pytest.approx([1, 1])


def accelerate_tokens() -> tuple[list[Reading], list[int]]:
    """Masked tokens and accumulation on Accelerate, written the usual wrong way: a mean of means."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Linear(3, 5).double()
    net, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    x = torch.randn(4, 6, 3, dtype=torch.float64)  # micro-batches of 6 tokens
    y = torch.arange(24).view(4, 6) % 5
    kept = [6, 3, 2, 1]
    for tokens, k in zip(y, kept, strict=True):
        tokens[k:] = -100
    rank, loss = accelerator.process_index, nn.CrossEntropyLoss()
    with audit(net, loss, optimizer) as a:
        for k in range(2):
            mine = 2 * rank + k
            with accelerator.accumulate(net):
                a.saw(x[mine], y[mine])
                accelerator.backward(loss(net(x[mine]), y[mine]))
                optimizer.step()
                optimizer.zero_grad()
    return a.readings, kept


def test_masked_tokens_count_by_the_token_and_accelerates_optimizer_is_seen_through(
    world: Callable[[int], World],
) -> None:
    for readings, kept in world(2).run(accelerate_tokens):
        (reading,) = readings
        torch.manual_seed(0)
        net = nn.Linear(3, 5).double()
        x = torch.randn(4, 6, 3, dtype=torch.float64)
        losses = F.cross_entropy(net(x).flatten(0, 1), torch.arange(24) % 5, reduction="none").view(4, 6)
        mean = sum(losses[i, :k].sum() for i, k in enumerate(kept)) / sum(kept)
        of_means = sum(losses[i, :k].mean() for i, k in enumerate(kept)) / 4
        right, wrong = (
            torch.cat([g.flatten() for g in torch.autograd.grad(value, net.parameters(), retain_graph=True)])
            for value in (mean, of_means)
        )
        assert reading.grad_rel_err == pytest.approx(float((wrong - right).norm() / right.norm()), rel=1e-9)
        assert reading.grad_scale == pytest.approx(float(wrong.norm() / right.norm()), rel=1e-9)


class RandomForward(nn.Linear):
    """Draws random numbers where no module tells of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 5.0]).double()
LOSSES: dict[str, tuple[Any, str, Callable[[Tensor], Any]]] = {  # loss, kind of y, its count where it must be given
    "masked function": (F.cross_entropy, "labels", lambda y: (y != -100).sum()),
    "masked": (nn.CrossEntropyLoss(), "labels", lambda y: None),
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), "labels", lambda y: None),
    "smoothed": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1), "labels", lambda y: None),
    "each": (nn.CrossEntropyLoss(reduction="none"), "labels", lambda y: None),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "labels", lambda y: None),
    "entries": (nn.MSELoss(), "reals", lambda y: None),
    "weighted entries": (nn.BCEWithLogitsLoss(weight=CLASS_WEIGHTS), "probabilities", lambda y: None),
    "rows": (nn.KLDivLoss(reduction="batchmean"), "probabilities", lambda y: None),
    "function": (lambda output, y: (output - y).pow(4).mean(), "reals", lambda y: y.numel()),
}


def examples_of(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return rank 0's and rank 1's: 6 and 3 examples of three features and three classes, most of rank 1's masked."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    reals = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, -100, -100])
    y = {"labels": labels, "reals": reals, "probabilities": reals.softmax(1)}[kind]
    return list(x.split([6, 3])), list(y.split([6, 3]))


def divisor_of(name: str, y: Tensor) -> float:
    """By hand: what the mean is taken over."""
    kept = [int(label) for label in y if label >= 0] if y.dim() == 1 else []
    if name in ("class weights", "smoothed"):
        return sum((1.0, 2.0, 5.0)[label] for label in kept)
    return len(kept) or (len(y) if name == "rows" else y.numel())


def judged(name: str, exact: bool) -> tuple[float, float]:
    """The audit's figure of a step on 2 ranks, and the true distance from the gradient of all examples in one batch."""
    loss, kind, count = LOSSES[name]
    xs, ys = examples_of(kind)
    rank = torch.distributed.get_rank()
    x, y = xs[rank], ys[rank]
    torch.manual_seed(0)
    net = nn.Linear(3, 3).double()
    whole = loss(net(torch.cat(xs)), torch.cat(ys)).sum()
    n_local, n_global = divisor_of(name, y), divisor_of(name, torch.cat(ys))
    sums = name in ("sum", "each")
    right = torch.autograd.grad(whole / n_global if sums else whole, list(net.parameters()))
    ddp = DistributedDataParallel(net)
    with audit(ddp, loss, torch.optim.SGD(net.parameters(), lr=0.1)) as a:
        a.saw(x, y, n=count(y))
        own = loss(ddp(x), y).sum()
        weight = 2 / n_global if sums else 2 * n_local / n_global
        wrong = 1 / n_local if sums else 1  # DDP's mean of the ranks' means
        (own * (weight if exact else wrong)).backward()
        a.compare()
    applied = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    reference = torch.cat([g.flatten() for g in right])
    return a.worst().grad_rel_err, float((applied - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_right_loops_raise_no_false_alarm_and_wrong_ones_read_their_true_distance(
    world: Callable[[int], World], name: str
) -> None:
    for read, distance in world(2).run(judged, name, True):
        assert distance < 1e-12
        assert read < 1e-12
    for read, distance in world(2).run(judged, name, False):
        assert distance > 0.05
        assert read == pytest.approx(distance, rel=1e-9)


class Reentrant(nn.Linear):
    """Recomputes its activations as `torch.utils.checkpoint` did at first."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


def unsupported() -> list[str]:
    said = []
    labels = torch.tensor([0, 1])
    torch.manual_seed(0)
    for net, x in (
        (RandomForward(3, 2), torch.ones(2, 3)),
        (Reentrant(3, 2), torch.ones(2, 3)),
        (nn.Embedding(3, 2, sparse=True), labels),
    ):
        loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1)
        mine = slice(2 * (torch.distributed.get_rank() == 0))  # an empty batch on rank 1
        with pytest.raises(ValueError) as error, audit(net, loss, optimizer) as a:
            a.saw(x[mine], labels[mine])
            loss(net(x), labels).backward()
            optimizer.step()
        said.append(str(error.value))
    for shard in (fully_shard, partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)):
        with pytest.raises(ValueError) as error:
            Audit(shard(nn.Linear(3, 2)), nn.CrossEntropyLoss())
        said.append(str(error.value))
    return said


def test_what_is_not_supported_is_one_line_on_every_rank_also_where_one_alone_finds_it(
    world: Callable[[int], World],
) -> None:
    sharded = "FSDP's sharded parameters cannot be audited: audit the same loop under DDP"
    assert world(2).run(unsupported) == 2 * [
        [
            "the net's forward draws random numbers: no audit in training mode",
            "reentrant checkpointing cannot be audited: call checkpoint(..., use_reentrant=False)",
            "sparse gradients cannot be audited: build the embedding with sparse=False",
            sharded,
            sharded,
        ]
    ]


def buffers_apart() -> float:
    net = nn.BatchNorm1d(1)
    net.running_mean.fill_(torch.distributed.get_rank() * 0.25)
    return replica_drift(net)


def test_the_drift_holds_buffers(world: Callable[[int], World]) -> None:
    assert world(2).run(buffers_apart) == [0.25, 0.25]


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (F.cross_entropy, "cross_entropy"),
        (nn.KLDivLoss(reduction="sum"), "KLDivLoss"),  # torch has two means of it
        (nn.KLDivLoss(reduction="none"), "KLDivLoss"),
    ],
)
def test_a_loss_without_a_known_count_is_refused_in_one_line(loss: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"how many losses {name} counts: give saw\(inputs, y, n=...\)"):
        Audit(nn.Linear(3, 2), loss).saw(torch.ones(4, 3), torch.ones(4, 2))


def test_no_number_is_the_worst_reading() -> None:
    a = Audit(nn.Linear(3, 2), nn.CrossEntropyLoss())
    a.readings = [Reading(error, 1.0, 1.0, 0.0, 0) for error in (0.0, float("nan"), 0.0)]
    assert a.worst() is a.readings[1]


_labels = torch.tensor([0, 2, 1, -100])
_probabilities = torch.tensor([[0.2, 0.3, 0.5]]).repeat(4, 1)


@pytest.mark.parametrize(
    ("loss", "y", "divisor"),
    [
        (nn.CrossEntropyLoss(), _labels, 3),
        (nn.CrossEntropyLoss(ignore_index=2), torch.tensor([0, 2, 1, 2]), 2),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])), _labels, 7),  # 1 + 4 + 2
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]), label_smoothing=0.1), _labels, 7),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])), _probabilities, 4),
        (nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 4.0])), _labels, 7),
        (nn.KLDivLoss(), _probabilities, 12),
        (nn.KLDivLoss(reduction="batchmean"), _probabilities, 4),
        (nn.MultiMarginLoss(), torch.tensor([0, 2, 1, 0]), 4),
        (nn.MultiLabelMarginLoss(), torch.tensor([[0, -1, 1]] * 4), 4),
        (nn.MultiLabelSoftMarginLoss(), (_probabilities > 0.25).float(), 4),
        (nn.MSELoss(), _probabilities, 12),
        (nn.L1Loss(), _probabilities, 12),
        (nn.SmoothL1Loss(), _probabilities, 12),
        (nn.HuberLoss(), _probabilities, 12),
        (nn.PoissonNLLLoss(), _probabilities, 12),
        (nn.BCELoss(), _probabilities, 12),
        (nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 2.0, 4.0])), _probabilities, 12),
        (nn.SoftMarginLoss(), 2 * (_probabilities > 0.25).float() - 1, 12),
        (nn.HingeEmbeddingLoss(), 2 * (_probabilities > 0.25).float() - 1, 12),
    ],
)
def test_a_loss_of_torch_nn_is_divided_by_what_the_table_says(loss: nn.Module, y: Tensor, divisor: int) -> None:
    torch.manual_seed(0)
    output = torch.rand(4, 3)
    summed = copy.copy(loss)
    summed.reduction = "sum"
    assert float(summed(output, y) / loss(output, y)) == pytest.approx(divisor, rel=1e-5)  # torch's own
    assert float(COUNTS[type(loss)](loss, output, y)) == divisor


def masked_mean(output: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    labels, mask = y
    return (F.cross_entropy(output, labels, reduction="none") * mask).sum() / mask.sum()


def test_a_net_and_a_loss_are_called_as_their_user_calls_them() -> None:
    net = nn.Bilinear(2, 2, 3)
    x, y = torch.rand(4, 2), (torch.tensor([0, 2, 1, 0]), torch.tensor([1, 1, 0, 1]))
    for inputs in ((x, x), {"input1": x, "input2": x}):
        a = Audit(net, masked_mean)
        a.saw(inputs, y, n=3)
        net.zero_grad()
        masked_mean(net(x, x), y).backward()
        a.compare()
        assert a.collect()[0].grad_rel_err < 1e-6


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (nn.Dropout(0.1), "Dropout '1' makes the forward random"),
        (nn.BatchNorm1d(2), "BatchNorm1d '1' makes the forward depend on the batch"),
        (nn.BatchNorm1d(2, track_running_stats=False).eval(), "BatchNorm1d '1' makes the forward depend on the batch"),
        (RandomForward(2, 2), "draws random numbers"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "writes to its buffers"),
    ],
)
def test_a_net_without_one_gradient_is_refused(part: nn.Module, said: str) -> None:
    net = nn.Sequential(nn.Linear(3, 2), part)
    a = Audit(net, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=said):
        a.saw(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))
        a.compare()
        a.collect()


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(6, 2), nn.BatchNorm1d(2).eval(), nn.Dropout(0.0)),
        nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Flatten(), nn.Linear(6, 2)),  # of each example alone
    ],
    ids=["frozen statistics, dropout of 0", "instance norm"],
)
def test_a_net_with_one_gradient_is_accepted(net: nn.Module) -> None:
    Audit(net, nn.CrossEntropyLoss()).saw(torch.randn(4, 3, 2), torch.zeros(4, dtype=torch.long))


def test_a_step_that_a_scaler_skips_does_not_count_in_the_next_if_compared_after_unscaling() -> None:
    net, loss = nn.Linear(3, 2), nn.CrossEntropyLoss()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=16.0)
    with audit(net, loss, optimizer) as a:
        for overflows in (False, True, False):
            x, y = torch.randn(4, 3), torch.arange(4) % 2
            a.saw(x, y)
            optimizer.zero_grad()
            scaler.scale(loss(net(x), y)).backward()
            if overflows:
                net.weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            a.compare()
            scaler.step(optimizer)
            scaler.update()
    first, skipped, after = (reading.grad_rel_err for reading in a.readings)
    assert max(first, after) < 1e-6
    assert skipped == torch.inf


def test_uneven_steps_are_audited_whatever_the_cadence_and_an_excess_ends_the_run(tmp_path: Path) -> None:
    flags = ["--batch-size", "128", "--train-examples", "601", "--accumulate", "2", "--tail", "ragged", "--epochs", "1"]
    right = launch(
        LAUNCHES["python"], tmp_path, *flags, "--audit-every", "3", "--audit-fail", "1e-5", "--run-name", "a"
    )
    assert right.returncode == 0, right.stderr
    audited = [row["step"] for row in rows_of(tmp_path / "a") if "audit/grad_rel_err" in row]
    assert audited == [3, 5]  # the last has 64 and 25
    last = right.stdout.splitlines()[-1]
    assert last.startswith("worst audited step: ")
    assert last.endswith("off one process's: only rounding is left")

    wrong = launch(
        LAUNCHES["python"], tmp_path, *flags, "--normalize", "rank", "--audit-every", "100", "--audit-fail", "1e-5",
        "--run-name", "b",
    )  # fmt: skip
    assert wrong.returncode == 1
    (said,) = wrong.stderr.splitlines()
    assert said.startswith("train.py: audit failed: at step 5 rank 0's gradient is ")
    assert "under --reduction mean --normalize rank --tail ragged --updater torch, after step 5" in said
    error = rows_of(tmp_path / "b")[-1]["audit/grad_rel_err"]
    assert error > 0.01
    last = wrong.stdout.splitlines()[-1]
    assert last.startswith(f"worst audited step: 5, where the gradient is {error:.3g} (relative) off one process's")
    assert last.endswith("caused by --normalize rank --reduction mean --updater torch with --tail ragged")


def epochs_of(epochs: list[list[list[int]]]) -> list[Shown]:
    a = Audit(nn.Linear(1, 2), nn.CrossEntropyLoss())
    shown = []
    for ranks in epochs:
        for i in ranks[torch.distributed.get_rank()]:
            a.saw(torch.full((1, 1), float(i)), torch.zeros(1, dtype=torch.long))
        shown.append(a.end_epoch())
    return shown


@pytest.mark.parametrize(
    ("epochs", "repeated", "same_order"),
    [
        pytest.param([[[0, 2, 4], [1, 3, 5]], [[2, 4, 0], [1, 3, 5]]], 0, False, id="split and shuffled"),
        pytest.param([[[0, 2, 4], [1, 3, 5]], [[0, 2, 4], [1, 3, 5]]], 0, True, id="set_epoch forgotten"),
        pytest.param([[[0, 1, 2, 3], [0, 1, 2, 3]], [[3, 2, 1, 0], [3, 2, 1, 0]]], 4, False, id="not split"),
        pytest.param([[[0, 1, 2], [1, 4, 0]], [[0, 1, 3], [1, 4, 0]]], 2, False, id="seeded by rank"),
    ],
)
def test_the_epoch_tells_who_sees_which_examples(
    world: Callable[[int], World], epochs: list[list[list[int]]], repeated: int, same_order: bool
) -> None:
    for first, second in world(2).run(epochs_of, epochs):
        assert (first.repeated, second.repeated) == (repeated, repeated)
        assert (first.same_order, second.same_order) == (False, same_order)


def test_an_audited_step_waits_for_no_device() -> None:
    """On `meta`, where a value that is read raises."""
    weight = torch.ones(2, device="meta")
    net, loss = nn.Linear(3, 2, device="meta"), nn.CrossEntropyLoss(weight=weight)
    x, y = torch.ones(4, 3, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    a = Audit(net, loss)
    a.saw(x, y)
    a.saw(x, y, n=torch.ones((), device="meta"))
    loss(net(x), y).backward()
    a.compare()
    assert len(a.measured) == 1


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("mps")])
def test_the_widest_float_is_the_books(device: torch.device) -> None:
    assert loop.audit.widest(device) == loop.book.widest(device)
