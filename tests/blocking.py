"""Synchronous view of an asynchronous transport, for tests below the client."""

from __future__ import annotations

from typing import Any

from genserve.background import LOOP
from genserve.transport import connect


class BlockingTransport:
    """Transport whose methods return when they are done."""

    def __init__(self, url: str, **options: Any) -> None:
        self.transport = connect(url, **options)
        self.url = self.transport.url

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.transport, name)
        return lambda *arguments, **options: LOOP.run(method(*arguments, **options))
