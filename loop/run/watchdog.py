"""Which rank failed: each rank writes beats to the launcher's store, and a rank that waits too long reads the others'.

A collective that fails names no rank, one that waits prints nothing, and NCCL answers its time-out by SIGABRT. So a
thread on each rank writes a beat once a second, with its rank's progress (forward passes, rows, parts of a save).
Where its rank has made no progress for `timeout_s`, the thread reads the others' beats: a rank without beats is dead,
stopped or cut off; a rank that beats but is behind hangs. Ranks that are all equally far are slow together, and are
left alone. The first rank that finds a cause reports it; the others end when they read that it has.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
BEAT_S = 1.0
LISTEN_S = 3 * BEAT_S  # between two looks at the others
STORE_TIMEOUT = timedelta(seconds=5)
ANSWER_S = LISTEN_S + STORE_TIMEOUT.total_seconds()  # a store that has not answered by then is out of reach
WATCHDOGS = itertools.count()  # of this process: each has beats of its own
NOT_BEGUN = (-1, -1)
SUSPENDED_S = 5 * BEAT_S  # a thread that slept for longer was stopped with its job, by Ctrl-Z for example


class Watchdog:
    """Watches between `with` and its end, where there are other ranks and a store.

    on_lost: called once, in a thread, with the cause that this rank reports, or None where another has; never returns.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, on_lost: Callable[[str | None], None]) -> None:
        self.rank, self.world_size, self.timeout_s, self.on_lost = rank, world_size, timeout_s, on_lost
        self.moves = 0
        self.ended = threading.Event()
        self.ending = threading.Lock()  # held by the thread that ends this process
        self.store = self._connect() if world_size > 1 else None
        self.threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((self._beat, "heartbeat"), (self._watch, "watchdog"))
        ]

    def _connect(self) -> PrefixStore | None:
        """Return a store client of its own, since the main thread may be waiting inside another."""
        try:
            if "ACCELERATE_DEBUG_RDV_FILE" in os.environ:  # of `debug_launcher`, whose ranks meet in a file
                raise KeyError
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
        except (KeyError, ValueError, RuntimeError):
            if self.rank == 0:
                print("train.py: no store to reach: the watchdog for lost ranks is off", file=sys.stderr)
            return None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"watchdog/{attempt}/{next(WATCHDOGS)}", store)

    def __enter__(self) -> Watchdog:
        if self.store:
            self.store.set(f"beat/{self.rank}", "0 0")
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ended.set()
        if self.store:
            for thread in self.threads:
                thread.join(2 * BEAT_S)  # it hangs where the store is out of reach

    def advance(self) -> None:
        """Count this rank's progress; every rank calls it equally often between two collectives."""
        self.moves += 1

    def is_first_to_fail(self) -> bool:
        """Note that this rank has failed; return whether it shall report why. Takes ANSWER_S at most."""
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # for the thread that is ending this process
        return self._in_time(self._claim, otherwise=True) if self.store else True

    def cause(self) -> str | None:
        """Return which ranks are lost, None if all are there and equally far. Takes ANSWER_S at most."""
        if not self.store:
            return None
        no_answer: str | None = self._lost_store()
        began = time.monotonic()
        cause = self._in_time(self._look, no_answer)
        return cause if time.monotonic() - began < ANSWER_S + BEAT_S else None  # its own job was stopped meanwhile

    def _in_time(self, ask: Callable[[], T], otherwise: T) -> T:
        """Return what the store answers within ANSWER_S.

        On a thread: where a cable is cut, a TCPStore still waits, after its own time-out, for the server's reply: up
        to 15 minutes.
        """
        answers: list[T] = []
        asking = threading.Thread(target=lambda: answers.append(ask()), name="ask the store", daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return answers[0] if answers else otherwise

    def _claim(self) -> bool:
        assert self.store
        try:
            return bool(self.store.add("failed", 1) == 1)
        except RuntimeError:
            return True  # without the store, each rank reports what it has lost

    def _lost_store(self) -> str:
        holder = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        return f"rank {self.rank} lost {holder}, and with it the store that all ranks share"

    def _look(self) -> str | None:
        try:
            before, began = self._read(), time.monotonic()
            time.sleep(LISTEN_S)
            if time.monotonic() - began > LISTEN_S + BEAT_S:
                return None  # stopped with its job, as the others were
            after = self._read()
        except RuntimeError:
            return self._lost_store()
        ranks, furthest = range(self.world_size), max(moves for _, moves in after)
        silent = [rank for rank in ranks if before[rank] == after[rank] != NOT_BEGUN]
        unborn = [rank for rank in ranks if after[rank] == NOT_BEGUN]
        behind = [rank for rank in ranks if before[rank][1] == after[rank][1] < furthest]
        for named, how in (
            (silent, f"is dead, stopped, or cut off: no sign of life for {LISTEN_S:g} s"),
            (unborn, "has not begun to train: it died at its start, or is still starting"),
            (behind, "is alive, but does not come to where the others wait: it hangs"),
        ):
            if named:
                return f"rank {', '.join(map(str, named))} {how}"
        return None

    def _read(self) -> list[tuple[int, int]]:
        """Return (beats, moves) of each rank."""
        assert self.store
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        # `get` alone would wait for a rank that has not begun
        texts = [bytes(self.store.get(key)).decode() if self.store.check([key]) else None for key in keys]
        return [(int(text.split()[0]), int(text.split()[1])) if text else NOT_BEGUN for text in texts]

    def _beat(self) -> None:
        assert self.store
        beats = 0
        while not self.ended.wait(BEAT_S):
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", f"{beats} {self.moves}")
                failed = self.store.check(["failed"])
            except RuntimeError:
                return  # a later read reports the lost store
            # The main thread may be about to fail by itself, with more to say.
            if failed and not self.ended.wait(LISTEN_S) and self.ending.acquire(blocking=False):
                self.on_lost(None)

    def _watch(self) -> None:
        looked = moved = time.monotonic()
        moves = self.moves
        while not self.ended.wait(BEAT_S):
            now = time.monotonic()
            if self.moves != moves or now - looked > SUSPENDED_S:
                moves, moved = self.moves, now
            looked = now
            if now - moved <= self.timeout_s:
                continue
            cause = self.cause()
            looked = time.monotonic()
            if self.ended.is_set():
                return  # and so may the others' beats
            if cause and self.moves == moves and self.ending.acquire(blocking=False):
                self.on_lost(cause if self._in_time(self._claim, otherwise=True) else None)


def is_from_backend(error: BaseException) -> bool:
    """Whether a collective has failed: the error is NCCL's, gloo's (which names its source file), or a store's."""
    return isinstance(error, DistError) or re.search(r"/gloo/[\w/]+\.\w+:\d+\]", str(error)) is not None


def first_line(error: BaseException) -> str:
    """Return an error's first line, and the reason that NCCL adds in a later one."""
    text = str(error) or repr(error)
    return " ".join([text.splitlines()[0], *text.partition("Last error:\n")[2].splitlines()[:1]])
