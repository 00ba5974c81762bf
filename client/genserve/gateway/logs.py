"""Log lines in logfmt, in the form of the server's: ``time=... level=... logger=... event=... key=value``."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone

LEVEL_ENV = "GENSERVE_LOG_LEVEL"


class LogfmtFormatter(logging.Formatter):
    """Formatter with the message as ``event`` and ``extra={"fields": {...}}`` as key=value pairs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, for any values."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={_quote(value)}" for key, value in fields.items())


def _quote(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text.isascii() and text.isprintable() and text and not set(text) & set(' "=\\')
    return text if plain else json.dumps(text)


def configure() -> None:
    """Log to stderr: GenServe at GENSERVE_LOG_LEVEL (default INFO), everything else from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    chosen = os.environ.get(LEVEL_ENV, "INFO").upper()
    is_valid = isinstance(logging.getLevelName(chosen), int)
    logging.getLogger("genserve").setLevel(chosen if is_valid else "INFO")


def log(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log `event` with `fields`; fields that are None are omitted."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"fields": {key: value for key, value in fields.items() if value is not None}})
