"""Does the number of ranks change what a training does, and if so, why? A test for any loop, on CPUs, without a GPU.

    def train(batches):                       # at the top level of a module: fresh processes import it by name
        net = DistributedDataParallel(...)    # or Accelerate, Lightning, FSDP2: whatever torchrun can start
        for micro_batches in batches:         # a step: this rank's K pairs (x, y), some perhaps without an example
            ...
        return net                            # or a state_dict

    def test_parity():
        assert_parity(train, data=(x, y), batch_size=16, masked=-100)

    python -m loop.parity my_module:train --data my_module:data --batch-size 16         # the same from a shell

`train` runs as 1, 2 and 3 processes with the variables that torchrun sets. One process takes each step in a single
batch; the others are dealt the same examples in the ways that break loops: uneven shares, a rank without an example, a
micro-batch whose labels are all `masked`. A `train()` without an argument deals out its own data instead; then fewer
causes can be told apart. Compared are the weights and the gradient before each of the first steps (before clipping),
and the weights in the end. Where they differ by more than rounding allows, the cause is named: `diagnose`.

What rounding allows is measured: one process trains again, several times, with its weights changed in their last bit.

The file needs torch alone and is made to be copied.

From chapter3-data-parallel, under the MIT licence: copyright (c) 2026, the authors of that project.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate as running_sum
from itertools import chain, pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Batch = tuple[Tensor, Tensor]
Steps = list[list[Batch]]  # for one rank: its K micro-batches of each step

FIRST = 8  # steps whose gradients are compared
REPEATS = 3  # trainings with weights changed in the last bit
MARGIN = 10  # times the largest difference among these is still rounding
COARSE = 0.02  # of a gradient's length: what differs by less may be a fault
MICRO_BATCHES = 2
SLOW_TO_IMPORT = ("torch._dynamo", "torch.nn.parallel")  # the first is what an optimizer imports
NO_GPU = ("NCCL", "No CUDA GPUs", "not compiled with CUDA", "no NVIDIA driver", "Invalid device", "device_ids")


# ---- Ranks ----


class RankError(RuntimeError):
    """A rank raised an exception, or ended. The text is its traceback, or what it printed."""


class HangError(TimeoutError):
    """Ranks did not end in time. The text says which, and where each of them waits."""


class Ranks(AbstractContextManager["Ranks"]):
    """Fresh processes on this machine, on CPUs and gloo, with the variables that torchrun sets.

    with Ranks(3) as ranks:
        results = ranks.run(function, *args)   # on every rank; in rank order

    preload: modules that are imported once for all ranks of this process, beside torch's. usable: whether every rank
    has answered, so that the next call finds it waiting.
    """

    def __init__(self, world_size: int, preload: Sequence[str] = ()) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([*SLOW_TO_IMPORT, *preload])  # seconds, which each rank would pay
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(world_size)),
            **{"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default", "TORCHELASTIC_RUN_ID": "parity"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            **{"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        }
        self.usable = True
        self.folder = tempfile.TemporaryDirectory()
        self.printed = [Path(self.folder.name, str(rank)) for rank in range(world_size)]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # a rank would import it before `_serve` sets the variables
        try:
            for rank, printed in enumerate(self.printed):
                ours, theirs = context.Pipe()
                environ = variables | dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
                self.processes.append(context.Process(target=_serve, args=(theirs, printed, environ), daemon=True))
                self.processes[-1].start()
                theirs.close()
                self.pipes.append(ours)
        finally:
            sys.modules["__main__"] = main

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Call a function that can be imported by name on every rank; return the results in rank order.

        Raises RankError with the words of the rank that failed first, or died; HangError after `timeout` seconds.
        """
        for pipe in self.pipes:
            with suppress(OSError):  # a rank that has ended is found below
                pipe.send((function, args, timeout))
        answers: list[Any] = [None] * len(self.pipes)
        failed: list[tuple[bool, str]] = []  # is the rank still alive, and its words
        silent: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + timeout + 1  # a second for each to write where it waits
        while silent and (ready := wait(list(silent), max(0, deadline - time.monotonic()))):
            for rank in map(silent.pop, ready):
                alive = True
                try:
                    answers[rank], error = self.pipes[rank].recv()
                except (EOFError, OSError):
                    self.usable = alive = False
                    self.processes[rank].join()
                    error = f"{self._words(rank)}\nended with exit code {self.processes[rank].exitcode}"
                if error:
                    failed.append((alive, f"rank {rank} of {len(self.pipes)}: {error.strip()}"))
                    deadline = min(deadline, time.monotonic() + 1)  # the others may wait for this one for ever
        self.usable = self.usable and not silent
        if failed:  # collectives fail with a rank that has died, and may say so before its end is seen
            raise RankError(min(failed, key=lambda each: each[0])[1])
        if silent:
            waits = (f"rank {r} has not ended after {timeout:g} s; it is in {self._where(r)}" for r in silent.values())
            raise HangError("\n".join(waits))
        return answers

    def close(self) -> None:
        """Kill the ranks, and what they have started."""
        for process in self.processes:
            with suppress(ProcessLookupError, AttributeError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        self.folder.cleanup()

    def _words(self, rank: int) -> str:
        printed = self.printed[rank]
        return printed.read_text(errors="replace").strip() if printed.exists() else ""

    def _where(self, rank: int) -> str:
        stacks = self._words(rank).rpartition("most recent call first")[2].splitlines()
        frames = [line.strip() for line in stacks if line.lstrip().startswith("File") and __file__ not in line]
        own = (frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame)
        return next(own, frames[0] if frames else "its start")


def _serve(pipe: Connection, printed: Path, environ: Mapping[str, str]) -> None:
    """Be a rank: call what is asked for, and answer (result, None) or (None, traceback), until killed."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, which is killed with all that the rank has started
    os.environ.update(environ)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # may have DataLoader's workers
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            function, args, timeout = pipe.recv()
            faulthandler.dump_traceback_later(timeout, file=output)
            answer: tuple[Any, str | None]
            try:
                answer = function(*args), None
            except BaseException as error:
                where = error.__traceback__  # from the first frame on that is not this file's
                while where and where.tb_next and where.tb_frame.f_code.co_filename == __file__:
                    where = where.tb_next
                answer = None, "".join(traceback.format_exception(type(error), error, where))
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)


# ---- On a rank: train, and note what happens ----

What = tuple[str, int]  # what is compared, and in which step


@dataclass
class Trained:
    """What a rank notes of a training.

    noted: in order, "the weights" and "the gradient" (P,) before each of the first steps, of all that the optimizer
    holds, and at FIRST "the last weights", which were returned: float64. steps: how many. shown: a hash of each example
    that the net was called with, by step. eps: of the coarsest number format in use. random: what makes the forward
    random, or depend on the batch.
    """

    noted: dict[What, Tensor] = field(default_factory=dict)
    steps: int = 0
    shown: list[list[int]] = field(default_factory=list)
    eps: float = 0.0
    random: set[str] = field(default_factory=set)


class _Notes:
    """Global hooks that fill a `Trained`; nudge: the eps by which weights are changed at the first forward, seeded."""

    def __init__(self, nudge: float, seed: int) -> None:
        self.trained, self.nudge = Trained(), nudge
        self.generator = torch.Generator().manual_seed(seed)
        self.root: nn.Module | None = None  # the first that is called and has parameters
        self.called: set[nn.Module] = set()  # with whole parameters
        self.seen: set[nn.Parameter] = set()
        self.params: list[Tensor] = []  # of the optimizer that steps
        self.depth = 0  # of optimizers that step within others
        self.shown: list[int] = []
        self.unclipped: dict[Tensor, Tensor] = {}  # by parameter
        nn.modules.module.register_module_forward_pre_hook(self._before_forward)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            clipping = self._noting(getattr(nn.utils, name))
            setattr(nn.utils, name, clipping)
            setattr(nn.utils.clip_grad, name, clipping)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        trained = self.trained
        if (isinstance(module, _DropoutNd) and module.p) or isinstance(module, _BatchNorm):
            trained.random.add(type(module).__name__)
        if torch.is_autocast_enabled("cpu"):
            trained.eps = max(trained.eps, torch.finfo(torch.get_autocast_dtype("cpu")).eps)
        if module not in self.called:
            params = list(module.parameters())
            new = [param for param in params if param not in self.seen and not is_lazy(param)]
            self.seen.update(new)
            for param in new if self.nudge else ():
                self._perturb(param.to_local() if hasattr(param, "to_local") else param)
            if not any(map(is_lazy, params)):
                self.called.add(module)
        if self.root is None and self.seen:
            self.root = module
        if module is self.root and module.training and torch.is_grad_enabled():
            self.shown += _hashes(next((arg for arg in args if isinstance(arg, Tensor) and arg.dim()), None))

    def _perturb(self, param: Tensor) -> None:
        if param.is_floating_point():
            noise = torch.rand(param.shape, generator=self.generator, dtype=torch.float64) - 0.5
            with torch.no_grad():
                param.copy_(param.double() * (1 + 2 * self.nudge * noise))

    def _noting(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        def noting(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            for param in parameters:
                if param.grad is not None:
                    self.unclipped.setdefault(param, _whole(param.grad))
            return clip(parameters, *args, **kwargs)

        return noting

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        trained, self.params = self.trained, [param for group in optimizer.param_groups for param in group["params"]]
        trained.eps = max([trained.eps, *(torch.finfo(param.dtype).eps for param in self.params)])
        if trained.steps < FIRST:
            trained.noted["the weights", trained.steps] = _flat(map(_whole, self.params))
        if not (args[1:] or kwargs):  # what a closure computes is there after the step
            self._note()

    def _after_step(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:
            if len(self.trained.shown) == self.trained.steps:
                self._note()
            self.trained.steps += 1

    def _note(self) -> None:
        if self.trained.steps < FIRST:
            grads = (self.unclipped.get(param, param.grad) for param in self.params)
            noted = (
                torch.zeros_like(_whole(param)) if grad is None else _whole(grad)
                for param, grad in zip(self.params, grads, strict=True)
            )
            self.trained.noted["the gradient", self.trained.steps] = _flat(noted)
        self.trained.shown.append(self.shown)
        self.shown, self.unclipped = [], {}


def _train(target: str, dealt: list[Steps] | None, nudge: float = 0.0, seed: int = 0) -> bytes:
    """Train on this rank; return what was noted, saved: nothing stays in memory that ranks share."""
    notes = _Notes(nudge, seed)  # before the training's own imports
    function, trained = _import(target), notes.trained
    result = function() if dealt is None else function(dealt[int(os.environ["RANK"])])
    state = result.state_dict() if isinstance(result, nn.Module) else result
    if not isinstance(state, Mapping):
        raise TypeError(f"{target} must return its net or a state_dict, not {type(result).__name__}")
    if last := list(_floats(state)):  # with FSDP, rank 0 alone may have a full one
        trained.eps = max([trained.eps, *(torch.finfo(value.dtype).eps for value in last)])
        trained.noted["the last weights", FIRST] = _flat(map(_whole, last))
    buffer = io.BytesIO()
    torch.save(vars(trained), buffer)
    return buffer.getvalue()


def _floats(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a state_dict, of those in it too."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _floats(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def _whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor's values, gathered where FSDP2 has sharded it."""
    tensor = tensor.detach()
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.to_dense().cpu().clone()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def _hashes(inputs: Tensor | None) -> list[int]:
    """Return an integer for each example: a fixed random combination of its bytes, modulo 2^64."""
    if inputs is None or not inputs.numel():
        return []
    data = inputs.detach().reshape(len(inputs), -1).contiguous().view(torch.uint8).long()
    factors = torch.randint(2**62, data.shape[1:], generator=torch.Generator().manual_seed(0))
    return list((data * factors).sum(1).tolist())


def _import(target: str) -> Any:
    """Return what a module:name stands for, or a program.py:name, which is the file of a program that was started."""
    module, _, name = target.rpartition(":")
    if not (module and name):
        raise ValueError(f"{target}: not of the form module:name")
    if module.endswith(".py"):
        found: Any = ModuleType("__parity_main__")
        sys.modules[found.__name__], found.__file__ = found, module
        exec(compile(Path(module).read_text(encoding="utf-8"), module, "exec"), vars(found))
    else:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _target(function: Callable[..., Any]) -> str:
    """Return the name by which `_import` finds a function in a fresh process."""
    name, module = getattr(function, "__qualname__", "<"), getattr(function, "__module__", "")
    if module == "__main__":
        main: Any = sys.modules["__main__"]
        module = main.__spec__.name if main.__spec__ else str(Path(getattr(main, "__file__", "")).absolute())
        if main.__spec__ is None and not module.endswith(".py"):
            name = "<"  # a notebook's, or of standard input
    if "<" in name or hasattr(function, "__self__"):
        raise ValueError(f"{function!r} cannot be imported by name, and parity trains in fresh processes: "
                         "define the training at the top level of a module")  # fmt: skip
    return f"{module}:{name}"


# ---- How a step is dealt ----


class Step(NamedTuple):
    """How the examples of a step are dealt. case: in words. x, y: all of them.

    Cell k W + r is micro-batch k of rank r. sizes: examples in each cell; counts: of its labels, those not masked.
    """

    case: str
    x: Tensor
    y: Tensor
    sizes: list[int]
    counts: list[int]

    def cells(self) -> list[Batch]:
        """Return each cell's examples."""
        return list(zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True))


