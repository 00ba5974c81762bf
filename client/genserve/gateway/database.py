"""Database of the durable tasks: addresses, connections and failures."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from genserve.errors import ServerUnavailable
from genserve.gateway.logs import log
from genserve.gateway.table import METADATA

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
"""Asynchronous drivers, by the short forms of their addresses."""
ALLOWED_URLS = "sqlite:///PATH, or postgresql://USER:PASSWORD@HOST/NAME"
BUSY_S = 30.0
"""Seconds that a statement waits for other writers of an SQLite file."""
RECYCLE_S = 1800
"""Age of a connection to PostgreSQL at which it is replaced: firewalls drop idle ones."""
OPEN_ATTEMPTS = 5
OPEN_PAUSE_S = 0.2
"""Gateways that start at once may all create the table; all but one fail and look again."""
logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D", bound="Database")


def state_folder() -> Path:
    """Return the folder for state: GENSERVE_STATE_DIR, else below XDG's state folder."""
    if own := os.environ.get("GENSERVE_STATE_DIR"):
        return Path(own)
    given = os.environ.get("XDG_STATE_HOME")
    return (Path(given) if given else Path.home() / ".local" / "state") / "genserve"


def default_url(port: int) -> str:
    """Return the address of the SQLite file of the gateway on a port, in the state folder."""
    return f"sqlite:///{state_folder().absolute() / f'gateway-{port}' / 'tasks.db'}"


def database_url(given: str) -> URL:
    """Return the address with its asynchronous driver.

    Args:
        given: ``sqlite:///PATH`` or ``postgresql://USER:PASSWORD@HOST/NAME``, or either with its driver.

    Raises:
        ValueError: The address has another form, or its driver is not installed. No message contains a password.
    """
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise ValueError(f"not the address of a database; allowed: {ALLOWED_URLS}") from None
    url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
    if url.drivername not in DRIVERS.values():
        raise ValueError(f"{url.drivername} is not supported; allowed: {ALLOWED_URLS}")
    if is_sqlite(url):
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise ValueError("durable tasks need a file; allowed: sqlite:///PATH")
        return url
    if find_spec("asyncpg") is None:
        raise ValueError("asyncpg is not installed; PostgreSQL needs: pip install 'genserve[postgresql]'")
    if sslmode := url.query.get("sslmode"):  # libpq's name, which providers put into their addresses
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": sslmode})
    return url


def is_sqlite(url: URL) -> bool:
    """Return whether the address is that of an SQLite file."""
    return url.get_backend_name() == "sqlite"


def new_engine(url: URL) -> AsyncEngine:
    """Return an engine. The folder of an SQLite file is created, with access for this user only.

    Raises:
        OSError: The folder cannot be created.
    """
    if not is_sqlite(url):
        return create_async_engine(url, pool_pre_ping=True, pool_recycle=RECYCLE_S)
    Path(url.database or "").absolute().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_async_engine(url, connect_args={"timeout": BUSY_S})
    event.listen(engine.sync_engine, "connect", _configure)
    return engine


def _configure(connection: Any, _: Any) -> None:
    """Let readers and a writer work at once, and write what was promised to the disk before it is promised."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


class StoreUnavailable(ServerUnavailable):
    """Unreachable database."""


def failures() -> tuple[type[BaseException], ...]:
    """Return the errors of a database that cannot be used. SQLAlchemy's others are defects."""
    # SQLAlchemy 2.0 does not wrap what asyncpg raises while it connects.
    asyncpg = sys.modules.get("asyncpg")
    raw = (asyncpg.PostgresError, asyncpg.InterfaceError) if asyncpg else ()
    return DBAPIError, PoolTimeout, OSError, asyncio.TimeoutError, *raw


def whole(method: Callable[Concatenate[D, P], Awaitable[T]]) -> Callable[Concatenate[D, P], Coroutine[Any, Any, T]]:
    """Let a method end even if its caller is cancelled: no statement is left halfway, no connection broken.

    The method raises StoreUnavailable if the database fails.
    """

    @functools.wraps(method)
    async def run(database: D, /, *args: P.args, **options: P.kwargs) -> T:
        work = asyncio.ensure_future(method(database, *args, **options))
        database.pending.add(work)
        work.add_done_callback(database.forget)
        try:
            result = await asyncio.shield(work)
        except failures() as error:
            database.note(error)
            raise StoreUnavailable("the database of the tasks is not available") from error
        database.note(None)
        return result

    return run


class Database:
    """Connections to the database of the tasks.

    Args:
        url: Its address, with the asynchronous driver.

    Raises:
        OSError: The folder of an SQLite file cannot be created.
    """

    def __init__(self, url: URL) -> None:
        self.engine = new_engine(url)
        self.pending: set[asyncio.Future[Any]] = set()
        self._has_failed = False

    async def open(self) -> None:
        """Create the table if it is missing.

        Raises:
            StoreUnavailable: The database cannot be used; the message says why, without a password.
        """
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                async with self.engine.begin() as connection:
                    await connection.run_sync(METADATA.create_all)
            except failures() as error:
                if attempt == OPEN_ATTEMPTS or isinstance(error, OSError):
                    raise StoreUnavailable(f"the database of the tasks is not available: {_reason(error)}") from error
                await asyncio.sleep(OPEN_PAUSE_S)
            else:
                return

    async def close(self) -> None:
        """Finish what has been begun, and close all connections."""
        if self.pending:
            await asyncio.wait(self.pending)
        await self.engine.dispose()

    def forget(self, work: asyncio.Future[Any]) -> None:
        """Drop a finished call. asyncio need not log the error of one whose caller has gone."""
        self.pending.discard(work)
        if not work.cancelled():
            work.exception()

    def note(self, error: BaseException | None) -> None:
        """Log the first of several failures, and the end of them."""
        if error and not self._has_failed:
            log(logger, logging.ERROR, "the database of the tasks failed", error=_reason(error))
        elif self._has_failed and not error:
            log(logger, logging.WARNING, "the database of the tasks is available again")
        self._has_failed = error is not None


def _reason(error: BaseException) -> str:
    """Return the database's own message, without the statement and its values."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
