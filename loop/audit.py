"""Is the gradient about to be applied the one that a single process would apply? Measured in a live run.

`train.py --audit-every` uses it; around a loop of your own, under DDP or Accelerate:

    with audit(net, loss, optimizer) as a:
        for x, y in loader:
            a.saw(x, y)                      # each micro-batch of a step to be audited, on every rank
            loss(net(x), y).backward()
            optimizer.step()                 # compared here, just before; or call a.compare() before clipping
            optimizer.zero_grad()
        print(a.end_epoch())                 # which examples came twice; whether in the last epoch's order
    print(a.worst())

The mean of masked or weighted losses is taken over their number or their weights, which the audit must know. It reads
them from a loss of torch.nn (`COUNTS` lists which); for any other callable, a function too, give them to each `saw`:

    with audit(net, masked_mean, optimizer) as a:                          # masked_mean(net(x), (y, mask))
        a.saw(x, (y, mask), n=mask.sum())

A loss that returns a sum has `reduction="sum"`. The step is compared with the mean over all examples, whatever the loss
returns, or with their sum under `target="sum"`.

Comparing is a collective: a step that one rank is shown must be shown to all, or the others wait. A rank without an
example shows one whose labels are all masked (n=0), or an empty batch.

The reference uses neither DDP nor any count of ranks or micro-batches: every rank back-propagates the *summed* loss of
its own examples once more, through the bare module, and the sums are added over ranks. That is the gradient of all the
step's examples together; divided by how many there are, what one process applies. (Where the replicas have drifted
apart no single process has these parameters: each example's gradient is then taken at its own rank's.)

A loss that joins examples of several ranks (a contrastive loss over gathered embeddings) cannot be judged: the
reference adds up what each rank computes alone.

A rightly reduced gradient is off by rounding alone: on the book's nets, 256 examples, W = 2, by 2e-16 in float64, 1e-7
in float32, 4e-3 under bf16's autocast; the project's tests bound them by 1e-12, 1e-5 and 2e-2.

From chapter3-data-parallel, under the MIT licence: copyright (c) 2026, the authors of that project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[Any, Any], Tensor]
Target = Literal["mean", "sum"]
Reduction = Literal["mean", "sum", "none"]


def _classes(loss: Any, output: Tensor, y: Tensor) -> Tensor | int:
    """Return the summed class weights of the labels that are not ignored; of class probabilities, their number."""
    if y.is_floating_point():
        return y.numel() // output.shape[min(1, output.dim() - 1)]
    kept = y != loss.ignore_index
    weights: Tensor = kept if loss.weight is None else loss.weight[torch.where(kept, y, 0)] * kept
    return weights.sum(dtype=widest(y.device))


def _examples(loss: Any, output: Tensor, y: Tensor) -> int:
    """Return how many losses there are, one for each example. output: (B, C), or (C,) for one example."""
    return len(output) if output.dim() > 1 else 1


def _entries(loss: Any, output: Tensor, y: Tensor) -> int:
    """Return how many losses there are, one for each entry."""
    return math.prod(torch.broadcast_shapes(output.shape, y.shape))


# What the mean of a loss is taken over, by its exact type: a subclass may compute something else.
COUNTS: dict[type, Callable[[Any, Tensor, Tensor], Tensor | int]] = {
    nn.KLDivLoss: lambda loss, *of: (_examples if loss.reduction == "batchmean" else _entries)(loss, *of),
    **dict.fromkeys((nn.CrossEntropyLoss, nn.NLLLoss), _classes),
    **dict.fromkeys((nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss), _examples),
    **dict.fromkeys((nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss), _entries),
    **dict.fromkeys((nn.BCELoss, nn.BCEWithLogitsLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss), _entries),
}


class Reading(NamedTuple):
    """The figures of an audited step, those of the worst rank; every rank gets the same.

    grad_rel_err: |applied - reference| / |reference|. grad_cosine: of the angle between them, 0 where one is zero.
    grad_scale: |applied| / |mean gradient|. replica_drift: largest difference of a parameter or buffer of any rank from
    rank 0's.
    """

    grad_rel_err: float
    grad_cosine: float
    grad_scale: float
    replica_drift: float
    rank: int


class Shown(NamedTuple):
    """Examples that `saw` was shown on all ranks: how many, how many came before, whether in the last epoch's order."""

    examples: int
    repeated: int
    same_order: bool


