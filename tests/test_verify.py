"""scripts.verify: what it starts on which machine, how it judges what it finds, and how it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.numpy import save_file
from tqdm import tqdm

from loop.config import Config
from loop.run.launch import join_ranks
from scripts import verify
from scripts.runs import distance
from scripts.verify import Failed, Place, Verify, plan, runs_at

ALL = verify.get_args(verify.Part)


@pytest.mark.parametrize(
    ("gpus", "on_gpus", "left_out"),
    [
        (0, [], ["left out: all that needs a GPU"]),
        (1, [Place(1, 1), Place(2, 1)], ["left out: several GPUs over NCCL"]),
        (2, [Place(1, 1), Place(2, 2)], []),
        (8, [Place(1, 1), Place(8, 8)], []),
    ],
)
def test_a_machine_verifies_on_its_cpu_and_on_every_gpu(gpus: int, on_gpus: list[Place], left_out: list[str]) -> None:
    steps, left = plan(ALL, gpus)
    assert left == left_out
    assert [place for step, place in steps if step == "train"] == [Place(1), Place(2), Place(3), Place(4), *on_gpus]
    assert [place for step, place in steps if step == "wait"] == on_gpus
    assert [place for step, place in steps if step == "lose"] == [Place(2), *[Place(gpus, gpus)] * (gpus > 1)]
    assert [place for step, place in steps if step == "resume"] == [
        Place(2), *(place for place in on_gpus if place.ranks == place.gpus)
    ]  # fmt: skip


def test_a_part_starts_no_more_than_it_needs() -> None:
    assert plan(["parity"], 0)[0] == [("parity", Place(1))]
    assert [place for _, place in plan(["bits"], 0)[0]] == [Place(1), Place(2), Place(4)]
    assert "fp16" in runs_at(Place(1, 1), ["audits"])
    assert "fp16" not in runs_at(Place(2), ["audits"])
    assert str(Place(2, 1)) == "2 ranks on 1 GPU, gloo"


def a_run(folder: Path, *weights: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"0.weight": np.array(weights)}, folder / "model.safetensors")
    return folder


def test_a_distance_is_relative_to_the_reference(tmp_path: Path) -> None:
    assert distance(a_run(tmp_path / "a", 3, 7), a_run(tmp_path / "b", 3, 4)) == pytest.approx(3 / 5)


@pytest.mark.parametrize(("gap", "off", "holds"), [(2.0**-44, "1.1e-14", True), (2.0**-8, "7.8e-04", False)])
def test_weights_that_are_off_fail_the_claim_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: float, off: str, holds: bool
) -> None:
    def launch(self: Verify, place: Place, runs: dict[str, str], *, timed: bool) -> dict[str, str]:
        for name in runs:
            a_run(self.folder(place, name), 3, 4 + gap * (place == Place(2) and name == "K = 2"))  # |b| is 5
        return {}

    monkeypatch.setattr(Verify, "launch", launch)
    found = Verify(["weights", "bits"], tmp_path, tqdm(disable=True))
    for place in (Place(1), Place(2), Place(3)):
        found.train(place)
    rows = [(row.claim, row.where, row.measured, row.holds) for row in found.rows]
    assert rows == [
        ("float64 weights, 7 trainings", "2 CPU ranks", f"{off} off (K = 2)", holds),
        ("--virtual-ranks 8, the weights' bytes", "2 CPU ranks", "equal", True),
        ("float64 weights, 7 trainings", "3 CPU ranks", "0.0e+00 off (softmax)", True),
    ]


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        (None, 0, "1 of 1 claims hold"),
        (Failed("loss became NaN"), 1, "1 of 2 claims hold"),
        (KeyboardInterrupt(), 130, "1 of 1 claims hold; interrupted after 1 of 2 launches"),
    ],
)
def test_what_was_measured_is_kept_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    end: BaseException | None, code: int, last: str,
) -> None:  # fmt: skip
    def train(self: Verify, place: Place) -> None:
        self.state("a claim", place, "equal", "equal", True)

    def wait(self: Verify, place: Place) -> None:
        if end:
            raise end

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "ensure_dataset", lambda *_, **__: None)
    monkeypatch.setattr(verify, "plan", lambda *_: ([("train", Place(1)), ("wait", Place(2))], []))
    monkeypatch.setattr(Verify, "train", train)
    monkeypatch.setattr(Verify, "wait", wait)
    assert verify.main([]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last
    kept = json.loads((tmp_path / "verify.json").read_text())
    assert kept["result"] == last
    assert [row["holds"] for row in kept["rows"]] == [True, *[False] * isinstance(end, Failed)]
    assert kept["machine"]["torch"] == torch.__version__.split("+")[0]


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--only", "everything"])
    assert "weights" in capsys.readouterr().err


def test_ranks_that_share_a_gpu_meet_over_gloo_on_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def make(**settings: Any) -> SimpleNamespace:
        made.update(settings)
        return SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=2)

    monkeypatch.setattr(accelerate, "Accelerator", make)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    join_ranks(Config(), [], share_gpus=True)
    assert not made["cpu"]
    assert made["kwargs_handlers"][0].to_kwargs()["backend"] == "gloo"
    assert os.environ["LOCAL_RANK"] == "0", "Accelerate hands it to DDP as the GPU's index"


@pytest.mark.slow  # 3 minutes
def test_every_claim_holds_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "RESULT", tmp_path / "verify.json")
    assert verify.main([]) == 0
