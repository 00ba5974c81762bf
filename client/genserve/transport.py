"""One server over gRPC or HTTP, behind the same few methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from genserve.access import TLS, Address, checked_headers
from genserve.protocol import Call, Outputs


class Transport(Protocol):
    """A connection to one server. Thread-safe.

    A class of one's own with these methods stands in for a server: ``Client(transport=...)``. Its answers are arrays by
    output name, in the shapes of the models' ``config.pbtxt``; its failures are GenServeErrors.
    """

    url: str

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """Send a request and wait for its answer, at most `timeout_s`; raises a GenServeError."""

    def live(self) -> bool:
        """Return whether the server answers at all."""

    def ready(self) -> bool:
        """Return whether every model is ready."""

    def metadata(self) -> dict[str, Any]:
        """Return Triton's name and version."""

    def models(self) -> list[dict[str, Any]]:
        """Return the repository index: name, version, state, reason."""

    def statistics(self) -> list[dict[str, Any]]:
        """Return Triton's counters for each model."""

    def close(self) -> None:
        """Close the connection."""


def connect(url: str, *, tls: TLS | None = None, headers: Mapping[str, str] | None = None) -> Transport:
    """Return a transport for an address.

    Args:
        url: ``host:port``, ``grpc://host:port`` or ``grpcs://host[:port]`` for gRPC; ``http://host[:port][/prefix]`` or
            ``https://host[:port][/prefix]`` for HTTP.
        tls: Certificates for ``grpcs://`` and ``https://``.
        headers: Sent with every request; over gRPC as metadata.

    Raises:
        InvalidInput: The address is of another form, a file of `tls` cannot be used, or a header cannot be sent.
    """
    # Each of the two takes a while to import, and most programs need one.
    address, checked = Address.parse(url), checked_headers(headers)
    if address.is_grpc:
        from genserve.grpc_transport import GrpcTransport

        return GrpcTransport(url, address, tls or TLS(), checked)
    from genserve.http_transport import HttpTransport

    return HttpTransport(url, address, tls or TLS(), checked)
