"""Kills at random moments lose nothing but work since the last checkpoint; and the soak can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import soak


@pytest.mark.slow  # 44 s
def test_three_kills_end_bit_equal(capsys: pytest.CaptureFixture[str]) -> None:
    code = soak.main(["--kills", "3", "--world-size", "2", "--", "--epochs", "2", "--train-examples", "10000"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "bit-equal" in said.out


def test_the_soak_tells_a_run_that_differs(tmp_path: Path) -> None:
    for name, loss in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        run = tmp_path / name
        run.mkdir()
        (run / "model.safetensors").write_bytes(b"weights" if name != "c" else b"others")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "time/epoch_s": len(name)}) + "\n")
    assert soak.compare(tmp_path / "a", tmp_path / "b") == []
    assert soak.compare(tmp_path / "c", tmp_path / "b") == ["weights", "rows"]


NO_NET = pytest.param(["--kills", "1", "--", "--net", "resnet"], marks=pytest.mark.slow)  # 15 s


@pytest.mark.parametrize("flags", [["--kills", "0"], ["--world-size", "0"], NO_NET])
def test_bad_flags_end_it(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = soak.main(flags)
    except SystemExit as end:
        code = end.code
    assert code
    assert "error" in capsys.readouterr().err
