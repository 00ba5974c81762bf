"""JSON that is wrong in ways that a schema cannot describe, for every route that takes a body."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from hostile.attack import Attack, request

JSON = b"application/json"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 1}
BODIES: dict[str, dict[str, object]] = {
    "/generate": {"prompt": "a red circle", "seed": 1, "cfg": 3.5, "priority": 1, "negative_prompt": "blue", **SMALL},
    "/v1/images/generations": {
        "prompt": "a red circle",
        "model": "flux",
        "n": 1,
        "size": "64x64",
        "num_inference_steps": 1,
        "seed": 1,
        "guidance_scale": 3.5,
        "output_format": "png",
        "stream": False,
        "partial_images": 0,
        "user": "somebody",
    },
    "/v1/rerank": {"query": "q", "documents": ["a", "b"], "top_n": 1, "model": "rerank", "return_documents": True},
    "/v2/rerank": {"query": "q", "documents": ["a", {"text": "b", "more": 1}], "return_documents": True},
    "/rerank": {"query": "q", "texts": ["a", "b"], "return_text": True, "raw_scores": False},
    "/score": {"text_1": "q", "text_2": ["a", "b"], "model": "rerank"},
    "/v1/ranking": {"query": {"text": "q"}, "passages": [{"text": "a"}], "truncate": "NONE", "model": "rerank"},
    "/v1/tasks": {"query": "q", "documents": ["a"], "top_n": 1, "priority": "normal"},
}
"""A valid body of every route, with most of its fields."""
VALUES = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "-0",
    "0.1",
    "1e-400",
    "9223372036854775808",
    "-9223372036854775809",
    "1" + "0" * 400,
    "1" * 5000,
    "-1",
    "0",
    "2147483648",
    "null",
    "true",
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[[[[[[1]]]]]]",
    '""',
    '" "',
    '"\\u0000"',
    '"\\ud800"',
    '["\\udfff"]',
    '["ok", "\\ud800\\ud800"]',
    '{"text": "\\ud83d"}',
    '[{"text": "ok", "x": "\\ud800"}]',
    '[{"text": "ok", "x": NaN}]',
    '[{"text": "ok", "x": ' + "[" * 150 + "]" * 150 + "}]",
    '[{"text": "ok", "x": ' + "[" * 400 + "]" * 400 + "}]",
    '[{"\\ud800": "x"}]',
    '{"text": NaN}',
    '[{"text": {"text": "x"}}]',
    '"\\u202e\\ufeff\\uffff"',
    '"../../../../etc/passwd"',
    '"http://127.0.0.1:1/"',
    '"\'; DROP TABLE tasks; --"',
    '"${jndi:ldap://127.0.0.1/x}"',
    '"{{7*7}}"',
    '"1x1"',
    '"99999x99999"',
    '"\\u0661\\u0662x\\u0661\\u0662"',
    "[" * 400 + "]" * 400,
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    '"' + "x" * 20_000 + '"',
    '"' + "\U0001f600" * 10_001 + '"',
    '"' + "\\u0301" * 9_000 + '"',
    "[" + ",".join(['"a"'] * 1_001) + "]",
    "[" + ",".join(["1"] * 100_000) + "]",
    "[" + ",".join(["{}"] * 100_000) + "]",
    "{" + ",".join(f'"k{number}": {number}' for number in range(20_000)) + "}",
)
"""JSON texts, and texts that look like JSON, to put in the place of a field's value."""
WHOLE = (
    b"null",
    b"true",
    b"0",
    b'"text"',
    b"[]",
    b"{}",
    b"[{}]",
    b"NaN",
    b"",
    b" ",
    b"{",
    b'{"prompt"',
    b"{'prompt': 'x'}",
    b'{"prompt": "x",}',
    b'{"prompt": "x"} {"prompt": "y"}',
    b'{"prompt": "x"} // comment',
    b'\xef\xbb\xbf{"prompt": "x", "query": "q", "documents": ["a"], "texts": ["a"]}',
    '{"prompt": "x"}'.encode("utf-16"),
    '{"prompt": "x"}'.encode("utf-32-le"),
    '{"prompt": "\xe4"}'.encode("latin-1"),
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xc0\x80"}',
    b'{"prompt": "a\x00b"}',
    b'{"prompt": "a\nb"}',
    b"\x00" * 100,
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    b" " * 1_000_000,
    b"[" * 1_000_000,
    b'{"prompt": "x", "prompt": "y", "query": 1, "query": "q"}',
    b'{"__proto__": {"x": 1}, "__class__": "x", "constructor": 1}',
    b'{"' + b"k" * 1_000_000 + b'": 1}',
    b"prompt=x&query=q",
    b"<prompt>x</prompt>",
    b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--\r\n',
)
"""Whole bodies."""
TYPES = (
    b"",
    b"text/plain",
    b"application/json; charset=utf-16",
    b"application/json; charset=nothing",
    b"application/vnd.api+json",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data",
    b"multipart/form-data; boundary=x",
    b"application/octet-stream",
    b"application/json, text/plain",
    b"a/b/c;;;=",
    b"application/" + b"x" * 5_000,
    b"\xff\xfe",
)


def mangled(count: int, *, seed: int) -> Iterator[Attack]:
    """Yield `count` requests: every whole body and type, and then fields with wrong values."""
    draw = random.Random(seed)
    fixed = [
        *((path, body, JSON) for path in BODIES for body in WHOLE),
        *((path, json.dumps(BODIES[path]).encode(), kind) for path in BODIES for kind in TYPES),
    ]
    draw.shuffle(fixed)
    for number in range(count):
        path, body, kind = fixed[number] if number < min(len(fixed), count // 2) else _with_a_wrong_value(draw)
        headers = [(b"Content-Type", kind)] if kind else []
        yield Attack(f"mangled {path}", (request(b"POST", path.encode(), body, headers=headers),))


def _with_a_wrong_value(draw: random.Random) -> tuple[str, bytes, bytes]:
    path = draw.choice(list(BODIES))
    fields = {name: json.dumps(value) for name, value in BODIES[path].items()}
    for name in draw.sample(list(fields), draw.choice((1, 1, 1, 2))):
        fields[name] = draw.choice(VALUES)
    body = ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items())
    return path, f"{{{body}}}".encode(), JSON