class Audit:
    """Compares applied gradients with what one process would apply; changes neither weights nor gradients.

    net: a module, under DDP where there are several ranks; its parameters must be whole on every rank.
    loss: takes (net(inputs), y). reduction: what it returns: the mean of the losses, their sum, or ("none") each of
    them; default: what a loss of torch.nn says of itself, "mean" for any other callable.
    target: whether a step shall apply the mean or the sum of its examples' gradients.
    readings: one for each step compared, as far as they are collected.

    Raises ValueError for sharded parameters (FSDP, `fully_shard`).
    """

    def __init__(
        self, net: nn.Module, loss: Loss, *, reduction: Reduction | None = None, target: Target = "mean"
    ) -> None:
        self.module = bare(net)
        self.loss, self.target, self.count = loss, target, COUNTS.get(type(loss))
        self.returns = reduction or (getattr(loss, "reduction", "mean") if self.count else "mean")
        if isinstance(loss, nn.KLDivLoss) and self.returns in ("sum", "none"):
            self.count = None  # torch has two means of it
        if any(type(part).__name__ == "FullyShardedDataParallel" for part in net.modules()) or any(
            hasattr(param, "full_tensor") for param in net.parameters()
        ):
            raise ValueError("FSDP's sharded parameters cannot be audited: audit the same loop under DDP")
        self.params = [param for param in self.module.parameters() if param.requires_grad]
        self.readings: list[Reading] = []
        self.measured: list[Tensor] = []  # (4,) a step: on this rank, of the steps not in `readings` yet
        self.total: Tensor | None = None  # of the gradients of all that this rank saw of the step
        self.n: Tensor = torch.zeros(())
        self.fault = ""  # why this rank cannot be audited
        self.hashes: list[Tensor] = []  # of the examples of the epoch under way, on this rank
        self.last_epoch: list[list[int]] | None = None

    def saw(self, inputs: Any, y: Any, n: float | Tensor | None = None) -> None:
        """Note a micro-batch of the step under way, perhaps an empty one, and back-propagate its summed loss.

        inputs: what the net is called with: a tensor, a tuple or list of arguments, or a dict of named ones.
        n: how many losses a mean is taken over, or their summed weights. Default: read from a loss in `COUNTS`.

        Raises ValueError for another loss without n; for a net whose forward is random (dropout in training mode) or
        depends on the batch (BatchNorm, unless its statistics are frozen): there is no one gradient to compare with.
        `collect` raises, on every rank, what one rank finds in the computation itself.
        """
        self.hashes.append(_hashes([*_tensors(inputs), *_tensors(y)]))
        self.add(inputs, y, n)

    def add(self, inputs: Any, y: Any, n: float | Tensor | None = None) -> None:
        """Note a micro-batch as `saw` does, but do not hash its examples: `end_epoch` does not count them."""
        _refuse_unrepeatable(self.module)
        if n is None and self.count is None:
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise ValueError(f"the audit cannot know how many losses {name} counts: give saw(inputs, y, n=...)")
        if self.total is None:
            self.total = torch.zeros_like(_flat(self.params))
            self.n = torch.zeros((), dtype=widest(self.total.device), device=self.total.device)
        if self.fault or not len(_tensors(inputs)[0]):
            return
        random_before, buffers_before = _random_state(self.total.device), _buffer_versions(self.module)
        output = _call(self.module, inputs)
        losses = self.loss(output, y)
        if not torch.equal(random_before, _random_state(self.total.device)):
            self.fault = "the net's forward draws random numbers: no audit in training mode"
        elif _buffer_versions(self.module) != buffers_before:
            self.fault = "the net's forward writes to its buffers: to audit it would change the training"
        if n is None:
            assert self.count
            n = self.count(self.loss, output, y)
        n = torch.zeros_like(self.n) + n  # on the device, which nothing here waits for
        loss_sum = losses.sum() if losses.dim() or self.returns in ("sum", "none") else losses * n
        if _is_reentrant(loss_sum):
            self.fault = "reentrant checkpointing cannot be audited: call checkpoint(..., use_reentrant=False)"
            return
        # runs none of DDP's hooks and leaves .grad alone
        grads = torch.autograd.grad(loss_sum, self.params, materialize_grads=True)
        if any(grad.layout != torch.strided for grad in grads):
            self.fault = "sparse gradients cannot be audited: build the embedding with sparse=False"
            return
        self.total += torch.where(n == 0, 0.0, _flat(grads))  # a mean over none is NaN
        self.n += n

    def compare(self, divisor: float = 1) -> None:
        """Compare the gradient in `.grad` with the reference, unless nothing of this step was seen: one collective.

        divisor: what the update divides the gradient by; 0 stands for no update.
        """
        if self.total is None:
            return
        own = _flat(_state(self.module))
        first = own if not _several() or dist.get_rank() == 0 else torch.zeros_like(own)
        bundle = torch.cat([self.total, first, self.n.to(own.dtype).view(1)])
        if _several():
            dist.all_reduce(bundle)
        total, first, n = bundle.split([len(self.total), len(own), 1])
        self.total = None
        wide = widest(own.device)
        mean = total / torch.where(n == 0, 1, n)
        reference = total if self.target == "sum" else mean
        grads = _flat(torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.params)
        applied = grads / divisor if divisor else torch.zeros_like(grads)
        error = _ratio(_norm(applied - reference), _norm(reference))
        cosine = _ratio(applied.to(wide) @ reference.to(wide), _norm(applied) * _norm(reference))
        scale = _ratio(_norm(applied), _norm(mean))
        self.measured.append(torch.stack([error, cosine, scale, (own - first).abs().max().to(wide)]))

    def collect(self) -> list[Reading]:
        """Return the readings of the steps compared since the last call: one collective, none without such steps.

        Raises ValueError, on every rank, where any rank has found that its steps cannot be audited.
        """
        if not self.measured:
            return []
        steps, self.measured = torch.stack(self.measured), []
        steps = torch.cat([steps, torch.full_like(steps[:, :1], bool(self.fault))], dim=1)
        ranks = [steps]
        if _several():
            ranks = [torch.empty_like(steps) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, steps)
        gathered = torch.stack(ranks, dim=1).cpu()
        if gathered[..., 4].any():
            raise ValueError(next(filter(None, _gathered(self.fault))))
        new = [_worst(step) for step in gathered[..., :4]]
        self.readings += new
        return new

    def end_epoch(self) -> Shown:
        """Return what is repeated among the examples since the last call, from a hash of each: one collective.

        It needs `saw` in every step of the epoch. A sampler seeded by rank or a stream that is not split repeats
        examples; without `set_epoch` the order is the last epoch's, as it is where nothing is shuffled. Equal examples
        count as repeated; augmentation makes one example differ each time, so that neither is found.
        """
        ranks: list[list[int]] = _gathered(torch.cat(self.hashes).tolist() if self.hashes else [])
        shown = [example for rank in ranks for example in rank]
        same_order = ranks == self.last_epoch
        self.hashes, self.last_epoch = [], ranks
        return Shown(len(shown), len(shown) - len(set(shown)), same_order)

    def worst(self) -> Reading:
        """Return the collected reading with the largest error; NaN counts as infinite."""
        if not self.readings:
            raise ValueError("no step was compared: call saw() in each step to be audited, before it is taken")
        return max(self.readings, key=lambda reading: or_infinite(reading.grad_rel_err))


