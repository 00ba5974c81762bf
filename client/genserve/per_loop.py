"""Objects that are bound to an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Object that is made in the running event loop on first use, and again when another loop uses it.

    One client may be used in several calls of ``asyncio.run``, and after a fork; the libraries' objects may not.

    Args:
        make: Factory of the object.
        drop: Function that gets an object whose loop has been closed.
    """

    def __init__(self, make: Callable[[], T], drop: Callable[[T], object] = id) -> None:
        self._make = make
        self._drop = drop
        self._made: tuple[asyncio.AbstractEventLoop, T] | None = None

    def get(self) -> T:
        """Return the running loop's object."""
        loop = asyncio.get_running_loop()
        if self._made is None or self._made[0] is not loop:
            if self._made and self._made[0].is_closed():
                self._drop(self._made[1])
            self._made = (loop, self._make())
        return self._made[1]

    def pop(self) -> T | None:
        """Return the running loop's object, or that of a closed loop, if there is one, and forget it."""
        made, self._made = self._made, None
        return made[1] if made and (made[0] is asyncio.get_running_loop() or made[0].is_closed()) else None
