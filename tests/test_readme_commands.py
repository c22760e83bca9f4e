"""The README's commands, as written, in a fresh shell in which the environment was activated: a dozen of 5 to 14 s."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.test_readme import README, ROOT, commands

NOT_RUN = {  # part of a command: why it is not run here
    "scripts/test.sh": "runs the tests, among them these",
    "wandb login": "needs an account",
    "--wandb online": "needs an account",
    "scripts.wandb_report": "needs an account",
    "scripts.compare": "shows what a sweep has trained",
    "scripts.verify": "takes minutes",
    "scripts.gallery": "takes minutes",
    "scripts.peers": "takes minutes",
}
RUN = {command: says for command, says in reversed(commands([README])) if not any(part in command for part in NOT_RUN)}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_runs_as_it_is_written(command: str) -> None:
    """The figures that train.py ends with are held by tests/test_readme.py."""
    shell = f"source {sys.prefix}/bin/activate && export OMP_NUM_THREADS=1 WANDB_MODE=disabled && {command}"
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV" and "WANDB" not in name}
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, env=environ, timeout=120, check=False
    )
    shown_a_fault = "loop.parity" in command
    assert done.returncode == shown_a_fault, done.stderr
    if "scripts.symptoms" in command:
        assert all(part in done.stdout for part in RUN[command].split("; ")), done.stdout


def test_every_exception_is_one() -> None:
    assert all(any(part in command for command, _ in commands([README])) for part in NOT_RUN)
