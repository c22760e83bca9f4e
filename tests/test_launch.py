"""What the launcher says: taken where it fits, refused in one line or named where it does not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import train
from loop.config import Config, InputError, parse
from loop.run.launch import HOW_TO_CONFIGURE, check_launch
from loop.run.run import Run
from tests.launches import PYTHON, forked_ranks, free_port, launch

TINY = ["--cpu", "--train-examples", "300", "--epochs", "1", "--wandb", "disabled", "--run-name", "run"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision that a process asks for."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("DYNAMO_BACKEND", "EAGER", "torch.compile"),
        ("USE_FSDP", "true", "FSDP"),
        ("USE_DEEPSPEED", "true", "DeepSpeed"),
        ("USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("USE_PARALLELISM_CONFIG", "true", "tensor or context parallelism"),
        ("USE_SAGEMAKER", "true", "SageMaker"),
    ],
)
def test_more_than_data_parallelism_is_refused(
    variable: str, value: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(InputError) as refused:
        train.train(parse([*TINY, "--out", str(tmp_path)]))
    assert str(refused.value) == (
        f"ACCELERATE_{variable}={value} asks for {what}, and this is plain data parallelism: {HOW_TO_CONFIGURE}"
    )
    assert not list(tmp_path.iterdir())


def test_fp8_is_refused_unless_a_flag_overrides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="ACCELERATE_MIXED_PRECISION=fp8 is not supported"):
        train.train(parse([*TINY, "--out", str(tmp_path)]))
    assert train.train(parse([*TINY, "--out", str(tmp_path), "--mixed-precision", "bf16"])) == 0


@pytest.mark.parametrize(
    ("told", "flags", "taken"),
    [
        ("bf16", [], "bf16"),
        ("FP16", [], "fp16"),
        ("no", [], "no"),
        ("bf16", ["--mixed-precision", "no"], "no"),
        ("no", ["--mixed-precision", "bf16"], "bf16"),
    ],
)
def test_the_launchers_precision_is_taken_unless_a_flag_is_given(
    told: str, flags: list[str], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    assert parse(flags).mixed_precision == taken


def test_micro_batches_come_from_the_flag_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    summaries = []
    for told in ("", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", told)
        assert (
            train.train(parse([*TINY, "--accumulate", "2", "--normalize", "rank", "--out", str(tmp_path / told)])) == 0
        )
        summary = json.loads((tmp_path / told / "run" / "summary.json").read_text())
        summaries.append({key: value for key, value in summary.items() if not key.startswith("time/")})
        warning = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 has no effect: micro-batches are --accumulate 2"
        assert capfd.readouterr().err == (f"train.py: warning: {warning}\n" if told else "")
    assert summaries[0] == summaries[1]


@pytest.mark.slow  # 14 s
def test_accelerate_launch_hands_its_precision_on_and_its_compiler_is_refused(tmp_path: Path) -> None:
    how = [PYTHON, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    done = launch([*how, "--mixed_precision", "bf16", "train.py"], tmp_path / "bf16", *TINY)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bf16" / "run" / "config.json").read_text())["mixed_precision"] == "bf16"
    done = launch([*how, "--dynamo_backend", "eager", "train.py"], tmp_path / "eager", *TINY)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert said == [
        "train.py: error: ACCELERATE_DYNAMO_BACKEND=EAGER asks for torch.compile, and this is plain data parallelism: "
        + HOW_TO_CONFIGURE
    ]
    assert not (tmp_path / "eager").exists()


EMPTY = """
import os, runpy
os.environ |= {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}
runpy.run_path("train.py", run_name="__main__")
"""
LEFT_OVER = [  # what a shell may have left over, as (rank, world size) would be read from it; and what is said
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, but no MASTER_ADDR: unset what another launch has left over"),
    ({"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1, but the number of ranks is 1: unset"),
    ({"RANK": "1"}, "RANK=1, but the number of ranks is 1: unset"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, but the number of ranks is 2: unset"),
    ({"LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=3, but the number of ranks is 2: unset"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: unset it"),
    ({"WORLD_SIZE": "\u00b3"}, "WORLD_SIZE=\u00b3 is no number: unset it"),
    ({"OMPI_COMM_WORLD_SIZE": "abc"}, "OMPI_COMM_WORLD_SIZE=abc is no number: unset it"),
    ({"ACCELERATE_TORCH_DEVICE": "xpu"}, "ACCELERATE_TORCH_DEVICE=xpu: unset it"),
]


@pytest.mark.parametrize(("environ", "said"), LEFT_OVER)
def test_what_a_shell_has_left_over_is_named_in_one_line(
    environ: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: error: {said}")
    assert not list(tmp_path.iterdir())


def test_an_empty_variable_is_unset(tmp_path: Path) -> None:
    done = launch([PYTHON, "-c", EMPTY], tmp_path, *TINY)
    assert (done.returncode, done.stderr) == (0, "")


TWO_RUNS = """
import atexit, sys
import torch.distributed as dist
atexit.register(lambda: print("at the end:", dist.is_initialized()))  # and so called after what a run registers
import train
from loop.config import parse
for name in ("one", "two"):
    train.train(parse([*sys.argv[1:], "--run-name", name]))
    print(f"after run {name}:", dist.is_initialized())
