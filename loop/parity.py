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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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


class Ranks:
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
        self.usable = True
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            variables = {
                **{"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0},
                **{"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "parity"},
                **{"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
            }
            ours, theirs = context.Pipe()
            told = {name: str(value) for name, value in variables.items()}
            self.processes.append(context.Process(target=_serve, args=(theirs, self._log(rank), told), daemon=True))
            with _without_main():
                self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Call a function that can be imported by name on every rank; return the results in rank order.

        Raises RankError with the words of the rank that failed first, HangError after `timeout` seconds.
        """
        for pipe in self.pipes:
            with suppress(OSError):  # a rank that has ended is found below
                pipe.send((function, args, timeout))
        answers: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + timeout + 1  # a second for each to write where it waits
        while len(answers) < len(self.pipes):
            silent: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait(list(silent), max(0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in map(silent.__getitem__, ready):
                try:
                    answers[rank], error = self.pipes[rank].recv()
                except (EOFError, OSError):
                    self.processes[rank].join()
                    answers[rank] = None
                    error = f"{self._said(rank).strip()}\nended with exit code {self.processes[rank].exitcode}"
                    self.usable = False
                if error:
                    errors.append(f"rank {rank} of {len(self.pipes)}: {error.strip()}")
                    deadline = min(deadline, time.monotonic() + 1)  # the others may wait for this one for ever
        self.usable = self.usable and len(answers) == len(self.pipes)
        if errors:
            raise RankError(errors[0])
        if not self.usable:
            raise HangError("\n".join(self._where(rank, timeout) for rank in silent.values()))
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """Kill the ranks, and what they have started."""
        for process in self.processes:
            with suppress(ProcessLookupError, AttributeError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        self.folder.cleanup()

    def _log(self, rank: int) -> str:
        return f"{self.folder.name}/{rank}"

    def _said(self, rank: int) -> str:
        log = Path(self._log(rank))
        return log.read_text(errors="replace") if log.exists() else ""

    def _where(self, rank: int, timeout: float) -> str:
        stacks = self._said(rank).rpartition("most recent call first")[2].splitlines()
        frames = [line.strip() for line in stacks if line.lstrip().startswith("File") and __file__ not in line]
        own = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame]
        return f"rank {rank} has not ended after {timeout:g} s; it is in {(own or frames or ['its start'])[0]}"


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep a new process from importing the main module, which would come before `_serve` sets the variables."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection, log: str, environ: Mapping[str, str]) -> None:
    """Be a rank: call what is asked for, and answer (result, None) or (None, traceback), until killed."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, which is killed with all that the rank has started
    os.environ.update(environ)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # may have DataLoader's workers
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    with suppress(EOFError):
        while True:
            function, args, timeout = pipe.recv()
            faulthandler.dump_traceback_later(timeout, file=output)
            answer: tuple[Any, str | None]
            try:
                answer = function(*args), None
            except BaseException as error:
                answer = None, _traceback(error)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)


def _traceback(error: BaseException) -> str:
    """Return the traceback from the first frame that is not this file's."""
    where = error.__traceback__
    while where and where.tb_next and where.tb_frame.f_code.co_filename == __file__:
        where = where.tb_next
    return "".join(traceback.format_exception(type(error), error, where))


# ---- On a rank: train, and note what happens ----


@dataclass
class Trained:
    """What a rank notes of a training.

    weights, gradients: (P,) before each of the first steps, of all that the optimizer holds, float64. steps: how many.
    shown: a hash of each example that the net was called with, by step. state: what was returned, float64.
    eps: of the coarsest number format in use. random: what makes the forward random, or depend on the batch.
    """

    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    steps: int = 0
    shown: list[list[int]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    eps: float = 0.0
    random: set[str] = field(default_factory=set)


class _Notes:
    """Global hooks that fill a `Trained`; nudge: the eps by which weights are changed at the first forward, seeded."""

    def __init__(self, nudge: float = 0.0, seed: int = 0) -> None:
        self.trained, self.nudge = Trained(), nudge
        self.generator = torch.Generator().manual_seed(seed)
        self.root: nn.Module | None = None  # the first that is called and has parameters
        self.called: set[nn.Module] = set()  # with whole parameters
        self.seen: set[nn.Parameter] = set()
        self.depth = 0  # of optimizers that step within others
        self.shown: list[int] = []
        self.unclipped: dict[int, Tensor] = {}  # by parameter
        nn.modules.module.register_module_forward_pre_hook(self._before_forward)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            clipping = self._noting(getattr(nn.utils, name))
            setattr(nn.utils, name, clipping)
            setattr(nn.utils.clip_grad, name, clipping)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in self.called:
            params = list(module.parameters())
            if not any(map(is_lazy, params)):
                self.called.add(module)
            self._at_first(module, [param for param in params if param not in self.seen and not is_lazy(param)])
        if self.root is None and self.seen:
            self.root = module
        if torch.is_autocast_enabled("cpu"):
            self.trained.eps = max(self.trained.eps, torch.finfo(torch.get_autocast_dtype("cpu")).eps)
        if module is self.root and module.training and torch.is_grad_enabled():
            self.shown += _hashes(next((arg for arg in args if isinstance(arg, Tensor) and arg.dim()), None))

    def _at_first(self, module: nn.Module, new: Sequence[nn.Parameter]) -> None:
        for part in module.modules():
            if (isinstance(part, _DropoutNd) and part.p) or isinstance(part, _BatchNorm):
                self.trained.random.add(type(part).__name__)
        self.seen.update(new)
        for param in new:
            if self.nudge and param.is_floating_point():
                local: Tensor = param.to_local() if hasattr(param, "to_local") else param
                with torch.no_grad():
                    noise = torch.rand(local.shape, generator=self.generator, dtype=torch.float64) - 0.5
                    local.copy_(local.double() * (1 + 2 * self.nudge * noise))

    def _noting(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        def noting(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            for param in parameters:
                if param.grad is not None:
                    self.unclipped.setdefault(id(param), _whole(param.grad))
            return clip(parameters, *args, **kwargs)

        return noting

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        trained, params = self.trained, [param for group in optimizer.param_groups for param in group["params"]]
        trained.eps = max([trained.eps, *(torch.finfo(param.dtype).eps for param in params)])
        trained.steps += 1
        if trained.steps > FIRST:
            self._end_step()
            return None
        trained.weights.append(_flat(map(_whole, params)))
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._note(params)
            return None

        def noting() -> Any:
            result = closure()
            if len(trained.gradients) < len(trained.weights):  # an optimizer may call it several times a step
                self._note(params)
            return result

        return (args[0], noting, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    def _after_step(self, *_: object) -> None:
        self.depth -= 1

    def _note(self, params: Sequence[Tensor]) -> None:
        def gradient(param: Tensor) -> Tensor:
            if id(param) in self.unclipped:
                return self.unclipped[id(param)]
            return torch.zeros_like(_whole(param)) if param.grad is None else _whole(param.grad)

        self.trained.gradients.append(_flat(map(gradient, params)))
        self._end_step()

    def _end_step(self) -> None:
        self.trained.shown.append(self.shown)
        self.shown, self.unclipped = [], {}


def _train(target: _Target, dealt: list[Steps] | None, nudge: float, seed: int) -> bytes:
    """Train on this rank; return what was noted, saved: nothing stays in memory that ranks share."""
    notes = _Notes(nudge, seed)  # before the training's own imports
    function = target.function()
    result = function() if dealt is None else function(dealt[int(os.environ["RANK"])])
    state = result.state_dict() if isinstance(result, nn.Module) else result
    if not isinstance(state, Mapping):
        raise TypeError(f"{target} must return its net or a state_dict, not {type(result).__name__}")
    for name, value in _tensors(state):
        notes.trained.eps = max(notes.trained.eps, torch.finfo(value.dtype).eps)
        notes.trained.state[name.removeprefix("module.")] = _whole(value).double()
    buffer = io.BytesIO()
    torch.save(vars(notes.trained), buffer)
    return buffer.getvalue()


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors of a state_dict, of those in it too, by name."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield name, value


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


# ---- How a step is dealt ----


class _Target(NamedTuple):
    """A function by its module's name, or the file of a program that was started: fresh processes import it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"

    def function(self) -> Any:
        if self.module.endswith(".py"):
            found: Any = ModuleType("__parity_main__")
            sys.modules[found.__name__], found.__file__ = found, self.module
            exec(compile(Path(self.module).read_text(encoding="utf-8"), self.module, "exec"), vars(found))
        else:
            found = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found

    @classmethod
    def named(cls, text: str) -> _Target:
        module, colon, name = text.partition(":")
        if not (module and colon and name):
            raise ValueError(f"{text}: not of the form module:name")
        return cls(module, name)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> _Target:
        name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
        if module == "__main__":
            main: Any = sys.modules["__main__"]
            module = main.__spec__.name if main.__spec__ else str(Path(getattr(main, "__file__", "")).absolute())
            if main.__spec__ is None and not module.endswith(".py"):
                name = ""  # a notebook's, or of standard input
        if not name or "<" in name or hasattr(function, "__self__"):
            raise ValueError(
                f"{function!r} cannot be imported by name, and parity trains in fresh processes: "
                "define the training at the top level of a module"
            )
        return cls(module, name)


class Step(NamedTuple):
    """How the examples of a step are dealt. case: in words. x, y: all of them. sizes: examples in each cell.

    Cell k W + r is micro-batch k of rank r.
    """

    case: str
    x: Tensor
    y: Tensor
    sizes: list[int]

    def cells(self) -> list[Batch]:
        """Return each cell's examples."""
        return list(zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True))

    def counts(self, masked: float | None) -> list[int]:
        """Return how many losses count in each cell: its labels that are not masked."""
        return [y.numel() if masked is None else int((y != masked).sum()) for _, y in self.cells()]


def deal(data: Batch, batch_size: int, masked: float | None, world_size: int) -> list[Step]:
    """Return steps of `batch_size` examples, dealt to W ranks x 2 micro-batches; the same examples for every W."""
    cells = world_size * MICRO_BATCHES
    rising = [1 + share for share in _shares(batch_size - cells, range(1, cells + 1))]
    idle = world_size - 1 if world_size > 1 else None  # the rank, or in one process the micro-batch, without examples
    some = [0 if (cell % world_size == idle or (idle is None and cell)) else 1 for cell in range(cells)]
    cases = {
        "uneven shares": rising,
        "a rank without an example" if idle else "an empty micro-batch": _shares(batch_size, some),
        "even shares": _shares(batch_size, [1] * cells),
    }
    if masked is not None:
        cases["a micro-batch masked altogether"] = rising
    x, y = data
    steps = []
    for number, (case, sizes) in enumerate(cases.items()):
        rows = torch.arange(number * batch_size, (number + 1) * batch_size) % len(x)
        labels = y[rows].clone()
        if "masked" in case:
            labels[: batch_size // 4].fill_(masked or 0)
        steps.append(Step(case, x[rows], labels, sizes))
    if masked is not None:  # the first cell is the masked examples alone, whatever W is
        rest = _shares(batch_size - batch_size // 4, [1] * (cells - 1))
        steps[-1] = steps[-1]._replace(sizes=[batch_size // 4, *rest])
    return steps


def _shares(n: int, weights: Sequence[int]) -> list[int]:
    """Split n in proportion to the weights; what is left goes to the last ones that have a weight."""
    shares = [n * weight // sum(weights) for weight in weights]
    taking = [i for i, weight in enumerate(weights) if weight]
    for place in range(n - sum(shares)):
        shares[taking[-1 - place % len(taking)]] += 1
    return shares


# ---- What is compared ----


@dataclass
class Report:
    """What parity found. lines: for people. causes: by number of ranks, the names of those that fit."""

    lines: list[str] = field(default_factory=list)
    causes: dict[int, list[str]] = field(default_factory=dict)
    same: bool = True

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def fault(self, world_size: int, line: str, causes: Sequence[Cause] = ()) -> None:
        """Add a difference, and what explains it."""
        self.same = False
        self.lines.append(line)
        self.causes[world_size] = [cause.name for cause in causes]
        self.lines += [f"    {cause.name}. {cause.remedy}" for cause in causes]


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
    return _Comparison(_Target.of(train), data, batch_size, masked, timeout).report(world_sizes)


class _Comparison:
    def __init__(
        self, target: _Target, data: Batch | None, batch_size: int | None, masked: float | None, timeout: float
    ) -> None:
        self.target, self.masked, self.timeout = target, masked, timeout
        self.data, self.batch_size = data, batch_size or 0
        self.found = Report()

    def steps(self, world_size: int) -> list[Step]:
        """Return how the steps are dealt; none where the training deals out its own data."""
        return deal(self.data, self.batch_size, self.masked, world_size) if self.data is not None else []

    def train(self, world_size: int, steps: list[Steps] | None, nudge: float = 0.0, seed: int = 0) -> list[Trained]:
        """Train in fresh processes; return what each rank noted. steps: for each rank."""
        with Ranks(world_size) as ranks:
            saved = ranks.run(_train, self.target, steps, nudge, seed, timeout=self.timeout)
        return [Trained(**torch.load(io.BytesIO(each), weights_only=True)) for each in saved]

    def report(self, world_sizes: Sequence[int]) -> Report:
        """Train, compare, and say what was found."""
        report = self.found
        whole = [[[(step.x, step.y)] for step in self.steps(1)]] if self.data is not None else None
        try:
            self.one = self.train(1, whole)[0]
            again = self.train(1, whole)[0]
            nudged = [self.train(1, whole, self.one.eps, seed)[0] for seed in range(REPEATS)]
        except (RankError, HangError) as error:
            report.fault(1, _failure(1, error))
            return report
        if _difference(again, self.one, None):
            report.fault(1, "two trainings of one process differ from each other: seed them")
            return report
        if whole and self.one.steps % len(whole[0]):
            report.fault(1, f"one process took {self.one.steps} steps for {len(whole[0])} that it was dealt: "
                            "take K from len(micro_batches), and step once for each item of batches")  # fmt: skip
            return report
        self.allowed = _Allowed(self.one, nudged)
        if self.allowed.coarsest > COARSE:
            coarse = f"rounding allows {self.allowed.coarsest:.1g} here, which hides small faults"
            report.lines.append(f"{coarse}: compare in float32 or float64")
        for world_size in world_sizes:
            if world_size > 1 or whole:
                self.compare(world_size)
        if self.one.random and not report.same:
            report.lines.append(f"    {', '.join(sorted(self.one.random))} makes what an example gives depend on its "
                                "batch or on chance: compare without")  # fmt: skip
        if whole and self.masked is None:
            report.lines.append("no micro-batch was masked altogether: give masked= where labels can be")
        if not whole and any(report.causes.values()):
            report.lines.append("train(batches) would tell more causes apart than train() does")
        return report

    def compare(self, world_size: int) -> None:
        """Train on W ranks and add to the report what came of it."""
        report, steps = self.found, self.steps(world_size)
        dealt = [[step.cells()[rank::world_size] for step in steps] for rank in range(world_size)]
        try:
            ranks = self.train(world_size, dealt if steps else None)
        except (RankError, HangError) as error:
            report.fault(world_size, _failure(world_size, error))
            return
        differences = [found for rank in ranks if (found := _difference(rank, self.one, self.allowed))]
        if not differences:
            report.lines.append(f"W = {world_size}: as one process, to rounding ({self.allowed.note(ranks, self.one)})")
            if _all_see_all(ranks, self.one):
                report.lines.append("    but every rank is shown all examples: that is W times the work")
            return
        found = min(differences, key=lambda difference: (difference.step, difference.what == "the gradient"))
        what, number, off, allowed = found
        where = f" of step {number + 1}" if what in ("the weights", "the gradient") else ""
        case = f" ({steps[self.place(number, steps)].case})" if steps and what == "the gradient" else ""
        line = f"W = {world_size}: {what}{where}{case}: off by {off:.1g}; rounding allows {allowed:.1g}"
        try:
            causes = self.causes(found, ranks, steps, world_size)
        except (RankError, HangError):  # of a cell that was trained alone
            causes = [UNKNOWN]
        report.fault(world_size, line, causes)

    def causes(self, found: Difference, ranks: list[Trained], steps: list[Step], world_size: int) -> list[Cause]:
        """Return what explains the first difference."""
        what, number, _, allowed = found
        shown = _by_examples(ranks, self.one)
        if shown and not steps:
            return shown
        if what == "the weights" and number == 0:
            apart = any(_off(rank.weights[0], ranks[0].weights[0]) for rank in ranks)
            return [STARTS_APART if apart else STARTS]
        if what == "the gradient":
            applied = [rank.gradients[number] for rank in ranks]
            cells, counts = None, None
            if steps:
                counts = steps[self.place(number, steps)].counts(self.masked)
                cells = self.alone(steps, number, counts)
            accumulate = MICRO_BATCHES if steps else 1
            found_causes = diagnose(applied, self.one.gradients[number], allowed=allowed, accumulate=accumulate,
                                    cells=cells, counts=counts)  # fmt: skip
            return shown if shown and found_causes == [UNKNOWN] else found_causes
        if what == "the weights":
            return _of_update(ranks, self.one, number, allowed)
        if what == "the number of steps":
            return [GREW if _grew(ranks, self.one) else OTHER_STEPS]
        return [LATER if self.one.gradients else ONLY_LAST]

    def alone(self, steps: list[Step], number: int, counts: Sequence[int]) -> list[Tensor]:
        """Return the gradient of each cell of a step by itself, in one process, after the steps before it."""
        whole, place, gradients = [[(step.x, step.y)] for step in steps], self.place(number, steps), []
        for cell, count in zip(steps[place].cells(), counts, strict=True):
            gradient = torch.zeros_like(self.one.gradients[number])
            if count:  # the steps after it stay: a schedule may depend on how many there are
                gradient = self.train(1, [[*whole[:place], [cell], *whole[place + 1 :]]])[0].gradients[number]
            gradients.append(gradient)
        return gradients

    def place(self, number: int, steps: list[Step]) -> int:
        """Return which of the steps that were dealt a noted one was; several optimizers may each take one in it."""
        return number * len(steps) // self.one.steps


def _failure(world_size: int, error: Exception) -> str:
    text = f"W = {world_size}: {error}"
    if isinstance(error, RankError) and any(word in str(error).splitlines()[-1] for word in NO_GPU):
        text += "\n    Parity runs on CPUs: ask torch.cuda.is_available() for the device, and take gloo without one"
    if isinstance(error, RankError) and "reshape tensor of 0 elements" in str(error):
        text += "\n    The net cannot take an empty batch: there show it one example whose labels are all masked"
    if isinstance(error, HangError):
        text += "\n    Every rank must take as many steps and micro-batches as every other"
        text += "\n    A training that takes longer needs a longer timeout"
    return text


class Difference(NamedTuple):
    """The first thing that differs: what, in which step, by how much of its length, and what rounding allows."""

    what: str
    step: int
    off: float
    allowed: float


class _Allowed:
    """What rounding allows, from trainings whose weights were changed in the last bit."""

    def __init__(self, one: Trained, nudged: Sequence[Trained]) -> None:
        self.floor = MARGIN * one.eps
        self.seen: dict[tuple[str, int], float] = {}
        for other in nudged:
            for what, step, a, b in _pairs(other, one):
                self.seen[what, step] = max(self.seen.get((what, step), 0.0), _off(a, b))

    @property
    def coarsest(self) -> float:
        """The largest that it allows a gradient."""
        return max((self(*seen) for seen in self.seen if seen[0] == "the gradient"), default=self.floor)

    def __call__(self, what: str, step: int) -> float:
        return max(self.floor, MARGIN * self.seen.get((what, step), 0.0))

    def note(self, ranks: Sequence[Trained], one: Trained) -> str:
        """Say how far off the worst was, and what was allowed there."""
        off, what, step = max((_off(a, b), what, step) for rank in ranks for what, step, a, b in _pairs(rank, one))
        return f"off by {off:.1g} at most; rounding allows {self(what, step):.1g}"


def _pairs(trained: Trained, one: Trained) -> Iterable[tuple[str, int, Tensor, Tensor]]:
    """Yield what is compared, in the order in which it came about."""
    for step, (w, w1, g, g1) in enumerate(
        zip(trained.weights, one.weights, trained.gradients, one.gradients, strict=False)
    ):
        yield "the weights", step, w, w1
        yield "the gradient", step, g, g1
    if trained.state and one.state:  # with FSDP, rank 0 alone may have a full one
        yield "the last weights", FIRST, _flat(trained.state.values()), _flat(one.state.values())


def _off(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|; infinite where they have other shapes, or one is no number."""
    if a.shape != b.shape:
        return float("inf")
    off = float((a - b).norm() / b.norm()) if b.norm() else float(a.norm() > 0)
    return off if off == off else float("inf")


def _difference(trained: Trained, one: Trained, allowed: _Allowed | None) -> Difference | None:
    """Return the first difference beyond what is allowed; without `allowed`, the first at all."""
    if trained.steps != one.steps:
        return Difference("the number of steps", 0, abs(trained.steps - one.steps), 0.0)
    for what, step, a, b in _pairs(trained, one):
        limit = allowed(what, step) if allowed else 0.0
        if _off(a, b) > limit:
            return Difference(what, step, _off(a, b), limit)
    return None


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
UPDATE = Cause(
    "the gradients agree, the updates do not", "Look at clipping, the rate's schedule, what a step divides by"
)
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
    if any(_off(other, applied[0]) > allowed for other in applied[1:]):
        return [UNSYNCHRONISED if cells is None or _own_only(applied, cells, allowed) else DIVERGED]
    allowed = max(allowed, 1e-9)
    factors = _factor(applied[0], whole, allowed, known_factors(world_size, accumulate))
    fitting = [FACTORS[name] for name in factors]
    if cells is not None and counts is not None:
        fitting += [
            cause for cause, vector in _predicted(cells, counts, world_size) if _off(applied[0], vector) <= allowed
        ]
        fitting = fitting or _weights_of_cells(applied[0], cells, counts, allowed)
    return list(dict.fromkeys(fitting)) or [UNKNOWN]


def known_factors(world_size: float, accumulate: float) -> dict[str, float]:
    """Return the factors by which a wrong division makes a result too large, by name."""
    w, k = world_size, accumulate
    factors = {"W": w, "1/W": 1 / w, "K": k, "1/K": 1 / k}
    if w != 1 != k:
        factors |= {"W K": w * k, "1/(W K)": 1 / (w * k)}
    return {name: factor for name, factor in factors.items() if factor != 1}


def _factor(a: Tensor, b: Tensor, allowed: float, factors: Mapping[str, float]) -> list[str]:
    """Return the names of the factors f for which a is f b."""
    return [name for name, factor in factors.items() if _off(a, factor * b) <= allowed]


def _predicted(cells: Sequence[Tensor], counts: Sequence[int], world_size: int) -> Iterable[tuple[Cause, Tensor]]:
    """Yield each cause that unequal cells tell apart, with the gradient that it gives."""
    g = torch.stack(list(cells)).view(-1, world_size, cells[0].numel())  # (K, W, P): each cell's own mean
    n = torch.tensor(counts, dtype=g.dtype).view(-1, world_size, 1)
    micro_batches = len(g)
    yield MEANS, g.mean((0, 1))
    if world_size > 1 and micro_batches > 1:
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


def _own_only(applied: Sequence[Tensor], cells: Sequence[Tensor], allowed: float) -> bool:
    """Whether each rank's gradient is made of that rank's own cells."""
    own = (_fit(cells[rank :: len(applied)], gradient)[1] for rank, gradient in enumerate(applied))
    return max(own) <= max(allowed, 1e-9)


def _fit(vectors: Sequence[Tensor], target: Tensor) -> tuple[Tensor, float]:
    """Return the coefficients with which the vectors come closest to the target, and how far off that is."""
    columns = torch.stack(list(vectors), 1)
    fitted = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    return fitted, _off(columns @ fitted, target)


def _by_examples(ranks: Sequence[Trained], one: Trained) -> list[Cause]:
    """Return what is wrong with the examples that the ranks were shown, if anything, and if they could be seen."""
    whole = _examples(one)
    total = sum(map(_examples, ranks), Counter[int]())
    if not whole or not total:
        return []
    if _all_see_all(ranks, one):
        return [ALL_SEE_ALL]
    causes = [GREW] if _grew(ranks, one) else []
    causes += [TWICE] if total - whole else []
    causes += [MISSING] if whole - total else []
    if not causes:
        steps = [Counter(e for rank in ranks for e in rank.shown[i]) for i in range(min(len(r.shown) for r in ranks))]
        if steps != [Counter(step) for step in one.shown[: len(steps)]]:
            causes.append(ORDER)
    return causes


def _of_update(ranks: Sequence[Trained], one: Trained, number: int, allowed: float) -> list[Cause]:
    """Return why the weights before a step differ, where the gradients of the steps before agree."""
    size = len(one.weights[number])  # several optimizers take turns: the one whose turn it is has this many
    before = max((i for i in range(number) if len(one.weights[i]) == size), default=number)
    if before == number or any(len(rank.weights[i]) != size for rank in ranks for i in (before, number)):
        return [UPDATE]
    whole, *moved = (each.weights[number] - each.weights[before] for each in (one, *ranks))
    if any(_off(other, moved[0]) > allowed for other in moved):
        return [DIVERGED]
    factors = _factor(moved[0], whole, 1e-3, known_factors(len(ranks), 1))
    return [UPDATE_W.of(name) for name in factors] or [UPDATE]


def _grew(ranks: Sequence[Trained], one: Trained) -> bool:
    """Whether about 1/W of the steps were taken."""
    return ranks[0].steps < one.steps and (ranks[0].steps - 1) * len(ranks) < one.steps


def _all_see_all(ranks: Sequence[Trained], one: Trained) -> bool:
    return len(ranks) > 1 and any(one.shown) and all(_examples(rank) == _examples(one) for rank in ranks)


def _examples(trained: Trained) -> Counter[int]:
    return Counter(example for step in trained.shown for example in step)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a shell; return 1 where the number of ranks changes the result."""
    parser = argparse.ArgumentParser(prog="parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="module:function")
    parser.add_argument("--data", help="module:name of (x, y), or of a function that returns them")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--masked", type=float)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one training")
    flags = parser.parse_args(argv)
    sys.path.insert(0, "")
    try:
        data = flags.data and _Target.named(flags.data).function()
        train = _Target.named(flags.train).function()
        report = parity(
            train,
            data=data() if callable(data) else data,
            batch_size=flags.batch_size,
            masked=flags.masked,
            world_sizes=flags.world_sizes,
            timeout=flags.timeout,
        )
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        print(f"parity: error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.same else 1


if __name__ == "__main__":  # under its own name, by which other processes find it
    sys.exit(importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem).main())
