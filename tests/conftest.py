"""Fixtures: worlds of ranks, made when first asked for and ended with the session; a stand-in for W&B; a browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from loop.run.fetch import fetch_fashion_mnist
from tests.ranks import World
from tests.wandb_stub import KEY, WandbStub

if TYPE_CHECKING:
    from playwright.sync_api import Browser

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
LONGEST = (  # of the files, in this order
    "readme_commands", "parity", "tracking", "virtual_ranks", "faults", "copied", "wandb_report", "checkpoints",
    "train", "readme", "speed", "compare", "explain", "peers", "audit",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that all workers end together."""
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def fashion_mnist() -> None:
    """The real set, fetched where it is not there yet: some tests train on slices of it."""
    fetch_fashion_mnist(Path("data"))


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(3)` is a group of three gloo ranks, the same one throughout."""
    torch.set_num_threads(1)
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size in worlds and not worlds[size].usable:
            worlds.pop(size).close()
        if size not in worlds:
            worlds[size] = World(size)
        return worlds[size]

    yield of_size
    for each in worlds.values():
        each.close()


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """A stand-in for W&B's server that this process, and those it starts, are logged in to."""
    wandb = pytest.importorskip("wandb")
    with WandbStub() as stub:
        for name, value in {"BASE_URL": stub.url, "API_KEY": KEY, "DIR": str(tmp_path), "SILENT": "true"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # else the settings of an earlier test would hold
        yield stub
        wandb.teardown()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", "--recursive", str(disk)], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r tests/requirements.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield launched
        launched.close()
