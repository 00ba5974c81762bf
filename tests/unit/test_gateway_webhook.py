"""Webhooks: their addresses, their signatures, and their way to the caller."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from fake_servers import FakeServer
from gateway_app import gateway, with_gateway
from standardwebhooks import Webhook
from yarl import URL

from genserve import InvalidInput, ServerError
from genserve.gateway import addresses, durable, webhook
from genserve.gateway.addresses import Addresses, is_public
from genserve.gateway.webhook import DELAYS_S, JITTER, pause_after

SECRET = "whsec_" + base64.b64encode(b"s" * 24).decode()
OTHER = base64.b64encode(b"t" * 32).decode()


class Receiver:
    """Caller's server. It answers with the statuses of `script`, then with 200.

    Attributes:
        url: Its address.
        received: Headers and body of each message.
        followed: Requests that a redirect has led to.
        moves_to: Target of redirects.
    """

    def __init__(self) -> None:
        self.url = ""
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.script: list[int] = []
        self.followed = 0
        self.hangs = False

    async def receive(self, request: web.Request) -> web.Response:
        self.received.append((dict(request.headers), await request.read()))
        if self.hangs:
            await asyncio.sleep(30)
        status = self.script.pop(0) if self.script else 200
        return web.Response(status=status, headers={"Location": f"{self.url}/elsewhere"} if status == 302 else {})

    async def follow(self, _: web.Request) -> web.Response:
        self.followed += 1
        return web.Response()

    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.received]


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    state = Receiver()
    app = web.Application()
    app.router.add_post("/hook", state.receive)
    app.router.add_route("*", "/elsewhere", state.follow)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    state.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield state
    finally:
        await runner.cleanup()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "POLL_S", 0.05)
    monkeypatch.setattr(webhook, "DELAYS_S", (0.05, 0.05, 0.05))


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until a condition holds; pytest's own limit ends a wait that is in vain."""
    while not await condition():
        await asyncio.sleep(0.05)


async def sent(http: httpx.AsyncClient, hook: Receiver, **task: Any) -> dict[str, Any]:
    """Submit a task, and return it once its webhook is settled."""
    answer = await http.post("/v1/tasks", json={"prompt": "a circle", "webhook_url": f"{hook.url}/hook", **task})
    assert answer.status_code == 202, answer.text
    return await settled(http, answer.json()["id"])


async def settled(http: httpx.AsyncClient, task_id: str) -> dict[str, Any]:
    async def is_settled() -> bool:
        found.update((await http.get(f"/v1/tasks/{task_id}")).json())
        return bool(found["webhook"]["state"] in {"delivered", "failed"})

    found: dict[str, Any] = {}
    await until(is_settled)
    return found


def with_receiver(
    use: Callable[[httpx.AsyncClient, Receiver], Awaitable[None]], folder: Path, *servers: FakeServer, **settings: Any
) -> None:
    async def run() -> None:
        values = {"webhook_secret": SECRET, "webhook_allow": ["127.0.0.0/8"], **settings}
        async with receiver() as hook, gateway(*servers, tasks=f"sqlite:///{folder / 'tasks.db'}", **values) as http:
            await use(http, hook)

    asyncio.run(run())


