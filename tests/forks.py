"""Python programs that start within a tenth of a second: forked from a process that has imported torch already.

A test that starts train.py would pay torch's import, 2 to 5 s of the processor, each time; most tests are not about it.
`Forked` is a `subprocess.Popen` whose program is forked from a server that has imported what every run imports, and
nothing of this project's: it runs as by `python FILE`, `python -c CODE` or `python -m MODULE`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

READ_AT_IMPORT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY", "PYTHONPATH")
SERVE = "from tests.forks import serve; serve()"


class Forked(subprocess.Popen[str]):
    """A program started by `[python, *words]`, with its output in pipes; it is no child of this process."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        super().__init__(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=env)

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        """As Popen's own, which this replaces: start the program with these ends of the pipes."""
        env, p2cread, c2pwrite, errwrite = rest[5], rest[9], rest[12], rest[14]
        server = _server(tuple((name, env[name]) for name in READ_AT_IMPORT if name in env))
        self.line, theirs = socket.socketpair()
        request = json.dumps([args[1:], env]).encode()
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [theirs.fileno(), p2cread, c2pwrite, errwrite])
        server.sendall(request)
        for fd in {p2cread, c2pwrite, errwrite}:
            os.close(fd)
        theirs.close()
        self.pid = int.from_bytes(self.line.recv(4), "big")
        self._child_created = True

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and (done := self._try_wait(os.WNOHANG))[0]:
            self.returncode = done[1]
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """As Popen's own: wait for the program's status, which its parent sends."""
        try:
            status = self.line.recv(4, socket.MSG_DONTWAIT if wait_flags else 0)
        except BlockingIOError:
            return 0, 0
        assert status, "the program's parent was killed"
        return self.pid, int.from_bytes(status, "big", signed=True)

    def _handle_exitstatus(self, sts: int, *_: Any, **__: Any) -> None:
        self.returncode = sts


@functools.cache
def _server(environ: tuple[tuple[str, str], ...]) -> socket.socket:
    """The line to a server of programs with these variables; it ends when this process does."""
    ours, theirs = socket.socketpair()
    rest = {name: value for name, value in os.environ.items() if name not in READ_AT_IMPORT}
    subprocess.Popen([sys.executable, "-c", SERVE], stdin=theirs, env=rest | dict(environ))
    theirs.close()
    return ours


def serve() -> None:
    """Fork programs as they are asked for on standard input, a socket."""
    import accelerate  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch
    import tyro  # noqa: F401

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # the first optimizer imports torch._dynamo
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        size, fds, *_ = socket.recv_fds(requests, 4, 4)
        if not size:
            return
        request = b""
        while len(request) < int.from_bytes(size, "big"):
            request += requests.recv(int.from_bytes(size, "big") - len(request))
        if os.fork() == 0:
            requests.close()
            _supervise(*json.loads(request), socket.socket(fileno=fds[0]), fds[1:])
        for fd in fds:
            os.close(fd)


def _supervise(words: list[str], environ: dict[str, str], line: socket.socket, streams: list[int]) -> None:
    """Run the program in a process of its own; send its process id, then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        line.close()
        for target, fd in enumerate(streams):
            os.dup2(fd, target)
            os.close(fd)
        os._exit(_program(words, environ))
    for fd in streams:
        os.close(fd)
    line.sendall(pid.to_bytes(4, "big"))
    line.sendall(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]).to_bytes(4, "big", signed=True))
    os._exit(0)


def _program(words: list[str], environ: dict[str, str]) -> int:
    """Run a program as the interpreter would, to its exit functions; return its exit code."""
    import atexit
    import runpy
    import threading
    import traceback

    for name in ("tests.forks", "tests"):
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environ)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = open(number, "w", closefd=False, buffering=1 if number == 2 else -1)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    code: Any = 0
    try:
        if words[0] == "-c":
            sys.path[0], sys.argv = "", ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.path[0], sys.argv = str(Path.cwd()), words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(words[0]).resolve().parent), words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return int(code or 0)
