"""Board of tasks, instances and settings, shared by a server's processes: instances write, the `tasks` model queries.

The board is one SQLite file per server. Several processes may write it at once, any of them may be killed meanwhile,
and no client data becomes part of a path.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

BOARD_ENV = "GENSERVE_BOARD"
FINISHED_KEPT_S = 600.0
"""Retention of finished tasks, in seconds."""
FINISHED_KEPT = 10_000
"""Limit on the number of finished tasks."""
CANCEL_KEPT_S = 300.0
"""Retention of early cancellations, in seconds: longer than a task can be queued."""
CANCELS_KEPT = 10_000
"""Limit on the number of early cancellations, of tasks that have not arrived yet."""
LOAD_KEPT_S = 5.0
"""Seconds without an update after which the load of an instance is ignored."""
INSTANCE_READY_S = 5.0
"""Seconds without a sign of life after which an instance no longer counts as ready."""
INSTANCE_KEPT_S = 60.0
"""Seconds without a sign of life after which an instance is no longer listed."""
SETTINGS_KEPT = 1_000
"""Limit on the number of settings, of all models together."""
SETTING_CHARACTERS = 4_096
"""Limit on the length of a setting's value as JSON; a longer one is cut and becomes a string."""
LISTED = 1_000
"""Limit on the number of tasks in a listing."""
TIDY_S = 1.0
"""Minimum interval between two deletions of expired records, in seconds."""
LOCK_TIMEOUT_S = 10.0
"""Time limit for waiting on another process's write, in seconds."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    key INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL,
    model TEXT NOT NULL,
    instance TEXT NOT NULL,
    state TEXT NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    preview BLOB NOT NULL DEFAULT x'',
    cancel INTEGER NOT NULL DEFAULT 0,
    arrived REAL NOT NULL,
    changed REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS tasks_by_id ON tasks (task_id, key);
CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state, changed);
CREATE TABLE IF NOT EXISTS cancelled_early (task_id TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS loads (
    instance TEXT PRIMARY KEY, model TEXT NOT NULL, load REAL NOT NULL, has_room INTEGER NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS instances (
    instance TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    device TEXT NOT NULL,
    gpu_id INTEGER,
    memory_used INTEGER,
    memory_free INTEGER,
    memory_total INTEGER,
    ready INTEGER NOT NULL,
    at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS settings (
    model TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, source TEXT NOT NULL, PRIMARY KEY (model, name)
);
"""
IN_FLIGHT = "state IN ('waiting', 'running')"
FINISHED = "state IN ('done', 'failed', 'cancelled')"
COLUMNS = "task_id, state, step, steps, model, instance, error, arrived, changed"
LOAD_COLUMNS = "instance, model, device, gpu_id, running, waiting, memory_used, memory_free, memory_total, ready"
SETTING_COLUMNS = "model, name, value, source"


class Memory(NamedTuple):
    """Memory of a worker and its device in bytes; None where it is unknown."""

    used: int | None = None
    """Memory that the worker holds."""
    free: int | None = None
    """Free memory of the device."""
    total: int | None = None
    """All memory of the device."""


def default_path() -> Path:
    """Return the board of this process's server: GENSERVE_BOARD, else a file in the temporary directory."""
    given = os.environ.get(BOARD_ENV)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"genserve-{os.getuid()}-{os.getppid()}.board"