@contextmanager
def audit(
    net: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    reduction: Reduction | None = None,
    target: Target = "mean",
) -> Iterator[Audit]:
    """Audit each step of the optimizer, torch's or Accelerate's, that `saw` is shown (module docstring).

    Under fp16's GradScaler the optimizer is not told of a step that overflow skips, and its examples would count in the
    next: there call `compare` in every step, after unscaling.
    """
    watching = Audit(net, loss, reduction=reduction, target=target)

    def before_step(*_: object) -> None:
        watching.compare()
        if not watching.readings:
            watching.collect()  # a net that cannot be audited is refused at the first step

    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper holds the one that steps
    hook = inner.register_step_pre_hook(before_step)
    try:
        yield watching
        watching.collect()
    finally:
        hook.remove()


def bare(net: nn.Module) -> nn.Module:
    """Return the module itself, without DDP."""
    module: nn.Module = net.module if isinstance(net, DistributedDataParallel) else net
    return module


def replica_drift(net: nn.Module) -> float:
    """Return the largest difference of a parameter or buffer between any rank and rank 0; 0 on one rank.

    Every rank must call. Two collectives: rank 0's are broadcast, the largest difference is reduced.
    """
    if not _several():
        return 0.0
    own = _flat(_state(net))
    first = own.clone()
    dist.broadcast(first, src=0)
    drift = (own - first).abs().max()
    dist.all_reduce(drift, op=dist.ReduceOp.MAX)
    return float(drift)


