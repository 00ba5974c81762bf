"""One part of a call, in a process of its own: `python -m gpu.part JSON`."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import record

if TYPE_CHECKING:
    from gpu.clock import Clock

CUDA_ALONE = "measured on CUDA alone"
LONGEST_REASON = 300
"""Characters."""


@dataclass(frozen=True)
class Run:
    """The arguments of a part, and its way to write results."""

    stage: str
    name: str
    device: str
    tiny: bool
    """Small shapes, for a dry run without a GPU."""
    out: Path
    scratch: Path
    """A folder for checkpoints, on the fastest file system there is; later parts find what earlier ones left."""
    values: dict[str, Any] = field(default_factory=dict)
    """The part's own arguments."""
    failures: list[str] = field(default_factory=list)
    """Of single measurements; the part goes on, and ends as one that failed."""

    @cached_property
    def clock(self) -> Clock:
        """Return the device's clock."""
        from gpu.clock import Clock

        return Clock(self.device, brief=self.tiny)

    def result(self, table: str, **values: Any) -> None:
        """Write one row of a table; a value that is None comes with a reason."""
        line = {"kind": record.RESULT, "stage": self.stage, "part": self.name, "table": table, **values}
        if "reason" not in values and any(value is None for value in values.values()):
            line["reason"] = CUDA_ALONE if not self.device.startswith("cuda") else "not available"
        record.append(self.out, line)

    @contextmanager
    def trying(self, table: str, **named: Any) -> Iterator[None]:
        """Keep the failure of one measurement from the others: it leaves a row with a reason."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:LONGEST_REASON]
            self.failures.append(reason)
            self.result(table, **named, reason=reason)


def main(text: str) -> int:
    """Run the part that the JSON object `text` describes; return the exit status."""
    told = json.loads(text)
    module, _, function = told.pop("target").partition(":")
    run = Run(out=Path(told.pop("out")), scratch=Path(told.pop("scratch")), **told)
    try:
        getattr(import_module(module), function)(run)
    except BaseException:
        traceback.print_exc()
        return 1
    return 1 if run.failures else 0


if __name__ == "__main__":
    faulthandler.enable()
    # The stacks of all threads, for a part that is out of time.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the engines' threads never end