class Board:
    """One process's access to the board. Thread-safe.

    One record is one task. Task ids may repeat, because a caller's request ids may: then `status` shows the newest task
    of that id, and `cancel` applies to all that are in flight.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = path or default_path()
        path.touch(mode=0o600)
        self._lock = threading.Lock()
        self._tidied = 0.0
        self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        # The board lives as long as its server: it need not survive a power cut, but the kill of any process.
        _write_ahead(self._db)
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # For instances.

    def start_instance(self, instance: str) -> None:
        """Fail the tasks that an earlier process of that instance left in flight."""
        with self._lock:
            self._db.execute(
                f"UPDATE tasks SET state = 'failed', error = 'the instance ended', changed = ?"  # noqa: S608
                f" WHERE instance = ? AND {IN_FLIGHT}",
                (time.time(), instance),
            )

    def add(self, task_id: str, *, model: str, instance: str) -> int:
        """Add a task as waiting, and return its key."""
        now = time.time()
        with self._lock:
            self._tidy(now)
            early = self._db.execute(
                "DELETE FROM cancelled_early WHERE task_id = ? RETURNING at", (task_id,)
            ).fetchone()
            cursor = self._db.execute(
                "INSERT INTO tasks (task_id, model, instance, state, cancel, arrived, changed)"
                " VALUES (?, ?, ?, 'waiting', ?, ?, ?)",
                (task_id, model, instance, early is not None, now, now),
            )
            return int(cursor.lastrowid or 0)

    def progress(self, key: int, step: int, steps: int, preview: bytes = b"") -> None:
        """Set a task to running, at `step` of `steps`. An empty preview keeps the last one."""
        with self._lock:
            self._db.execute(
                "UPDATE tasks SET state = 'running', step = ?, steps = ?, changed = ?,"
                " preview = CASE WHEN ? = x'' THEN preview ELSE ? END WHERE key = ?",
                (step, steps, time.time(), preview, preview, key),
            )

    def finish(self, key: int, state: str, error: str | None = None) -> None:
        """Set the final state of a task: done, failed or cancelled."""
        with self._lock:
            self._db.execute(
                "UPDATE tasks SET state = ?, error = ?, changed = ?, step = CASE WHEN ? = 'done' THEN steps ELSE step"
                " END, preview = x'' WHERE key = ?",
                (state, error, time.time(), state, key),
            )

    def cancel_requested(self, instance: str) -> set[int]:
        """Return the keys of the instance's tasks in flight that are to be cancelled."""
        with self._lock:
            records = self._db.execute(
                f"SELECT key FROM tasks WHERE cancel AND instance = ? AND {IN_FLIGHT}",  # noqa: S608
                (instance,),
            ).fetchall()
        return {int(key) for (key,) in records}

    def set_load(self, instance: str, *, model: str, load: float, has_room: bool) -> None:
        """Set the backlog of an instance, and whether it could accept more requests."""
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO loads VALUES (?, ?, ?, ?, ?)", (instance, model, load, has_room, time.time())
            )

    def has_less_loaded(self, instance: str, *, model: str, load: float) -> bool:
        """Return whether another instance of the model has room and a backlog smaller than `load`."""
        with self._lock:
            record = self._db.execute(
                "SELECT 1 FROM loads WHERE model = ? AND instance <> ? AND load < ? AND has_room AND at > ? LIMIT 1",
                (model, instance, load, time.time() - LOAD_KEPT_S),
            ).fetchone()
        return record is not None

    def set_instance(
        self, instance: str, *, model: str, device: str, gpu_id: int | None, memory: Memory, ready: bool
    ) -> None:
        """Set the state of an instance; also its sign of life. Drop the instances without one."""
        now = time.time()
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (instance, model, device, gpu_id, *memory, ready, now),
            )
            self._db.execute("DELETE FROM instances WHERE at < ?", (now - INSTANCE_KEPT_S,))

    def remove_instance(self, instance: str) -> None:
        """Remove an instance that ends."""
        with self._lock:
            self._db.execute("DELETE FROM instances WHERE instance = ?", (instance,))

    def set_settings(self, model: str, settings: Iterable[tuple[str, Any, str]]) -> None:
        """Replace the settings of a model.

        Args:
            model: The model.
            settings: Name, value (anything that JSON can hold) and source of each setting.
        """
        records = [(model, name, _bounded_json(value), source) for name, value, source in settings]
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("DELETE FROM settings WHERE model = ?", (model,))
            self._db.executemany("INSERT INTO settings VALUES (?, ?, ?, ?)", records)
            self._db.execute(
                "DELETE FROM settings WHERE rowid NOT IN (SELECT rowid FROM settings ORDER BY rowid DESC LIMIT ?)",
                (SETTINGS_KEPT,),
            )

    # For the `tasks` model.

    def status(self, task_id: str) -> tuple[dict[str, Any], bytes]:
        """Return the newest task of that id and its preview; the state is ``unknown`` if there is none."""
        with self._lock:
            record = self._db.execute(
                f"SELECT {COLUMNS}, preview FROM tasks WHERE task_id = ? ORDER BY key DESC LIMIT 1",  # noqa: S608
                (task_id,),
            ).fetchone()
        if record is None:
            return {"task_id": task_id, "state": "unknown", "step": 0, "steps": 0, "instance": None}, b""
        return _as_dict(record), bytes(record[-1])

    def cancel(self, task_id: str) -> tuple[dict[str, Any], bytes]:
        """Request the cancellation of all tasks of that id in flight, and return the status of the newest.

        The cancellation of an unknown id is stored: a request that still waits in Triton's queue is cancelled when it
        arrives at an instance.
        """
        now = time.time()
        with self._lock:
            in_flight = self._db.execute(
                f"UPDATE tasks SET cancel = 1 WHERE task_id = ? AND {IN_FLIGHT}",  # noqa: S608
                (task_id,),
            ).rowcount
            exists = self._db.execute("SELECT 1 FROM tasks WHERE task_id = ? LIMIT 1", (task_id,)).fetchone()
            if not in_flight and not exists:
                self._db.execute("INSERT OR REPLACE INTO cancelled_early VALUES (?, ?)", (task_id, now))
                self._db.execute(
                    "DELETE FROM cancelled_early WHERE rowid <= (SELECT max(rowid) FROM cancelled_early) - ?",
                    (CANCELS_KEPT,),
                )
        return self.status(task_id)

    def listing(self) -> list[dict[str, Any]]:
        """Return the tasks in flight, oldest first, at most `LISTED`."""
        with self._lock:
            records = self._db.execute(
                f"SELECT {COLUMNS} FROM tasks WHERE {IN_FLIGHT} ORDER BY key LIMIT ?",  # noqa: S608
                (LISTED,),
            ).fetchall()
        return [_as_dict(record) for record in records]

    def load(self) -> list[dict[str, Any]]:
        """Return the instances with their load, by model and instance, at most `LISTED`.

        An instance whose worker is being started or replaced is not ready, nor is one without a sign of life.
        """
        now = time.time()
        with self._lock:
            records = self._db.execute(
                "SELECT instance, model, device, gpu_id,"
                " (SELECT count(*) FROM tasks WHERE state = 'running' AND tasks.instance = instances.instance),"
                " (SELECT count(*) FROM tasks WHERE state = 'waiting' AND tasks.instance = instances.instance),"
                " memory_used, memory_free, memory_total, ready AND at > ?"
                " FROM instances WHERE at > ? ORDER BY model, instance LIMIT ?",
                (now - INSTANCE_READY_S, now - INSTANCE_KEPT_S, LISTED),
            ).fetchall()
        return [_as_dict((*record[:-1], bool(record[-1])), LOAD_COLUMNS) for record in records]

    def config(self) -> list[dict[str, Any]]:
        """Return the settings of the models that have an instance, by model and in the order they were given."""
        with self._lock:
            records = self._db.execute(
                f"SELECT {SETTING_COLUMNS} FROM settings"  # noqa: S608
                " WHERE model IN (SELECT model FROM instances WHERE at > ?) ORDER BY model, rowid",
                (time.time() - INSTANCE_KEPT_S,),
            ).fetchall()
        return [
            _as_dict((model, name, json.loads(value), source), SETTING_COLUMNS)
            for model, name, value, source in records
        ]

    def _tidy(self, now: float) -> None:
        if now - self._tidied < TIDY_S:
            return
        self._tidied = now
        self._db.execute(
            f"DELETE FROM tasks WHERE {FINISHED} AND (changed < ? OR key <= (SELECT max(key) FROM tasks) - ?)",  # noqa: S608
            (now - FINISHED_KEPT_S, FINISHED_KEPT),
        )
        self._db.execute("DELETE FROM cancelled_early WHERE at < ?", (now - CANCEL_KEPT_S,))


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log. SQLite's own lock timeout does not cover this statement."""
    give_up = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.01)
        else:
            return


def _bounded_json(value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # JSON has no infinity
        text = json.dumps(str(value))
    # Quotes and backslashes take two characters in a JSON string.
    return text if len(text) <= SETTING_CHARACTERS else json.dumps(text[: SETTING_CHARACTERS // 2 - 3] + "...")


def _as_dict(record: tuple[Any, ...], columns: str = COLUMNS) -> dict[str, Any]:
    return dict(zip(columns.split(", "), record, strict=False))
