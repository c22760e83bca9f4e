"""Bad input: one clear line that names the flag, exit code 2, nothing trained and nothing written."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from loop.config import Config, InputError, parse
from loop.effect import effect
from loop.idx import SetSize
from loop.run import wandb_tracker
from loop.run.resume import is_finished

REFUSED = [
    ("--batch-size 0", "--batch-size 0 must be at least 1"),
    ("--accumulate 0", "--accumulate 0 must be at least 1"),
    ("--accumulate 257", "--accumulate 257 must be at most --batch-size"),
    ("--lr 1e300", "--lr 1e+300 must be above 0 and below 1e38"),
    ("--weight-decay 1e308", "--weight-decay 1e+308 must be"),
    (f"--resume {'x' * 300}", "is neither never, nor auto, nor the folder"),
    (f"--data-dir {'x' * 300}", "cannot keep Fashion-MNIST there"),
    ("--epochs 0", "--epochs 0 must be at least 1"),
    ("--log-every 0", "--log-every 0 must be at least 1"),
    ("--train-examples 0", "--train-examples 0 must be at least 1"),
    ("--train-examples 60001", "--train-examples 60001: fashion-mnist has only 60000"),
    ("--seed -1", "--seed -1 must be"),
    ("--lr 0", "--lr 0.0 must be above 0 and below 1e38"),
    ("--lr nan", "--lr nan must be"),
    ("--lr inf", "--lr inf must be"),
    ("--momentum 1", "--momentum 1.0 must be"),
    ("--weight-decay -1", "--weight-decay -1.0 must be"),
    ("--clip-norm 0", "--clip-norm 0.0 must be"),
    ("--audit-every -1", "--audit-every -1 must be 0 or more"),
    ("--audit-every 1 --audit-fail nan", "--audit-fail nan must be"),
    ("--audit-fail 1e-6", "--audit-fail needs --audit-every"),
    ("--run-name ../elsewhere", "--run-name '../elsewhere' must be a plain name"),
    ("--out README.md", "--out README.md: README.md is not a folder"),
    ("--out README.md/runs", "README.md is not a folder"),
    (f"--out {'x' * 300}", "cannot be used: File name too long"),
    (f"--dataset {'x' * 300}", "cannot be read"),
    ("--mixed-precision fp16", "--mixed-precision fp16 needs a GPU"),
    ("--optimizer adam --momentum 0.9", "--momentum is for --optimizer sgd"),
    ("--updater scratch --optimizer adam", "--updater scratch is the book's sgd"),
    ("--updater scratch --momentum 0.9", "--updater scratch has no momentum"),
    ("--updater scratch --weight-decay 0.1", "--updater scratch has no weight decay"),
    ("--updater scratch --clip-norm 1", "--clip-norm needs --updater torch"),
    ("--updater scratch --mixed-precision fp16", "--mixed-precision fp16 needs --updater torch"),
    ("--dtype float64 --mixed-precision bf16", "autocast leaves float64 as it is"),
    ("--cpu --mixed-precision fp16", "--mixed-precision fp16 needs a GPU"),
    ("--tail drop --train-examples 100", "--tail drop leaves an epoch without a step"),
    ("--tail pad --accumulate 3", "(1 x 3 = 3) to divide --batch-size 256: choose a multiple of 3"),
    ("--virtual-ranks -1", "--virtual-ranks -1 must be 0 or more"),
    ("--virtual-ranks 65 --batch-size 64", "--virtual-ranks 65 must be 0 or more, and at most --batch-size"),
    ("--virtual-ranks 8 --accumulate 2", "--virtual-ranks sets the micro-batches itself: leave out --accumulate"),
    ("--virtual-ranks 8 --normalize rank", "--virtual-ranks needs --normalize global"),
    ("--virtual-ranks 8 --mixed-precision fp16", "without fp16's scaler: use bf16"),
    ("--virtual-ranks 24 --tail pad --batch-size 36", "--tail pad needs ranks x micro-batches (1 x 24 = 24)"),
    (f"--tags {'x' * 65}", "a tag has 1 to 64 characters"),
    ("--tags ''", "--tags '': a tag has 1 to 64 characters"),
    ("--wandb-project a/b", "--wandb-project 'a/b': a project's name has at most 128 characters, and none of /"),
    (f"--wandb-project {'x' * 129}", "a project's name has at most 128 characters"),
    ("--dataset no/such/folder", "--dataset no/such/folder: cannot be read: No such file"),
]


def refusal(flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **environ: str) -> str:
    """What train.py says on stderr as it refuses."""
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(flags)])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_bad_flags_get_one_line(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(flags, monkeypatch, capsys)
    assert said.startswith("train.py: error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("flags", ["--reduction median", "--batch-size many", "--no-such-flag"])
def test_unparsable_flags_are_named(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flags.split()[0] in refusal(flags, monkeypatch, capsys)


@pytest.mark.parametrize("flags", ["--batch-size 0", "--no-such-flag", "--tail pad"])
def test_only_one_rank_complains(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}
    assert refusal(flags, monkeypatch, capsys, **ranks) == ""


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ("--check --tail pad", "3", "--tail pad needs ranks x micro-batches (3 x 1 = 3) to divide --batch-size 256: "),
        ("--virtual-ranks 12", "8", "--virtual-ranks 12: 8 ranks do not divide 12: start one of 1, 2, 3, 4, 6, 12\n"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused_before_they_are_there(
    flags: str, ranks: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(flags, monkeypatch, capsys, WORLD_SIZE=ranks).startswith(f"train.py: error: {message}")


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    assert "choose another name" in refusal(f"--out {tmp_path} --run-name mine", monkeypatch, capsys)


def test_processes_that_do_not_see_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refusal(f"--cpu --out {tmp_path}", monkeypatch, capsys, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    assert "started 2 processes, but they do not see each other" in said
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_gpus_are_refused_by_the_one_that_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    environ = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    said = refusal(f"--out {tmp_path}", monkeypatch, capsys, **environ)
    assert said == "train.py: error: 2 ranks on a machine of 1 GPU(s): start 1, or train with --cpu\n"
    assert refusal(f"--out {tmp_path}", monkeypatch, capsys, **{**environ, "RANK": "1", "LOCAL_RANK": "1"}) == ""
    assert not list(tmp_path.iterdir())


def test_help_and_check_need_no_torch_and_answer_at_once() -> None:
    for flag in ("--help", "--check"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-X", "importtime", "train.py", flag]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of the processor"
        assert not [line for line in done.stderr.splitlines() if line.rsplit("|", 1)[-1].strip() == "torch"]


def test_the_default_learning_rates_are_the_books() -> None:
    assert [parse(["--net", net]).learning_rate for net in ("softmax", "mlp", "lenet")] == [0.1, 0.1, 0.9]
    assert Config(optimizer="adam").learning_rate == 1e-3
    assert Config(lr=0.3, net="lenet").learning_rate == 0.3


@pytest.mark.parametrize(
    ("flags", "lr_effective"),
    [
        ({}, 0.1),
        ({"reduction": "sum"}, 0.1 * 7),
        ({"reduction": "sum", "normalize": "rank"}, 0.1 * 7 / 3),
        ({"normalize": "rank"}, 0.1 * 2 / 3),  # one cell of three is empty: its mean is 0, and is averaged in
        ({"updater": "scratch", "reduction": "sum"}, 0.1),
        ({"updater": "scratch", "reduction": "sum", "normalize": "rank"}, 0.1 * 7 / 3 / 4),
        ({"updater": "scratch"}, 0.1),
    ],
)
def test_effective_learning_rate(flags: dict[str, str], lr_effective: float) -> None:
    assert effect(Config(**flags), (4, 3, 0), world_size=3).lr_effective == pytest.approx(lr_effective, rel=1e-12)


def test_auto_goes_on_with_the_latest_run_of_a_default_name(tmp_path: Path) -> None:
    first, auto = Config(out=tmp_path).folder(2), Config(out=tmp_path, resume="auto")
    assert auto.folder(2) == first
    for path in (first, first.with_name(f"{first.name}-2"), first.with_name(f"{first.name}-3")):
        path.mkdir()
        assert auto.folder(2) == path
    assert Config(out=tmp_path, resume="auto", run_name=first.name).folder(2) == first


FLAGS = sorted(f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__)
VALUES = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(["", "-1", "~"]))


@settings(max_examples=60, deadline=None)
@given(chosen=st.dictionaries(st.sampled_from(FLAGS), VALUES, min_size=1, max_size=5), world_size=st.integers(1, 9))
def test_no_value_of_any_flag_ends_in_a_traceback(chosen: dict[str, str], world_size: int) -> None:
    try:
        config = parse([word for pair in chosen.items() for word in pair], quiet=True)
        config.validate()
        config.shards(config.training_size(60_000), world_size)
        is_finished(config, SetSize(60_000), world_size, quiet=True)
    except (SystemExit, InputError) as refusal:
        assert str(refusal)


@pytest.mark.parametrize(
    ("variable", "value", "refusal"),
    [
        ("WANDB_MODE", "of", "WANDB_MODE=of: choose one of online, offline, disabled, dryrun, run, shared"),
        ("WANDB_PROJECT", "a:b", "WANDB_PROJECT 'a:b': a project's name has at most 128 characters, and none of"),
    ],
)
def test_what_the_environment_tells_wandb_is_refused_too(
    variable: str, value: str, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"^{re.escape(refusal)}"):
        Config().validate()
    if variable == "WANDB_MODE":
        Config(wandb="disabled").validate()


@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_a_variable_that_wandb_refuses_does_not_switch_it_off(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_TAGS", "")
    assert wandb_tracker.choose_mode(Config(wandb="offline")).name == "offline", "empty is unset"
    monkeypatch.setenv("WANDB_TAGS", "a," + "b" * 65)
    with pytest.raises(InputError, match=r"^W&B refuses a WANDB_ variable: .* run_tags .*64 characters$"):
        wandb_tracker.choose_mode(Config(wandb=mode))
    assert wandb_tracker.choose_mode(Config(wandb="disabled")).name == "disabled"


@pytest.mark.parametrize(
    ("told", "mode"), [("OFFLINE", "offline"), ("Disabled", "disabled"), ("dryrun", "offline"), ("", "offline")]
)
def test_case_does_not_matter_and_empty_is_unset(told: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "_why_not_online", lambda: "no key")
    monkeypatch.setenv("WANDB_MODE", told)
    Config().validate()
    assert wandb_tracker.choose_mode(Config()).name == mode
    assert os.environ.get("WANDB_MODE") == (told.lower() or None), "as W&B itself reads it"
