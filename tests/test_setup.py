"""The environment that the scripts make: whole, repaired where it is not, without touching what it has installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SETUP = 'source "$1/scripts/setup.sh"; setup "$2" requirements.txt; . .venv/bin/activate; echo "$VIRTUAL_ENV"'


def set_up(folder: Path) -> str:
    """Run the set-up for an empty list of requirements, then activate as the README says; return what that gives."""
    (folder / "requirements.txt").touch()
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    command = ["bash", "-ec", SETUP, "setup", str(Path.cwd()), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow  # 8 s each
@pytest.mark.parametrize("fault", ["no activate", "no python", "a Python that is gone"])
def test_an_environment_can_be_activated_as_made_and_when_repaired(tmp_path: Path, fault: str) -> None:
    environment = tmp_path / ".venv"
    assert set_up(tmp_path) == str(environment)
    (installed,) = environment.glob("lib/python*/site-packages")
    (installed / "kept.py").touch()
    if fault == "no activate":
        (environment / "bin" / "activate").unlink()
    else:
        for python in (environment / "bin").glob("python*"):
            python.unlink()
    if fault == "a Python that is gone":
        (environment / "bin" / "python").symlink_to(tmp_path / "gone")
    assert set_up(tmp_path) == str(environment)
    assert (installed / "kept.py").exists()