def deal(data: Batch, batch_size: int, masked: float | None, world_size: int) -> list[Step]:
    """Return steps of `batch_size` examples, dealt to W ranks x 2 micro-batches; the same examples for every W."""
    cells, quarter = world_size * MICRO_BATCHES, batch_size // 4
    if world_size > 1:
        idle, some = "a rank without an example", [int(cell % world_size < world_size - 1) for cell in range(cells)]
    else:
        idle, some = "an empty micro-batch", [int(cell == 0) for cell in range(cells)]
    cases = [  # in words, how many examples are masked, the sizes of the cells
        ("uneven shares", 0, [1 + share for share in _shares(batch_size - cells, range(1, cells + 1))]),
        (idle, 0, _shares(batch_size, some)),
        ("even shares", 0, _shares(batch_size, [1] * cells)),
        ("a micro-batch masked altogether", quarter, [quarter, *_shares(batch_size - quarter, [1] * (cells - 1))]),
    ]
    steps = []
    for number, (case, hidden, sizes) in enumerate(cases[:3] if masked is None else cases):
        chosen = torch.arange(number * batch_size, (number + 1) * batch_size) % len(data[0])
        x, y = data[0][chosen], data[1][chosen]
        y[:hidden] = masked or 0
        counts = [share.numel() if masked is None else int((share != masked).sum()) for share in y.split(sizes)]
        steps.append(Step(case, x, y, sizes, counts))
    return steps


