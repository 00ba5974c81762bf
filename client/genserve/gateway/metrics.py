"""Metrics of the gateway for Prometheus, and one log line per request."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genserve.gateway.logs import log

router = APIRouter(tags=["genserve"])

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
OTHER = "other"
"""Label of a method or path that is not the gateway's: callers can invent any number of them."""
QUIET = frozenset({"/health", "/metrics"})
"""Routes that machines call all the time; their lines are logged at level DEBUG."""
GONE = 499
"""Status of a request whose caller went away before the answer."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

logger = logging.getLogger(__name__)


class Metrics:
    """Metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        self.requests = Counter(
            "genserve_gateway_requests",
            "Requests, by route, method and status",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "genserve_gateway_request_seconds",
            "Seconds from a request's arrival to the end of its answer",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("genserve_gateway_in_flight", "Requests in flight", registry=self.registry)
        self.disconnects = Counter(
            "genserve_gateway_disconnects",
            "Requests whose caller went away before the end of the answer",
            ("route",),
            registry=self.registry,
        )


class Recorder:
    """Middleware that counts every request, and logs it at its end.

    Args:
        app: The application.
        metrics: The metrics to count in.
        routes: The application's routes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status, is_complete, has_gone = GONE, False, False

        async def receive_watched() -> Message:
            nonlocal has_gone
            message = await receive()
            has_gone = has_gone or (message["type"] == "http.disconnect" and not is_complete)
            return message

        async def send_watched(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive_watched, send_watched)
        finally:
            self._metrics.in_flight.dec()
            self._record(scope, status, time.perf_counter() - started, has_gone=has_gone)

    def _record(self, scope: Scope, status: int, seconds: float, *, has_gone: bool) -> None:
        route = self._template(scope)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if has_gone:
            self._metrics.disconnects.labels(route).inc()
        state = scope.get("state", {})
        log(
            logger,
            logging.DEBUG if route in QUIET else logging.INFO,
            "request done",
            task_id=state.get("request_id"),
            trace_id=state.get("trace_id"),
            route=route,
            method=method,
            status=status,
            seconds=seconds,
            key=state.get("key_name"),
            gone=True if has_gone else None,
        )

    def _template(self, scope: Scope) -> str:
        """Return the template of the request's path, also for a request that was refused before it was routed."""
        matching = (route for route in self._routes if route.matches(scope)[0] is not Match.NONE)
        return getattr(scope.get("route") or next(matching, None), "path", OTHER)


@router.get("/metrics", summary="Metrics of the gateway for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Answer in Prometheus' text format."""
    found: Metrics = request.app.state.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)
