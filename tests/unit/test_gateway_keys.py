"""Keys of the gateway: their file, and who is admitted."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from gateway_app import RERANK, with_gateway

from genserve import cli_gateway
from genserve.cli import main
from genserve.gateway.keys import Keyring, KeysError, digest_of, draw_key, parse

DIGEST = "0" * 64


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def later(path: Path, text: str) -> None:
    """Write a file so that its time of change differs for sure."""
    path.write_text(text)
    changed = path.stat().st_mtime_ns + 10_000_000
    os.utime(path, ns=(changed, changed))


# The file.


def test_drawn_keys_are_found_by_their_owner(file: Path) -> None:
    file.write_text("# callers")  # without a newline
    alice, bob = (draw_key(file, name, {"rate": rate}) for name, rate in (("alice", None), ("bob", "5/minute")))
    assert alice not in file.read_text()
    keyring = Keyring(str(file))
    for key, name in ((alice, "alice"), (bob, "bob")):
        found = keyring.find(key)
        assert found is not None
        assert found.name == name
    assert keyring.find(alice[:-1]) is None
    assert keyring.find(digest_of(alice)) is None, "the file's hash is no key"
    assert len(alice) == len("gs-") + 43
    assert alice[:3] == "gs-"
    assert alice[3:] != bob[3:]


def test_file_of_keys_is_for_its_user_only(file: Path) -> None:
    draw_key(file, "alice", {})
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice", "there is no SHA-256"),
        ("alice 0123", "there is no SHA-256"),
        (f"alice {DIGEST.replace('0', 'G')}", "there is no SHA-256"),
        (f"al/ice {DIGEST}", "the name is not usable"),
        (f"{'a' * 65} {DIGEST}", "the name is not usable"),
        (f"alice {DIGEST} rate=60", "rate is '60'; allowed: as 60/minute"),
        (f"alice {DIGEST} rate=0/minute", "rate is '0/minute'"),
        (f"alice {DIGEST} concurrency=0", "concurrency is '0'; allowed: 1 or more"),
        (f"alice {DIGEST} concurrency=x", "concurrency is 'x'"),
        (f"alice {DIGEST} color=red", "only rate=N/TIME and concurrency=N"),
        (f"alice {DIGEST} concurrency=1 concurrency=2", "only rate=N/TIME and concurrency=N"),
        (f"bob {DIGEST}", "the name or the key is there already"),
        (f"carol {'1' * 64}", "the name or the key is there already"),
    ],
)
def test_damaged_line_is_named_without_its_hash(line: str, reason: str) -> None:
    with pytest.raises(KeysError) as caught:
        parse(f"# first\nbob {'1' * 64}\n\n{line}\n", "keys.txt")
    assert str(caught.value).startswith("keys.txt, line 4: ")
    assert reason in str(caught.value)
    assert DIGEST not in str(caught.value)


def test_keys_may_be_lines_instead_of_a_file() -> None:
    found = Keyring(f"alice {digest_of('secret')} concurrency=3").find("secret")
    assert found is not None
    assert found.limits.concurrency == 3


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"alice"], ids=["missing", "not-text", "damaged"])
def test_unusable_file_at_start_is_an_error(content: bytes | None, file: Path) -> None:
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(KeysError, match=r"keys\.txt"):
        Keyring(str(file))


def test_changed_file_is_read_again(file: Path) -> None:
    file.write_text(f"alice {digest_of('first')}\n")
    keyring = Keyring(str(file))
    later(file, f"bob {digest_of('other')}\n")
    assert keyring.find("first") is None
    found = keyring.find("other")
    assert found is not None
    assert found.name == "bob"


@pytest.mark.parametrize("damage", ["damaged", "removed"])
def test_last_good_keys_stay_in_force(damage: str, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(f"alice {digest_of('first')}\n")
    keyring = Keyring(str(file))
    if damage == "removed":
        file.unlink()
    else:
        later(file, "alice\n")
    with caplog.at_level(logging.INFO, logger="genserve"):
        assert keyring.find("first") is not None
        assert keyring.find("first") is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"], "once, not with every request"
    later(file, f"alice {digest_of('second')}\n")
    assert keyring.find("first") is None
    assert keyring.find("second") is not None


# The verb.


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["gateway", *arguments], env=environment)
    return result.exit_code, result.stdout, result.stderr


def test_verb_prints_the_key_once(file: Path) -> None:
    code, printed, _ = run("key", "alice", "--keys", str(file))
    assert code == 0
    found = Keyring(str(file)).find(printed.strip())
    assert found is not None
    code, printed, _ = run("key", "bob", "--keys", str(file), "--rate", "5/minute", "--concurrency", "2", "--json")
    found = Keyring(str(file)).find(json.loads(printed)["key"])
    assert found is not None
    assert (str(found.limits.rate), found.limits.concurrency) == ("5 per 1 minute", 2)


@pytest.mark.parametrize("arguments", [("alice",), ("a b",), ("bob", "--rate", "often")])
def test_refused_line_changes_nothing(arguments: tuple[str, ...], file: Path) -> None:
    draw_key(file, "alice", {})
    before = file.read_text()
    code, printed, reason = run("key", *arguments, "--keys", str(file))
    assert (code, printed) == (1, "")
    assert reason.count("\n") == 1
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["--keys", "/nowhere/keys"], {}, "genserve: cannot read /nowhere/keys: No such file or directory"),
        ([], {"GENSERVE_GATEWAY_KEYS": ""}, "genserve: GENSERVE_GATEWAY_KEYS is empty"),
        ([], {"GENSERVE_GATEWAY_KEYS": "alice\nbob"}, "genserve: the keys, line 1: "),
    ],
    ids=["missing", "empty", "damaged"],
)
def test_gateway_without_its_keys_does_not_start(
    arguments: list[str], environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genserve.gateway.logs.configure", lambda: None)  # it is for the whole process
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("the gateway runs without its keys"))
    code, _, printed = run(*arguments, **environment)
    assert code == 1
    assert printed.splitlines()[-1].startswith(reason)


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else name)
    for verb in ([], ["key", "alice", "--keys", "x"]):
        code, _, printed = run(*verb)
        assert (code, printed) == (1, "genserve: the gateway needs fastapi: pip install 'genserve[gateway]'\n")
    result = CliRunner().invoke(main, ["serve", "--gateway-port", "1"])
    assert (result.exit_code, result.stderr) == (1, printed)


# Admission.

KEYS = f"alice {digest_of('right')}"
PATHS = {
    "/v1/images/generations": lambda body: body["error"]["message"],
    "/v2/rerank": lambda body: body["message"],
    "/rerank": lambda body: body["error"],
    "/score": lambda body: body["error"]["message"],
    "/v1/ranking": lambda body: body["message"],
    "/generate": lambda body: body["message"],
    "/nowhere": lambda body: body["message"],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({}, 401, "no API key was given: send it as Authorization: Bearer KEY, or as x-api-key"),
        ({"Authorization": "Basic cmlnaHQ="}, 401, "no API key was given"),
        ({"Authorization": "Bearer"}, 401, "no API key was given"),
        ({"Authorization": "Bearer wrong"}, 403, "the API key is not valid"),
        ({"x-api-key": "wrong"}, 403, "the API key is not valid"),
        ({"Authorization": f"Bearer {digest_of('right')}"}, 403, "the API key is not valid"),
    ],
    ids=["none", "basic", "empty", "wrong", "wrong-x-api-key", "hash"],
)
def test_caller_without_a_right_key_is_refused_in_the_dialect(
    path: str, headers: dict[str, str], status: int, message: str
) -> None:
    answer = with_gateway(lambda http: http.post(path, content=b"{", headers=headers), keys=KEYS)
    assert answer.status_code == status
    assert PATHS[path](answer.json()).startswith(message)
    assert answer.headers["x-request-id"] in answer.text
    assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer right"}, {"authorization": "bearer  right "}, {"x-api-key": "right"}]
)
def test_right_key_is_admitted(headers: dict[str, str]) -> None:
    answer = with_gateway(lambda http: http.post("/v2/rerank", json=RERANK, headers=headers), keys=KEYS)
    assert answer.status_code == 200


@pytest.mark.parametrize("keys", ["# nobody yet\n", KEYS], ids=["empty", "keys"])
@pytest.mark.parametrize(
    "path",
    [
        "/status",
        "/metrics",
        "/openapi.json",
        "/health/",
        "http://gateway//health",
        "/health/../status",
        "/playground/../status",
    ],
)
def test_everything_but_health_and_the_page_needs_a_key(path: str, keys: str) -> None:
    assert with_gateway(lambda http: http.get(path), keys=keys).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/"])
def test_health_and_the_page_need_none(path: str) -> None:
    assert with_gateway(lambda http: http.get(path), keys=KEYS).status_code == 200


def test_no_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        for key in ("right", "wrong-secret"):
            await http.get("/status", headers={"x-api-key": key})

    with caplog.at_level(logging.DEBUG):
        with_gateway(ask, keys=KEYS)
    fields: list[dict[str, Any]] = [getattr(record, "fields", {}) for record in caplog.records]
    lines = [each for each in fields if each.get("route") == "/status"]
    assert [(each["status"], each.get("key")) for each in lines] == [(200, "alice"), (403, None)]
    assert not [each for each in fields if {"right", "wrong-secret"} & set(map(str, each.values()))]


def test_files_need_no_key_but_their_name() -> None:
    assert with_gateway(lambda http: http.get("/files/unknown"), keys=KEYS).status_code == 404


def test_callers_do_not_see_each_others_tasks(tmp_path: Path) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        task = {"query": "q", "documents": ["a"]}
        accepted = await http.post("/v1/tasks", json=task, headers={"x-api-key": "a"})
        assert accepted.status_code == 202
        path = f"/v1/tasks/{accepted.json()['id']}"
        seen = [(await http.get(path, headers={"x-api-key": key})).status_code for key in ("a", "b")]
        assert seen == [200, 404]

    keys = f"alice {digest_of('a')}\nbob {digest_of('b')}"
    with_gateway(ask, keys=keys, tasks=f"sqlite:///{tmp_path / 'tasks.db'}")


def test_packages_are_those_of_the_extra() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extra = text.partition("\ngateway = [\n")[2].partition("\n]")[0]
    named = {name.replace("-", "_") for name in re.findall(r'^    "([\w-]+)', extra, flags=re.MULTILINE)}
    needless = {"aiohttp", "uvloop"}  # the client needs the one anyway, and uvicorn works without the other
    assert set(cli_gateway.PACKAGES) == named - needless
