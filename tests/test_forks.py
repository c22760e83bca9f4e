"""Programs that tests start: forked with their imports made, and with nothing of this project's."""

from __future__ import annotations

import sys

from tests.forks import Forked
from tests.launches import environment

MODULES = "import sys; print(*(name in sys.modules for name in sys.argv[1:])); sys.exit(3)"


def test_a_program_starts_with_torchs_imports_made_and_none_of_this_projects() -> None:
    names = ["torch", "torch._dynamo", "accelerate", "matplotlib.figure", "loop", "tests", "wandb"]
    process = Forked([sys.executable, "-c", MODULES, *names], environment())
    assert process.communicate() == ("True True True True False False False\n", "")
    assert process.returncode == 3
