"""The closing sentence: what an example weighed in the last step, by hand-made figures."""

from __future__ import annotations

from typing import Any

import pytest

from loop.config import Config
from loop.run.console import last_batch
from loop.shards import sizes_in_words


@pytest.mark.parametrize(
    ("flags", "examples", "world_size", "parts"),
    [
        ({}, 60_000, 2, ["96 example(s) in 2 cells (2 x 48)", "weighed 1/n in every cell", "rate 0.1 (--lr 0.1)."]),
        ({}, 60_000, 1, ["took 96 example(s) in one cell: an example weighed 1/n, "]),
        # 100 mod 256 = 100 in cells of 50: a sum of weights 1/2 each, 100 times 1/2 over n.
        ({"reduction": "sum", "normalize": "rank"}, 100, 2, ["weighed 50/n", "rate 5 (--lr 0.1)"]),
        ({"tail": "ragged", "normalize": "rank"}, 192, 2, ["(128, 64)", "1.5/n in the smallest cell (64) and 0.75/n"]),
        ({"updater": "scratch", "reduction": "sum"}, 192, 2, ["weighed 1/n in every cell, effective"]),
        (
            {"updater": "scratch", "reduction": "sum", "normalize": "rank", "tail": "ragged"}, 192, 2,
            ["weighed 0.75/n in every cell, effective", "the ranks divided by 128, 64, and drifted apart"],
        ),
        ({"tail": "drop"}, 60_000, 2, ["took 256", "96 examples of the epoch were never seen."]),
        ({"tail": "pad"}, 60_000, 2, ["took 256", "160 of the examples had been seen before."]),
    ],
)  # fmt: skip
def test_the_closing_sentence(flags: dict[str, Any], examples: int, world_size: int, parts: list[str]) -> None:
    config = Config(**flags)
    sentence = last_batch(config, config.shards(examples, world_size))
    for part in parts:
        assert part in sentence


def test_sizes_in_words() -> None:
    assert sizes_in_words((33, 33, 32, 0)) == "2 x 33, 32, 0"
