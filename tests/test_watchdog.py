"""The watchdog by itself: who is named, by whom, and who is left alone. (tests/test_faults.py has whole trainings.)"""

from __future__ import annotations

import signal
import threading
import time

import pytest
from torch.distributed import TCPStore

from loop.run.watchdog import Watchdog
from tests.launches import PYTHON, ranks_of

TIMEOUT_S = 2
RANK = f"""
import os, sys, time
from torch.distributed import TCPStore
from loop.run.watchdog import Watchdog

rank, world_size, case = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]

def lost(cause):
    if cause:
        print(cause, flush=True)
    os._exit(1)

with Watchdog(rank, world_size, {TIMEOUT_S}, lost) as watchdog:
    for _ in range(3 if case == "hangs" and rank == 1 else 4):  # the others wait for it in the fourth
        watchdog.advance()
    print("at work", flush=True)
    time.sleep(4 * {TIMEOUT_S} if case == "slow" else 60 if case in ("hangs", "stops") else 12)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store.add("done", 1)
    while store.add("done", 0) < world_size:  # one that ended earlier than the others would be silent, rightly
        time.sleep(0.1)
"""
LEFT_ALONE: list[str] = []


@pytest.mark.parametrize(
    ("case", "world_size", "named"),
    [
        ("hangs", 3, ["rank 1 is alive, but does not come to where the others wait: it hangs"]),
        pytest.param("slow", 2, LEFT_ALONE, marks=pytest.mark.slow),  # 12 s
        pytest.param(
            "stops", 2, ["rank 1 is dead, stopped, or cut off: no sign of life for 3 s"], marks=pytest.mark.slow
        ),  # 12 s
        pytest.param("the job is stopped and goes on", 2, LEFT_ALONE, marks=pytest.mark.slow),  # 18 s
        pytest.param("the job is stopped while ranks look", 2, LEFT_ALONE, marks=pytest.mark.slow),  # 18 s
    ],
)
def test_one_rank_names_who_is_lost_and_ranks_that_are_slow_together_are_left_alone(
    case: str, world_size: int, named: list[str]
) -> None:
    with ranks_of([[PYTHON, "-c", RANK, case]] * world_size) as ranks:
        for rank in ranks:
            assert rank.stdout and rank.stdout.readline() == "at work\n"
        stopped = {"stops": ranks[1:]}.get(case, ranks if "job" in case else [])
        time.sleep(TIMEOUT_S + 2.5 if "look" in case else 0)
        for rank in stopped:
            rank.send_signal(signal.SIGSTOP)
        if "job" in case:
            time.sleep(4 * TIMEOUT_S)
            for rank in stopped:
                rank.send_signal(signal.SIGCONT)
        watching = [rank for rank in ranks if rank not in stopped or "job" in case]
        said = [rank.communicate(timeout=TIMEOUT_S + 15)[0] for rank in watching]
        assert [line for text in said for line in text.splitlines()] == named
        assert {rank.returncode for rank in watching} == ({1} if named else {0})


def test_a_look_that_the_end_of_training_overtakes_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's beats end with the training, while this one listens for them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr("loop.run.watchdog.BEAT_S", 0.1)
    monkeypatch.setattr("loop.run.watchdog.LISTEN_S", 0.5)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    named: list[str | None] = []
    watchdog = Watchdog(0, 2, timeout_s=0, on_lost=named.append)
    looking = threading.Event()
    monkeypatch.setattr(watchdog, "_read", lambda: looking.set() or [(7, 4), (7, 4)])
    with watchdog:
        assert looking.wait(10)
    watchdog.threads[1].join(10)
    assert named == []
