"""One server over gRPC or HTTP, behind the same few methods."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from genserve.errors import DeadlineExceeded, GenServeError, InvalidInput, ServerError, ServerUnavailable, from_answer
from genserve.protocol import DTYPES, Call, Outputs

CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 5.0
"""For questions that a healthy server answers at once."""
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
        with _errors(self.url):
            result = self._client.infer(
                call.model,
                inputs,
                outputs=[triton_grpc.InferRequestedOutput(name) for name in call.outputs],
                request_id=call.request_id,
                priority=call.priority,
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

    tritonclient's HTTP client belongs to the thread that made it, so each thread that calls gets one of its own.
    """

    def __init__(self, url: str, address: str) -> None:
        self.url = url
        self._address = address
        self._local = threading.local()
        self._clients: weakref.WeakSet[Any] = weakref.WeakSet()

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        inputs = [_input(triton_http.InferInput, name, array) for name, array in call.inputs.items()]
        with _errors(self.url):
            result = self._client(timeout_s).infer(
                call.model,
                inputs,
                outputs=[triton_http.InferRequestedOutput(name, binary_data=True) for name in call.outputs],
                request_id=call.request_id,
                priority=call.priority,
                timeout=call.queue_timeout_us,
            )
            return {name: result.as_numpy(name) for name in call.outputs}

    def live(self) -> bool:
        """See Transport."""
        with _errors(self.url):
            return bool(self._client().is_server_live())

    def ready(self) -> bool:
        """See Transport."""
        with _errors(self.url):
            return bool(self._client().is_server_ready())

    def metadata(self) -> dict[str, Any]:
        """See Transport."""
        with _errors(self.url):
            return dict(self._client().get_server_metadata())

    def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        with _errors(self.url):
            return list(self._client().get_model_repository_index())

    def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        with _errors(self.url):
            return list(self._client().get_inference_statistics().get("model_stats", []))

    def close(self) -> None:
        """See Transport."""
        for client in list(self._clients):
            client.close()

    def _client(self, timeout_s: float = PROBE_TIMEOUT_S) -> Any:
        """This thread's client. Its timeout belongs to its connections, so another timeout takes a new one."""
        if getattr(self._local, "timeout_s", None) != timeout_s:
            self._local.client = triton_http.InferenceServerClient(
                self._address, connection_timeout=CONNECT_TIMEOUT_S, network_timeout=timeout_s
            )
            self._local.timeout_s = timeout_s
            self._clients.add(self._local.client)
        return self._local.client


def _input(kind: Any, name: str, array: Any) -> Any:
    tensor = kind(name, list(array.shape), DTYPES[name])
    tensor.set_data_from_numpy(array)
    return tensor


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn whatever tritonclient and the network raise into our exceptions."""
    try:
        yield
    except GenServeError:
        raise
    except InferenceServerException as error:
        known = from_answer(error.status(), error.message() or "")
        raise type(known)(f"{url}: {known}") if isinstance(known, ServerUnavailable) else known from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"{url} did not answer in time") from error
    except OSError as error:
        raise ServerUnavailable(f"{url}: {error.strerror or error}") from error
    except Exception as error:
        # A connection that breaks in the middle of an answer surfaces as whatever the HTTP library was parsing.
        raise ServerError(f"{url}: {type(error).__name__}: {error}") from error
