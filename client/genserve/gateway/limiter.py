"""Limits of each caller: requests per time over a moving window, and requests at once."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import limits
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from genserve.gateway.errors import Failure

IPV6_HOST_BITS = 64
"""Bits of an IPv6 address that its owner chooses freely."""


@dataclass(frozen=True)
class Limits:
    """Limits of one caller. None is no limit.

    Attributes:
        rate: Requests per time.
        concurrency: Requests at once.
    """

    rate: limits.RateLimitItem | None = None
    concurrency: int | None = None

    @classmethod
    def parse(cls, *, rate: str | None = None, concurrency: str | int | None = None) -> Limits:
        """Return the limits as written in an option or in a file of keys.

        Raises:
            ValueError: A limit has another form.
        """
        parsed = None
        if rate is not None:
            try:
                parsed = limits.parse(rate)
            except ValueError:
                parsed = None
            if parsed is None or parsed.amount < 1:
                raise ValueError(f"rate is {rate!r:.40}; allowed: as 60/minute, with second, minute, hour or day")
        if concurrency is not None and not (str(concurrency).isdecimal() and int(concurrency) >= 1):
            raise ValueError(f"concurrency is {concurrency!r:.40}; allowed: 1 or more")
        return cls(parsed, None if concurrency is None else int(concurrency))

    def or_else(self, others: Limits) -> Limits:
        """Return these limits, with those of `others` in place of missing ones."""
        return Limits(self.rate or others.rate, self.concurrency or others.concurrency)


class Limiter:
    """Count of the requests of every caller. For use in one event loop.

    Args:
        retry_after_s: Seconds after which a caller with too many requests at once should try again.
    """

    def __init__(self, retry_after_s: int) -> None:
        self._retry_after_s = retry_after_s
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    @asynccontextmanager
    async def admitted(self, caller: str, allowed: Limits) -> AsyncIterator[None]:
        """Count a request for the length of the block.

        Raises:
            Failure: The caller is over a limit. A request that is refused does not count.
        """
        if allowed.concurrency is not None and self._running[caller] >= allowed.concurrency:
            raise _refusal(f"{allowed.concurrency} requests run already, and no more are allowed", self._retry_after_s)
        self._running[caller] += 1
        try:
            if allowed.rate is not None and not await self._rates.hit(allowed.rate, caller):
                free_at, _ = await self._rates.get_window_stats(allowed.rate, caller)
                raise _refusal(f"the limit is {allowed.rate}", free_at - time.time())
            yield
        finally:
            self._running[caller] -= 1
            if not self._running[caller]:
                del self._running[caller]


def network_of(host: str) -> str:
    """Return the caller behind an address: the address itself, or the network of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # as of a Unix socket
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    network = int(address) >> IPV6_HOST_BITS << IPV6_HOST_BITS
    return str(ipaddress.IPv6Network((network, 128 - IPV6_HOST_BITS)))


def _refusal(reason: str, seconds: float) -> Failure:
    headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
    return Failure(429, "QueueFull", f"too many requests: {reason}", headers)