def _shares(n: int, weights: Sequence[int]) -> list[int]:
    """Split n in proportion to the weights."""
    ends = [n * weight // sum(weights) for weight in running_sum(weights, initial=0)]
    return [end - start for start, end in pairwise(ends)]


# ---- What is compared ----


@dataclass
class Report:
    """What parity found. lines: for people. causes: by number of ranks, the names of those that fit."""

    lines: list[str] = field(default_factory=list)
    causes: dict[int, list[str]] = field(default_factory=dict)
    same: bool = True

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def fault(self, world_size: int, line: str, causes: Sequence[Cause] = ()) -> Report:
        """Add a difference, and what explains it."""
        self.same = False
        self.causes[world_size] = [cause.name for cause in causes]
        self.lines += [line, *(f"    {cause.name}. {cause.remedy}" for cause in causes)]
        return self


def assert_parity(train: Callable[..., Any], **how: Any) -> None:
    """Raise AssertionError, with `parity`'s report, where the number of ranks changes what `train` does."""
    report = parity(train, **how)
    if not report.same:
        raise AssertionError(f"\n{report}")


def parity(
    train: Callable[..., Any],
    *,
    data: Batch | None = None,
    batch_size: int | None = None,
    masked: float | None = None,
    world_sizes: Sequence[int] = (1, 2, 3),
    timeout: float = 60,
) -> Report:
    """Train on each number of ranks, compare with one process, and report (module docstring).

    data: examples x (N, ...) and their labels y (N, ...), dealt in steps of `batch_size` if `train` takes batches.
    masked: the label that does not count; without it no micro-batch is masked altogether. timeout: seconds for one
    training.

    Raises ValueError for a function that cannot be imported by name, and for data that make no step.
    """
    least = 2 * MICRO_BATCHES * max(world_sizes)
    if data is not None and (len(data[0]) != len(data[1]) or not least <= (batch_size or 0) <= len(data[0])):
        raise ValueError(
            f"data of {len(data[0])} examples and {len(data[1])} labels, batch_size {batch_size}: as many labels as "
            f"examples are needed, and a batch_size from {least} to their number"
        )
    run = partial(_run, _target(train), timeout)
    dealt = {W: deal(data, batch_size or 0, masked, W) if data is not None else [] for W in {1, *world_sizes}}
    whole = [[(step.x, step.y)] for step in dealt[1]]
    report = Report()
    try:
        (one,), again = run(1, [whole]), run(1, [whole])
        nudged = [run(1, [whole], one.eps, seed)[0] for seed in range(REPEATS)]
    except (RankError, HangError) as error:
        return report.fault(1, _failure(1, error))
    if any(_off_by(again, one).values()):
        return report.fault(1, "two trainings of one process differ from each other: seed them")
    if whole and one.steps % len(whole):
        return report.fault(1, f"one process took {one.steps} steps for {len(whole)} that it was dealt: "
                               "take K from len(micro_batches), and step once for each item of batches")  # fmt: skip
    allowed = {what: MARGIN * max(one.eps, off) for what, off in _off_by(nudged, one).items()}
    coarsest = max((limit for (what, _), limit in allowed.items() if what == "the gradient"), default=0.0)
    if coarsest > COARSE:
        report.lines.append(f"rounding allows {coarsest:.1g} here, which hides small faults: "
                            "compare in float32 or float64")  # fmt: skip
    for world_size in world_sizes:
        if world_size > 1 or whole:
            try:
                _compare(report, world_size, one, allowed, dealt[world_size], run)
            except (RankError, HangError) as error:
                report.fault(world_size, _failure(world_size, error))
    if one.random and not report.same:
        report.lines.append(f"    {', '.join(sorted(one.random))} makes what an example gives depend on its batch or "
                            "on chance: compare without")  # fmt: skip
    if whole and masked is None:
        report.lines.append("no micro-batch was masked altogether: give masked= where labels can be")
    if not whole and any(report.causes.values()):
        report.lines.append("train(batches) would tell more causes apart than train() does")
    return report


Run = Callable[..., list[Trained]]  # _run's, but for its first two arguments


def _run(target: str, timeout: float, world_size: int, dealt: list[Steps], *nudge: float) -> list[Trained]:
    """Train in fresh processes; return what each rank noted. dealt: for each rank; no steps: it deals out its own."""
    with Ranks(world_size) as ranks:
        saved = ranks.run(_train, target, dealt if any(dealt) else None, *nudge, timeout=timeout)
    return [Trained(**torch.load(io.BytesIO(each), weights_only=True)) for each in saved]


def _compare(report: Report, world_size: int, one: Trained, allowed: Mapping[What, float], steps: list[Step],
             run: Run) -> None:  # fmt: skip
    """Train on W ranks and add to the report what came of it. steps: as they are dealt."""
    ranks = run(world_size, [[step.cells()[rank::world_size] for step in steps] for rank in range(world_size)])
    off = _off_by(ranks, one)
    first = next((what for what in off if off[what] > allowed[what]), None)
    if first is None:
        worst = max(off, key=lambda what: off[what])
        line = f"off by {off[worst]:.1g} at most; rounding allows {allowed[worst]:.1g}"
        report.lines.append(f"W = {world_size}: as one process, to rounding ({line})")
        if _by_examples(ranks, one) == [ALL_SEE_ALL]:
            report.lines.append("    but every rank is shown all examples: that is W times the work")
        return
    what, number = first
    line = f"W = {world_size}: {what}"
    line += f" of step {number + 1}" if what in ("the weights", "the gradient") else ""
    place = number * len(steps) // max(one.steps, 1)  # several optimizers may each take a step in one that was dealt
    line += f" ({steps[place].case})" if steps and what == "the gradient" else ""
    line += f": off by {off[first]:.1g}; rounding allows {allowed[first]:.1g}"
    try:
        causes = _causes(first, ranks, one, allowed[first], steps, place, run)
    except (RankError, HangError):  # of a cell that was trained alone
        causes = [UNKNOWN]
    report.fault(world_size, line, causes)


def _failure(world_size: int, error: Exception) -> str:
    lines = [f"W = {world_size}: {error}"]
    last = str(error).splitlines()[-1]
    if isinstance(error, HangError):
        lines.append("Every rank must take as many steps and micro-batches as every other")
        lines.append("A training that takes longer needs a longer timeout")
    elif any(word in last for word in NO_GPU):
        lines.append("Parity runs on CPUs: ask torch.cuda.is_available() for the device, and take gloo without one")
    elif "reshape tensor of 0 elements" in last:
        lines.append("The net cannot take an empty batch: there show it one example whose labels are all masked")
    return "\n    ".join(lines)


def _off_by(ranks: Sequence[Trained], one: Trained) -> dict[What, float]:
    """Return how far off the worst rank is, in the order in which things came about."""
    off: dict[What, float] = {("the number of steps", 0): max(abs(rank.steps - one.steps) for rank in ranks)}
    for what, noted in one.noted.items():
        off[what] = max((_off(rank.noted[what], noted) for rank in ranks if what in rank.noted), default=0.0)
    return off


def _off(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|; infinite where their shapes differ, or one is NaN."""
    if a.shape != b.shape:
        return float("inf")
    off = float((a - b).norm() / b.norm()) if b.norm() else float(a.norm() > 0)
    return off if off == off else float("inf")


# ---- Why ----


class Cause(NamedTuple):
    """A cause, by name, and what puts it right."""

    name: str
    remedy: str

    def of(self, figure: str) -> Cause:
        """Return it with its figure."""
        return self._replace(name=self.name.format(figure))


ONCE = "cell_loss(losses, n_global=n, averaged_over=W), n from global_count (loop/reduction.py)"
GREW = Cause("the global batch grew with W", "Divide the batch size of a rank by W")
ALL_SEE_ALL = Cause("every rank is shown all examples", "Deal them out: DistributedSampler, or data[rank::W]")
TWICE = Cause("examples are counted twice", "DistributedSampler and even_batches fill up shares: take data[rank::W]")
MISSING = Cause("examples are missing", "A loader drops the last batch (drop_last), or a share is left out")
ORDER = Cause("the examples come in another order", "Draw one order, from a seed that depends on neither rank nor W")
OTHER_STEPS = Cause("the number of steps depends on W", "Each rank must take as many steps as one process")
STARTS = Cause("the first weights depend on W", "Seed before the net is made, with a number that W does not change")
STARTS_APART = Cause("the ranks begin with different weights", "Seed before the net is made, or broadcast rank 0's")
UNSYNCHRONISED = Cause("the ranks were never synchronised", "Call the net that DDP returned, not net.module")
DIVERGED = Cause("the replicas diverged", "Every rank must apply the same gradient, divided by the same number")
UPDATE_W = Cause("the gradients agree, and the update is {} times one process's", "The learning rate depends on W")
UPDATE = Cause("the gradients agree, the updates do not", "Look at clipping, the rate, what a step divides by")
LATER = Cause("the first steps agree", "Look at later steps, at buffers (BatchNorm's), at what comes after training")
ONLY_LAST = Cause("no optimizer of torch's took a step", "So only the last weights are compared, and no cause is known")
UNKNOWN = Cause("no known cause fits", "Compare what each rank back-propagates, cell by cell")
MEANS = Cause("a mean of means: the fewer examples a cell has, the more each counts", ONCE)
RANK_MEANS = Cause("a mean over ranks of each rank's own mean", f"Count over all ranks: {ONCE}")
MICRO_MEANS = Cause("a mean over micro-batches of each one's own mean", f"Count over the whole step: {ONCE}")
LAST = Cause("only the last micro-batch counts", "Zero the gradient after the step, not between micro-batches")
WEIGHTS = Cause("the examples of each cell weigh {} times what they should", f"Count once for the step: {ONCE}")
FACTORS = {
    "W": Cause("the gradient is W times too long: a sum over ranks for a mean", f"Drop a factor W: {ONCE}"),
    "1/W": Cause("the gradient is 1/W of the right one: divided by W twice", f"DDP divides by W already: {ONCE}"),
    "K": Cause("the gradient is K times too long: a sum over micro-batches for a mean", "Divide by one count a step"),
    "1/K": Cause("the gradient is 1/K of the right one: divided by K twice", "The framework divides by K already"),
    "W K": Cause("the gradient is W K times too long: a sum over cells for a mean", ONCE),
    "1/(W K)": Cause("the gradient is 1/(W K) of the right one: divided by W and by K once more", ONCE),
}


def diagnose(
    applied: Sequence[Tensor],
    whole: Tensor,
    *,
    allowed: float,
    accumulate: int = 1,
    cells: Sequence[Tensor] | None = None,
    counts: Sequence[int] | None = None,
) -> list[Cause]:
    """Return the causes that explain a wrong gradient: all that fit, or `UNKNOWN`.

    applied: each rank's gradient (P,), as its update took it. whole: one process's, of the whole batch. allowed: the
    relative difference that rounding may make. accumulate: K.
    cells: the gradient of each cell alone, cell k W + r for micro-batch k of rank r; counts: how many losses it has.
    Without them only factors are found, and gradients that differ between ranks, which are taken for unsynchronised.
    """
    world_size = len(applied)
    if _apart(applied, allowed):
        own = max(_fit(cells[rank::world_size], mine)[1] for rank, mine in enumerate(applied)) if cells else 0.0
        return [UNSYNCHRONISED if own <= max(allowed, 1e-9) else DIVERGED]
    allowed = max(allowed, 1e-9)
    fitting = [FACTORS[name] for name in _factors(applied[0], whole, allowed, world_size, accumulate)]
    if cells and counts:
        predicted = _predicted(cells, counts, world_size)
        fitting += [cause for cause, vector in predicted if _off(applied[0], vector) <= allowed]
        fitting = fitting or _weights_of_cells(applied[0], cells, counts, allowed)
    return list(dict.fromkeys(fitting)) or [UNKNOWN]


def known_factors(world_size: float, accumulate: float) -> dict[str, float]:
    """Return the factors by which a wrong division makes a result too large, by name."""
    w, k = world_size, accumulate
    factors = {"W": w, "1/W": 1 / w, "K": k, "1/K": 1 / k}
    if w != 1 != k:
        factors |= {"W K": w * k, "1/(W K)": 1 / (w * k)}
    return {name: factor for name, factor in factors.items() if factor != 1}


def _factors(a: Tensor, b: Tensor, allowed: float, *sizes: int) -> list[str]:
    return [name for name, factor in known_factors(*sizes).items() if _off(a, factor * b) <= allowed]


def _predicted(cells: Sequence[Tensor], counts: Sequence[int], world_size: int) -> Iterable[tuple[Cause, Tensor]]:
    """Yield each cause that unequal cells tell apart, with the gradient that it gives."""
    g = torch.stack(list(cells)).view(-1, world_size, cells[0].numel())  # (K, W, P): each cell's own mean
    n = torch.tensor(counts, dtype=g.dtype).view(-1, world_size, 1)
    yield MEANS, g.mean((0, 1))
    if world_size > 1 and len(g) > 1:
        yield RANK_MEANS, ((n * g).sum(0) / n.sum(0).clamp(min=1)).mean(0)
        yield MICRO_MEANS, ((n * g).sum(1) / n.sum(1).clamp(min=1)).mean(0)
    yield LAST, g[-1].mean(0)
    yield LAST, (n[-1] * g[-1]).sum(0) / n.sum()


def _weights_of_cells(applied: Tensor, cells: Sequence[Tensor], counts: Sequence[int], allowed: float) -> list[Cause]:
    """Return what an example of each cell weighs, where the gradient is made of the cells' gradients in some way."""
    fitted, off = _fit(cells, applied)
    if off > allowed:
        return []
    shares = (count / sum(counts) for count in counts)
    weights = (f"{float(a) / share:.3g}" if share else "-" for a, share in zip(fitted, shares, strict=True))
    return [WEIGHTS.of(", ".join(weights))]


def _fit(vectors: Sequence[Tensor], target: Tensor) -> tuple[Tensor, float]:
    """Return the coefficients with which the vectors come closest to the target, and how far off that is."""
    columns = torch.stack(list(vectors), 1)
    fitted = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    return fitted, _off(columns @ fitted, target)


def _causes(first: What, ranks: Sequence[Trained], one: Trained, allowed: float, steps: list[Step],
            place: int, run: Run) -> list[Cause]:  # fmt: skip
    """Return what explains the first difference. place: which of the steps that were dealt it is in, if they were."""
    what, number = first
    shown = _by_examples(ranks, one)
    if shown and not steps:
        return shown
    if what == "the number of steps":
        return [GREW if _grew(ranks, one) else OTHER_STEPS]
    if what == "the last weights":
        return [LATER if one.steps else ONLY_LAST]
    vectors, whole = [rank.noted[first] for rank in ranks], one.noted[first]
    if what == "the weights":
        return _of_update(ranks, one, number, allowed) if number else [STARTS_APART if _apart(vectors, 0.0) else STARTS]
    if not steps:
        return diagnose(vectors, whole, allowed=allowed)
    batches, cells = [[(step.x, step.y)] for step in steps], []
    for cell, count in zip(steps[place].cells(), steps[place].counts, strict=True):
        batches[place] = [cell]  # the steps after it stay: a schedule may depend on how many there are
        cells.append(run(1, [batches])[0].noted[first] if count else torch.zeros_like(whole))
    causes = diagnose(vectors, whole, allowed=allowed, accumulate=MICRO_BATCHES, cells=cells,
                      counts=steps[place].counts)  # fmt: skip
    return shown if shown and causes == [UNKNOWN] else causes


def _apart(vectors: Sequence[Tensor], allowed: float) -> bool:
    return any(_off(vector, vectors[0]) > allowed for vector in vectors)


def _by_examples(ranks: Sequence[Trained], one: Trained) -> list[Cause]:
    """Return what is wrong with the examples that the ranks were shown, if anything, and if they could be seen."""
    whole, *shares = (Counter(chain.from_iterable(trained.shown)) for trained in (one, *ranks))
    total = sum(shares, Counter[int]())
    if not whole or not total:
        return []
    if len(ranks) > 1 and all(share == whole for share in shares):
        return [ALL_SEE_ALL]
    found = {GREW: _grew(ranks, one), TWICE: total - whole, MISSING: whole - total}
    causes = [cause for cause, it_is in found.items() if it_is]
    steps = [Counter(chain.from_iterable(step)) for step in zip(*(rank.shown for rank in ranks), strict=False)]
    in_order = steps == [Counter(step) for step in one.shown[: len(steps)]]
    return causes or ([] if in_order else [ORDER])


def _grew(ranks: Sequence[Trained], one: Trained) -> bool:
    """Whether about 1/W of the steps were taken."""
    return ranks[0].steps < one.steps and (ranks[0].steps - 1) * len(ranks) < one.steps


def _of_update(ranks: Sequence[Trained], one: Trained, number: int, allowed: float) -> list[Cause]:
    """Return why the weights before a step differ, where the gradients of the steps before agree."""
    noted = [[each.noted["the weights", i] for i in range(number + 1)] for each in (one, *ranks)]
    size = len(noted[0][number])  # several optimizers take turns: the one whose turn it is has this many
    before = max((i for i in range(number) if len(noted[0][i]) == size), default=number)
    if before == number or any(len(weights[i]) != size for weights in noted for i in (before, number)):
        return [UPDATE]
    whole, *moved = (weights[number] - weights[before] for weights in noted)
    if _apart(moved, allowed):
        return [DIVERGED]
    return [UPDATE_W.of(name) for name in _factors(moved[0], whole, 1e-3, len(ranks), 1)] or [UPDATE]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a shell; return 1 where the number of ranks changes the result."""
    parser = argparse.ArgumentParser(prog="parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="module:function")
    parser.add_argument("--data", help="module:name of (x, y), or of a function that returns them")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--masked", type=float)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one training")
    flags = vars(parser.parse_args(argv))
    sys.path.insert(0, "")
    try:
        data = flags["data"] and _import(flags["data"])
        flags["data"] = data() if callable(data) else data
        report = parity(_import(flags.pop("train")), **flags)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        print(f"parity: error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.same else 1


if __name__ == "__main__":  # under its own name, by which other processes find it
    sys.exit(importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem).main())
