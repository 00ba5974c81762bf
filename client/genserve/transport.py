"""One server over gRPC or HTTP, behind the same few methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import urllib3
from tritonclient.utils import InferenceServerException

from genserve.errors import DeadlineExceeded, InvalidInput, ServerError, ServerUnavailable, from_answer
from genserve.protocol import DTYPES, Call, Outputs

CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 5.0
"""For questions that a healthy server answers at once."""
MAX_IDLE_CONNECTIONS = 1024
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Where the JSON of a message with binary tensors ends (Triton's binary tensor data extension)."""
MAX_MESSAGE_BYTES = 2**31 - 1


class Transport(Protocol):
    """A connection to one server. Thread-safe."""

    url: str

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """Send a request and wait for its answer, at most `timeout_s`; raises a GenServeError."""

    def live(self) -> bool:
        """Whether the server answers at all."""

    def ready(self) -> bool:
        """Whether every model is ready."""

    def metadata(self) -> dict[str, Any]:
        """Triton's name and version."""

    def models(self) -> list[dict[str, Any]]:
        """The repository index: name, version, state, reason."""

    def statistics(self) -> list[dict[str, Any]]:
        """Triton's counters for each model."""

    def close(self) -> None:
        """Close the connection."""


def connect(url: str) -> Transport:
    """A transport for ``host:port`` or ``grpc://host:port`` (gRPC), or ``http://host:port``.

    Raises:
        InvalidInput: The address is of another form.
    """
    scheme, separator, address = url.partition("://")
    if not separator:
        scheme, address = "grpc", url
    address = address.rstrip("/")
    if scheme not in {"grpc", "http"} or not address.rpartition(":")[2].isdecimal():
        raise InvalidInput(f"url is {url!r}; allowed: HOST:PORT or grpc://HOST:PORT (gRPC), http://HOST:PORT")
    return GrpcTransport(url, address) if scheme == "grpc" else HttpTransport(url, address)


class GrpcTransport:
    """Triton's gRPC endpoint."""

    def __init__(self, url: str, address: str) -> None:
        self.url = url
        self._client = triton_grpc.InferenceServerClient(
            address,
            channel_args=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # A server that was down is found again within a second, not after gRPC's growing pauses.
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        inputs = [_input(triton_grpc.InferInput, name, array) for name, array in call.inputs.items()]
        with _errors(self.url, call.request_id):
            result = self._client.infer(
                call.model,
                inputs,
                outputs=[triton_grpc.InferRequestedOutput(name) for name in call.outputs],
                request_id=call.request_id,
                priority=call.priority,
                parameters=_parameters(call),
                timeout=call.queue_timeout_us,
                client_timeout=timeout_s,
            )
            return {name: result.as_numpy(name) for name in call.outputs}

    def live(self) -> bool:
        """See Transport."""
        with _errors(self.url):
            return bool(self._client.is_server_live(client_timeout=PROBE_TIMEOUT_S))

    def ready(self) -> bool:
        """See Transport."""
        with _errors(self.url):
            return bool(self._client.is_server_ready(client_timeout=PROBE_TIMEOUT_S))

    def metadata(self) -> dict[str, Any]:
        """See Transport."""
        with _errors(self.url):
            return dict(self._client.get_server_metadata(as_json=True, client_timeout=PROBE_TIMEOUT_S))

    def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        with _errors(self.url):
            index = self._client.get_model_repository_index(as_json=True, client_timeout=PROBE_TIMEOUT_S)
            return list(index.get("models", []))

    def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        with _errors(self.url):
            answer = self._client.get_inference_statistics(as_json=True, client_timeout=PROBE_TIMEOUT_S)
            return list(answer.get("model_stats", []))

    def close(self) -> None:
        """See Transport."""
        self._client.close()


class HttpTransport:
    """Triton's HTTP endpoint.

    tritonclient makes and reads the messages; urllib3 carries them, because tritonclient's own HTTP client belongs to
    one thread and has one timeout for everything.
    """

    def __init__(self, url: str, address: str) -> None:
        self.url = url
        self._pool = urllib3.connection_from_url(f"http://{address}", maxsize=MAX_IDLE_CONNECTIONS, retries=False)

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        body, header_length = triton_http.InferenceServerClient.generate_request_body(
            [_input(triton_http.InferInput, name, array) for name, array in call.inputs.items()],
            outputs=[triton_http.InferRequestedOutput(name, binary_data=True) for name in call.outputs],
            request_id=call.request_id,
            priority=call.priority,
            parameters=_parameters(call),
            timeout=call.queue_timeout_us,
        )
        headers = {} if header_length is None else {HEADER_LENGTH: str(header_length)}
        path = f"/v2/models/{quote(call.model, safe='')}/infer"
        with _errors(self.url, call.request_id):
            answer = self._request("POST", path, timeout_s, body=body, headers=headers)
            length = answer.headers.get(HEADER_LENGTH)
            result = triton_http.InferenceServerClient.parse_response_body(
                answer.data, header_length=int(length) if length else None
            )
            return {name: result.as_numpy(name) for name in call.outputs}

    def live(self) -> bool:
        """See Transport."""
        return self._is("/v2/health/live")

    def ready(self) -> bool:
        """See Transport."""
        return self._is("/v2/health/ready")

    def metadata(self) -> dict[str, Any]:
        """See Transport."""
        with _errors(self.url):
            return dict(self._request("GET", "/v2").json())

    def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        with _errors(self.url):
            return list(self._request("POST", "/v2/repository/index").json())

    def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        with _errors(self.url):
            return list(self._request("GET", "/v2/models/stats").json().get("model_stats", []))

    def close(self) -> None:
        """See Transport."""
        self._pool.close()

    def _is(self, path: str) -> bool:
        with _errors(self.url):
            answer = self._pool.request("GET", path, timeout=_timeout(PROBE_TIMEOUT_S))
            return answer.status == HTTPStatus.OK

    def _request(self, method: str, path: str, timeout_s: float = PROBE_TIMEOUT_S, **options: Any) -> Any:
        """The answer, if it is a good one; raises InferenceServerException with the status otherwise."""
        answer = self._pool.request(method, path, timeout=_timeout(timeout_s), **options)
        if answer.status != HTTPStatus.OK:
            try:
                message = str(answer.json()["error"])
            except (ValueError, KeyError, TypeError):
                message = answer.reason or f"HTTP status {answer.status}"
            raise InferenceServerException(message, status=str(answer.status))
        return answer


def _timeout(timeout_s: float) -> urllib3.Timeout:
    return urllib3.Timeout(total=timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))


def _input(kind: Any, name: str, array: Any) -> Any:
    tensor = kind(name, list(array.shape), DTYPES[name])
    tensor.set_data_from_numpy(array)
    return tensor


def _parameters(call: Call) -> dict[str, int]:
    """Triton orders its queue by the priority but does not tell the model: the engine hears of it by a parameter."""
    return {"priority_level": call.priority}


@contextlib.contextmanager
def _errors(url: str, request_id: str = "") -> Iterator[None]:
    """Turn whatever tritonclient and the network raise into our exceptions."""
    try:
        yield
    except InferenceServerException as error:
        known = from_answer(error.status(), error.message() or "", request_id=request_id)
        raise type(known)(f"{url}: {known}") if isinstance(known, ServerUnavailable) else known from error
    except urllib3.exceptions.ReadTimeoutError as error:
        raise DeadlineExceeded(f"{url} did not answer in time") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ServerUnavailable(f"{url}: {_reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"{url} sent an answer that is not Triton's: {error}") from error


def _reason(error: Exception) -> str:
    """The operating system's words for a failed connection, where it was that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)
