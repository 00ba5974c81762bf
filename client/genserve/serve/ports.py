"""Port checks and free ports."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from genserve.serve.options import ServeError, ServeOptions


def check_ports(options: ServeOptions, ports: Mapping[str, int] | None = None) -> None:
    """Check that ports are free.

    Args:
        options: Options with the host.
        ports: Ports by their options; None checks all of the server's.

    Raises:
        ServeError: A port cannot be bound, or is there twice. The message names the option that changes it.
    """
    used: dict[int, str] = {}
    for flag, port in (options.ports if ports is None else ports).items():
        if port in used:
            raise ServeError(f"{used[port]} and {flag} are both {port}; they need different ports")
        used[port] = flag
    family = socket.AF_INET6 if options.is_ipv6 else socket.AF_INET
    for port, flag in used.items():
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, port))
            except OSError as error:
                raise ServeError(
                    f"port {port} on {options.host}: {error.strerror} (choose another with {flag})"
                ) from None


def free_ports(count: int = 3) -> list[int]:
    """Return free loopback ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
