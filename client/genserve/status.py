"""State of a server and its models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from genserve.errors import GenServeError
from genserve.tasks import in_flight
from genserve.transport import Transport
from genserve.types import ModelStatus, ServerStatus


def probe(ask: Callable[[], bool]) -> bool:
    """Return a health probe's result, False if the server does not answer."""
    try:
        return ask()
    except GenServeError:
        return False


def server_status(server: Transport) -> ServerStatus:
    """Return a server's state. An unreachable server has ``live=False``."""
    try:
        version = str(server.metadata().get("version", ""))
        models = model_statuses(server)
    except GenServeError as error:
        reason = f"{type(error).__name__}: {error}"
        return ServerStatus(server.url, live=False, ready=False, version="", models=(), tasks=(), error=reason)
    return ServerStatus(
        server.url,
        live=True,
        ready=probe(server.ready),
        version=version,
        models=tuple(models),
        tasks=tuple(in_flight(server)),
    )


def model_statuses(server: Transport) -> list[ModelStatus]:
    """Return a server's models.

    Raises:
        GenServeError: The server does not answer.
    """
    statistics = {entry["name"]: entry.get("inference_stats", {}) for entry in server.statistics()}
    return [_model(entry, statistics.get(entry["name"], {})) for entry in server.models()]


def _model(entry: dict[str, Any], statistics: dict[str, Any]) -> ModelStatus:
    def counter(name: str, field: str) -> int:
        return int(statistics.get(name, {}).get(field, 0))

    queued = counter("queue", "count")
    return ModelStatus(
        name=entry["name"],
        version=str(entry.get("version", "")),
        state=str(entry.get("state", "")),
        reason=str(entry.get("reason", "")),
        succeeded=counter("success", "count"),
        failed=counter("fail", "count"),
        queue_s=counter("queue", "ns") / queued / 1e9 if queued else 0.0,
    )
