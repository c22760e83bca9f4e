"""The peers' table: every figure by brute force, hangs and crashes as such, this project exact."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from scripts.peers import __main__ as peers
from scripts.peers.__main__ import distances, launch, main, measure
from scripts.peers.loops import BATCH_SIZE, LR, OURS, PEERS, Peer, Task, train_rank
from tests.ranks import World

DATA = Path("data")
Cells = list[list[Tensor]]  # of each step: the positions that each rank takes


def strided(n: int, world_size: int) -> Cells:
    """DistributedSampler's: every W-th, the first ones again until all ranks have equally many."""
    each = -(-n // world_size)
    shares = [(torch.arange(each * world_size) % n)[rank::world_size].split(BATCH_SIZE) for rank in range(world_size)]
    return [list(cells) for cells in zip(*shares, strict=True)]


def padded(n: int, world_size: int) -> Cells:
    """Accelerate's: the first ones again until the last step is full."""
    steps = -(-n // (BATCH_SIZE * world_size))
    return ragged(steps * BATCH_SIZE * world_size, world_size, modulo=n)


def ragged(n: int, world_size: int, modulo: int | None = None) -> Cells:
    """Accelerate's `even_batches=False`: the last step's cells filled in order, perhaps empty."""
    cells = list((torch.arange(n) % (modulo or n)).split(BATCH_SIZE))
    cells += [torch.empty(0, dtype=torch.long)] * (-len(cells) % world_size)
    return [cells[i : i + world_size] for i in range(0, len(cells), world_size)]


def predict(task: Task, steps: Cells, *, by_sum: bool = False) -> list[np.ndarray]:
    """Every rank's weights, of gradients written out: W means averaged, or W sums, divided by each rank's own count."""
    X, y = task.dataset.tensors
    replicas = [torch.from_numpy(task.weights()) for _ in range(task.world_size)]

    def summed_gradient(weights: Tensor, cell: Tensor) -> Tensor:
        x = X[cell].flatten(1)
        residual = (x @ weights[:-10].view(10, 784).T + weights[-10:]).softmax(1) - F.one_hot(y[cell], 10)
        return torch.cat([(residual.T @ x).flatten(), residual.sum(0)])

    for cells in steps:
        sums = [summed_gradient(weights, cell) for weights, cell in zip(replicas, cells, strict=True)]
        if by_sum:
            step = sum(sums) / len(cells)
            replicas = [weights - LR * step / len(cell) for weights, cell in zip(replicas, cells, strict=True)]
        else:
            step = sum(g / max(len(cell), 1) for g, cell in zip(sums, cells, strict=True)) / len(cells)
            replicas = [weights - LR * step for weights in replicas]
    return [weights.numpy() for weights in replicas]


@pytest.mark.parametrize(
    "peer",
    [
        OURS,
        f"{OURS}, ragged",
        f"{OURS}, book's sgd",
        "Accelerate, ragged, num_items",
        pytest.param("Trainer, ragged, num_items", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_who_divides_by_the_global_count_is_exact(world: Callable[[int], World], peer: str, world_size: int) -> None:
    pytest.importorskip(PEERS[peer].package)
    for n in (350, 351, 193) if peer.startswith(OURS) else (350, 351):
        trained = world(world_size).run(train_rank, PEERS[peer].loop, n)
        distance, drift = distances(trained, Task(n, world_size, DATA))
        assert max(distance, drift) <= 1e-12, n
        assert sum(rank.seen for rank in trained) == n


@pytest.mark.parametrize(
    ("peer", "deal"),
    [
        ("DDP, DistributedSampler", strided),
        pytest.param("Lightning", strided, marks=pytest.mark.slow),
        ("Accelerate", padded),
        ("Accelerate, split", padded),
        ("Accelerate, ragged", ragged),
        ("Accelerate, ragged, join", ragged),
        ("torch's Join, ragged", ragged),
        ("book's sgd, ragged", ragged),
        pytest.param("Trainer", padded, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_peer_is_off_by_what_its_dealing_predicts(
    world: Callable[[int], World], peer: str, deal: Callable[[int, int], Cells], world_size: int
) -> None:
    pytest.importorskip(PEERS[peer].package)
    n = 349 + world_size  # one too many for the ranks, and a last batch too short for them
    task = Task(n, world_size, DATA)
    start, steps = task.weights(), deal(n, world_size)
    predicted = predict(task, steps, by_sum="sgd" in peer)
    trained = world(world_size).run(train_rank, PEERS[peer].loop, n)
    for rank, weights in zip(trained, predicted, strict=True):
        assert np.linalg.norm(rank.weights - weights) <= 1e-12 * np.linalg.norm(weights - start)
    assert sum(rank.seen for rank in trained) == sum(len(cell) for cells in steps for cell in cells)
    distance, drift = distances(trained, task)
    assert distance > 1e-3
    assert (drift > 1e-5) == ("sgd" in peer)


def test_join_averages_over_ranks_that_have_nothing(world: Callable[[int], World]) -> None:
    task = Task(129, 2, DATA)
    predicted = predict(task, ragged(129, 2))
    for rank, weights in zip(world(2).run(train_rank, PEERS["torch's Join, ragged"].loop, 129), predicted, strict=True):
        assert np.abs(rank.weights - weights).max() <= 1e-12


def sleep_with_a_child(pid_file: Path, _: Task) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    with pid_file.open("a") as pids:
        pids.write(f"{os.getpid()} {child.pid} ")
    time.sleep(1000)


def speak_out_of_turn(task: Task) -> None:
    dist.all_reduce(torch.ones(2 + 100 * dist.get_rank()))


def fail(task: Task) -> None:
    while dist.get_rank() == 1:  # still speaking when the other has ended
        print("Traceback (most recent call last):", flush=True)
        time.sleep(0.001)
    raise ValueError("no such luck")


def test_a_hang_is_reported_within_the_time_out_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setitem(peers.PEERS, "sleeper", Peer(partial(sleep_with_a_child, pids)))
    result = measure("sleeper", 2, 10, 5, DATA)
    assert str(result) == "hangs (> 5 s)"
    assert len(pids.read_text().split()) == 4
    for pid in pids.read_text().split():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_rank_without_a_last_batch_leaves_the_others_waiting() -> None:
    with pytest.raises(TimeoutError):
        launch(PEERS["Accelerate, ragged, join"].loop, 2, 1.5, 129, DATA)


def test_failures_have_their_own_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        peers, "PEERS", {"a": Peer(fail), "b": Peer(speak_out_of_turn), "c": Peer(fail, "no_such_package")}
    )
    assert main(["--examples", "10", "--world-size", "2"]) == 1
    output = capsys.readouterr()
    assert [line[1:].strip() for line in output.out.splitlines()[2:]] == [
        "crashes: ValueError: no such luck",
        "aborts: ranks out of step",
        "not installed: pip install -r scripts/peers/requirements.txt",
    ]
    assert "Traceback" in output.err
    assert main(["--examples", "10", "--world-size", "2", "--only", "b", "c"]) == 0


@pytest.mark.slow  # 10 s
def test_the_table_and_the_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peers.json"
    flags = ["--only", OURS, "Accelerate, sp", "--examples", "129", "--world-size", "2", "--markdown"]
    assert main([*flags, "--json", str(file)]) == 0
    setting, header, rule, *rows = capsys.readouterr().out.splitlines()
    assert setting.startswith(f"torch {torch.__version__.split('+')[0]}, accelerate ")
    assert (header, rule) == ("|  | W=2 N=129 |", "| --- | --- |")
    written = json.loads(file.read_text())
    assert written["setting"] == setting
    exact, pads = written["results"][:3], written["results"][3]
    assert [row.split(" | ")[0][2:] for row in rows] == [result["peer"] for result in written["results"]]
    assert all(max(result["distance"], result["replica_drift"]) <= 1e-12 for result in exact)
    assert pads["duplicated"] == 127
    assert rows[3] == f"| Accelerate, split | {100 * pads['distance']:.2g} %, +127 |"


def test_this_project_off_by_more_than_rounding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {OURS: PEERS["Accelerate"]})
    assert main(["--examples", "129", "--world-size", "2"]) == 1