def test_end_of_a_task_is_told_with_a_signature(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        task = await sent(http, hook)
        assert task["webhook"] == {"url": f"{hook.url}/hook", "state": "delivered", "attempts": 1}
        ((headers, body),) = hook.received
        assert headers["Content-Type"] == "application/json"
        assert headers["webhook-id"] == f"msg_{task['id']}"
        for secret in (SECRET, OTHER):
            assert Webhook(secret).verify(body, headers)
        with pytest.raises(Exception, match="No matching signature"):
            Webhook(base64.b64encode(b"x" * 24).decode()).verify(body, headers)

        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        digest = base64.b64encode(hmac.digest(b"s" * 24, signed, hashlib.sha256)).decode()
        assert headers["webhook-signature"].split()[0] == f"v1,{digest}"

        (message,) = hook.messages()
        assert message["type"] == "task.done"
        assert message["data"]["id"] == task["id"]
        assert message["data"]["result"]["url"].startswith("https://images.example.org/files/")
        assert "b64_json" not in body.decode()

    settings = {"webhook_secret": f"{SECRET} {OTHER}", "public_url": "https://images.example.org"}
    with_receiver(use, tmp_path, **settings)


def test_failure_and_cancellation_are_told_too(tmp_path: Path) -> None:
    server = FakeServer()

    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        server.script.append(ServerError("broken"))
        await sent(http, hook)
        server.hung = True
        answer = await http.post("/v1/tasks", json={"prompt": "x", "webhook_url": f"{hook.url}/hook"})
        await http.delete(f"/v1/tasks/{answer.json()['id']}")
        await settled(http, answer.json()["id"])
        assert [message["type"] for message in hook.messages()] == ["task.failed", "task.cancelled"]
        assert hook.messages()[0]["data"]["error"] == {"class": "ServerError", "message": "broken"}

    with_receiver(use, tmp_path, server)


def test_message_is_sent_again_with_the_same_id_until_it_is_accepted(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        hook.script = [500, 302, 429]
        task = await sent(http, hook)
        assert (task["webhook"]["state"], task["webhook"]["attempts"]) == ("delivered", 4)
        assert {headers["webhook-id"] for headers, _ in hook.received} == {f"msg_{task['id']}"}
        for headers, body in hook.received:
            Webhook(SECRET).verify(body, headers)
        assert hook.followed == 0

    with_receiver(use, tmp_path)


@pytest.mark.parametrize(("script", "attempts"), [([503] * 9, 4), ([500, 410], 2)], ids=["refused", "gone"])
def test_attempts_are_bounded(script: list[int], attempts: int, tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        hook.script = script
        task = await sent(http, hook)
        assert (task["state"], task["webhook"]["state"]) == ("done", "failed")
        assert task["webhook"]["attempts"] == len(hook.received) == attempts

    with_receiver(use, tmp_path)


def test_receiver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(webhook, "DELAYS_S", ())

    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        hook.hangs = True
        assert (await sent(http, hook))["webhook"]["state"] == "failed"

    with_receiver(use, tmp_path)


def test_message_outlives_the_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TAKEN_S", 0.3)
    tasks = {"tasks": f"sqlite:///{tmp_path / 'tasks.db'}", "webhook_allow": ["127.0.0.1"]}

    async def run() -> None:
        async with receiver() as hook:
            hook.hangs = True
            async with gateway(webhook_secret=SECRET, **tasks) as http:
                body = {"prompt": "x", "webhook_url": f"{hook.url}/hook"}
                task_id = (await http.post("/v1/tasks", json=body)).json()["id"]
                while not hook.received:
                    await asyncio.sleep(0.05)
            hook.hangs = False
            async with gateway(webhook_secret=SECRET, **tasks) as http:
                task = await settled(http, task_id)
            assert task["webhook"]["state"] == "delivered"
            assert task["webhook"]["attempts"] == len(hook.received) > 1

    asyncio.run(run())


def test_webhooks_without_a_secret_are_refused_at_acceptance(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/tasks", json={"prompt": "x", "webhook_url": "https://example.org/hook"})
        assert answer.status_code == 400
        assert "no secret to sign webhooks" in answer.json()["message"]
        assert (await http.get("/v1/tasks")).json()["data"] == []

    with_gateway(use, tasks=f"sqlite:///{tmp_path / 'tasks.db'}")


@pytest.mark.parametrize("secret", ["short", "whsec_AAAA", "whsec_" + "A" * 28, "not base64 !", "A" * 96])
def test_unusable_secret_is_refused_and_not_repeated(secret: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="24 to 64 bytes in base64") as refusal:
        with_gateway(_nothing, tasks=f"sqlite:///{tmp_path / 'tasks.db'}", webhook_secret=secret)
    assert secret not in str(refusal.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("2002:5db8:d822::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("233.252.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
        ("2001:db8::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::1", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/hook?a=b",
        "http://example.org:80",
        "https://example.org:8443/x",
        "http://93.184.216.34:1024/",
        "http://[2606:2800:220:1:248:1893:25c8:1946]/",
        "HTTPS://EXAMPLE.ORG/",
    ],
)
def test_usable_urls(url: str) -> None:
    assert Addresses().checked(url) == URL(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "//example.org/x",
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "https://",
        "https:///path",
        "https://user@example.org/",
        "https://user:password@example.org/",
        "http://example.org:22/",
        "http://example.org:0/",
        "http://example.org:1023/",
        "http://example.org:99999/",
        "http://127.0.0.1/",
        "http://127.0.0.1:8080/",
        "http://[::1]:8080/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1%25eth0]/",
        "http://exa mple.org/",
        "http://example.org/\r\nX: y",
        "http://ex\u00e4mple.org/",
        "http://example.org/\0",
        "http://[::1",
        "https://example.org/" + "a" * 2048,
    ],
)
def test_unusable_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="webhook_url: "):
        Addresses().checked(url)


class Names(AbstractResolver):
    """Resolver that answers with one address after another."""

    def __init__(self, *found: str) -> None:
        self.found = list(found)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        address = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        entry = {"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [ResolveResult(**entry)]  # type: ignore[typeddict-item]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("allowed", "state"),
    [([], "failed"), (["other.example"], "failed"), (["Hook.Example"], "delivered"), (["127.0.0.0/24"], "delivered")],
    ids=["nothing", "another-host", "host", "network"],
)
def test_address_that_is_connected_to_counts(
    allowed: list[str], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name has a public address when it is looked up first, and this machine's when it is connected to."""
    names = Names("93.184.216.34", "127.0.0.1")
    monkeypatch.setattr(durable, "Addresses", lambda entries: Addresses(entries, resolver=names))
    asyncio.run(names.resolve("hook.example"))

    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        hook.url = hook.url.replace("127.0.0.1", "hook.example")
        task = await sent(http, hook)
        assert task["webhook"]["state"] == state
        assert bool(hook.received) is (state == "delivered")

    with_receiver(use, tmp_path, webhook_allow=allowed)


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1"])
def test_names_of_this_machine_lead_nowhere(host: str, tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, hook: Receiver) -> None:
        hook.url = hook.url.replace("127.0.0.1", host)
        assert (await sent(http, hook))["webhook"]["state"] == "failed"
        assert hook.received == []

    with_receiver(use, tmp_path, webhook_allow=[])


def test_allowed_literal_address_is_accepted() -> None:
    rule = Addresses(["10.0.0.0/8", "fd00::/8"])
    assert rule.checked("http://10.1.2.3/x").host == "10.1.2.3"
    assert rule.checked("http://[fd00::1]/x").host == "fd00::1"
    with pytest.raises(InvalidInput):
        rule.checked("http://11.0.0.1:22/x")


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "http://example.org", "*.example.org", "-x", ""])
def test_unusable_exceptions_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="neither a network, as 10.0.0.0/8, nor a host"):
        Addresses([entry])


def test_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "DELAYS_S", DELAYS_S)
    for number, seconds in enumerate(DELAYS_S, start=1):
        pauses = {pause_after(number) for _ in range(50)}
        assert len(pauses) > 1
        assert all(pause and abs(pause / seconds - 1) <= JITTER for pause in pauses)
    assert list(DELAYS_S) == sorted(DELAYS_S)
    assert pause_after(len(DELAYS_S) + 1) is None
    assert addresses.MAX_URL_CHARACTERS == 2048


async def _nothing(_: httpx.AsyncClient) -> None:
    pass
