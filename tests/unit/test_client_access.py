"""Addresses, certificates and headers."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from genserve import TLS, Client, InvalidInput
from genserve.access import Address, checked_headers
from genserve.grpc_transport import GrpcTransport
from genserve.http_transport import HttpTransport
from genserve.transport import connect


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("localhost:8001", Address("grpc", "localhost:8001")),
        ("grpc://10.0.0.1:8001/", Address("grpc", "10.0.0.1:8001")),
        ("[::1]:8001", Address("grpc", "[::1]:8001")),
        ("grpcs://models.example.org", Address("grpcs", "models.example.org:443")),
        ("grpcs://models.example.org:8443", Address("grpcs", "models.example.org:8443")),
        ("http://localhost:8000", Address("http", "localhost:8000")),
        ("http://localhost", Address("http", "localhost:80")),
        ("HTTP://Localhost/", Address("http", "localhost:80")),
        ("https://models.example.org", Address("https", "models.example.org:443")),
        ("https://models.example.org/team/genserve/", Address("https", "models.example.org:443", "/team/genserve")),
        ("https://[::1]/x", Address("https", "[::1]:443", "/x")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_address_parses_scheme_authority_and_prefix(url: str, address: Address) -> None:
    assert Address.parse(url) == address
    assert address.is_grpc == address.scheme.startswith("grpc")
    assert address.is_secure == address.scheme.endswith("s")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:",
        "localhost:0",
        "localhost:65536",
        "a:b",
        ":8001",
        "grpc://localhost",
        "localhost:8001/prefix",
        "grpcs://localhost/prefix",
        "ftp://localhost:1",
        "http://",
        "https:///prefix",
        "http://[::1",
        "http://localhost?x=1",
        "http://localhost#x",
        "http://local host",
        "http://localhost/\n",
    ],
    ids=repr,
)
def test_invalid_address_is_rejected(url: str) -> None:
    with pytest.raises(InvalidInput, match="url is ") as caught:
        Client(url)
    assert repr(url) in str(caught.value)


def test_password_in_address_is_rejected_and_not_repeated() -> None:
    with pytest.raises(InvalidInput, match="headers") as caught:
        Client("https://me:secret@localhost")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("localhost:1", GrpcTransport),
        ("grpcs://a", GrpcTransport),
        ("http://a", HttpTransport),
        ("https://a", HttpTransport),
    ],
    ids=["grpc", "grpcs", "http", "https"],
)
def test_address_selects_the_transport(url: str, kind: type) -> None:
    transport = connect(url)
    assert isinstance(transport, kind)
    assert transport.url == url


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Create a certificate with its key, an authority's certificate and a key with a password."""
    authority = trustme.CA()
    leaf = authority.issue_cert("caller")
    paths = {name: tmp_path / name for name in ("ca", "cert", "key", "locked", "text", "none")}
    authority.cert_pem.write_to_path(paths["ca"])
    leaf.cert_chain_pems[0].write_to_path(paths["cert"])
    leaf.private_key_pem.write_to_path(paths["key"])
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    paths["locked"].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    paths["text"].write_text("no certificate")
    return paths


@pytest.mark.parametrize("url", ["https://localhost", "grpcs://localhost"], ids=["https", "grpcs"])
@pytest.mark.parametrize("names", [{}, {"ca"}, {"cert", "key"}, {"ca", "cert", "key"}], ids=str)
def test_valid_certificates_are_accepted(url: str, names: set[str], files: dict[str, Path]) -> None:
    connect(url, tls=TLS(**{name: files[name] for name in names}))
    connect(url, tls=TLS(**{name: str(files[name]) for name in names}))


@pytest.mark.parametrize("url", ["https://localhost", "grpcs://localhost"], ids=["https", "grpcs"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"ca": "none"}, "TLS ca is '.*none': No such file or directory"),
        ({"ca": "text"}, "TLS: .*; allowed: PEM files"),
        ({"cert": "cert"}, "TLS has only one of cert and key; allowed: both, or neither"),
        ({"key": "key"}, "TLS has only one of cert and key; allowed: both, or neither"),
        ({"cert": "cert", "key": "none"}, "TLS key is '.*none': No such file or directory"),
        ({"cert": "none", "key": "key"}, "TLS cert is '.*none': No such file or directory"),
        ({"cert": "cert", "key": "text"}, "TLS: .*; allowed: PEM files"),
        ({"cert": "cert", "key": "locked"}, "TLS: the key has a password; allowed: PEM files, the key without"),
    ],
    ids=["no-ca", "ca-text", "cert-alone", "key-alone", "no-key", "no-cert", "key-text", "locked-key"],
)
def test_unusable_certificate_file_is_rejected(
    url: str, names: dict[str, str], message: str, files: dict[str, Path]
) -> None:
    with pytest.raises(InvalidInput, match=message):
        connect(url, tls=TLS(**{option: files[name] for option, name in names.items()}))


def test_verify_false_works_over_http_only() -> None:
    assert TLS(verify=False).context().verify_mode is ssl.CERT_NONE
    assert TLS().context().verify_mode is ssl.CERT_REQUIRED
    with pytest.warns(RuntimeWarning, match="not verified"):
        connect("https://localhost", tls=TLS(verify=False))
    with pytest.raises(InvalidInput, match="TLS verify is False; allowed over gRPC: True"):
        connect("grpcs://localhost", tls=TLS(verify=False))


@pytest.mark.parametrize("url", ["localhost:1", "http://localhost:1"], ids=["grpc", "http"])
def test_plain_address_ignores_certificates(url: str, files: dict[str, Path]) -> None:
    connect(url, tls=TLS(ca=files["none"]))


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"": "secret"}, "an invalid name"),
        ({"X Y": "secret"}, "an invalid name"),
        ({"X\r\nY": "secret"}, "an invalid name"),
        ({"\u00e4": "secret"}, "an invalid name"),
        ({5: "secret"}, "an invalid name"),
        ({"Content-Length": "secret"}, "Content-Length, which only the client sets"),
        ({"content-type": "secret"}, "content-type, which only the client sets"),
        ({"Inference-Header-Content-Length": "secret"}, "which only the client sets"),
        ({"grpc-timeout": "secret"}, "grpc-timeout, which only the client sets"),
        ({"X-Bin": "secret"}, "X-Bin, which only the client sets"),
        ({"X": "secret\r\nY: 1"}, "the value of X cannot be sent"),
        ({"X": "secret\n"}, "the value of X cannot be sent"),
        ({"X": "secret\u00e4"}, "the value of X cannot be sent"),
        ({"X": b"secret"}, "the value of X cannot be sent"),
    ],
    ids=str,
)
@pytest.mark.parametrize("url", ["localhost:1", "http://localhost:1"], ids=["grpc", "http"])
def test_invalid_header_is_rejected_and_its_value_not_repeated(url: str, headers: dict[Any, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        Client(url, headers=headers)
    assert "secret" not in str(caught.value)


def test_headers_are_copied() -> None:
    given = {"Authorization": "Bearer x", "X-Empty": ""}
    checked = checked_headers(given)
    assert checked == given
    given.clear()
    assert len(checked) == 2
    assert checked_headers(None) == {}
