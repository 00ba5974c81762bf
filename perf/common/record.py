"""A script's run as a JSON file: options, tables, promises, machine, versions and commit.

Written to the folder that GENSERVE_PERF_RESULTS names, at the end of a command that has shown a table, judged its
promises or failed. `common.command` calls it, so the scripts do not.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from common import machine
from common.plain import plain

FOLDER = "GENSERVE_PERF_RESULTS"
PACKAGES = ("torch", "diffusers", "transformers", "tritonclient", "genserve")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""Environment variables that change results and are not options."""
PERF = machine.ROOT / "perf"
NUMBER = re.compile(
    r"(?P<value>[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?)"
    r"(?: ± [\d.,]+)?\s*(?:%|[a-zA-Z]+(?:/s)?)?(?: \([^)]*\))?"
)
"""A number with what may follow it: half an interval, a unit, a range in parentheses."""
KEY = "genserve.perf.record"


def number(text: str) -> float | None:
    """Return the number of a cell without its unit, as in 3.63 of ``3.63 x``; None if it is not one number."""
    found = NUMBER.fullmatch(text.strip())
    return float(found["value"].replace(",", "")) if found else None


class Shown(BaseModel):
    """A table as it was shown."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def values(self) -> list[list[float | None]]:
        """The cells' numbers, as precise as shown; None for text."""
        return [[number(cell) for cell in row] for row in self.rows]


class Machine(BaseModel):
    """The machine of a run."""

    model_config = ConfigDict(frozen=True)

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()

    @classmethod
    def of_this(cls) -> Machine:
        """Return this machine."""
        memory = round(machine.memory_gib(), 1)
        return cls(cpu=machine.cpu_model(), cores=machine.cores(), memory_gib=memory, gpus=tuple(machine.gpus("name")))

    def __str__(self) -> str:
        return ", ".join((self.cpu, f"{self.cores} cores", f"{self.memory_gib:g} GiB", *self.gpus))


class Record(BaseModel):
    """A run of a script."""

    script: str
    """Path in perf, as in compare/flux.py."""
    arguments: list[str]
    options: dict[str, Any]
    """All of them, with their defaults."""
    environment: dict[str, str]
    tables: list[Shown] = Field(default_factory=list)
    broken: list[str] | None = None
    """Promises that did not hold, none if all did; None if the script has not judged any."""
    error: str | None = None
    seconds: float = 0.0
    """From the start of the process to the end of the command."""
    date: datetime
    machine: Machine
    versions: dict[str, str]
    commit: str | None
    dirty: bool
    """True if the checkout had changes."""

    @classmethod
    def begin(cls, script: str, context: click.Context) -> Record:
        """Return the record of this process, which runs the script with the context's options."""
        commit, dirty = machine.commit()
        return cls(
            script=script,
            arguments=sys.argv[1:],
            options={name: plain(_in_checkout(value)) for name, value in context.params.items()},
            environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
            date=datetime.fromtimestamp(psutil.Process().create_time(), timezone.utc).replace(microsecond=0),
            machine=Machine.of_this(),
            versions=machine.versions(PACKAGES),
            commit=commit,
            dirty=dirty,
        )

    @property
    def key(self) -> tuple[str, ...]:
        """The command line in words: records with the same one are repeats."""
        return command_line(self.script, self.arguments, self.environment)

    @property
    def name(self) -> str:
        """The command line."""
        return " ".join(self.key)

    def add_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Append a table."""
        self.tables.append(Shown(title=title, columns=list(columns), rows=[list(row) for row in rows]))

    def add_broken(self, lines: Sequence[str]) -> None:
        """Append broken promises, or note that there are none."""
        self.broken = [*(self.broken or []), *lines]

    def write(self, folder: Path) -> Path:
        """Write a file of its own, at once, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{Path(self.script).with_suffix('').as_posix().replace('/', '-')}-{self.date:%Y%m%dT%H%M%S}"
        target = folder / f"{name}-{os.getpid()}.json"
        part = target.with_suffix(".part")
        part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(target)
        return target


def command_line(script: str, arguments: Iterable[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return variables, script and arguments."""
    return (*(f"{name}={value}" for name, value in sorted(environment.items())), script, *arguments)


def current() -> Record | None:
    """Return the record of the running command, which is written at its end.

    None if none is wanted, or if the script is not in a folder of perf: those in perf itself work on records.
    """
    context = click.get_current_context(silent=True)
    folder = os.environ.get(FOLDER)
    script = Path(sys.argv[0]).resolve()
    if context is None or not folder or PERF not in script.parent.parents:
        return None
    context = context.find_root()
    if KEY not in context.meta:
        record = Record.begin(script.relative_to(PERF).as_posix(), context)
        context.meta[KEY] = context.with_resource(_written(record, Path(folder)))
    found: Record = context.meta[KEY]
    return found


def read(folder: Path) -> list[Record]:
    """Return the records of a folder, the oldest first.

    Raises:
        ValueError: There are none, or a file is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(Record.model_validate_json(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise ValueError(f"{path} is not a record: {error.errors()[0]['msg']}") from None
    if not records:
        raise ValueError(f"{folder} has no records")
    return sorted(records, key=lambda record: record.date)


@contextmanager
def _written(record: Record, folder: Path) -> Iterator[Record]:
    try:
        yield record
    except Exception as error:
        record.error = record.error or f"{type(error).__name__}: {error}"
        raise
    except KeyboardInterrupt:
        record.error = "interrupted"
        raise
    finally:
        record.seconds = round(time.time() - psutil.Process().create_time(), 1)
        record.write(folder)


def _in_checkout(value: Any) -> Any:
    """Return a path inside of the checkout without its place on this machine, and other values as they are."""
    inside = isinstance(value, Path) and value.is_relative_to(machine.ROOT)
    return value.relative_to(machine.ROOT) if inside else value
