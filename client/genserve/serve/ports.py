"""Port checks and free ports."""

from __future__ import annotations

import socket

from genserve.serve.options import ServeError, ServeOptions


def check_ports(options: ServeOptions) -> None:
    """Check that the server's ports are free.

    Raises:
        ServeError: A port cannot be bound. The message names the flag that changes it.
    """
    flags = ("--http-port", "--grpc-port", "--metrics-port")
    if len(set(options.ports)) < len(options.ports):
        raise ServeError(f"HTTP, gRPC and metrics need three different ports, not {options.ports} (see {flags[0]})")
    family = socket.AF_INET6 if options.is_ipv6 else socket.AF_INET
    for port, flag in zip(options.ports, flags, strict=True):
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
