"""diagnose: the quotients of public reports, each with its name."""

from __future__ import annotations

import pytest

from scripts.diagnose import main

SUM_OVER_RANKS = "W: a sum over ranks was logged where a mean was meant"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--loss 4.436 0.5536 --ranks 8 1", [f"8.01 = {SUM_OVER_RANKS}"]),  # liquid-finetune#38
        ("--loss 0.5536 4.436 --ranks 8 1", ["0.125 = 1/W: a mean over ranks was divided by W once more"]),
        ("--loss 3 1 --ranks 6 2", [f"3 = {SUM_OVER_RANKS}"]),
        ("--loss 138 69 --accumulate 8 4", ["2 = K: a sum over micro-batches was logged where a mean was meant"]),
        (
            "--loss 2 1 --ranks 2 1 --accumulate 2 1",
            [f"2 = {SUM_OVER_RANKS}", "2 = K: a sum over micro-batches was logged where a mean was meant"],
        ),
        (
            "--loss 6 1 --ranks 2 1 --accumulate 3 1",
            ["6 = W K: a sum over ranks and micro-batches was logged where a mean was meant"],
        ),
        ("--loss 2.301 2.302 --ranks 8 1", ["1: the same, to 1%"]),
    ],
)
def test_a_quotient_has_its_name(flags: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 0
    assert capsys.readouterr().out.splitlines() == said


def test_another_quotient_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--loss", "1.37", "1", "--ranks", "8", "1"]) == 1
    assert capsys.readouterr().out.startswith("1.37 is no product of W and K, or one over it: first make sure")
