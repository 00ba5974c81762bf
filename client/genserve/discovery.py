"""Addresses of a client's servers: a DNS name with several addresses counts as several servers."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence

from genserve.access import Address
from genserve.server import Server
from genserve.transport import AsyncTransport

REFRESH_S = 30.0
"""Seconds between two lookups of a name, as of a headless Kubernetes Service."""


class Discovery:
    """The servers behind a client's addresses. Names are looked up when they are needed, and again from time to time.

    Args:
        servers: One server per address, in order, each with its address; None for a custom transport.
        connect: Factory of the transport to one address of a name; its arguments are the address and its URL.
    """

    def __init__(
        self,
        servers: Sequence[tuple[Server, Address | None]],
        connect: Callable[[Address, str], AsyncTransport],
    ) -> None:
        self._given = servers
        self._connect = connect
        self._has_names = any(address and is_name(address) for _, address in servers)
        self._found: dict[str, Server] = {}
        self._retired: list[Server] = []
        """Servers that are no longer found, with requests in flight."""
        self._current = [server for server, _ in servers]
        self._due = 0.0
        self._lookup: asyncio.Task[None] | None = None

    async def servers(self) -> Sequence[Server]:
        """Return all servers, in the order of the addresses."""
        if self._has_names and time.monotonic() >= self._due:
            is_first = self._due == 0.0
            if not self._lookup or self._lookup.done() or self._lookup.get_loop() is not _loop():
                self._lookup = asyncio.ensure_future(self._look_up())
            if is_first:  # Later lookups delay no request.
                await asyncio.shield(self._lookup)
        return self._current

    async def close(self) -> None:
        """Close all connections."""
        if self._lookup:
            self._lookup.cancel()
        servers = {*self._found.values(), *self._retired, *(server for server, _ in self._given)}
        closed = await asyncio.gather(*(server.transport.close() for server in servers), return_exceptions=True)
        for error in closed:
            if isinstance(error, BaseException):
                raise error

    async def _look_up(self) -> None:
        current: list[Server] = []
        for server, address in self._given:
            found = await resolved(address) if address else []
            current += [self._at(each) for each in found] or [server]
        gone = [server for server in self._found.values() if server not in current]
        self._found = {url: server for url, server in self._found.items() if server in current}
        self._current, self._due = current, time.monotonic() + REFRESH_S
        self._retired += gone
        idle = [server for server in self._retired if not server.running]
        self._retired = [server for server in self._retired if server.running]
        for server in idle:
            await server.transport.close()

    def _at(self, address: Address) -> Server:
        if address.url not in self._found:
            self._found[address.url] = Server(self._connect(address, address.url))
        return self._found[address.url]


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def is_name(address: Address) -> bool:
    """Return whether the host is a name that may have several servers. ``localhost`` is one machine."""
    if address.host == "localhost" or address.host.endswith(".localhost"):
        return False
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        return True
    return False


async def resolved(address: Address) -> list[Address]:
    """Return each address of a name with several ones, else an empty list.

    IPv4 and IPv6 addresses are two ways to the same servers: only those of the preferred kind count.
    """
    if not is_name(address):
        return []
    try:
        found = await _loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []  # The connection will fail with the reason.
    family = found[0][0]
    hosts = sorted({str(each[4][0]) for each in found if each[0] == family})
    return [address.at(host) for host in hosts] if len(hosts) > 1 else []
