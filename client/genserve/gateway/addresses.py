"""Addresses that webhooks may go to."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from genserve.errors import InvalidInput

Address = IPv4Address | IPv6Address

MAX_URL_CHARACTERS = 2048
WELL_KNOWN_PORTS = {80, 443}
FIRST_FREE_PORT = 1024
GLOBAL_UNICAST = IPv6Network("2000::/3")
"""The only IPv6 addresses of hosts on the Internet. Translated and embedded IPv4 addresses are outside."""
_URL = re.compile(r"https?://[\x21-\x7e]+", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class Addresses:
    """Rule on webhooks' addresses: public ones, and those that the operator allows.

    The rule is applied to the address of each connection when it is opened, so a name that changes its address in the
    meantime gains nothing.

    Args:
        allowed: Networks as ``10.0.0.0/8``, and names of hosts, whose addresses do not matter then.
        resolver: Resolver of names in place of the system's, for tests.

    Raises:
        ValueError: An entry is neither a network nor a name.
    """

    def __init__(self, allowed: Sequence[str] = (), *, resolver: AbstractResolver | None = None) -> None:
        self._resolver = resolver
        self._hosts: set[str] = set()
        self._networks = []
        for entry in allowed:
            try:
                self._networks.append(ip_network(entry, strict=False))
            except ValueError:
                if not _HOST.fullmatch(entry.lower()):
                    raise ValueError(f"{entry!r:.80} is neither a network, as 10.0.0.0/8, nor a host") from None
                self._hosts.add(entry.lower())

    def checked(self, url: str) -> URL:
        """Return a parsed URL if webhooks may go to it, as far as that can be told without a look at the network.

        Raises:
            InvalidInput: They may not.
        """
        problem = "" if len(url) <= MAX_URL_CHARACTERS else f"it is longer than {MAX_URL_CHARACTERS:,} characters"
        try:
            parsed = URL(url if _URL.fullmatch(url) else "")
        except ValueError:
            parsed = URL("")
        host, port = parsed.host, parsed.port or 0
        if not host:
            problem = problem or "it is not the URL of a host over http or https, in ASCII"
        elif parsed.user is not None or parsed.password is not None:
            problem = "it contains a user or a password"
        elif port not in WELL_KNOWN_PORTS and port < FIRST_FREE_PORT:
            problem = f"port {port} is not allowed; allowed: 80, 443, and {FIRST_FREE_PORT} or more"
        elif (literal := _literal(host)) and not self.allows(literal):
            problem = "its address is not public"
        if problem:
            raise InvalidInput(f"webhook_url: {problem}")
        return parsed

    def allows(self, address: Address) -> bool:
        """Return whether a connection to the address may be opened."""
        return is_public(address) or any(address in network for network in self._networks)

    def connector(self, url: URL) -> aiohttp.TCPConnector:
        """Return a connector for requests to a URL."""
        is_named = (url.host or "").lower() in self._hosts
        factory = None if is_named else self._socket
        return aiohttp.TCPConnector(force_close=True, resolver=self._resolver, socket_factory=factory)

    def _socket(self, found: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        """Return a socket for a connection to an address that the name has now."""
        family, kind, protocol, _, place = found
        if not self.allows(ip_address(place[0])):
            raise PermissionError(errno.EACCES, "the address is not public")
        return socket.socket(family, kind, protocol)


def is_public(address: Address) -> bool:
    """Return whether an address is that of a host on the Internet: not private, loopback, multicast or reserved."""
    if isinstance(address, IPv6Address):
        if address not in GLOBAL_UNICAST or (address.sixtofour and not is_public(address.sixtofour)):
            return False
    elif address.is_reserved:
        return False
    return address.is_global and not address.is_multicast


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
