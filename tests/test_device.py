"""What a GPU would show, shown without one: the loop on the `meta` device, groups that serve no CPU tensor, TF32.

`meta` tensors hold no data: whatever would wait for a GPU's numbers raises there, and so does mixing devices.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loop.book import Accumulator, train_epoch_ch3
from loop.config import Config, InputError
from loop.data import Split, TrainBatches
from loop.idx import SetSize
from loop.nets import make_net
from loop.progress import Progress
from loop.reduction import global_count
from loop.run.checkpoints import Checkpoints
from loop.run.launch import prepare_net, set_float32_precision
from loop.run.recorder import Recorder
from loop.run.run import Run
from loop.updater import make_updater
from tests.forks import Forked
from tests.launches import environment
from tests.ranks import World

META = torch.device("meta")
COLLECTIVES = {"all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce", "scatter"}
UPDATERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw, clipped": {"optimizer": "adamw", "clip_norm": 1.0},
    "accumulated": {"accumulate": 3},
    "scratch": {"updater": "scratch", "reduction": "sum"},
}


@pytest.mark.parametrize("updater", UPDATERS)
@pytest.mark.parametrize("net_name", ["softmax", "mlp", "lenet"])
def test_an_epoch_waits_for_the_device_in_its_last_reading_alone(net_name: Any, updater: str) -> None:
    config = Config(net=net_name, batch_size=16, log_every=1000, **UPDATERS[updater])
    accelerator, progress = Accelerator(cpu=True), Progress()
    shards = config.shards(67, 2)  # as rank 1 of 2, which has one of the last step's 3 examples
    run: Any = SimpleNamespace(config=config, shards=shards, is_main=False, at_end=ExitStack())
    net, loss = make_net(config.net).to(META), nn.CrossEntropyLoss(reduction="none")
    split = Split(
        torch.empty(67, 28, 28, dtype=torch.uint8, device=META), torch.empty(67, dtype=torch.int64, device=META)
    )
    updater = make_updater(accelerator, net, config, progress)
    observers = progress, Recorder(run, updater, progress)
    batches = TrainBatches(split, shards, rank=1, progress=progress)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        train_epoch_ch3(net, batches, loss, updater, progress.sums, observers)
    assert progress.step == 5, "all steps are taken before the epoch's loss is read"
    assert {type(value) for value in progress.sums.kept[:2]} == {Tensor}
    assert {value.device for value in progress.sums.kept[:2]} == {META}
    AcceleratorState._reset_state()


def test_a_sum_of_no_batch_is_reduced_on_the_device_it_is_given() -> None:
    sums = Accumulator(2)
    sums.all_reduce(META)
    assert [value.device for value in sums.kept] == [META, META]


def test_a_count_is_made_on_the_device_without_a_copy_from_the_host() -> None:
    made: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        assert global_count(3, META).device == META
    assert made == [torch.ops.aten.full.default], "a copy of a number to a GPU waits for it"


def test_a_group_for_gpus_alone_is_not_handed_a_cpu_tensor(tmp_path: Path) -> None:
    code = f"""
import torch, torch.distributed as dist
from loop.book import Accumulator
dist.init_process_group("cuda:gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(error)
try:
    Accumulator(3).all_reduce(torch.device("cpu"))
except ValueError as error:
    print(error)
dist.destroy_process_group()
"""
    theirs, ours = Forked([sys.executable, "-c", code], environment()).communicate()[0].splitlines()
    assert theirs == "No backend type associated with device type cpu"
    assert ours == "cannot sum over ranks on cpu: the process group serves cuda:gloo only"


def test_collectives_are_called_in_files_that_are_copied() -> None:
    """And there on the device that they are given, or of the parameters: nowhere is a tensor's device guessed."""
    found = set()
    for path in [Path("train.py"), *Path("loop").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"dist.{name}" for name in COLLECTIVES}:
                found.add(path.name)
    assert found == {"reduction.py", "audit.py", "virtual_ranks.py"}


def test_adams_step_count_stays_on_the_cpu_when_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(Config(optimizer="adam", cpu=True, wandb="disabled", out=tmp_path)) as run:
        run.open(SetSize(256))
        net = run.prepare(make_net("softmax"))
        updater = make_updater(run.accelerator, net, run.config, run.progress)
        checkpoints = Checkpoints(run, updater, run.progress)
        net(torch.ones(1, 784)).sum().backward()
        updater.optimizer.step()
        checkpoints.save()
        (run.resume_from,) = (run.folder / "checkpoints").iterdir()
        # As on rank 0 of two GPUs, whose memory holds no data here.
        monkeypatch.setitem(PartialState._shared_state, "device", META)
        monkeypatch.setitem(AcceleratorState._shared_state, "num_processes", 2)
        monkeypatch.setattr(Accelerator, "multi_device", True)
        checkpoints.resume()
        monkeypatch.undo()
    steps = [state["step"] for state in updater.optimizer.state.values()]
    assert [(float(step), step.device.type) for step in steps] == [(1.0, "cpu")] * 2


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_float32_unless_tf32_is_asked_for(tf32: bool) -> None:
    set_float32_precision(tf32=tf32)
    backends = torch.backends
    found = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    assert found == (("tf32", "tf32") if tf32 else ("ieee", "ieee"))


def refused_net(backend: str) -> str:
    """What is said of a net that Accelerate compiles in place of putting it under DDP alone."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, dynamo_backend=backend)
    try:
        prepare_net(accelerator, make_net("softmax"))
    except InputError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state()
    return "prepared"


def test_with_several_ranks_the_net_is_under_ddp_or_the_run_does_not_begin(world: Callable[[int], World]) -> None:
    assert world(2).run(refused_net, "no") == ["prepared"] * 2
    for said in world(2).run(refused_net, "eager"):
        assert said.startswith("Accelerate put the net into OptimizedModule, not DistributedDataParallel: ")
