"""Fixtures: worlds of ranks, made when first asked for and ended with the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(3)` is a group of three gloo ranks, the same one throughout."""
    torch.set_num_threads(1)
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size not in worlds:
            worlds[size] = World(size)
        return worlds[size]

    yield of_size
    for each in worlds.values():
        each.close()
