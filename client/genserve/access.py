"""Access to a server: address, TLS certificates and request headers."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from genserve.errors import InvalidInput

DEFAULT_PORTS = {"http": 80, "https": 443, "grpcs": 443}
"""``grpc`` has no default port, so that ``localhost`` without a port is an error."""
GRPC_SCHEMES = ("grpc", "grpcs")
SECURE_SCHEMES = ("https", "grpcs")
ALLOWED_URLS = (
    "HOST:PORT, grpc://HOST:PORT or grpcs://HOST[:PORT] for gRPC,"
    " http://HOST[:PORT][/PREFIX] or https://HOST[:PORT][/PREFIX] for HTTP"
)
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[ -~]*")
RESERVED_HEADERS = frozenset(
    {"connection", "content-length", "content-type", "inference-header-content-length", "te", "transfer-encoding"}
)
"""Headers that only the client sets."""


@dataclass(frozen=True)
class Address:
    """A server's address.

    Attributes:
        scheme: ``grpc``, ``grpcs``, ``http`` or ``https``.
        authority: ``host:port`` to connect to, with brackets around an IPv6 address.
        prefix: The path before Triton's own, without a trailing slash. HTTP only.
        named: ``host:port`` as in the URL, if `authority` is one of the addresses of that name; else empty.
    """

    scheme: str
    authority: str
    prefix: str = ""
    named: str = ""

    @property
    def host(self) -> str:
        """The host of `authority`, without brackets."""
        return _split(self.authority)[0]

    @property
    def port(self) -> int:
        """The port of `authority`."""
        return _split(self.authority)[1]

    @property
    def url(self) -> str:
        """The address as a URL; gRPC without TLS has no scheme."""
        return f"{'' if self.scheme == 'grpc' else self.scheme + '://'}{self.authority}{self.prefix}"

    def at(self, host: str) -> Address:
        """Return one of the addresses of this name. Certificates are still checked for the name."""
        return Address(self.scheme, _join(host, self.port), self.prefix, named=self.authority)

    @property
    def is_grpc(self) -> bool:
        """True for gRPC."""
        return self.scheme in GRPC_SCHEMES

    @property
    def is_secure(self) -> bool:
        """True for an encrypted connection."""
        return self.scheme in SECURE_SCHEMES

    @classmethod
    def parse(cls, url: str) -> Address:
        """Parse a URL.

        Raises:
            InvalidInput: The URL has another form, or contains a user name or password.
        """
        invalid = InvalidInput(f"url is {url!r}; allowed: {ALLOWED_URLS}")
        try:
            parts = urlsplit(url if "://" in url else f"grpc://{url}")
            port = parts.port or DEFAULT_PORTS.get(parts.scheme)
        except ValueError:
            raise invalid from None
        if "@" in parts.netloc:
            # The message must not repeat the credentials.
            raise InvalidInput("url contains a user name or password; allowed: send credentials in headers")
        host = parts.hostname or ""
        prefix = parts.path.rstrip("/")
        is_supported = parts.scheme in {*GRPC_SCHEMES, "http", "https"}
        is_plain = not (parts.query or parts.fragment) and url.isprintable() and " " not in url
        if not (is_supported and is_plain and host and port) or (prefix and parts.scheme in GRPC_SCHEMES):
            raise invalid
        return cls(parts.scheme, _join(host, port), prefix)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(authority: str) -> tuple[str, int]:
    host, _, port = authority.rpartition(":")
    return host.strip("[]"), int(port)


@dataclass(frozen=True)
class TLS:
    """Certificates for ``https://`` and ``grpcs://`` addresses; ignored for the others.

    Attributes:
        ca: PEM file with the trusted authorities. None selects the system's (HTTP) or gRPC's own.
        cert: PEM file with the client's certificate, for mutual TLS.
        key: PEM file with the certificate's key, without a password.
        verify: Check the server's certificate. False works over HTTP only.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    verify: bool = True

    def check(self) -> None:
        """Check that the files are readable.

        Raises:
            InvalidInput: A file is not readable, or only one of `cert` and `key` is given.
        """
        if (self.cert is None) != (self.key is None):
            raise InvalidInput("TLS has only one of cert and key; allowed: both, or neither")
        for name, path in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            if path is not None:
                try:
                    Path(path).read_bytes()
                except OSError as error:
                    raise InvalidInput(f"TLS {name} is {str(path)!r}: {error.strerror}") from None

    def context(self) -> ssl.SSLContext:
        """Return the context for HTTP connections.

        Raises:
            InvalidInput: A file is not readable, or contains no certificate or key.
        """
        self.check()
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidInput(f"TLS: {error}; allowed: PEM files, the key without a password") from None
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _no_password() -> str:
    raise ValueError("the key has a password")


def checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return a checked copy of the headers.

    Raises:
        InvalidInput: A header cannot be sent. The message names the header, never its value.
    """
    checked = dict(headers or {})
    for name, value in checked.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidInput("headers contain an invalid name; allowed: letters, digits and hyphens")
        lower = name.lower()
        if lower in RESERVED_HEADERS or lower.startswith("grpc-") or lower.endswith("-bin"):
            raise InvalidInput(f"headers contain {name}, which only the client sets")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise InvalidInput(f"headers: the value of {name} cannot be sent; allowed: printable ASCII")
    return checked
