"""The playground's files: how they are served, and that they need nothing else."""

from __future__ import annotations

import re

import httpx
import pytest
from gateway_app import with_gateway

from genserve.gateway import page

TEXTS = {name: content.decode() for name, content in page.FILES.items()}
INDEX = TEXTS["index.html"]
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


def get(path: str, **headers: str) -> httpx.Response:
    return with_gateway(lambda http: http.get(path, headers=headers), keys="alice " + 64 * "0")


@pytest.mark.parametrize("path", sorted(page.PATHS))
def test_files_are_open_and_allow_only_their_own_origin(path: str) -> None:
    answer = get(path)
    assert answer.status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert not {"script-src", "style-src", "connect-src"} & policy.keys()
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    kinds = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "html": "text/html"}
    assert answer.headers["content-type"].startswith(kinds[path.rpartition("/")[2].rpartition(".")[2]])


def test_known_files_are_not_sent_again() -> None:
    tag = get("/playground/app.js").headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = get("/playground/app.js", **{"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert get("/playground/app.js", **{"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/playground/", "/playground/page.py", "/playground/..%2fpage.py", "/playground/x.js"]
)
def test_other_files_are_not_served(path: str) -> None:
    answer = with_gateway(lambda http: http.get(path))
    assert answer.status_code == 404
    assert "default-src" not in answer.text


def test_api_still_needs_the_key() -> None:
    assert get("/status").status_code == 401


def test_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    assert re.findall(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son[a-z]+=", INDEX) == []
    for name, text in TEXTS.items():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`)]*", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name


def test_named_files_exist() -> None:
    named = set(re.findall(r'(?:href|src)="playground/([\w.-]+)"', INDEX))
    assert {"app.js", "base.css", "icon.svg"} <= named
    for text in SCRIPTS.values():
        named |= set(re.findall(r'from "\./([\w.-]+)"', text))
    assert named == TEXTS.keys() - {"index.html"}


def test_scripts_find_their_elements() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', INDEX)
    assert len(ids) == len(set(ids))
    used = {name for text in SCRIPTS.values() for name in re.findall(r'\b(?:at|copyOf)\("([\w-]+)"\)', text)}
    assert used
    assert used <= set(ids)


def test_every_field_has_a_label() -> None:
    fields = [re.search(r'\bid="([\w-]+)"', tag) for tag in re.findall(r"<(?:input|textarea|select)\b[^>]*>", INDEX)]
    alone = [field[1] for field in fields if field and f'for="{field[1]}"' not in INDEX]
    assert alone == ["open-file"]  # inside of its label
