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
from genserve.gateway import errors, images, own, rerank
from genserve.gateway.errors import Failure, Shape
from genserve.gateway.middleware import REQUEST_ID, BodyLimit, RequestIds
from genserve.gateway.settings import GatewaySettings

SHAPES: dict[str, Shape] = {
    "/v1/images": errors.openai,
    "/v1/models": errors.openai,
    "/v1/rerank": errors.cohere,
    "/v2/rerank": errors.cohere,
    "/v1/ranking": errors.nim,
    "/rerank": errors.tei,
    "/score": errors.openai,
}
"""Shape of the errors, by the beginning of the path; plain for the others."""
SHOWN_PROBLEMS = 5


def create_app(settings: GatewaySettings, client: AsyncClient) -> FastAPI:
    """Return the application. It closes `client` at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(
        title="GenServe",
        summary="Image generation with FLUX, and reranking",
        version=version("genserve"),
        lifespan=lifespan,
        docs_url=None,  # Its page loads scripts from another host.
        redoc_url=None,
    )
    app.state.client, app.state.settings = client, settings
    for router in (own.router, images.router, rerank.router):
        app.include_router(router)
    app.add_exception_handler(Failure, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID],
        )
    app.add_middleware(RequestIds)
    return app


def _answer(request: Request, failure: Failure) -> JSONResponse:
    path = request.url.path
    shape = next((shape for start, shape in SHAPES.items() if path.startswith(start)), errors.plain)
    body = shape(failure, request.state.request_id)
    return JSONResponse(body, failure.status, headers=dict(failure.headers))


async def _failed(request: Request, failure: Any) -> JSONResponse:
    return _answer(request, failure)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    problems = [_problem(problem) for problem in error.errors()[:SHOWN_PROBLEMS]]
    return _answer(request, Failure(400, "InvalidInput", "; ".join(problems) or "the request is not valid"))


async def _refused(request: Request, error: Any) -> JSONResponse:
    return _answer(request, Failure(error.status_code, "InvalidInput", str(error.detail), error.headers or {}))


def _problem(problem: dict[str, Any]) -> str:
    """Return one problem with the field's name, without the value: it may be long."""
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])