"""


def test_the_process_group_outlives_a_run_and_is_destroyed_with_the_process(tmp_path: Path) -> None:
    (tmp_path / "two_runs.py").write_text(TWO_RUNS)
    done = launch([*forked_ranks(2)[:-1], str(tmp_path / "two_runs.py")], tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    for said in ("after run one: True", "after run two: True", "at the end: False"):
        assert done.stdout.count(said) == 2


def test_the_argument_of_torchs_old_launcher_names_the_new_one() -> None:
    with pytest.raises(InputError, match="adds --local-rank: use torchrun instead"):
        check_launch(["--local-rank=1", "--epochs", "1"])


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, ValueError])
def test_what_accelerates_constructor_raises_is_reported_with_its_variables(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise kind("a plugin is missing\nand more")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    monkeypatch.setattr(Accelerator, "__init__", fails)
    with pytest.raises(
        InputError, match=r"^Accelerate cannot be set up: a plugin is missing \(.*ACCELERATE_USE_CPU=yes"
    ):
        train.train(parse([*TINY, "--out", str(tmp_path)]))


DEBUG_LAUNCHER = """
import sys, torch
torch.set_num_threads(1)
sys.argv = ["train.py", *sys.argv[1:]]
import train
from accelerate import debug_launcher
debug_launcher(train.main)
"""


@pytest.mark.slow  # 15 s
def test_debug_launcher_trains_and_says_that_no_watchdog_watches(tmp_path: Path) -> None:
    done = launch([PYTHON, "-c", DEBUG_LAUNCHER], tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "train.py: no store to reach: the watchdog for lost ranks is off\n"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2


MPI_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: {port}
use_cpu: true
mpirun_config:
  mpirun_hostfile: {hosts}
  mpirun_ccl: '1'
"""


@pytest.mark.slow  # 15 s each
@pytest.mark.skipif(not shutil.which("mpirun"), reason="no MPI: apt-get install openmpi-bin")
@pytest.mark.parametrize("by", ["its configuration", "mpirun"])
def test_accelerates_way_over_mpi_trains_on_all_ranks(tmp_path: Path, by: str) -> None:
    hosts, config = tmp_path / "hosts", tmp_path / "config.yaml"
    hosts.write_text("localhost slots=2\n")
    config.write_text(MPI_CONFIG.format(port=free_port(), hosts=hosts))
    environ = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    accelerate = [PYTHON, "-m", "accelerate.commands.launch"]
    how = [*accelerate, "--config_file", str(config)]
    if by == "mpirun":
        port = ["--main_process_port", free_port()]
        how = ["mpirun", "--oversubscribe", "-np", "2", *accelerate, "--cpu", "--num_processes", "2", *port]
    done = launch([*how, "train.py"], tmp_path / "out", *TINY, **environ)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run" / "config.json").read_text())["world_size"] == 2


def test_no_rank_is_accused_while_the_trackers_of_a_run_that_is_over_take_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off: list[bool] = []
    monkeypatch.setattr(Run, "_finish_trackers", lambda run: off.append(run.watchdog.ended.is_set()))
    assert train.train(parse([*TINY, "--out", str(tmp_path)])) == 0
    assert off == [True]


def test_tf32_is_part_of_what_decides_the_weights(tmp_path: Path) -> None:
    flags = [*TINY, "--out", str(tmp_path)]
    assert train.train(parse(flags)) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tf32"] is False
    with pytest.raises(InputError, match=r"other mathematics \(tf32 False -> True\)"):
        train.train(parse([*flags, "--resume", "auto", "--epochs", "2", "--tf32"]))
    with pytest.raises(InputError, match="--tf32 is for --dtype float32"):
        Config(tf32=True, dtype="float64").validate()


@pytest.mark.parametrize("kind", [DistributedType.XLA, DistributedType.FSDP, DistributedType.MULTI_NPU])
def test_what_accelerate_makes_of_it_is_looked_at_too(
    kind: DistributedType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(
        InputError, match=f"^Accelerate was set up for {kind.value}, and this is plain data parallelism"
    ):
        train.train(parse([*TINY, "--out", str(tmp_path)]))
