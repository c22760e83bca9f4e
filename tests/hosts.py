"""Two hosts on one machine: network namespaces joined by a cable, with names of their own that nothing resolves.

They live in a PID namespace whose first process waits for its standard input to end: whatever ends the tests, the
kernel then ends every process on the hosts, and with the last of them the hosts and the cable are gone.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import TracebackType

import psutil

ADDRESSES = "10.77.0.1", "10.77.0.2"
NAMES = "first", "second"
LAY_THE_CABLE = f"""
set -e
unshare --net --uts sleep infinity &
while [ /proc/$!/ns/net -ef /proc/$$/ns/net ]; do sleep 0.05; done
ip link add cable type veth peer name cable netns $!
hostname {NAMES[0]}
ip addr add {ADDRESSES[0]}/24 dev cable
nsenter --target $! --net --uts sh -ec 'hostname {NAMES[1]}; ip addr add {ADDRESSES[1]}/24 dev cable
    ip link set lo up; ip link set cable up'
ip link set lo up
ip link set cable up
echo $!
exec cat
"""


class NoHostsError(Exception):
    """Why there can be no network namespaces here."""


class TwoHosts:
    """`enter[i]` before a command runs it on host i, between `with` and its end. Raises NoHostsError."""

    def __enter__(self) -> TwoHosts:
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = ["unshare", *as_root, "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        try:
            self.holder = subprocess.Popen(
                [*command, "sh", "-c", LAY_THE_CABLE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError as error:
            raise NoHostsError(f"no {error.filename} here") from None
        assert self.holder.stdout
        second = self.holder.stdout.readline().strip()
        if not second:
            raise NoHostsError(self.holder.communicate()[1].strip())
        (init,) = psutil.Process(self.holder.pid).children()
        users = ["--user", "--preserve-credentials"] if as_root else []
        first = ["nsenter", "--target", str(init.pid), *users, "--net", "--uts", "--pid", "--mount"]
        first.append(f"--wd={Path.cwd()}")
        self.enter = first, [*first, "nsenter", "--target", second, "--net", "--uts"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.holder.communicate()

    def cable(self, state: str) -> None:
        """Pull the second host's end of the cable ("down"), or put it back ("up")."""
        subprocess.run([*self.enter[1], "ip", "link", "set", "cable", state], check=True)
