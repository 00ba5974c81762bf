"""Files of generated images: their folder, their names, their time, and the URLs that name them."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from fake_servers import FakeServer, image
from gateway_app import with_gateway

from genserve.gateway import durable, files
from genserve.gateway.files import ResultFiles
from genserve.gateway.keys import digest_of
from genserve.protocol import Call, Outputs

T = TypeVar("T")
PROMPT = {"prompt": "a circle", "response_format": "url"}
TOKEN = "A" * 43


async def painted(call: Call) -> Outputs:
    outputs = image(call)
    outputs["INFO"][0, 0] = b'{"height": 64, "width": 48, "steps": 4}'
    return outputs


def painter() -> FakeServer:
    server = FakeServer()
    server.always = painted
    return server


def ask(use: Callable[[httpx.AsyncClient], Awaitable[T]], folder: Path, **settings: Any) -> T:
    return with_gateway(use, painter(), results=folder, **settings)


async def generated(http: httpx.AsyncClient, **options: Any) -> str:
    """Generate an image and return its URL."""
    answer = await http.post("/v1/images/generations", json=PROMPT, **options)
    assert answer.status_code == 200, answer.text
    (data,) = answer.json()["data"]
    assert "b64_json" not in data
    url: str = data["url"]
    return url


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_file_is_read_until_it_expires(
    image_format: files.ImageFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ResultFiles(tmp_path / "results")
    name = asyncio.run(folder.save(b"data", image_format, 100))
    assert re.fullmatch(rf"\d+-[\w-]{{43}}\.{image_format}", name)
    assert asyncio.run(folder.read(name)) == b"data"
    later = time.time() + 102
    monkeypatch.setattr(files.time, "time", lambda: later)
    assert asyncio.run(folder.read(name)) is None


def test_files_are_for_this_user_and_names_are_never_the_same(tmp_path: Path) -> None:
    folder = ResultFiles(tmp_path / "below" / "results")
    found = {asyncio.run(folder.save(b"same", "png", 100)).partition("-")[2] for _ in range(20)}
    assert len(found) == 20
    for path in [tmp_path / "below" / "results", *(tmp_path / "below" / "results").iterdir()]:
        assert path.stat().st_mode & 0o077 == 0


def test_sweep_removes_expired_and_half_files_and_nothing_else(tmp_path: Path) -> None:
    now = int(time.time())
    gone = [f"{now - 10}-{TOKEN}.png", f".{now + 900}-{TOKEN}.webp.part"]
    kept = [
        f"{now + 900}-{TOKEN}.png",
        f".{now + 901}-{TOKEN}.webp.part",
        f"{now - 10}-short.png",
        f"{now - 10}-{TOKEN}.txt",
        "1-notes.txt",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / gone[1], (now - 7200, now - 7200))
    asyncio.run(ResultFiles(tmp_path).sweep())
    assert names(tmp_path) == sorted(kept)
    asyncio.run(ResultFiles(tmp_path / "missing").sweep())


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        asyncio.run(ResultFiles(tmp_path).save(b"data", "png", 100))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        f"../x/9999999999-{TOKEN}.png",
        f"9999999999-{TOKEN}.png/../../secret.png",
        f"9999999999-{TOKEN}.png\0",
        f"9999999999-{TOKEN}.png\n",
        f"9999999999-{TOKEN}.svg",
        f"-1-{TOKEN}.png",
        f"٩٩-{TOKEN}.png",
        "",
    ],
)
def test_other_names_are_no_files(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / f"9999999999-{TOKEN}.svg").write_bytes(b"secret")
    asyncio.run(ResultFiles(folder).remove(name))
    assert asyncio.run(ResultFiles(folder).read(name)) is None
    assert (tmp_path / "secret.png").exists()
    assert names(folder) == [f"9999999999-{TOKEN}.svg"]


def test_url_serves_the_image(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        url = await generated(http)
        answer = await http.get(url)
        assert (answer.status_code, answer.content) == (200, b"a circle")
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"private, max-age=(59\d|60[01]), immutable", answer.headers["cache-control"])
        head = await http.head(url)
        assert (head.status_code, head.headers["content-length"]) == (200, "8")
        for path in (f"/files/9999999999-{TOKEN}.png", "/files/..%2fsecret.png", "/files/%00", "/files/", "/files"):
            refused = await http.get(path)
            assert refused.status_code == 404
            assert refused.headers["x-request-id"]

    ask(use, tmp_path, keep_files_s=600)


def test_expired_image_is_gone_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "SWEEP_S", 0.1)

    async def use(http: httpx.AsyncClient) -> None:
        url = await generated(http)
        assert len(names(tmp_path)) == 1
        while names(tmp_path):
            await asyncio.sleep(0.1)
        assert (await http.get(url)).status_code == 404

    ask(use, tmp_path, keep_files_s=0.5)


def test_each_image_of_a_request_has_its_url(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/images/generations", json={**PROMPT, "n": 3, "output_format": "webp"})
        urls = [data["url"] for data in answer.json()["data"]]
        assert len(set(urls)) == 3
        assert {(await http.get(url)).headers["content-type"] for url in urls} == {"image/webp"}

    ask(use, tmp_path)


def test_full_disk_is_an_error_to_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResultFiles, "_write", full)

    async def use(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post("/v1/images/generations", json=PROMPT)

    answer = ask(use, tmp_path)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_gateway_without_a_folder_refuses_urls_before_it_generates() -> None:
    server = painter()

    async def use(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/images/generations", json=PROMPT)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format"
        assert (await http.get(f"/files/9999999999-{TOKEN}.png")).status_code == 404

    with_gateway(use, server)
    assert server.calls == []


@pytest.mark.parametrize(
    ("host", "start"),
    [
        ("localhost:12411", "http://localhost:12411/files/"),
        ("127.0.0.1:12411", "http://127.0.0.1:12411/files/"),
        ("[::1]:12411", "http://[::1]:12411/files/"),
        ("evil.example", "/files/"),
        ("localhost.evil.example", "/files/"),
        ("localhost@evil.example", "/files/"),
        ("localhost:80@evil.example", "/files/"),
        ("evil.example#localhost", "/files/"),
        ("[::1", "/files/"),
        ("localhost:99999999", "/files/"),
    ],
)
def test_callers_host_is_repeated_only_if_it_is_this_machine(host: str, start: str, tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> str:
        return await generated(http, headers={"host": host, "x-forwarded-host": "evil.example"})

    assert ask(use, tmp_path).startswith(start)


def test_public_url_is_the_base(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> str:
        return await generated(http, headers={"host": "evil.example"})

    url = ask(use, tmp_path, public_url="https://images.example.org/genserve/")
    assert url.startswith("https://images.example.org/genserve/files/")


@pytest.mark.parametrize("url", ["images.example.org", "ftp://x", "https://", "https://x/?a=b", "javascript:alert(1)"])
def test_unusable_public_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="public URL has another form"):
        with_gateway(_nothing, public_url=url)


def test_files_need_no_key(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/images/generations", json=PROMPT)).status_code == 401
        url = await generated(http, headers={"x-api-key": "secret"})
        assert (await http.get(url)).content == b"a circle"

    ask(use, tmp_path, keys=f"alice {digest_of('secret')}\n# end")


async def _nothing(_: httpx.AsyncClient) -> None:
    pass
