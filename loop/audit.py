"""Is the gradient about to be applied the one that a single process would apply? Measured in a live run.

`train.py --audit-every` uses it; around a loop of your own, under DDP or Accelerate:

    with audit(net, loss, optimizer) as a:
        for x, y in loader:
            a.saw(x, y)                      # each micro-batch of a step to be audited, on every rank
            loss(net(x), y).backward()
            optimizer.step()                 # compared here, just before; or call a.compare() before clipping
            optimizer.zero_grad()
    print(max(reading.grad_rel_err for reading in a.readings))

Comparing is a collective: a step that one rank is shown must be shown to all, where a rank has no example by an empty
batch, or the others wait for it.

The reference uses neither DDP nor any count of ranks or micro-batches: every rank back-propagates the *summed* loss of
its own examples once more, through the bare module, and the sums are added over ranks. That is the gradient of all the
step's examples together; divided by how many there are, what one process applies. (Where the replicas have drifted
apart no one process has such parameters: each example's gradient is then its own rank's.)

A rightly reduced gradient is off by rounding alone: on the book's nets, 256 examples, W = 2, by 2e-16 in float64, 1e-7
in float32, 4e-3 under bf16's autocast. tests/test_audit.py bounds them by 1e-12, 1e-5 and 2e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from loop.book import widest
from loop.reduction import Reduction


class Reading(NamedTuple):
    """What the audit of a step came to: of the rank whose gradient is furthest off, the same on all ranks.

    grad_rel_err: |applied - reference| / |reference|. grad_cosine: of the angle between them, 0 where one is zero.
    grad_scale: |applied| / |mean gradient|. replica_drift: largest difference of a parameter of any rank from rank 0's.
    """

    grad_rel_err: float
    grad_cosine: float
    grad_scale: float
    replica_drift: float
    rank: int


class Audit:
    """Compares applied gradients with what one process would apply; changes neither weights nor gradients.

    net: a module, under DDP where there are several ranks; its parameters must be whole on every rank.
    loss: takes (net(x), y); returns one loss an example, or their mean or sum, as `reduction` says.
    reduction: whether a step is meant to apply the mean or the sum of its examples' gradients.
    readings: one for each step compared, as far as they are collected.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], reduction: Reduction = "mean") -> None:
        self.module = bare(net)
        self.loss, self.reduction = loss, reduction
        self.params = [param for param in self.module.parameters() if param.requires_grad]
        self.readings: list[Reading] = []
        self.measured: list[Tensor] = []  # (4,) a step: on this rank, of the steps not in `readings` yet
        self.total: Tensor | None = None  # of the gradients of all that this rank saw of the step
        self.n = 0.0
        self.sums: _SumsOverRanks | None = None

    def saw(self, x: Tensor, y: Tensor, n: float | Tensor | None = None, *, last: bool = False) -> None:
        """Note a micro-batch of the step under way, perhaps an empty one, and back-propagate its summed loss.

        n: how many losses its mean is taken over, or their summed weights. Default: as many as y has entries, but for
        those equal to the loss's `ignore_index`. last: no more of this step is to come, on any rank: the sum over ranks
        can begin while the training goes on.

        Raises ValueError for a net whose forward draws random numbers (dropout in training mode) or depends on the
        batch (BatchNorm, but for frozen statistics): for those there is no one gradient to compare with. And for one
        that keeps running statistics of another kind: a second forward would change them.
        """
        _refuse_unrepeatable(self.module)
        if self.total is None:
            self.total = torch.zeros_like(_flat(self.params))
        if n is None:
            ignored = getattr(self.loss, "ignore_index", None)
            n = y.numel() if ignored is None else int(torch.ne(y, ignored).sum())
        if n:
            self.total += self._summed_gradient(x, y, n)
            self.n += float(n)
        if last:
            self.sums = _SumsOverRanks(self.total, self.n, self.params)

    def _summed_gradient(self, x: Tensor, y: Tensor, n: float | Tensor) -> Tensor:
        random_before, buffers_before = _random_state(x.device), _buffer_versions(self.module)
        losses = self.loss(self.module(x), y)
        if not torch.equal(random_before, _random_state(x.device)):
            raise ValueError("the net's forward draws random numbers: no audit in training mode")
        if _buffer_versions(self.module) != buffers_before:
            raise ValueError("the net's forward writes to its buffers: to audit it would change the training")
        loss_sum = losses.sum() if losses.dim() or self.reduction == "sum" else losses * n
        # autograd.grad runs none of DDP's hooks and leaves .grad alone
        return _flat(torch.autograd.grad(loss_sum, self.params, materialize_grads=True))

    def compare(self, divisor: float = 1) -> None:
        """Compare the gradient in `.grad` with the reference, unless nothing of this step was seen: one collective.

        divisor: what the update divides the gradient by; 0 stands for no update.
        """
        if self.total is None:
            return
        own = _flat(self.params)
        wide = widest(own.device)
        total, first, n = (self.sums or _SumsOverRanks(self.total, self.n, self.params)).wait()
        self.total, self.n, self.sums = None, 0.0, None
        mean = total / n
        reference = total if self.reduction == "sum" else mean
        grads = _flat(torch.zeros_like(p) if p.grad is None else p.grad for p in self.params)
        applied = grads / divisor if divisor else torch.zeros_like(grads)
        error = _ratio(_norm(applied - reference), _norm(reference))
        cosine = _ratio(applied.to(wide) @ reference.to(wide), _norm(applied) * _norm(reference))
        scale = _ratio(_norm(applied), _norm(mean))
        self.measured.append(torch.stack([error, cosine, scale, (own - first).abs().max().to(wide)]))

    def collect(self) -> list[Reading]:
        """Return the readings of the steps compared since the last call: one collective, none without such steps."""
        if not self.measured:
            return []
        mine = torch.stack(self.measured)
        ranks = [mine]
        if _several():
            ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, mine)
        new = [_worst(step) for step in torch.stack(ranks, dim=1).cpu()]
        self.measured = []
        self.readings += new
        return new


