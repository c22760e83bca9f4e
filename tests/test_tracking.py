"""W&B: every row arrives or stays on disk, no start waits, no fault ends a training, every end is told truly."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from loop.run.wandb_tracker import count_rows
from tests.launches import LAUNCHES, forked_ranks, kill, launch, rank_pids, rows_of, start, wait_for_rows
from tests.wandb_reader import read_run
from tests.wandb_stub import KEY, WandbStub

ONE, TWO = LAUNCHES["python"], LAUNCHES["train.sh, 2 ranks"]
SHORT = ["--epochs", "2", "--train-examples", "900", "--batch-size", "100", "--log-every", "4"]
LONG = ["--epochs", "100000", "--train-examples", "900", "--batch-size", "100", "--log-every", "1"]


def only_run(out: Path) -> Path:
    """The one run under `out`."""
    (run,) = out.iterdir()
    return run


def wandb_folder(run: Path) -> Path:
    """The one folder that W&B has written for a run."""
    (folder,) = (path for path in (run / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink())
    return folder


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(("_", "time/", "last_step", "curves"))}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks, tracked offline: its folder and what it said."""
    out = tmp_path_factory.mktemp("offline")
    flags = ["--group", "study", "--tags", "a", "b", "--notes", "a remark", "--wandb", "offline", "--tail", "ragged"]
    done = launch(forked_ranks(2), out, *SHORT, *flags)
    assert done.returncode == 0, done.stderr
    return only_run(out), done.stdout


def test_an_offline_run_holds_every_row_of_metrics_jsonl(offline: tuple[Path, str]) -> None:
    run, _ = offline
    stored = read_run(wandb_folder(run))
    assert [without_clock(row) for row in stored["history"]] == rows_of(run)
    assert stored["history"][0]["last_step"]["_type"] == "table-file"
    assert stored["history"][-1]["curves"]["_type"] == "image-file"


def test_an_offline_run_holds_config_summary_table_model_and_exit_code(offline: tuple[Path, str]) -> None:
    run, _ = offline
    stored, config = read_run(wandb_folder(run)), json.loads((run / "config.json").read_text())
    assert {key: stored["config"][key] for key in config} == config
    assert (stored["run"]["name"], stored["run"]["group"]) == (run.name, "study")
    assert (stored["run"]["job_type"], stored["run"]["notes"]) == ("train", "a remark")
    assert set(stored["run"]["tags"]) == {"a", "b"}
    assert stored["exit_code"] == 0
    assert all(step == "examples" for name, step in stored["metrics"].items() if name != "examples")
    epochs = [row for row in rows_of(run) if "train/loss" in row]
    assert stored["summary"]["train/loss"] == {
        "min": min(r["train/loss"] for r in epochs),
        "last": epochs[-1]["train/loss"],
    }
    assert stored["summary"]["test/acc"]["max"] == max(r["test/acc"] for r in epochs)
    models = [artifact for artifact in stored["artifacts"] if artifact[1] == "model"]
    ((name, _, aliases),) = models
    assert name == f"model-{config['wandb_id']}"
    assert set(aliases) == {"latest", "final"}
    (table,) = (wandb_folder(run) / "files").rglob("last_step*.table.json")
    assert json.loads(table.read_text())["data"] == [[0, 0, 50, 1.0, 1], [1, 0, 50, 1.0, 1]]


def test_a_run_says_its_mode_its_reason_and_how_to_sync(offline: tuple[Path, str]) -> None:
    run, said = offline
    assert said.splitlines()[0] == "W&B: offline (--wandb offline)"
    assert said.splitlines()[-1] == f"W&B: to send this run: wandb sync {wandb_folder(run)}"


