"""Which rank failed, and why: every rank beats in the launcher's store, and those left behind read who does not.

A collective that fails says that *a* peer is gone, or late, but not which. So each rank counts up a key of its own once
a second, from a thread that runs even while the main thread waits; and where its run ends before its time, it leaves
word there, for the others to find.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
FAILED = "a collective failed"
BEAT_S = 1.0
LISTEN_S = 3 * BEAT_S  # between two looks at the others
STORE = timedelta(seconds=5)
ANSWER_S = LISTEN_S + STORE.total_seconds()  # a store that has not answered by then is out of reach


class Heartbeat:
    """Beats between `with` and its end, where there are other ranks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.store: PrefixStore | None = None
        if world_size > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, world_size, is_master=False, timeout=STORE, wait_for_workers=False)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = PrefixStore(f"heartbeat/{attempt}", store)

    def __enter__(self) -> Heartbeat:
        if self.store:
            self.store.set(f"lost/{self.rank}", "no")
            self.store.set(f"beat/{self.rank}", "0")
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self.is_first_to_fail()
        self.ended.set()
        if self.store:
            self.thread.join(2 * BEAT_S)  # it hangs where the store is out of reach

    def is_first_to_fail(self) -> bool:
        """Note that this rank has failed; return whether it is for this one to say why. Takes ANSWER_S at most."""
        return self._in_time(self._note_failure, otherwise=True) if self.store else True

    def accuse(self, error: RuntimeError) -> str | None:
        """Return the backend's error in one line, after the ranks that are to blame for it where this is certain.

        None on ranks that need not report it, because another rank has. To be called on each rank whose collective
        failed. Takes ANSWER_S at most.
        """
        reason = _in_one_line(error)
        no_answer: str | None = self._lost_store()
        blame = self._in_time(lambda: self._ask("Timed out" in reason), no_answer) if self.store else FAILED
        return blame and f"{blame} (the backend: {reason})"

    def _in_time(self, ask: Callable[[], T], otherwise: T) -> T:
        """Return what the store answers within ANSWER_S.

        On a thread: where a cable is cut, a TCPStore's own time-out goes on to wait for the store's consent to it,
        which TCP gives up after 15 minutes.
        """
        answers: list[T] = []
        asking = threading.Thread(target=lambda: answers.append(ask()), name="ask the store", daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return answers[0] if answers else otherwise

    def _note_failure(self) -> bool:
        assert self.store
        with contextlib.suppress(RuntimeError):
            return bool(self.store.add("failed", 1) == 1)
        return False

    def _lost_store(self) -> str:
        holder = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        return f"rank {self.rank} lost {holder}, and with it the store that all ranks share"

    def _ask(self, timed_out: bool) -> str | None:
        """Return which ranks are to blame, FAILED for none, None as `accuse` does, in as long as the store takes."""
        assert self.store
        try:
            self.store.set(f"lost/{self.rank}", "yes")
            before = self._read("beat")
            time.sleep(LISTEN_S)
            after, lost = self._read("beat"), self._read("lost")
        except RuntimeError:
            return self._lost_store()
        if not self._note_failure():
            return None
        silent = [rank for rank in range(self.world_size) if before[rank] == after[rank] != ""]
        unborn = [rank for rank in range(self.world_size) if after[rank] == ""]
        hanging = [rank for rank in range(self.world_size) if lost[rank] == "no"]
        if silent:
            return f"rank {_listed(silent)} is dead, stopped, or cut off: no sign of life for {LISTEN_S:g} s"
        if unborn:
            return f"rank {_listed(unborn)} has not begun to train: it died at its start, or is still starting"
        if hanging and timed_out:
            return f"rank {_listed(hanging)} is alive, but does not come to where the others wait: it hangs"
        return FAILED

    def _beat(self) -> None:
        beats = 0
        while not self.ended.wait(BEAT_S):
            beats += 1
            try:
                assert self.store
                self.store.set(f"beat/{self.rank}", str(beats))
            except RuntimeError:
                return  # who needs to know finds out

    def _read(self, what: str) -> list[str]:
        """Return what each rank has put there, "" for one that has not begun: `get` alone would wait for it."""
        assert self.store
        keys = [f"{what}/{rank}" for rank in range(self.world_size)]
        return [bytes(self.store.get(key)).decode() if self.store.check([key]) else "" for key in keys]


def is_from_backend(error: RuntimeError) -> bool:
    """Whether the error is NCCL's, gloo's (which names its source file), or a store's: a collective has failed."""
    return isinstance(error, DistError) or "/gloo/" in str(error)


def _in_one_line(error: RuntimeError) -> str:
    """Return an error's first line, and the reason that NCCL adds in a later one."""
    text = str(error)
    return " ".join([text.splitlines()[0], *text.partition("Last error:\n")[2].splitlines()[:1]])


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