def _refuse_unrepeatable(module: nn.Module) -> None:
    for name, part in module.named_modules():
        batch_norm = isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
        if batch_norm or (isinstance(part, _DropoutNd) and part.training and part.p > 0):
            why = "depend on the batch" if batch_norm else "random"
            raise ValueError(f"{type(part).__name__} {name!r} makes the forward {why}: no audit in training mode")


def _worst(ranks: Tensor) -> Reading:
    """Return the reading of the rank whose error is the largest, with the largest drift of any. ranks: (W, 4)."""
    worst = int(ranks[:, 0].nan_to_num(nan=torch.inf).argmax())
    error, cosine, scale, _ = ranks[worst].tolist()
    return Reading(error, cosine, scale, float(ranks[:, 3].max()), worst)


def _gathered(value: Any) -> list[Any]:
    """Return every rank's value, in rank order."""
    if not _several():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the tensors' values in one vector, of float32 at least, cut from the graph."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _norm(vector: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector, dtype=widest(vector.device))
    return norm


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b; 0 / 0 is 0."""
    return torch.where(a == 0, 0.0, a / b)


def _buffer_versions(module: nn.Module) -> list[tuple[int, int]]:
    """Return what changes when a buffer is replaced or written to in place."""
    return [(id(buffer), buffer._version) for buffer in module.buffers()]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _is_reentrant(loss_sum: Tensor) -> bool:
    """Return whether a part of the graph is a reentrant checkpoint, in which `autograd.grad` finds no parameter."""
    seen, stack = set(), [loss_sum.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return any(node.name() == "CheckpointFunctionBackward" for node in seen)


def _state(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def _call(net: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, (tuple, list)) else net(inputs)


def _tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else [value]
    return [tensor for tensor in values if isinstance(tensor, Tensor) and tensor.dim()]


def _hashes(tensors: list[Tensor]) -> Tensor:
    """Return an integer for each example: a fixed random combination of its bytes, modulo 2^64. tensors: (B, ...)."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(len(tensors[0]), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        data = tensor.detach().reshape(len(tensor), tensor[:1].numel()).contiguous().view(torch.uint8).long()
        factors = torch.randint(2**62, data.shape[1:], generator=generator)
        sums += (data * factors.to(data.device, non_blocking=True)).sum(1)
    return sums


def or_infinite(error: float) -> float:
    """Return the error, or infinity for NaN."""
    return math.inf if math.isnan(error) else error


def widest(device: torch.device) -> torch.dtype:
    """Return the device's widest float: float64, but on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
