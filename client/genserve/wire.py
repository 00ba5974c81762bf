"""Shared parts of both transports: tensors, parameters and error translation."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from tritonclient.utils import InferenceServerException

from genserve.errors import (
    GenServeError,
    NotAllowed,
    ServerError,
    ServerUnavailable,
    from_answer,
)
from genserve.protocol import DTYPES, Call, Outputs
from genserve.retry import parse_retry_after

PROBE_TIMEOUT_S = 5.0
"""Timeout of requests that a healthy server answers at once."""
_PASSED_ON: ContextVar[Mapping[str, str]] = ContextVar("passed on", default=MappingProxyType({}))


@contextlib.contextmanager
def passing_on(headers: Mapping[str, str]) -> Iterator[None]:
    """Send headers with every request that the block causes, also from the tasks that it starts.

    A gateway passes on its caller's trace context with it. Over gRPC, headers are metadata.

    Args:
        headers: Headers by lower-case name, in printable ASCII.
    """
    token = _PASSED_ON.set(headers)
    try:
        yield
    finally:
        _PASSED_ON.reset(token)


def all_headers(own: Mapping[str, str]) -> dict[str, str]:
    """Return a transport's own headers and those of `passing_on`."""
    return {**own, **_PASSED_ON.get()}


def input_tensor(kind: Any, name: str, array: Any) -> Any:
    """Return an input as tritonclient's InferInput; `kind` is the protocol's class."""
    tensor = kind(name, list(array.shape), DTYPES[name])
    tensor.set_data_from_numpy(array)
    return tensor


def infer_options(call: Call, timeout_s: float) -> dict[str, Any]:
    """Return the tritonclient options that both protocols share.

    The remaining time limits both the wait in the server's queue and the run. Triton orders its queue by `priority`
    but does not pass it to the model, so the engine gets it as the parameter ``priority_level``.
    """
    return {
        "request_id": call.request_id,
        "priority": call.priority,
        "parameters": {"priority_level": call.priority},
        "timeout": max(1, round(timeout_s * 1e6)),
    }


def parse_outputs(result: Any, call: Call) -> Outputs:
    """Return the output tensors that the call requested.

    Raises:
        KeyError: The answer lacks a tensor.
    """
    outputs = {name: result.as_numpy(name) for name in call.outputs}
    missing = [name for name, array in outputs.items() if array is None]
    if missing:
        raise KeyError(*missing)
    return outputs


def answer_error(
    url: str, status: str | None, message: str, *, request_id: str = "", retry_after: str | None = None
) -> GenServeError:
    """Return the exception for an error answer. Errors about the server rather than the request name the server."""
    error = from_answer(status, message, request_id=request_id, retry_after=parse_retry_after(retry_after))
    return type(error)(f"{url}: {error}") if isinstance(error, (ServerUnavailable, NotAllowed)) else error


@contextlib.contextmanager
def translated(url: str, request_id: str = "") -> Iterator[None]:
    """Translate exceptions of tritonclient and the network into GenServeErrors."""
    try:
        yield
    except InferenceServerException as error:
        raise answer_error(
            url, error.status(), error.message() or "", request_id=request_id, retry_after=_retry_after(error)
        ) from error
    except OSError as error:
        raise ServerUnavailable(f"{url}: {reason(error)}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{url} sent an answer that is not Triton's: {error}") from error


def _retry_after(error: InferenceServerException) -> str | None:
    """Return the retry-after metadata of a gRPC answer, from the exception that tritonclient replaced."""
    replaced = error.__context__
    for read in (getattr(replaced, "initial_metadata", None), getattr(replaced, "trailing_metadata", None)):
        for name, value in (read() if read else None) or ():
            if name == "retry-after":
                return str(value)
    return None


def reason(error: Exception) -> str:
    """Return the operating system's message for a failed connection, else the error's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return str(cause)
        if isinstance(cause, OSError) and (cause.errno or 0) > 0:
            return os.strerror(cause.errno or 0)  # asyncio words its own
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)
