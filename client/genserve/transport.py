"""Transport interface to one server, over gRPC or HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from genserve.access import TLS, Address, checked_headers
from genserve.protocol import Call, Outputs


class Transport(Protocol):
    """Connection to one server. Thread-safe.

    Tests can replace a server with an object that has these methods: ``Client(transport=...)``. It answers with arrays
    by output name, in the shapes of the models' ``config.pbtxt``, and raises GenServeErrors.
    """

    url: str

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """Send a request and return its outputs within `timeout_s` seconds, or raise a GenServeError."""

    def live(self) -> bool:
        """Return whether the server answers."""

    def ready(self) -> bool:
        """Return whether every model is ready."""

    def metadata(self) -> dict[str, Any]:
        """Return Triton's name and version."""

    def models(self) -> list[dict[str, Any]]:
        """Return the repository index: name, version, state, reason."""

    def statistics(self) -> list[dict[str, Any]]:
        """Return Triton's statistics per model."""

    def close(self) -> None:
        """Close the connection."""


def connect(url: str, *, tls: TLS | None = None, headers: Mapping[str, str] | None = None) -> Transport:
    """Return a transport for an address.

    Args:
        url: ``host:port``, ``grpc://host:port`` or ``grpcs://host[:port]`` for gRPC; ``http://host[:port][/prefix]`` or
            ``https://host[:port][/prefix]`` for HTTP.
        tls: Certificates for ``grpcs://`` and ``https://``.
        headers: Headers of every request; over gRPC they are metadata.

    Raises:
        InvalidInput: The address, a file of `tls` or a header is not usable.
    """
    # Both are slow to import, and most programs need only one.
    address, checked = Address.parse(url), checked_headers(headers)
    if address.is_grpc:
        from genserve.grpc_transport import GrpcTransport

        return GrpcTransport(url, address, tls or TLS(), checked)
    from genserve.http_transport import HttpTransport

    return HttpTransport(url, address, tls or TLS(), checked)
