"""State of a server and its models."""

from __future__ import annotations

from typing import Any

from genserve.errors import GenServeError
from genserve.server import answers
from genserve.tasks import in_flight
from genserve.transport import AsyncTransport
from genserve.types import ModelStatus, ServerStatus


async def server_status(server: AsyncTransport) -> ServerStatus:
    """Return a server's state. An unreachable server has ``live=False``."""
    try:
        version = str((await server.metadata()).get("version", ""))
        models = await model_statuses(server)
    except GenServeError as error:
        reason = f"{type(error).__name__}: {error}"
        return ServerStatus(server.url, live=False, ready=False, version="", models=(), tasks=(), error=reason)
    return ServerStatus(
        server.url,
        live=True,
        ready=await answers(server.ready()),
        version=version,
        models=tuple(models),
        tasks=tuple(await in_flight(server)),
    )


async def model_statuses(server: AsyncTransport) -> list[ModelStatus]:
    """Return a server's models.

    Raises:
        GenServeError: The server does not answer.
    """
    statistics = {entry["name"]: entry.get("inference_stats", {}) for entry in await server.statistics()}
    return [_model(entry, statistics.get(entry["name"], {})) for entry in await server.models()]


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
