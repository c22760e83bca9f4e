"""What the launcher says: taken where it fits, refused in one line or named where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import train
from loop.config import Config, InputError, parse
from loop.run.launch import HOW_TO_CONFIGURE
from tests.launches import PYTHON, launch

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
    how = [
        PYTHON,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
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
