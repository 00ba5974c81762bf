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

CUDA_ONLY = "measured on CUDA only"
LONGEST_REASON = 300
"""Characters."""


@dataclass(frozen=True)
class Run:
    """Arguments of a part, and the writer of its results."""

    stage: str
    name: str
    device: str
    tiny: bool
    """Small shapes, for a dry run without a GPU."""
    out: Path
    scratch: Path
    """Folder for checkpoints on the fastest file system; the parts of a call share it."""
    values: dict[str, Any] = field(default_factory=dict)
    """The part's own arguments."""
    failures: list[str] = field(default_factory=list)
    """Failures of single measurements; the part continues, and fails at its end."""

    @cached_property
    def clock(self) -> Clock:
        """Return the device's clock."""
        from gpu.clock import Clock

        return Clock(self.device, brief=self.tiny)

    def result(self, table: str, **values: Any) -> None:
        """Write one line of a table, with a reason if a value is None."""
        line = {"kind": record.RESULT, "stage": self.stage, "part": self.name, "table": table, **values}
        if "reason" not in values and any(value is None for value in values.values()):
            line["reason"] = CUDA_ONLY if not self.device.startswith("cuda") else "not available"
        record.append(self.out, line)

    @contextmanager
    def isolate(self, table: str, **named: Any) -> Iterator[None]:
        """Isolate the failure of one measurement: it is written as a line with a reason."""
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
    options = json.loads(text)
    module, _, function = options.pop("target").partition(":")
    run = Run(out=Path(options.pop("out")), scratch=Path(options.pop("scratch")), **options)
    try:
        getattr(import_module(module), function)(run)
    except BaseException:
        traceback.print_exc()
        return 1
    return 1 if run.failures else 0


if __name__ == "__main__":
    faulthandler.enable()
    # Dumps the stacks of all threads before a timeout.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the engines' threads never end
