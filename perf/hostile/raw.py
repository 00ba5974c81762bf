"""Raw bytes on a connection: broken HTTP, broken headers, tricks with paths, and slow or cut requests."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hostile.attack import Attack, request

RERANK = b'{"query": "q", "documents": ["a"]}'
JSON = (b"Content-Type", b"application/json")
PATHS = (
    b"/",
    b"//",
    b"/..",
    b"/../../etc/passwd",
    b"/%2e%2e/%2e%2e/etc/passwd",
    b"/files/..%2f..%2fetc%2fpasswd",
    b"/files/%00",
    b"/files/" + b"a" * 5_000,
    b"/playground/..%2fapp.py",
    b"/playground/%2e%2e/app.py",
    b"/playground/index.html%00.js",
    b"/task/%ff%fe",
    b"/task/%00",
    b"/task/" + b"x" * 300,
    b"/task/..%2f..",
    b"/task/%0d%0aSet-Cookie:%20x=1",
    b"/v1/models/%2e%2e",
    b"/v1/models/" + b"%F0%9F%98%80" * 500,
    b"/v1/tasks/%27%20OR%201=1",
    b"/v1/tasks?after=%00&limit=99999999999999999999&state=%ff",
    b"/v1/tasks?" + b"limit=1&" * 2_000,
    b"/status?" + b"x" * 30_000,
    b"/status;jsessionid=1",
    b"/status/.",
    b"/STATUS",
    b"/health#x",
    b"/\\evil.example",
    b"//evil.example/%2e%2e",
    b"http://evil.example/status",
    b"http://[::1/status",
    b"*",
    b"",
    b"\xff\xfe",
    b"/\xc3\xa4",
    b"/a b",
    b"/" + b"a" * 100_000,
    b"/" + b"a/" * 20_000,
    b"/.git/config",
    b"/openapi.json",
    b"/docs",
)
METHODS = (
    b"GET",
    b"POST",
    b"PUT",
    b"DELETE",
    b"HEAD",
    b"OPTIONS",
    b"PATCH",
    b"TRACE",
    b"CONNECT",
    b"G\xc3\x84T",
    b"A" * 100,
)
HEADERS = (
    (b"Host", b"["),
    (b"Host", b"evil.example:99999"),
    (b"Host", b"a b"),
    (b"Host", b""),
    (b"X-Forwarded-Host", b"evil.example"),
    (b"X-Forwarded-For", b"999.999.999.999, ::::"),
    (b"X-Forwarded-Proto", b"gopher"),
    (b"Forwarded", b'for="_gazonk";host=evil'),
    (b"X-Request-Id", b"../../" * 20),
    (b"X-Request-Id", b"a" * 20_000),
    (b"X-Request-Id", b"\xff\x80"),
    (b"X-Request-Id", b"x\tid"),
    (b"Traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00"),
    (b"Traceparent", b"\xff" * 55),
    (b"Tracestate", b"," * 10_000),
    (b"Authorization", b"Bearer " + b"\xff" * 100),
    (b"Authorization", b"Bearer"),
    (b"X-Api-Key", b"\x80"),
    (b"Cookie", b"a=" + b"b" * 30_000),
    (b"Accept", b"*/*;q=" + b"9" * 5_000),
    (b"Accept-Encoding", b"gzip;q=nan"),
    (b"Idempotency-Key", b"x" * 10_000),
    (b"Idempotency-Key", b"\xff"),
    (b"Range", b"bytes=0-1,2-3,-1"),
    (b"If-None-Match", b'"' * 5_000),
    (b"Expect", b"100-continue"),
    (b"Expect", b"200-maybe"),
    (b"Upgrade", b"websocket"),
    (b"Transfer-Encoding", b"gzip"),
    (b"Transfer-Encoding", b"chunked, chunked"),
    (b"Content-Length", b"-1"),
    (b"Content-Length", b"+1"),
    (b"Content-Length", b"1e3"),
    (b"Content-Length", b"9" * 5_000),
    (b"Content-Length", b"999999999999"),
    (b"Content-Encoding", b"gzip"),
    (b"Origin", b"null"),
    (b"Na me", b"x"),
    (b"Name\x00", b"x"),
    (b"", b"x"),
    (b"X", b"a\x00b"),
    (b"X", b"a\r b"),
    (b"X" * 10_000, b"x"),
    (b"X", b"y" * 100_000),
)


def raw(count: int, *, seed: int) -> Iterator[Attack]:
    """Yield `count` attacks: a share of each kind."""
    draw = random.Random(seed)
    kinds = (_garbage, _path, _path, _header, _header, _framing, _cut)
    for number in range(count):
        yield kinds[number % len(kinds)](draw)


def _garbage(draw: random.Random) -> Attack:
    texts = (
        draw.randbytes(draw.randint(1, 2_000)),
        b"\r\n" * draw.randint(1, 1_000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET  /health  HTTP/1.1\r\nHost: x\r\n\r\n",
        b"get /health http/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: x\nConnection: close\n\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n folded\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % number for number in range(10_000)) + b"\r\n",
    )
    return Attack("garbage", (draw.choice(texts),), may_be_silent=True, closes=True)


def _path(draw: random.Random) -> Attack:
    method, path = draw.choice(METHODS), draw.choice(PATHS)
    return Attack("path", (request(method, path, RERANK if method == b"POST" else b"", headers=[JSON]),))


def _header(draw: random.Random) -> Attack:
    chosen = [draw.choice(HEADERS) for _ in range(draw.choice((1, 1, 2)))]
    length = any(name in {b"Content-Length", b"Transfer-Encoding", b"Expect"} for name, _ in chosen)
    body = b"" if length else RERANK
    sent = request(b"POST", draw.choice((b"/v2/rerank", b"/rerank", b"/v1/ranking")), body, headers=[JSON, *chosen])
    return Attack("header", (sent,), may_be_silent=length, closes=length)


def _framing(draw: random.Random) -> Attack:
    chunked = (b"Transfer-Encoding", b"chunked")
    head = request(b"POST", b"/v2/rerank", headers=[JSON, chunked])
    texts = (
        head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(RERANK), RERANK),
        head + b"".join(b"1\r\n%c\r\n" % byte for byte in RERANK) + b"0\r\n\r\n",
        head + b"ffffffffffffffff\r\n" + RERANK,
        head + b"zz\r\n" + RERANK + b"\r\n0\r\n\r\n",
        head + b"-5\r\n" + RERANK + b"\r\n0\r\n\r\n",
        head + b"1" + b"0" * 100 + b"\r\n" + RERANK,
        head + b"5;" + b"x" * 100_000 + b"\r\n" + RERANK,
        head + b"0\r\nTrailer: " + b"x" * 50_000 + b"\r\n\r\n",
        head + b"100000\r\n" + b" " * 0x100000 + b"\r\n" + b"100000\r\n" * 9,
        request(b"POST", b"/v2/rerank", RERANK, headers=[JSON, chunked]),
        request(b"POST", b"/v2/rerank", RERANK, headers=[JSON, (b"Content-Length", b"5")]),
        request(b"POST", b"/v2/rerank", b" " * 9_000_000, headers=[JSON]),
        request(b"GET", b"/health", keep=True) * 100 + request(b"GET", b"/health"),
        request(b"POST", b"/v2/rerank", RERANK, headers=[JSON], keep=True) * 5 + b"\x00\x01\x02\r\n\r\n",
    )
    return Attack("framing", (draw.choice(texts),), may_be_silent=True, closes=True)


def _cut(draw: random.Random) -> Attack:
    whole = request(b"POST", b"/v2/rerank", RERANK, headers=[JSON])
    if draw.random() < 0.5:
        return Attack("cut", (whole[: draw.randrange(len(whole))],), may_be_silent=True, closes=True)
    step = draw.randint(10, 40)
    return Attack("slow", tuple(whole[start : start + step] for start in range(0, len(whole), step)), pause_s=0.1)
