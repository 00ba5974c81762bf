"""What is in flight, shared by all processes of one server: the instances write it, the `tasks` model reads it.

One SQLite file per server: several processes may write it at once, any of them may be killed while it does, and
nothing of a client's becomes part of a path.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BOARD_ENV = "GENSERVE_BOARD"
FINISHED_KEPT_S = 600.0
"""Seconds that a finished task stays visible."""
FINISHED_KEPT = 10_000
"""Finished tasks that stay visible, at most."""
CANCEL_KEPT_S = 300.0
"""Seconds that the cancellation of a task which has not yet arrived is remembered: longer than it can be queued."""
CANCELS_KEPT = 10_000
"""Cancellations of tasks that have not arrived, at most."""
LOAD_KEPT_S = 5.0
"""Seconds after which an instance that no longer says how busy it is counts as gone."""
LISTED = 1_000
"""Tasks that one listing shows, at most."""
TIDY_S = 1.0
"""Seconds between two looks for what is too old to be kept."""
LOCK_TIMEOUT_S = 10.0
"""Seconds that a process waits for another one's write."""

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
"""
IN_FLIGHT = "state IN ('waiting', 'running')"
FINISHED = "state IN ('done', 'failed', 'cancelled')"
COLUMNS = "task_id, state, step, steps, model, instance, error, arrived, changed"


def default_path() -> Path:
    """The board of the server whose child this process is: where GENSERVE_BOARD says, else in the temporary folder."""
    given = os.environ.get(BOARD_ENV)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"genserve-{os.getuid()}-{os.getppid()}.board"


class Board:
    """One process's access to the board. Thread-safe.

    A row is one task; a task id may come again (a caller's request ids may repeat), and then the newest one is shown
    and all that are in flight are cancelled.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = path or default_path()
        path.touch(mode=0o600)
        self._lock = threading.Lock()
        self._tidied = 0.0
        self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        # The board dies with its server: nothing needs to survive a power cut, but every process a neighbour's kill.
        _write_ahead(self._db)
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # The instance's side.

    def start_instance(self, instance: str) -> None:
        """An instance begins: whatever an earlier process of that name had in flight will never be answered."""
        with self._lock:
            self._db.execute(
                f"UPDATE tasks SET state = 'failed', error = 'the instance ended', changed = ?"  # noqa: S608
                f" WHERE instance = ? AND {IN_FLIGHT}",
                (time.time(), instance),
            )

    def add(self, task_id: str, *, model: str, instance: str) -> int:
        """Enter a task as waiting; the returned key names it from now on."""
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
        """The task runs and has done `step` of `steps`; an empty preview leaves the last one."""
        with self._lock:
            self._db.execute(
                "UPDATE tasks SET state = 'running', step = ?, steps = ?, changed = ?,"
                " preview = CASE WHEN ? = x'' THEN preview ELSE ? END WHERE key = ?",
                (step, steps, time.time(), preview, preview, key),
            )

    def finish(self, key: int, state: str, error: str | None = None) -> None:
        """The task ended as `state` (done, failed or cancelled)."""
        with self._lock:
            self._db.execute(
                "UPDATE tasks SET state = ?, error = ?, changed = ?, step = CASE WHEN ? = 'done' THEN steps ELSE step"
                " END, preview = x'' WHERE key = ?",
                (state, error, time.time(), state, key),
            )

    def cancel_requested(self, instance: str) -> set[int]:
        """Keys of the instance's tasks in flight that somebody wants cancelled."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT key FROM tasks WHERE cancel AND instance = ? AND {IN_FLIGHT}",  # noqa: S608
                (instance,),
            ).fetchall()
        return {int(key) for (key,) in rows}

    def set_load(self, instance: str, *, model: str, load: float, has_room: bool) -> None:
        """Say how much work an instance has before it, and whether it could take more."""
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO loads VALUES (?, ?, ?, ?, ?)", (instance, model, load, has_room, time.time())
            )

    def has_freer(self, instance: str, *, model: str, load: float) -> bool:
        """Whether another instance of the model has less than `load` before it, and room."""
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM loads WHERE model = ? AND instance <> ? AND load < ? AND has_room AND at > ? LIMIT 1",
                (model, instance, load, time.time() - LOAD_KEPT_S),
            ).fetchone()
        return row is not None

    # The `tasks` model's side.

    def status(self, task_id: str) -> tuple[dict[str, Any], bytes]:
        """The newest task of that id, and its preview; state ``unknown`` where there is none."""
        with self._lock:
            row = self._db.execute(
                f"SELECT {COLUMNS}, preview FROM tasks WHERE task_id = ? ORDER BY key DESC LIMIT 1",  # noqa: S608
                (task_id,),
            ).fetchone()
        if row is None:
            return {"task_id": task_id, "state": "unknown", "step": 0, "steps": 0, "instance": None}, b""
        return _as_dict(row), bytes(row[-1])

    def cancel(self, task_id: str) -> tuple[dict[str, Any], bytes]:
        """Ask for the cancellation of all tasks of that id that are in flight, and return the newest one's status.

        An id that is not in flight is remembered: a request that still waits in Triton's queue is cancelled as soon
        as an instance takes it.
        """
        now = time.time()
        with self._lock:
            found = self._db.execute(
                f"UPDATE tasks SET cancel = 1 WHERE task_id = ? AND {IN_FLIGHT}",  # noqa: S608
                (task_id,),
            ).rowcount
            known = self._db.execute("SELECT 1 FROM tasks WHERE task_id = ? LIMIT 1", (task_id,)).fetchone()
            if not found and not known:
                self._db.execute("INSERT OR REPLACE INTO cancelled_early VALUES (?, ?)", (task_id, now))
                self._db.execute(
                    "DELETE FROM cancelled_early WHERE rowid <= (SELECT max(rowid) FROM cancelled_early) - ?",
                    (CANCELS_KEPT,),
                )
        return self.status(task_id)

    def listing(self) -> list[dict[str, Any]]:
        """The tasks in flight, oldest first, at most `LISTED`."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT {COLUMNS} FROM tasks WHERE {IN_FLIGHT} ORDER BY key LIMIT ?",  # noqa: S608
                (LISTED,),
            ).fetchall()
        return [_as_dict(row) for row in rows]

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
    """Switch the file to a write-ahead log. This is the one statement for which SQLite does not wait by itself."""
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


def _as_dict(row: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(COLUMNS.split(", "), row, strict=False))
