"""The tensor LORA: valid lists, and everything that a hostile caller may send instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from genserve_backend.errors import InvalidInput
from genserve_backend.flux.lora.request import MAX_ADAPTERS, Lora, parse_lora


def rejection(text: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_lora(text)
    return str(caught.value)


def adapter(name: Any, weight: Any = 1.0) -> str:
    return json.dumps([{"name": name, "weight": weight}])


@pytest.mark.parametrize("text", ["[]", " [ ] ", "\n[\t]\r\n"], ids=repr)
def test_empty_list_is_no_adapter(text: str) -> None:
    assert parse_lora(text) == ()


def test_adapters_keep_their_order() -> None:
    text = '[{"name": "b", "weight": -1.5}, {"weight": 2, "name": "a"}, {"name": "c"}]'
    assert parse_lora(text) == (Lora("b", -1.5), Lora("a", 2.0), Lora("c", 1.0))


@pytest.mark.parametrize("name", ["neon", "Neon v1.2 (final)", "\u7ea2", "x" * 200, "a..b", "-x"])
def test_names_of_files_are_accepted(name: str) -> None:
    assert parse_lora(adapter(name)) == (Lora(name, 1.0),)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/etc/passwd",
        "../secret",
        "a\\b",
        "a\x00b",
        "a\nb",
        "\ud800",
        "x" * 201,
        "\u7ea2" * 67,
        "\u202e",
        5,
        None,
        True,
        ["neon"],
        {"name": "neon"},
    ],
    ids=lambda name: repr(name)[:20],
)
def test_other_names_are_rejected(name: Any) -> None:
    message = rejection(adapter(name))
    assert message.startswith("LORA is a list with the name ")
    assert message.endswith("; allowed: names of adapters in the server's folder")
    assert message.isprintable()
    assert len(message) < 200


@pytest.mark.parametrize("weight", [-10, 10.0, 0, -0.0, 1e-300])
def test_limits_of_weights_are_inclusive(weight: float) -> None:
    assert parse_lora(adapter("neon", weight)) == (Lora("neon", weight),)


@pytest.mark.parametrize(
    "weight",
    ["10.0001", "-11", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400, "true", "null", '"1"', "[]", "{}"],
    ids=lambda weight: weight[:12],
)
def test_other_weights_are_rejected(weight: str) -> None:
    message = rejection(f'[{{"name": "neon", "weight": {weight}}}]')
    assert message.startswith("LORA's weight of neon is ")
    assert message.endswith("; allowed: -10 to 10")
    assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", "a JSON list"),
        ("[", "a JSON list"),
        ("not JSON", "a JSON list"),
        ("[]]", "a JSON list"),
        ("\x00", "a JSON list"),
        ("[" * 4_096, "a JSON list"),
        ("[" * 100_000, "at most 4,096 characters"),
        ("[]" + " " * 5_000, "at most 4,096 characters"),
        ("1" * 4_096, "number}"),
        ("{}", "number}"),
        ("null", "number}"),
        ("NaN", "number}"),
        ('""', "number}"),
        ("[[]]", "number}"),
        ('["neon"]', "number}"),
        ("[{}]", "number}"),
        ('[{"weight": 1}]', "number}"),
        ('[{"name": "neon", "scale": 1}]', "number}"),
        ('[{"name": "neon"}, {"name": "neon"}]', "each adapter once"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_other_values_are_rejected(text: str, allowed: str) -> None:
    message = rejection(text)
    assert message.startswith("LORA is ")
    assert message.endswith(allowed)


def test_deeply_nested_lists_are_rejected() -> None:
    assert rejection("[" * 2_048 + "]" * 2_048).startswith("LORA is ")


def test_number_of_adapters_is_limited() -> None:
    entries = [{"name": f"a{index}"} for index in range(MAX_ADAPTERS + 1)]
    assert len(parse_lora(json.dumps(entries[:-1]))) == MAX_ADAPTERS
    assert rejection(json.dumps(entries)) == f"LORA is a list of {MAX_ADAPTERS + 1} adapters; allowed: at most 8"
