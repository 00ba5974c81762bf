"""Addresses, certificates and headers: which are taken, and how each refusal reads."""

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
def test_addresses(url: str, address: Address) -> None:
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
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="url is ") as caught:
        Client(url)
    assert repr(url) in str(caught.value)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
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
def test_the_address_decides_the_protocol(url: str, kind: type) -> None:
    transport = connect(url)
    assert isinstance(transport, kind)
    assert transport.url == url
    transport.close()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A certificate with its key, an authority's, and a key with a password."""
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
def test_certificates(url: str, names: set[str], files: dict[str, Path]) -> None:
    connect(url, tls=TLS(**{name: files[name] for name in names})).close()
    connect(url, tls=TLS(**{name: str(files[name]) for name in names})).close()


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
def test_files_that_cannot_be_used_are_refused(
    url: str, names: dict[str, str], message: str, files: dict[str, Path]
) -> None:
    with pytest.raises(InvalidInput, match=message):
        connect(url, tls=TLS(**{option: files[name] for option, name in names.items()}))


def test_only_http_can_do_without_verification() -> None:
    assert TLS(verify=False).context().verify_mode is ssl.CERT_NONE
    assert TLS().context().verify_mode is ssl.CERT_REQUIRED
    connect("https://localhost", tls=TLS(verify=False)).close()
    with pytest.raises(InvalidInput, match="TLS verify is False; allowed over gRPC: True"):
        connect("grpcs://localhost", tls=TLS(verify=False))


@pytest.mark.parametrize("url", ["localhost:1", "http://localhost:1"], ids=["grpc", "http"])
def test_plain_addresses_need_no_certificates(url: str, files: dict[str, Path]) -> None:
    connect(url, tls=TLS(ca=files["none"])).close()


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"": "secret"}, "a name that is none"),
        ({"X Y": "secret"}, "a name that is none"),
        ({"X\r\nY": "secret"}, "a name that is none"),
        ({"\u00e4": "secret"}, "a name that is none"),
        ({5: "secret"}, "a name that is none"),
        ({"Content-Length": "secret"}, "Content-Length, which is not the caller's"),
        ({"content-type": "secret"}, "content-type, which is not the caller's"),
        ({"Inference-Header-Content-Length": "secret"}, "which is not the caller's"),
        ({"grpc-timeout": "secret"}, "grpc-timeout, which is not the caller's"),
        ({"X-Bin": "secret"}, "X-Bin, which is not the caller's"),
        ({"X": "secret\r\nY: 1"}, "the value of X cannot be sent"),
        ({"X": "secret\n"}, "the value of X cannot be sent"),
        ({"X": "secret\u00e4"}, "the value of X cannot be sent"),
        ({"X": b"secret"}, "the value of X cannot be sent"),
    ],
    ids=str,
)
@pytest.mark.parametrize("url", ["localhost:1", "http://localhost:1"], ids=["grpc", "http"])
def test_headers_that_cannot_be_sent_are_refused_and_not_repeated(
    url: str, headers: dict[Any, Any], message: str
) -> None:
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
