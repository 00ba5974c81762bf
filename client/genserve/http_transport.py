"""Transport over Triton's HTTP endpoint."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import tritonclient.http as triton_http
import urllib3

from genserve.access import TLS, Address
from genserve.protocol import Call, Outputs
from genserve.wire import PROBE_TIMEOUT_S, answer_error, infer_options, input_tensor, parse_outputs, translated

CONNECT_TIMEOUT_S = 5.0
MAX_IDLE_CONNECTIONS = 1024
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Length of the JSON part of a message with binary tensors (Triton's binary tensor data extension)."""


class HttpTransport:
    """Transport over HTTP.

    tritonclient builds and parses the messages. urllib3 sends them, because tritonclient's HTTP client is bound to one
    thread and to one timeout for all requests.
    """

    def __init__(self, url: str, address: Address, tls: TLS, headers: dict[str, str]) -> None:
        self.url = url
        self._headers = headers
        self._prefix = address.prefix
        options = {"ssl_context": tls.context()} if address.is_secure else {}
        self._pool = urllib3.connection_from_url(
            f"{address.scheme}://{address.authority}", maxsize=MAX_IDLE_CONNECTIONS, retries=False, **options
        )

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        body, header_length = triton_http.InferenceServerClient.generate_request_body(
            [input_tensor(triton_http.InferInput, name, array) for name, array in call.inputs.items()],
            outputs=[triton_http.InferRequestedOutput(name, binary_data=True) for name in call.outputs],
            **infer_options(call, timeout_s),
        )
        headers = {} if header_length is None else {HEADER_LENGTH: str(header_length)}
        path = f"/v2/models/{quote(call.model, safe='')}/infer"
        with translated(self.url, call.request_id):
            answer = self._request("POST", path, timeout_s, body=body, headers=headers, request_id=call.request_id)
            length = answer.headers.get(HEADER_LENGTH)
            result = triton_http.InferenceServerClient.parse_response_body(
                answer.data, header_length=int(length) if length else None
            )
            return parse_outputs(result, call)

    def live(self) -> bool:
        """See Transport."""
        return self._is_ok("/v2/health/live")

    def ready(self) -> bool:
        """See Transport."""
        return self._is_ok("/v2/health/ready")

    def metadata(self) -> dict[str, Any]:
        """See Transport."""
        with translated(self.url):
            return dict(self._request("GET", "/v2").json())

    def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        with translated(self.url):
            return list(self._request("POST", "/v2/repository/index").json())

    def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        with translated(self.url):
            return list(self._request("GET", "/v2/models/stats").json().get("model_stats", []))

    def close(self) -> None:
        """See Transport."""
        self._pool.close()

    def _is_ok(self, path: str) -> bool:
        """Return whether a health endpoint answers 200. Raise NotAllowed if a gateway rejects the request."""
        with translated(self.url):
            answer = self._send("GET", path, PROBE_TIMEOUT_S)
            if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
                raise self._error(answer)
            return bool(answer.status == HTTPStatus.OK)

    def _request(
        self, method: str, path: str, timeout_s: float = PROBE_TIMEOUT_S, *, request_id: str = "", **options: Any
    ) -> Any:
        """Return the answer if its status is 200, else raise its GenServeError."""
        answer = self._send(method, path, timeout_s, **options)
        if answer.status != HTTPStatus.OK:
            raise self._error(answer, request_id)
        return answer

    def _send(
        self, method: str, path: str, timeout_s: float, *, headers: dict[str, str] | None = None, body: Any = None
    ) -> Any:
        return self._pool.request(
            method,
            f"{self._prefix}{path}",
            body=body,
            headers={**self._headers, **(headers or {})},
            timeout=urllib3.Timeout(total=timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        )

    def _error(self, answer: Any, request_id: str = "") -> Exception:
        try:
            message = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            message = f"HTTP status {answer.status} {answer.reason or ''}".rstrip()
        return answer_error(
            self.url,
            str(answer.status),
            message,
            request_id=request_id,
            retry_after=answer.headers.get("Retry-After"),
        )
