"""Time limits on connections, with uvicorn and real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from genserve.gateway import connections
from genserve.gateway.connections import TimedProtocol

LIMIT_S = 0.3
LARGE = 2**25
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
seen: list[str] = []


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, think for longer than the limit, and answer in two parts."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
    seen.append(message["type"])
    if message["type"] == "http.disconnect":
        return
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * LARGE})
        return
    await asyncio.sleep(2 * LIMIT_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"o", "more_body": True})
    await asyncio.sleep(2 * LIMIT_S)
    await send({"type": "http.response.body", "body": b"k"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listening:
        patch.setattr(connections, "RECEIVE_S", LIMIT_S)
        patch.setattr(connections, "STALL_S", LIMIT_S)
        config = uvicorn.Config(application, http=TimedProtocol, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)


@pytest.fixture(autouse=True)
def forget() -> None:
    seen.clear()


def talk(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send parts and return what comes until the gateway closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(pause_s)
        try:
            while data := connection.recv(1000):
                received += data
        except ConnectionResetError:
            pass
    return received


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [HEAD[:10]],
        [HEAD],
        [HEAD[number : number + 1] for number in range(len(HEAD))],
        [HEAD + b"Content-Length: 100\r\n\r\n", b"{"],
        [HEAD + b"Content-Length: 100\r\n\r\n", *[b" "] * 90],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 90],
    ],
    ids=["silent", "cut-line", "cut-head", "slow-head", "cut-body", "slow-body", "endless-body"],
)
def test_incomplete_request_ends_its_connection(parts: list[bytes], port: int) -> None:
    assert talk(port, *parts, pause_s=0.02 if len(parts) > 2 else 0.0) == b""
    assert set(seen) <= {"http.disconnect"}


def test_slow_answer_is_not_cut(port: int) -> None:
    answer = talk(port, HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\n", b"{}")
    assert answer.endswith(b"\r\n\r\nok")
    assert seen == ["http.request"]


def test_requests_one_after_another_have_a_limit_each(port: int) -> None:
    request = HEAD + b"Content-Length: 2\r\n\r\n{}"
    answer = talk(port, request * 3)  # and then silence
    assert answer.count(b"200 OK") == 3


@pytest.mark.parametrize(("pause_s", "is_whole"), [(0.0, True), (10 * LIMIT_S, False)], ids=["reading", "not-reading"])
def test_caller_that_does_not_read_is_given_up(pause_s: float, is_whole: bool, port: int) -> None:
    received = 0
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(pause_s)
        try:
            while data := connection.recv(2**16):
                received += len(data)
        except ConnectionResetError:
            pass
    assert (received > LARGE) == is_whole


def test_caller_that_reads_slowly_gets_everything(port: int) -> None:
    received = 0
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while data := connection.recv(2**21):
            received += len(data)
            time.sleep(LIMIT_S / 10)
    assert received > LARGE
