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
from datetime import timedelta
from types import TracebackType

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

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
            self.store.set(f"word/{self.rank}", "")
            self.store.set(f"beat/{self.rank}", "0")
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ended.set()
        if self.store:
            if error is not None:
                self.leave_word("failed")
            self.thread.join(2 * BEAT_S)  # it hangs where the store is out of reach

    def accuse(self) -> str | None:
        """Return which ranks the others lost, and why; None on ranks that need not say it, since another does.

        To be called on each rank whose collective failed. Takes ANSWER_S at most, on a thread: where a cable is cut, a
        TCPStore's own time-out goes on to wait for the store's consent to it, which TCP gives up after 15 minutes.
        """
        if not self.store:
            return "lost the other ranks"
        answers: list[str | None] = []
        asking = threading.Thread(target=lambda: answers.append(self._ask()), name="accuse", daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return answers[0] if answers else self._lost_store()

    def _lost_store(self) -> str:
        return f"rank {self.rank} lost the ranks' store: its process (rank 0's, or the launcher's) is gone or cut off"

    def _ask(self) -> str | None:
        """Return what `accuse` does, in as long as the store takes."""
        try:
            self.leave_word("lost")
            before = self._beats()
            time.sleep(LISTEN_S)
            after = self._beats()
            words = [self._read(f"word/{rank}") for rank in range(self.world_size)]
        except RuntimeError:
            return self._lost_store()
        if "failed" in words:  # it has said why itself
            return None
        silent = [rank for rank in range(self.world_size) if before[rank] == after[rank]]
        hanging = [rank for rank in range(self.world_size) if rank not in silent and not words[rank]]
        accusers = [rank for rank in range(self.world_size) if words[rank] and rank not in silent]
        if self.rank != min(accusers, default=self.rank):
            return None
        self.leave_word("failed")  # before this rank falls silent, too
        if silent:
            return f"rank {_listed(silent)} is dead, stopped, or cut off: no sign of life for {LISTEN_S:g} s"
        if hanging:
            return f"rank {_listed(hanging)} is alive, but does not come to where the others wait: it hangs"
        return "the ranks lost each other: all are alive, the network between them is not"

    def _beat(self) -> None:
        beats = 0
        while not self.ended.wait(BEAT_S):
            beats += 1
            try:
                assert self.store
                self.store.set(f"beat/{self.rank}", str(beats))
            except RuntimeError:
                return  # who needs to know finds out

    def leave_word(self, word: str) -> None:
        """Let the others know: "failed", and has said why, or "lost", because of another."""
        with contextlib.suppress(RuntimeError):
            if self.store:
                self.store.set(f"word/{self.rank}", word)

    def _beats(self) -> list[str]:
        return [self._read(f"beat/{rank}") for rank in range(self.world_size)]

    def _read(self, key: str) -> str:
        assert self.store
        return bytes(self.store.get(key)).decode()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank did not take part."""
    return isinstance(error, DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
