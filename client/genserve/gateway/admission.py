"""Middleware that decides who may send requests, and how many."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from genserve.gateway import files, page
from genserve.gateway.errors import Failure
from genserve.gateway.keys import Key, Keyring
from genserve.gateway.limiter import Limiter, Limits, network_of

OPEN = frozenset({"/health"}) | page.PATHS
"""Paths that need no key and have no limits, besides those of files, whose names are secrets."""
UNLIMITED = frozenset({"/metrics"})
"""Paths without limits: reading them must be possible under any load."""
HINT = "send it as Authorization: Bearer KEY, or as x-api-key"


class Admission:
    """Middleware that checks keys and limits before anything of a request's body is read.

    Args:
        app: The application.
        keyring: The keys. None admits everybody.
        limits: Limits of each key that has none of its own; without keys, of each address.
        limiter: Counter of the requests.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring | None, limits: Limits, limiter: Limiter) -> None:
        self._app = app
        self._keyring = keyring
        self._limits = limits
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request.

        Raises:
            Failure: The caller has no right key, or is over a limit.
        """
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(files.PATH):
            await self._app(scope, receive, send)
            return
        caller, limits = network_of((scope.get("client") or ("",))[0]), self._limits
        if self._keyring is not None:
            key = _checked(self._keyring, Headers(scope=scope))
            caller, limits = key.name, key.limits.or_else(limits)
            scope.setdefault("state", {})["key_name"] = key.name
        if scope["path"] in UNLIMITED:
            limits = Limits()
        async with self._limiter.admitted(caller, limits):
            await self._app(scope, receive, send)


def _checked(keyring: Keyring, headers: Headers) -> Key:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    given = credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not given:
        raise Failure(401, "NotAllowed", f"no API key was given: {HINT}", {"WWW-Authenticate": "Bearer"})
    key = keyring.find(given)
    if key is None:
        raise Failure(403, "NotAllowed", "the API key is not valid")
    return key
