"""Transport over Triton's HTTP endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp
import tritonclient.http as triton_http
from yarl import URL

from genserve.access import TLS, Address
from genserve.errors import DeadlineExceeded, GenServeError, ServerUnavailable
from genserve.per_loop import PerLoop
from genserve.protocol import Call, Outputs
from genserve.retry import Deadline
from genserve.wire import (
    PROBE_TIMEOUT_S,
    all_headers,
    answer_error,
    infer_options,
    input_tensor,
    parse_outputs,
    reason,
    translated,
)

CONNECT_TIMEOUT_S = 5.0
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Length of the JSON part of a message with binary tensors (Triton's binary tensor data extension)."""


@dataclass(frozen=True)
class Answer:
    """HTTP answer."""

    status: int
    reason: str
    headers: Mapping[str, str]
    data: bytes


class HttpTransport:
    """Transport over HTTP.

    tritonclient builds and parses the messages. aiohttp, which tritonclient requires anyway, sends them: tritonclient's
    own HTTP clients have one timeout for all requests.
    """

    def __init__(self, url: str, address: Address, tls: TLS, headers: dict[str, str]) -> None:
        self.url = url
        self._base = URL(f"{address.scheme}://{address.authority}{address.prefix}", encoded=True)
        self._headers = {**({"Host": address.named} if address.named else {}), **headers}
        self._options: dict[str, Any] = {}
        if address.is_secure:
            if not tls.verify:
                warnings.warn(f"{url}: the server's certificate is not verified", RuntimeWarning, stacklevel=2)
            self._options["ssl"] = tls.context()
            if address.named:
                self._options["server_hostname"] = address.named.rpartition(":")[0]
        self._sessions = PerLoop(_session, self._drop)

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        body, header_length = triton_http.InferenceServerClient.generate_request_body(
            [input_tensor(triton_http.InferInput, name, array) for name, array in call.inputs.items()],
            outputs=[triton_http.InferRequestedOutput(name, binary_data=True) for name in call.outputs],
            **infer_options(call, timeout_s),
        )
        headers = {} if header_length is None else {HEADER_LENGTH: str(header_length)}
        path = f"/v2/models/{quote(call.model, safe='')}/infer"
        with translated(self.url, call.request_id):
            answer = await self._request(
                "POST", path, timeout_s, data=body, headers=headers, request_id=call.request_id
            )
            length = answer.headers.get(HEADER_LENGTH)
            result = triton_http.InferenceServerClient.parse_response_body(
                answer.data, header_length=int(length) if length else None
            )
            return parse_outputs(result, call)

    async def live(self) -> bool:
        """See Transport."""
        return await self._is_ok("/v2/health/live")

    async def ready(self, model: str = "") -> bool:
        """See AsyncTransport."""
        return await self._is_ok(f"/v2/models/{quote(model, safe='')}/ready" if model else "/v2/health/ready")

    async def metadata(self) -> dict[str, Any]:
        """See Transport."""
        with translated(self.url):
            return dict(json.loads((await self._request("GET", "/v2")).data))

    async def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        with translated(self.url):
            return list(json.loads((await self._request("POST", "/v2/repository/index")).data))

    async def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        with translated(self.url):
            return list(json.loads((await self._request("GET", "/v2/models/stats")).data).get("model_stats", []))

    async def close(self) -> None:
        """See Transport."""
        session = self._sessions.pop()
        if session is not None:
            await session.close()

    def _drop(self, session: aiohttp.ClientSession) -> None:
        """Forget the connections of a loop that has been closed. aiohttp would log that they are open."""
        self._dropping = asyncio.ensure_future(session.close())

    async def _is_ok(self, path: str) -> bool:
        """Return whether a health endpoint answers 200. Raise NotAllowed if a gateway rejects the request."""
        with translated(self.url):
            answer = await self._send("GET", path, PROBE_TIMEOUT_S)
            if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
                raise self._error(answer)
            return answer.status == HTTPStatus.OK

    async def _request(
        self, method: str, path: str, timeout_s: float = PROBE_TIMEOUT_S, *, request_id: str = "", **options: Any
    ) -> Answer:
        """Return the answer if its status is 200, else raise its GenServeError."""
        answer = await self._send(method, path, timeout_s, **options)
        if answer.status != HTTPStatus.OK:
            raise self._error(answer, request_id)
        return answer

    async def _send(
        self, method: str, path: str, timeout_s: float, *, headers: dict[str, str] | None = None, data: Any = None
    ) -> Answer:
        deadline = Deadline(timeout_s)
        options = {"data": data, "headers": {**all_headers(self._headers), **(headers or {})}, **self._options}
        with _connected(self.url):
            try:
                return await self._send_once(method, path, timeout_s, options)
            except aiohttp.ServerDisconnectedError:
                # The server may have closed an idle connection just before it was used again.
                return await self._send_once(method, path, deadline.left(), options)

    async def _send_once(self, method: str, path: str, timeout_s: float, options: dict[str, Any]) -> Answer:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CONNECT_TIMEOUT_S))
        url = URL(f"{self._base}{path}", encoded=True)
        async with self._sessions.get().request(
            method, url, timeout=timeout, allow_redirects=False, **options
        ) as answer:
            return Answer(answer.status, answer.reason or "", answer.headers, await answer.read())

    def _error(self, answer: Answer, request_id: str = "") -> GenServeError:
        try:
            message = str(json.loads(answer.data)["error"])
        except (ValueError, KeyError, TypeError):
            message = f"HTTP status {answer.status} {answer.reason}".rstrip()
        return answer_error(
            self.url,
            str(answer.status),
            message,
            request_id=request_id,
            retry_after=answer.headers.get("Retry-After"),
        )


def _session() -> aiohttp.ClientSession:
    # The number of connections is the caller's number of requests at once. Cookies would tie requests together.
    # Triton would compress its answers, images included, if the caller accepted that.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, enable_cleanup_closed=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
    )


@contextlib.contextmanager
def _connected(url: str) -> Iterator[None]:
    """Translate aiohttp's exceptions into GenServeErrors."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise ServerUnavailable(f"{url}: no connection within {CONNECT_TIMEOUT_S:g} s") from error
    except asyncio.TimeoutError as error:
        raise DeadlineExceeded(f"{url} did not answer in time") from error
    except aiohttp.ClientError as error:
        raise ServerUnavailable(f"{url}: {reason(error)}") from error