@contextmanager
def audit(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    reduction: Reduction = "mean",
) -> Iterator[Audit]:
    """Audit each step of the optimizer, torch's or Accelerate's, that `saw` is shown (module docstring).

    Under fp16's GradScaler the optimizer is not told of a step that overflow skips, and its examples would count in the
    next: there call `compare` in every step, after unscaling.
    """
    watching = Audit(net, loss, reduction)

    def before_step(*_: object) -> None:
        watching.compare()

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
    """Return the largest difference of a parameter between any rank and rank 0; every rank must call. 0 on one rank.

    Two collectives: rank 0's parameters are broadcast, the largest difference is reduced.
    """
    if not _several():
        return 0.0
    own = _flat(net.parameters())
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


class _SumsOverRanks:
    """One collective under way: the sums over ranks of `total` and `n`, and rank 0's parameters."""

    def __init__(self, total: Tensor, n: float, params: list[nn.Parameter]) -> None:
        own = _flat(params)
        first = own if not _several() or dist.get_rank() == 0 else torch.zeros_like(own)
        self.bundle = torch.cat([total, first, total.new_full((1,), n)])
        self.work = dist.all_reduce(self.bundle, async_op=True) if _several() else None

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return total, rank 0's parameters in one vector, and n, 1 for 0."""
        if self.work:
            self.work.wait()
        half = len(self.bundle) // 2
        total, first, n = self.bundle.split([half, half, 1])
        return total, first, n + (n == 0)


def _worst(ranks: Tensor) -> Reading:
    """Return the readings of the rank whose error is the largest, with the largest drift of any. ranks: (W, 4)."""
    worst = int(ranks[:, 0].nan_to_num(nan=torch.inf).argmax())
    error, cosine, scale, _ = ranks[worst].tolist()
    return Reading(error, cosine, scale, float(ranks[:, 3].max()), worst)


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
