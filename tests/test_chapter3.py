"""The notebook scripts/chapter3.ipynb: its form, and its cells run in a real kernel, held to what mathematics promises.

`python -m tests.test_chapter3` runs it and writes its outputs anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

NOTEBOOK = Path("scripts/chapter3.ipynb")
ROUNDING = 1e-12
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MACHINE = r"/tmp|/home|/root|/Users|/usr|site-packages|Traceback|[Ww]arning|0x[0-9a-f]{6}"
ANSWERS = """
empty_wrong, empty_right = on_ranks("mean.py", 384), on_ranks("global_mean.py", 384)
names = "X y start one_mean two_mean one_uneven two_wrong two_right mean_step sum_step sum_step_on_ranks"
kept = {name: globals()[name] for name in names.split() + ["empty_wrong", "empty_right"]}
torch.save(kept | {"four": on_ranks("global_mean.py", 385, world_size=4)}, PROJECT.parent / "kept.pt")
"""


def run(notebook: Any, folder: Path) -> None:
    """Run all cells in a new kernel that starts in the folder; their outputs come into the notebook."""
    nbclient, _ = (
        pytest.importorskip(name, reason=f"{name} is not installed (tests/requirements-d2l.txt)")
        for name in ("nbclient", "ipykernel")
    )
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()


def read() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (tests/requirements-d2l.txt)")
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: Any) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def shape(cell: Any) -> list[Any]:
    """What stands under a cell, without the digits."""
    return [
        re.sub(r"-?\d[\d.]*(e[+-]\d+)?", "#", "".join(output["text"]))
        if output["output_type"] == "stream"
        else sorted(output["data"])
        for output in cell["outputs"]
    ]


# Its form


@pytest.fixture(scope="module")
def committed() -> Any:
    return json.loads(NOTEBOOK.read_text())


def test_it_is_committed_with_outputs_of_one_run_from_top_to_bottom(committed: Any) -> None:
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data"), output
            assert output.get("name", "stdout") == "stdout", output
        source = "".join(cell["source"])
        assert bool(cell["outputs"]) == bool(re.search(r"print\(|%%writefile|^train_ch3\(|animator.add", source, re.M))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 2


def test_nothing_in_it_depends_on_the_machine(committed: Any) -> None:
    assert committed["metadata"] == METADATA
    for cell in committed["cells"]:
        assert cell["metadata"] == {}
        for output in cell.get("outputs", []):
            assert output.get("metadata", {}) == {}
            text = json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}})
            assert not re.search(MACHINE, text), text
    assert 'REPOSITORY = ""' in "".join(code_cells(committed)[0]["source"])
    assert NOTEBOOK.stat().st_size < 200_000


def test_its_links_lead_to_files(committed: Any) -> None:
    text = "".join("".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]


def test_it_prints_what_the_mathematics_promises(committed: Any) -> None:
    """Rounding where a step is one process's; n and n / W; 1 / (W n_r) over 1 / n."""
    printed_by = {cell["id"]: re.findall(r"[\d.e+-]*\d", printed(cell)) for cell in code_cells(committed)}
    assert float(printed_by["even"][-1]) < ROUNDING
    assert [values for values in printed_by["sum"] if "." in values] == ["256.0000", "128.0000"]
    assert [values for values in printed_by["weights"] if "." in values] == [f"{129 / 256:.3f}", f"{129 / 2:.3f}"]
    assert float(printed_by["wrong"][-1]) > 0.01
    assert float(printed_by["right"][-1]) < ROUNDING


# Its cells, run


def trained(start: Tensor, X: Tensor, y: Tensor, weights: Callable[[int], Tensor]) -> Tensor:
    """Softmax regression by hand, in steps of 256 at the rate 0.1, three epochs long.

    weights: of the n examples of a step, by which their gradients are added.
    """
    W, b = start[:7840].view(10, 784).clone(), start[7840:].clone()
    for _ in range(3):
        for x, labels in zip(X.flatten(1).split(256), y.split(256), strict=True):
            errors = ((x @ W.T + b).softmax(1) - F.one_hot(labels, 10)) * weights(len(labels))[:, None]
            W -= 0.1 * errors.T @ x
            b -= 0.1 * errors.sum(0)
    return torch.cat([W.flatten(), b])


def mean(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def mean_of_two_means(n: int) -> Tensor:
    """Rank 0 takes the first 128 examples, rank 1 the others."""
    return torch.cat([mean(128), mean(n - 128)]) / 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The notebook run alone in a new folder, where it clones the project; and what its cells have computed."""
    folder = tmp_path_factory.mktemp("alone")
    origin = folder / "origin"
    shutil.copytree("loop", origin / "loop", ignore=shutil.ignore_patterns("__pycache__"))
    (origin / "data").symlink_to(Path("data").resolve())
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    notebook = read()
    first = code_cells(notebook)[0]
    first.source = first.source.replace('REPOSITORY = ""', f"REPOSITORY = {origin.as_uri()!r}")
    notebook.cells.append(type(first)(first, id="answers", source=ANSWERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.delenv("PYTHONPATH", raising=False)
        run(notebook, folder)
    assert (folder / "chapter3-data-parallel" / "loop").is_dir()
    yield notebook, torch.load(folder / "kept.pt")


@pytest.mark.slow
def test_run_alone_it_shows_what_is_committed_but_for_digits(alone: tuple[Any, Any], committed: Any) -> None:
    *cells, _ = code_cells(alone[0])
    assert [shape(cell) for cell in cells] == [shape(cell) for cell in code_cells(committed)]


@pytest.mark.slow
def test_its_weights_are_those_computed_by_hand(alone: tuple[Any, dict[str, Any]]) -> None:
    kept = alone[1]

    def off(found: list[Tensor], examples: int, weights: Callable[[int], Tensor]) -> float:
        expected = trained(kept["start"], kept["X"][:examples], kept["y"][:examples], weights)
        return float((found[-1] - expected).norm() / (expected - kept["start"]).norm())

    assert off(kept["one_mean"], 1024, mean) < ROUNDING
    assert off(kept["two_mean"], 1024, mean) < ROUNDING
    assert off(kept["one_uneven"], 385, mean) < ROUNDING
    assert off(kept["two_right"], 385, mean) < ROUNDING
    assert off(kept["two_wrong"], 385, mean_of_two_means) < ROUNDING
    assert off(kept["two_wrong"], 385, mean) > 0.01
    assert off(kept["empty_right"], 384, mean) < ROUNDING
    assert kept["empty_wrong"][-1].isnan().all(), "the mean of no losses"
    assert off(kept["four"], 385, mean) < ROUNDING


@pytest.mark.slow
def test_a_sums_step_is_n_times_the_means_and_n_over_w_on_ranks(alone: tuple[Any, dict[str, Any]]) -> None:
    kept = alone[1]
    assert kept["sum_step"] / kept["mean_step"] == pytest.approx(256, rel=ROUNDING)
    assert kept["sum_step_on_ranks"] / kept["mean_step"] == pytest.approx(256 / 2, rel=ROUNDING)


@pytest.mark.slow
def test_opened_in_a_checkout_it_takes_the_project_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = read()
    first = code_cells(notebook)[0]
    again = type(first)(first, id="again")  # a cell may be run twice
    shown = type(first)(first, id="shown", source="print(PROJECT)")
    notebook.cells = [first, again, shown]
    run(notebook, NOTEBOOK.parent)
    assert printed(notebook.cells[-1]).strip() == str(Path.cwd())


if __name__ == "__main__":
    import nbformat

    notebook = read()
    run(notebook, NOTEBOOK.parent)
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n")
