"""The gateway's application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from genserve.aio import AsyncClient
from genserve.gateway import errors, files, images, metrics, own, page, rerank, tasks
from genserve.gateway.admission import Admission
from genserve.gateway.durable import Durable
from genserve.gateway.errors import Failure, Shape
from genserve.gateway.keys import Keyring
from genserve.gateway.limiter import Limiter
from genserve.gateway.line import Line
from genserve.gateway.metrics import Metrics, Recorder
from genserve.gateway.middleware import REQUEST_ID, BodyLimit, Failures, RequestIds
from genserve.gateway.settings import GatewaySettings
from genserve.gateway.trace import Tracing

SHAPES: dict[str, Shape] = {
    "/v1/images": errors.openai,
    "/v1/models": errors.openai,
    "/v1/rerank": errors.cohere,
    "/v2/rerank": errors.cohere,
    "/v1/ranking": errors.nim,
    "/rerank": errors.tei,
    "/score": errors.vllm,
    "/v1/score": errors.vllm,
}
"""Shape of the errors, by the beginning of the path; plain for the others."""
UNREADABLE: dict[Shape, int] = {errors.cohere: 422, errors.tei: 422, errors.nim: 422}
"""Status of a body with missing fields or wrong types, as each dialect's own service answers it; 400 for the others."""
SHOWN_PROBLEMS = 5


def create_app(settings: GatewaySettings, client: AsyncClient) -> FastAPI:
    """Return the application. It closes `client` at its end.

    Raises:
        KeysError: The file of keys is unreadable or damaged.
        ValueError: A setting is not usable.
        OSError: The folder of the database of tasks cannot be created.
    """
    durable = Durable(settings, client)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client, durable:
            yield

    app = FastAPI(
        title="GenServe",
        summary="Image generation with FLUX, and reranking",
        version=version("genserve"),
        lifespan=lifespan,
        docs_url=None,  # Its page loads scripts from another host.
        redoc_url=None,
        redirect_slashes=False,  # A redirect would name the host that the caller claims to have called.
    )
    app.state.client, app.state.settings, app.state.line = client, settings, Line(client)
    app.state.metrics, app.state.durable = Metrics(), durable
    routers = (own.router, images.router, rerank.router, tasks.router, files.router, metrics.router, page.router)
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(Failure, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    # From the innermost to the outermost.
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_total_bytes=settings.max_bodies_bytes,
        retry_after_s=settings.retry_after_s,
    )
    app.add_middleware(
        Admission,
        keyring=None if settings.keys is None else Keyring(settings.keys),
        limits=settings.limits,
        limiter=Limiter(settings.retry_after_s),
    )
    app.add_middleware(Failures, answer=_answer)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID],
        )
    app.add_middleware(
        Recorder, metrics=app.state.metrics, routes=[each for router in routers for each in router.routes]
    )
    app.add_middleware(Tracing)
    app.add_middleware(RequestIds)
    return app


def _shape(request: Request) -> Shape:
    path = request.scope["path"]  # not of `url`, whose host may be anything
    return next((shape for start, shape in SHAPES.items() if path.startswith(start)), errors.plain)


def _answer(request: Request, failure: Failure) -> JSONResponse:
    body = _shape(request)(failure, request.state.request_id)
    return JSONResponse(body, failure.status, headers=dict(failure.headers))


async def _failed(request: Request, failure: Any) -> JSONResponse:
    return _answer(request, failure)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    found = error.errors()[:SHOWN_PROBLEMS]
    message = "; ".join(map(_problem, found)) or "the request is not valid"
    parameter = _place(found[0]) if found else None
    return _answer(request, Failure(_unreadable(request), "InvalidInput", message, parameter=parameter or None))


async def _refused(request: Request, error: Any) -> JSONResponse:
    # FastAPI's own 400 is a body that it cannot parse, as one nested too deeply.
    status = _unreadable(request) if error.status_code == 400 else error.status_code
    kind = "QueueFull" if status == 503 else "InvalidInput"
    return _answer(request, Failure(status, kind, str(error.detail), error.headers or {}))


def _unreadable(request: Request) -> int:
    return UNREADABLE.get(_shape(request), 400)


def _problem(problem: dict[str, Any]) -> str:
    """Return one problem with the field's name, without the value: it may be long."""
    place = _place(problem)
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


def _place(problem: dict[str, Any]) -> str:
    """Return the field's name, empty for the body as a whole."""
    return ".".join(str(part) for part in problem["loc"] if part != "body")
