"""What a terminal, or what stands in for one, can do to a program: close its output, interrupt it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from loop.config import Config
from loop.run.run import Run, Stopped
from loop.run.stopping import StopSignal
from tests.launches import PYTHON, kill, start, wait_for_rows

TINY = "--cpu --train-examples 300 --epochs 1 --wandb disabled --run-name run"


def in_shell(command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a pipeline, whose exit code is that of its first command."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        check=False,
    )


@pytest.mark.parametrize(
    "output",
    [
        "2>&1 | head -1",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("> /dev/full", "| head -7", ">&- 2>&-")),  # 7 s each
    ],
)
def test_a_closed_or_full_stdout_never_harms_a_training(tmp_path: Path, output: str) -> None:
    done = in_shell(f"{PYTHON} train.py {TINY} --out {tmp_path} {output}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow  # 7 s
def test_a_stdout_that_cannot_encode_a_name_never_harms_a_training(tmp_path: Path) -> None:
    done = in_shell(f"{PYTHON} train.py {TINY} --out '{tmp_path}/größe'", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"gr\xf6\xdfe" in done.stdout


def test_a_script_whose_reader_has_gone_ends_quietly() -> None:
    done = in_shell(f"{PYTHON} -m scripts.explain --world-size 64 | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("60000 examples")


@pytest.mark.slow  # 10 s each
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_train_sh_ends_with_the_message_and_the_signals_exit_code(tmp_path: Path, signum: signal.Signals) -> None:
    flags = ["--train-examples", "2000", "--epochs", "100000", "--log-every", "5", "--run-name", "run"]
    process = start(["bash", "scripts/train.sh"], tmp_path, *flags)
    try:
        wait_for_rows(process, tmp_path, 1)
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            if signum == signal.SIGINT or each is process:  # a terminal interrupts all
                each.send_signal(signum)
        stderr = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 128 + signum
    last = stderr.splitlines()[-1]
    assert last.startswith(f"train.py: stopped by {signum.name} after step ")
    command = f"bash scripts/train.sh {' '.join(flags[:-2])} --out {tmp_path} --run-name run --resume auto"
    assert last.endswith(f"is kept. To go on: {command}")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("of_ranks", "said"),
    [
        ([signal.SIGINT, 0, 0], "stopped by SIGINT"),
        ([0, signal.SIGTERM, 0], "stopped by SIGTERM"),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGINT], "stopped by SIGTERM"),
    ],
)
def test_a_signal_is_told_by_its_name_on_the_ranks_that_did_not_have_it(of_ranks: list[int], said: str) -> None:
    runs = [Run(Config()) for _ in of_ranks]
    for run, signum in zip(runs, of_ranks, strict=True):
        run.stop = StopSignal()
        run.stop.signum = signum
    for run in runs:
        with pytest.raises(Stopped, match=said) as stopped:
            run.decide(stops=sum(each.told_to_stop for each in runs), saved=True)
        assert stopped.value.exit_code == 128 + signal.Signals[said.split()[-1]]


@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_last_words_are_out_before_the_process_is_ended(unbuffered: str) -> None:
    """Under `python -u`, as torchrun starts ranks, a line had stayed in the buffer of a process that ends itself."""
    code = "import os, sys, loop.run.streams as s; s.forgive_streams(); print('last', file=sys.stderr); os._exit(3)"
    done = in_shell(f'{PYTHON} {unbuffered} -c "{code}"')
    assert (done.returncode, done.stderr) == (3, "last\n")


def test_only_a_signal_to_stop_stops_a_run() -> None:
    old = signal.signal(signal.SIGWINCH, lambda *_: None)  # a handler of Python's, as a library may set one
    try:
        with StopSignal() as stop:
            stop.handled.set()  # else the process would end
            os.kill(os.getpid(), signal.SIGWINCH)
            time.sleep(0.3)
            assert stop.signum == 0
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 5
            while not stop.signum and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGWINCH, old)
