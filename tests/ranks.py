"""Worlds of gloo ranks for the tests: one process group a size, kept for the whole session, running any function."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

HANG_S = 30  # a collective that takes longer has hung


class World:
    """`world.run(f, ...)` calls f on every rank and returns the results in rank order; size 1 is this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        if size == 1:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks", "tests.cases"])  # torch is imported once, not once a rank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function, one that can be imported by name, on every rank; fail with a rank's traceback."""
        if self.size == 1:
            return [function(*args, **kwargs)]
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(2 * HANG_S):
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer")
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            if error:
                raise AssertionError(f"rank {rank} of {self.size}:\n{error}")
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the ranks."""
        if self.size > 1:
            for process in self.processes:
                process.kill()


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=HANG_S))
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((function(*args, **kwargs), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
