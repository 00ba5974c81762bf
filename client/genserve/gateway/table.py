"""Table of the durable tasks, and the database's clock."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Double, Index, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

METADATA = MetaData()
TASKS = Table(
    "genserve_tasks",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("owner", String(128), nullable=False),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("priority", String(16), nullable=False),
    Column("rank", Double, nullable=False),
    Column("arguments", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("runner", String(32)),
    Column("lease_until", Double),
    Column("accepted", Double, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("expires", Double),
    Column("result", Text),
    Column("error", Text),
    Column("webhook_url", String(2048)),
    Column("webhook_state", String(16)),
    Column("webhook_attempts", Integer, nullable=False, default=0),
    Column("webhook_next", Double),
    UniqueConstraint("owner", "idempotency_key"),
    Index("genserve_tasks_queue", "state", "kind", "rank", "number"),
    Index("genserve_tasks_owner", "owner", "number"),
    Index("genserve_tasks_expires", "expires"),
    Index("genserve_tasks_webhooks", "webhook_state", "webhook_next"),
    # A number is never used twice, so a page of a list neither repeats nor skips a task.
    sqlite_autoincrement=True,
)
"""One row per task. Times are seconds since the epoch by the database's clock."""


class now(FunctionElement[float]):  # noqa: N801  # used as an SQL function
    """Seconds since the epoch by the database's clock, which all gateways share."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
