"""The playground: a page of plain HTML, CSS and JavaScript, with what a browser needs to trust it."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from genserve.gateway.errors import Failure

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'self'",
    "img-src": "'self' data: blob:",
    "object-src": "'none'",
    "base-uri": "'none'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in POLICY.items()),
    "Cache-Control": "no-cache",  # A browser keeps the files and asks if they have changed.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
INDEX = "index.html"
FILES = {
    file.name: file.read_bytes()
    for file in (files("genserve.gateway") / "playground").iterdir()
    if file.name.rpartition(".")[2] in MEDIA_TYPES
}
"""The page's files by name. Requests choose among them; no path comes from a request."""
TAGS = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in FILES.items()}
PATHS = frozenset({"/", *(f"/playground/{name}" for name in FILES)})
"""Paths of the page, which contains nothing secret: it asks for a key only to send it with its requests."""


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """Show the playground."""
    return _answer(INDEX, request)


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def file(name: str, request: Request) -> Response:
    """Send one of the playground's files.

    Raises:
        Failure: There is no such file.
    """
    if name not in FILES:
        raise Failure(404, "InvalidInput", "Not Found")
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    headers = {**HEADERS, "ETag": TAGS[name]}
    known = request.headers.get("if-none-match", "")
    # A proxy that compresses the files marks the tags as weak.
    if TAGS[name] in {tag.strip().removeprefix("W/") for tag in known.split(",")}:
        return Response(status_code=304, headers=headers)
    return Response(FILES[name], media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=headers)
