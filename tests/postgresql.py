"""PostgreSQL of this machine, in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genserve.serve.ports import free_ports

USER = "postgres"
"""Account for the server if the tests run as root, which it refuses."""
TIMEOUT_S = 60


def missing() -> str:
    """Return the reason why no server can be started, empty if there is none."""
    if _binary("initdb") is None:
        return "no PostgreSQL server is installed"
    if os.geteuid() == 0 and USER not in {entry.pw_name for entry in pwd.getpwall()}:
        return f"the tests run as root, and there is no account {USER} for PostgreSQL"
    return ""


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Run a server inside the block; yield the address of an empty database.

    Args:
        folder: An empty folder for its files.
    """
    (port,) = free_ports(1)
    data = folder / "data"
    if os.geteuid() == 0:
        shutil.chown(folder, USER)
        for parent in folder.parents:  # pytest's folders are closed to others
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    _run("initdb", "-D", data, "-A", "trust", "-U", "genserve")
    _run("pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
    try:
        yield f"postgresql://genserve@127.0.0.1:{port}/postgres"
    finally:
        _run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


def _run(name: str, *arguments: Any) -> None:
    user: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run(
        [str(_binary(name)), *map(str, arguments)],
        check=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # pg_ctl's child would keep a pipe open
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        **user,
    )


def _binary(name: str) -> Path | None:
    """Return a program of the server: of the newest one of Debian's, which are not on the path, or on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which(name)
    return found[-1] if found else Path(on_path) if on_path else None