def test_summaries_cover_the_rows_before_a_resume(tmp_path: Path) -> None:
    for epochs in ("1", "2"):
        flags = ["--run-name", "r", "--resume", "auto", "--wandb", "offline", "--epochs", epochs]
        done = launch(ONE, tmp_path, *SHORT[2:], *flags, "--virtual-ranks", "2")
        assert done.returncode == 0, done.stderr
    _, second = sorted((tmp_path / "r" / "wandb").glob("offline-run-*"))
    norms = [row["step/grad_norm"] for row in rows_of(tmp_path / "r") if "step/grad_norm" in row]
    assert max(norms) > max(norms[len(norms) // 2 :]), "the largest is from before"
    summary = read_run(second)["summary"]
    assert summary["step/grad_norm"] == {"max": max(norms), "last": norms[-1]}
    weights = (tmp_path / "r" / "model.safetensors").read_bytes()
    assert summary["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_disabled_imports_no_wandb(tmp_path: Path) -> None:
    code = (
        "import sys, train; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "try: train.main()\nexcept SystemExit as end: assert end.code == 0\n"
        "assert 'torch' in sys.modules and 'wandb' not in sys.modules"
    )
    done = launch([sys.executable, "-c", code], tmp_path, *SHORT, "--wandb", "disabled", WANDB_MODE="online")
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout


@pytest.mark.slow  # 9 s
def test_with_no_key_a_run_starts_training_within_two_seconds_and_an_import(tmp_path: Path) -> None:
    def seconds_to_first_row(mode: str) -> float:
        began = time.monotonic()
        environ = {"HOME": str(tmp_path), "WANDB_MODE": ""}  # no netrc, no settings
        process = start(ONE, tmp_path / mode, *LONG, "--wandb", mode, **environ)
        wait_for_rows(process, tmp_path / mode, 1)
        seconds = time.monotonic() - began
        kill(process)
        return seconds

    launch([sys.executable, "-c", ""], tmp_path)  # the first waits for torch's imports, made once for all
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import wandb"], check=True)
    imported = time.monotonic() - began  # which differs from machine to machine
    assert seconds_to_first_row("auto") - seconds_to_first_row("disabled") < 2 + imported


# --- online, against a stand-in for the service ----------------------------------------------------------------------


@pytest.fixture
def stub(stub: WandbStub) -> Iterator[WandbStub]:
    """The stand-in for W&B's server, which must have an answer to all it is asked."""
    yield stub
    assert not stub.unknown


def keyed(url: str) -> dict[str, str]:
    """The environment of someone who is logged in at `url`."""
    return {"WANDB_MODE": "", "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}


def test_online_every_row_arrives_and_no_key_stays_behind(stub: WandbStub, tmp_path: Path) -> None:
    done = launch(forked_ranks(2), tmp_path, *SHORT, "--group", "study", **keyed(stub.url))
    assert done.returncode == 0, done.stderr
    assert "W&B: online (logged in)" in done.stdout
    run = only_run(tmp_path)
    ((name, arrived),) = stub.runs.items()
    assert name == json.loads((run / "config.json").read_text())["wandb_id"]
    assert done.stdout.splitlines()[-1].endswith(f"/ent/chapter3-data-parallel/runs/{name}")
    assert [without_clock(row) for row in arrived["history"]] == rows_of(run)
    assert (arrived["exit_code"], arrived["groupName"], arrived["displayName"]) == (0, "study", run.name)
    assert (arrived["complete"], arrived["config"]["reduction"]["value"]) == (True, "mean")
    assert any(artifact["artifactCollectionName"] == f"model-{name}" for artifact in stub.artifacts.values())
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.slow  # 55 s
def test_a_server_that_fails_means_offline_within_half_a_minute(tmp_path: Path) -> None:
    with ExitStack() as servers:
        urls = {}
        for operation in ("Viewer", "UpsertBucket"):
            for status in (401, 403, 500, 503):
                stub = servers.enter_context(WandbStub())
                stub.fail = lambda kind, op, status=status, wanted=operation: status if op == wanted else None
                urls[f"{operation}-{status}"] = stub.url
        for name in ("down", "silent"):
            server = servers.enter_context(socket.socket())
            server.bind(("127.0.0.1", 0))
            if name == "silent":
                server.listen(64)
            urls[name] = f"http://127.0.0.1:{server.getsockname()[1]}"

        def timed(name: str) -> tuple[str, float, subprocess.CompletedProcess[str]]:
            began = time.monotonic()
            done = launch(ONE, tmp_path / name, *SHORT, **keyed(urls[name]))
            return name, time.monotonic() - began, done

        with ThreadPoolExecutor(4) as pool:  # they mostly wait
            results = list(pool.map(timed, urls))
    for name, seconds, done in results:
        assert done.returncode == 0, (name, done.stderr)
        assert seconds < 45, (name, "30 s to decide, the rest to start and train beside three others")
        assert done.stdout.startswith("W&B: offline ("), name
        synced = done.stdout.splitlines()[-1].removeprefix("W&B: to send this run: wandb sync ")
        stored = read_run(synced)["history"]
        assert [without_clock(row) for row in stored] == rows_of(only_run(tmp_path / name)), name


def sync(stub: WandbStub, home: Path, *words: str) -> None:
    """Call wandb, logged in at the stand-in."""
    env = os.environ | keyed(stub.url) | {"HOME": str(home)}
    env.pop("WANDB_MODE")
    command = [sys.executable, "-m", "wandb", *words]
    subprocess.run(command, env=env, check=True, timeout=60, capture_output=True)


def test_a_run_kept_offline_is_sent_by_the_command_it_prints(
    stub: WandbStub, offline: tuple[Path, str], tmp_path: Path
) -> None:
    run, said = offline
    command = said.splitlines()[-1].removeprefix("W&B: to send this run: ")
    sync(stub, tmp_path, *command.split()[1:])
    (arrived,) = stub.runs.values()
    assert [without_clock(row) for row in arrived["history"]] == rows_of(run)


@pytest.mark.slow  # 26 s
def test_a_server_that_dies_in_mid_run_costs_no_row(tmp_path: Path) -> None:
    with WandbStub() as stub:
        process = start(ONE, tmp_path, *LONG, **keyed(stub.url))
        wait_for_rows(process, tmp_path, 50)
        stub.fail = lambda kind, op: 503
        run = wait_for_rows(process, tmp_path, 200)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert time.monotonic() - began < 30
    assert "W&B: not everything arrived; to send it: wandb sync --no-skip-online" in stdout
    assert len(read_run(wandb_folder(run))["history"]) == len(rows_of(run))


@pytest.mark.slow  # 12 s
def test_the_background_service_killed_in_mid_run_does_not_end_the_training(tmp_path: Path) -> None:
    process = start(ONE, tmp_path, *SHORT[2:], "--epochs", "60", WANDB_MODE="offline")
    run = wait_for_rows(process, tmp_path, 5)
    services = [child for child in psutil.Process(process.pid).children(recursive=True) if "wandb" in child.name()]
    assert services, "there is a service to kill"
    for service in services:
        service.kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "W&B failed, training goes on" in stderr
    assert f"rows are not in its file; metrics.jsonl has {len(rows_of(run))}" in stderr
    assert len([row for row in rows_of(run) if "train/loss" in row]) == 60


def test_rows_lost_by_w_and_b_are_counted(offline: tuple[Path, str], tmp_path: Path) -> None:
    folder = wandb_folder(offline[0])
    (stored,) = folder.glob("*.wandb")
    whole = len(read_run(folder)["history"])
    assert count_rows(folder) == whole
    (tmp_path / "run-x.wandb").write_bytes(stored.read_bytes()[: stored.stat().st_size * 2 // 3])
    part = count_rows(tmp_path)
    assert part == len(read_run(tmp_path)["history"])
    assert 0 < part < whole
    (tmp_path / "run-x.wandb").write_bytes(b"")  # as a service that was killed before it wrote leaves it
    assert count_rows(tmp_path) == 0
    (tmp_path / "run-x.wandb").write_bytes(b"not a file of W&B's")
    assert count_rows(tmp_path) is None


GOING_ON = [*SHORT[2:], "--checkpoint-every", "50", "--run-name", "r", "--resume", "auto"]


@pytest.mark.slow  # 48 s
@pytest.mark.parametrize("server_is", ["ahead of the checkpoint", "behind the checkpoint"])
def test_a_killed_run_goes_on_as_the_same_online_run(stub: WandbStub, tmp_path: Path, server_is: str) -> None:
    behind = server_is == "behind the checkpoint"
    stub.fail = lambda kind, op: 503 if behind and kind == "file_stream" else None
    process = start(ONE, tmp_path, *GOING_ON, "--epochs", "100000", **keyed(stub.url))
    run = wait_for_rows(process, tmp_path, 30)
    (arrived,) = stub.runs.values()
    while not (behind or arrived["history"]):  # it sends every 15 s
        time.sleep(0.02)
    kill(process)
    assert bool(arrived["history"]) != behind
    stub.fail = lambda kind, op: None
    done = launch(ONE, tmp_path, *GOING_ON, "--epochs", str(rows_of(run)[-1]["epoch"] + 2), **keyed(stub.url))
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert [without_clock(row) for row in arrived["history"]] == rows_of(run)
    assert [row["_step"] for row in arrived["history"]] == list(range(len(rows_of(run))))
    assert (arrived["complete"], arrived["exit_code"]) == (True, 0)


@pytest.mark.slow  # 11 s
def test_a_run_that_cannot_go_on_online_is_left_as_it_is(stub: WandbStub, tmp_path: Path) -> None:
    process = start(ONE, tmp_path, *GOING_ON, "--epochs", "100000", WANDB_MODE="disabled")
    run = wait_for_rows(process, tmp_path, 30)
    kill(process)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    stub.fail = lambda kind, op: 403 if op == "UpsertBucket" else None
    done = launch(ONE, tmp_path, *GOING_ON, "--wandb", "online", **keyed(stub.url))
    assert done.returncode == 2
    assert "--wandb online is not available: " in done.stderr
    assert before
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow  # 22 s
def test_a_killed_run_goes_on_offline_with_the_rows_that_its_first_file_lacks(stub: WandbStub, tmp_path: Path) -> None:
    process = start(ONE, tmp_path, *GOING_ON, "--epochs", "100000", WANDB_MODE="offline")
    run = wait_for_rows(process, tmp_path, 100)
    first = wandb_folder(run)
    while (count_rows(first) or 0) < 50:
        time.sleep(0.1)
    kill(process)
    epochs = str(rows_of(run)[-1]["epoch"] + 2)
    done = launch(ONE, tmp_path, *GOING_ON, "--epochs", epochs, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    calls = done.stdout.splitlines()[-1].removeprefix("W&B: to send this run: ").split("; ")
    folders = [call.removeprefix("wandb sync ") for call in calls]
    assert folders[0] == str(first)
    stored = [row for folder in folders for row in read_run(folder)["history"]]
    assert [without_clock(row) for row in stored] == rows_of(run)
    for call in calls:
        sync(stub, tmp_path, *call.split()[1:])
    (arrived,) = stub.runs.values()
    assert [without_clock(row) for row in arrived["history"]] == rows_of(run)


def test_w_and_b_that_cannot_start_at_all_is_left_out(tmp_path: Path) -> None:
    program = (
        "import runpy, wandb\n"
        "def init(**_): raise OSError('no room')\n"
        "wandb.init = init; runpy.run_path('train.py', run_name='__main__')"
    )
    done = launch([sys.executable, "-c", program], tmp_path, *SHORT, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("W&B: disabled (no room)\n")


@pytest.mark.slow  # 9 s
def test_a_fault_of_w_and_b_at_the_end_does_not_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = launch(ONE, tmp_path / "out", *SHORT, WANDB_MODE="offline", WANDB_DATA_DIR=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    assert "W&B failed, training goes on" in done.stderr
    assert read_run(wandb_folder(only_run(tmp_path / "out")))["exit_code"] == 0


@pytest.mark.parametrize("refused", ["UpsertBucket", pytest.param("", marks=pytest.mark.slow)], ids=["run", "all"])
def test_online_that_is_refused_fails_at_once_with_the_reason_and_leaves_no_run_behind(
    stub: WandbStub, tmp_path: Path, refused: str
) -> None:
    stub.fail = lambda kind, op: 401 if refused in op else None
    began, out = time.monotonic(), tmp_path / "out"
    done = launch(ONE, out, "--wandb", "online", "--run-name", "mine", **keyed(stub.url))
    assert done.returncode == 2, done.stderr
    assert refused or time.monotonic() - began < 20
    assert done.stderr.splitlines()[-1].startswith("train.py: error: --wandb online is not available: ")
    assert "Traceback" not in done.stderr
    assert not out.exists() or (refused and not list(out.iterdir()))


@pytest.mark.slow  # 8 s
def test_a_loss_that_is_not_finite_raises_an_alert(tmp_path: Path) -> None:
    flags = ["--net", "mlp", "--lr", "1e30", "--wandb", "offline"]
    done = launch(ONE, tmp_path, *SHORT, *flags)
    stored = read_run(wandb_folder(only_run(tmp_path)))
    ((title, text),) = stored["alerts"]
    assert title == "The loss is not finite"
    assert "--reduction mean, lr 1e+30" in text
    assert done.returncode == 1
    assert "start a new run with a smaller --lr than 1e+30" in done.stderr


# --- stopping --------------------------------------------------------------------------------------------------------


SIGNALS = [(signal.SIGTERM, 1, 2), (signal.SIGTERM, 0, 1), (signal.SIGINT, 0, 2)]


@pytest.mark.parametrize(
    ("signum", "rank", "ranks"),
    [
        (signal.SIGINT, 0, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SIGNALS),  # 9 to 14 s each
    ],
)
def test_a_signal_stops_all_ranks_with_every_row_on_disk(tmp_path: Path, signum: int, rank: int, ranks: int) -> None:
    process = start(TWO if ranks == 2 else ONE, tmp_path, *LONG, WANDB_MODE="offline")
    run = wait_for_rows(process, tmp_path, 30)
    os.kill(rank_pids(process)[rank], signum)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 15
    assert process.returncode == 128 + signum if ranks == 1 else process.returncode != 0
    assert "train.py: stopped by SIG" in stderr
    stored = read_run(wandb_folder(run))
    assert stored["exit_code"] in (128 + signum, 143), "whoever was not signalled itself reports SIGTERM"
    assert [without_clock(row) for row in stored["history"]] == rows_of(run)


@pytest.mark.slow  # 10 s
def test_killed_outright_a_run_loses_a_second_at_most(tmp_path: Path) -> None:
    process = start(ONE, tmp_path, *LONG, WANDB_MODE="offline")
    run = wait_for_rows(process, tmp_path, 30)
    time.sleep(1.5)
    before = len(rows_of(run))
    time.sleep(1.2)
    kill(process)
    assert len(read_run(wandb_folder(run))["history"]) >= before
    for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]:
        json.loads(line)


@pytest.mark.slow  # 16 s, 19 s
@pytest.mark.parametrize("killed", ["rank 1", "launcher"])
def test_ranks_whose_fellow_or_launcher_is_killed_end_with_every_row_in_a_failed_run(
    tmp_path: Path, killed: str
) -> None:
    process = start(TWO, tmp_path, *LONG, WANDB_MODE="offline")
    run = wait_for_rows(process, tmp_path, 30)
    ranks = [psutil.Process(pid) for pid in rank_pids(process)]
    (process if killed == "launcher" else ranks[1]).kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for rank in alive:
        rank.kill()
    assert not alive, "within 20 s"
    process.communicate()
    assert process.returncode != 0
    stored = read_run(wandb_folder(run))
    assert stored["exit_code"] == 143 or (stored["exit_code"] and killed != "launcher"), "marked failed"
    assert [without_clock(row) for row in stored["history"]] == rows_of(run)


@pytest.mark.slow  # 36 s
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_a_rank_leaves_every_row_and_a_failed_run(tmp_path: Path, rank: int) -> None:
    script = tmp_path / "crash.py"
    script.write_text(
        "import os, train\nfrom loop.run.checkpoints import Checkpoints\nafter_cell = Checkpoints.after_cell\n"
        "def crash(self, *args):\n    after_cell(self, *args)\n"
        f"    if self.progress.step == 20 and os.environ['RANK'] == '{rank}': raise RuntimeError('planted')\n"
        "Checkpoints.after_cell = crash\ntrain.main()\n"
    )
    how = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = launch(how, tmp_path / "out", *LONG, WANDB_MODE="offline", PYTHONPATH=str(Path.cwd()))
    assert done.returncode != 0
    assert "RuntimeError: planted" in done.stderr
    run = only_run(tmp_path / "out")
    stored = read_run(wandb_folder(run))
    assert stored["exit_code"] not in (0, None), "marked failed"
    assert len(rows_of(run)) >= 20
    assert [without_clock(row) for row in stored["history"]] == rows_of(run)


@pytest.mark.slow  # 15 s
def test_a_signal_before_training_ends_the_w_and_b_run_too(stub: WandbStub, tmp_path: Path) -> None:
    def slow(kind: str, op: str) -> None:
        if op == "UpsertBucket":
            time.sleep(3)

    stub.fail = slow
    process = start(ONE, tmp_path, *LONG, **keyed(stub.url))
    while not stub.ops["UpsertBucket"]:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    (arrived,) = stub.runs.values()
    assert (arrived["complete"], arrived["exit_code"]) == (True, 143)
