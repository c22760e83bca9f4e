"""SIGTERM and SIGINT, handled in one place: noted at once, acted on by all ranks together.

A rank that stopped alone would leave the others waiting in their next all-reduce. So a signal is only noted; the reduce
of the next log step or checkpoint carries the note to all ranks, and all stop there. Where that does not happen in time
(a peer is dead, the steps are long), a thread ends the trackers and the process; it runs even while the main thread
waits in a collective. Before the ranks have joined there is nothing to save, and the process ends at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 1  # between looks at whether the launcher is alive
GRACE_S = 8  # torchrun kills 30 s after its SIGTERM, and ending a W&B run may take 20
# As of the import, before what is slow. `accelerate launch` of one process sets no LOCAL_RANK.
LAUNCHER = os.getppid() if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None


class StopSignal:
    """Notes the first SIGTERM or SIGINT, or the death of the launcher as a SIGTERM, between `with` and its end.

    signum: the signal noted, 0 for none. handled: set once the signal has been acted on, or can no longer matter.
    last_resort: called in a thread, with the exit code, if `handled` is not set within GRACE_S seconds; it ends the
    process. None, as at first, where nothing would be lost: the process ends at once.
    """

    def __init__(self) -> None:
        self.last_resort: Callable[[int], None] | None = None
        self.signum, self.orphaned = 0, False
        self.handled = threading.Event()

    def __enter__(self) -> StopSignal:
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.reader.settimeout(POLL_S)
        self.old_fd = signal.set_wakeup_fd(self.writer.fileno())
        self.old_handlers = [signal.signal(signum, self._noted) for signum in SIGNALS]
        self.thread = threading.Thread(target=self._watch, name="stop signal", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.handled.set()
        signal.set_wakeup_fd(self.old_fd)
        for signum, handler in zip(SIGNALS, self.old_handlers, strict=True):
            signal.signal(signum, handler)
        self.writer.close()  # ends the thread's wait
        self.thread.join()
        self.reader.close()

    def _noted(self, signum: int, frame: FrameType | None) -> None:
        """Do nothing: the interpreter has written the signal to the socket, where the thread reads it."""

    def _watch(self) -> None:
        noted = None
        while noted is None:
            try:
                noted = self.reader.recv(1)
                if noted and noted[0] not in SIGNALS:  # another signal that Python handles, such as a worker's SIGCHLD
                    noted = None
            except TimeoutError:
                if LAUNCHER not in (None, os.getppid()):  # and with the launcher whoever would stop us
                    self.orphaned, noted = True, bytes([signal.SIGTERM])
        if not noted:
            return
        self.signum = noted[0]
        if not self.handled.wait(GRACE_S if self.last_resort else 0):
            (self.last_resort or _end)(128 + self.signum)


def _end(exit_code: int) -> None:
    try:
        sys.stdout.flush()  # of a run before this one, in a sweep
    finally:
        os._exit(exit_code)
