"""The book's calls in a real Jupyter kernel, and in one whose shell is a subclass, as Colab's is."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

COLAB = "shell = get_ipython(); shell.__class__ = type('Shell', (type(shell),), {})"
TRAINING = """
import torch
from torch import nn
from loop.book import train_ch3

y = torch.arange(100) % 10
batches = [(nn.functional.one_hot(y, 10).float(), y)]

def train(epochs):
    net = nn.Linear(10, 10)
    train_ch3(net, batches, batches, nn.CrossEntropyLoss(), epochs, torch.optim.SGD(net.parameters(), lr=100.0))
"""


def outputs(folder: Path, *cells: str) -> list[list[Any]]:
    """Run a notebook; return what stands under each cell in the end."""
    nbclient, nbformat, _ = (
        pytest.importorskip(name, reason=f"{name} is not installed (tests/requirements-d2l.txt)")
        for name in ("nbclient", "nbformat", "ipykernel")
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    setup = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(Path.cwd())!r})")
    notebook.cells.insert(0, setup)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells[1:]]


def kinds(of_cell: list[Any]) -> list[str]:
    return ["picture" if "image/png" in output.get("data", {}) else output.output_type for output in of_cell]


@pytest.mark.parametrize("setup", ["", COLAB], ids=["Jupyter", "Colab"])
def test_each_training_leaves_its_figure(setup: str, tmp_path: Path) -> None:
    _, _, one, two, printed, kept = outputs(
        tmp_path,
        setup,
        TRAINING,
        "train(4)",
        "train(3); train(4)",
        "train(3); print('trained')",
        "import matplotlib.pyplot as plt; train(3); plt.savefig('mine.png')",
    )
    assert kinds(one) == ["picture"]
    assert kinds(two) == ["picture"] * 2
    assert kinds(printed) == ["stream", "picture"]
    assert kinds(kept) == ["picture"]
    first, second = (base64.b64decode(output.data["image/png"]) for output in two)
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"], "and no file unasked"
    assert (tmp_path / "mine.png").stat().st_size > 5000, "an empty figure has less than half of it"


def test_a_figure_is_shown_while_the_training_goes_on(tmp_path: Path) -> None:
    """Under a backend that shows nothing by itself, a picture can only be the Animator's own."""
    (_, _, shown) = outputs(tmp_path, "import matplotlib; matplotlib.use('Agg')", TRAINING, "train(3)")
    assert kinds(shown) == ["picture"]
