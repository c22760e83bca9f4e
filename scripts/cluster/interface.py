"""Print how this machine reaches the place where the nodes of a training meet, for scripts/cluster/multinode.sh.

    python -m scripts.cluster.interface HOST:PORT [--ifname IFNAME] [--wait SECONDS]

One line: this machine's address on the way there, the interface that has it, and `host` where HOST is this machine,
`guest` where it is another. With --wait, a guest waits until HOST listens, so that a wrong address ends with a message
and not with a hang. Addresses are asked for because names mislead: Debian's /etc/hosts gives a machine's own name to
loopback, and torchrun's c10d rendezvous would send it to the other nodes.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address

import psutil
import tyro

from loop.config import InputError
from scripts.command import command

RETRY_S = 0.5


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT; raises InputError for anything else."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"{endpoint!r} is not HOST:PORT")
    return host, int(port)


def own_addresses() -> dict[str, list[str]]:
    """Return this machine's IP addresses by interface, the IPv4 ones first."""
    families = socket.AF_INET, socket.AF_INET6
    return {
        name: [each.address.split("%")[0] for family in families for each in addresses if each.family == family]
        for name, addresses in psutil.net_if_addrs().items()
    }


def reach(host: str, port: int, ifname: str | None) -> tuple[str, str, bool]:
    """Return (own address on the way to host, its interface, whether host is this machine).

    Raises InputError where there is no way, or other machines would not find this one by what is returned.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise InputError(f"{host} cannot be resolved on this node: {error.strerror}") from None
    interfaces = own_addresses()
    is_host = any(str(target[0]) in addresses for addresses in interfaces.values())
    if ifname is not None:
        if not interfaces.get(ifname):
            named = ", ".join(name for name, addresses in interfaces.items() if addresses)
            raise InputError(f"IFNAME={ifname}: there is no such interface with an address: {named}")
        return interfaces[ifname][0], ifname, is_host
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(target)  # sends nothing: asks for the route
        except OSError as error:
            raise InputError(f"no way from this node to {host}: {error.strerror}") from None
        address = str(probe.getsockname()[0])
    if ip_address(address).is_loopback and host != "localhost" and host != address:
        raise InputError(
            f"{host} is {address} on this node, where no other node finds it (see /etc/hosts): name the address, "
            "or this node's interface in IFNAME"
        )
    return address, next(name for name, addresses in interfaces.items() if address in addresses), is_host


def wait_until_listening(host: str, port: int, patience_s: float) -> None:
    """Return when host:port accepts a connection; raises InputError if it does not within so many seconds."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(RETRY_S, give_up - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > give_up:
                raise InputError(
                    f"nobody answers at {host}:{port} after {patience_s:g} s ({error}): has the node that has this "
                    "address started, and does its firewall let the other nodes in?"
                ) from None
        time.sleep(RETRY_S)


@dataclass(frozen=True)
class Flags:
    """The flags."""

    endpoint: tyro.conf.Positional[str]
    """Where the nodes meet, HOST:PORT."""
    ifname: str | None = None
    """Use this interface instead of the one on the way."""
    wait: float | None = None
    """Seconds that a guest waits for HOST."""


@command
def main(flags: Flags) -> None:
    """Print the line."""
    host, port = split_endpoint(flags.endpoint)
    address, ifname, is_host = reach(host, port, flags.ifname)
    if flags.wait is not None and not is_host:
        wait_until_listening(host, port, flags.wait)
    print(address, ifname, "host" if is_host else "guest")


if __name__ == "__main__":
    sys.exit(main())
