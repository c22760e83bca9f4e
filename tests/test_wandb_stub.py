"""The stand-in and the reader that other tests lean on: what goes in at wandb comes out at the other end, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wandb_reader import read_run
from tests.wandb_stub import WandbStub

wandb = pytest.importorskip("wandb")

ROWS = [{"examples": 256 * step, "train/loss": 1 / step} for step in (1, 2, 3)]


def log_a_run(mode: str) -> str:
    run = wandb.init(
        mode=mode, project="study", group="tails", tags=["x"], config={"reduction": "sum", "deep": {"w": 2}}
    )
    for row in ROWS:
        run.log(row)
    run.alert("stop", "the loss is not finite")
    folder = str(Path(run.dir).parent)
    run.finish(exit_code=3)
    wandb.teardown()
    return folder


def test_an_online_run_arrives_whole(stub: WandbStub) -> None:
    log_a_run("online")
    (run,) = stub.runs.values()
    assert [{key: row[key] for key in ROWS[0]} for row in run["history"]] == ROWS
    assert run["config"]["reduction"]["value"] == "sum"
    assert run["summary"]["train/loss"] == ROWS[-1]["train/loss"]
    assert (run["groupName"], run["project"], run["tags"]) == ("tails", "study", ["x"])
    assert (run["complete"], run["exit_code"]) == (True, 3)
    assert run["alerts"] == [("stop", "the loss is not finite")]
    assert stub.unknown == []


def test_an_offline_run_is_read_back_whole(stub: WandbStub) -> None:
    found = read_run(log_a_run("offline"))
    assert [{key: row[key] for key in ROWS[0]} for row in found["history"]] == ROWS
    assert (found["config"]["reduction"], found["config"]["deep"]) == ("sum", {"w": 2})
    assert found["summary"]["train/loss"] == ROWS[-1]["train/loss"]
    assert (found["run"]["group"], found["run"]["project"], found["exit_code"]) == ("tails", "study", 3)
    assert [alert[:2] for alert in found["alerts"]] == [("stop", "the loss is not finite")]
    assert stub.ops == {}


def test_a_torn_file_is_read_up_to_the_tear(stub: WandbStub, tmp_path: Path) -> None:
    (file,) = Path(log_a_run("offline")).glob("*.wandb")
    whole = read_run(file)
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(file.read_bytes()[:-1])
    assert sum(read_run(torn)["kinds"].values()) == sum(whole["kinds"].values()) - 1


def test_an_injected_status_reaches_the_client(stub: WandbStub) -> None:
    stub.fail = lambda kind, operation: 401
    with pytest.raises(wandb.errors.CommError, match="injected"):
        wandb.init(mode="online", project="study")
    assert stub.runs == {}
