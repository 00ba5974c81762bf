"""Answers of `tasks` to ``load`` and ``config``: typed, tolerant of new fields, strict about the known ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from genserve.errors import ServerError
from genserve.protocol import instance_loads, settings_in_force
from genserve.types import InstanceLoad, Setting

LOAD: dict[str, Any] = {
    "instance": "flux_0_0",
    "model": "flux",
    "device": "cuda:0",
    "gpu_id": 0,
    "running": 2,
    "waiting": 1,
    "memory_used": 2**40,
    "memory_free": 0,
    "memory_total": 2**41,
    "ready": True,
}
SETTING: dict[str, Any] = {"model": "flux", "name": "max_pixels", "value": 4096, "source": "environment MAX_PIXELS"}
UNKNOWN = dict.fromkeys(("gpu_id", "memory_used", "memory_free", "memory_total"))


def outputs(task: Any) -> dict[str, Any]:
    text = task if isinstance(task, bytes) else json.dumps(task).encode()
    return {"TASK": np.array([text], dtype=np.object_), "PREVIEW": np.array([b""], dtype=np.object_)}


def test_loads_are_parsed_in_their_order() -> None:
    other = {**LOAD, "instance": "rerank_0_0", **UNKNOWN, "ready": False}
    assert instance_loads(outputs([LOAD, other])) == [InstanceLoad(**LOAD), InstanceLoad(**other)]
    assert instance_loads(outputs([])) == []


@pytest.mark.parametrize("value", [4096, 0.25, "auto", True, None, [[0, 1]]], ids=str)
def test_settings_hold_any_json_value(value: Any) -> None:
    (setting,) = settings_in_force(outputs([{**SETTING, "value": value}]))
    assert setting == Setting("flux", "max_pixels", value, "environment MAX_PIXELS")
    assert type(setting.value) is type(value)


def test_unknown_fields_are_ignored() -> None:
    assert instance_loads(outputs([{**LOAD, "temperature": 60}])) == instance_loads(outputs([LOAD]))
    assert settings_in_force(outputs([{**SETTING, "unit": "pixels"}])) == settings_in_force(outputs([SETTING]))


@pytest.mark.parametrize("name", LOAD)
def test_missing_field_of_a_load_is_a_server_error(name: str) -> None:
    incomplete = {key: value for key, value in LOAD.items() if key != name}
    with pytest.raises(ServerError, match=f"TASK holds InstanceLoad without {name}"):
        instance_loads(outputs([LOAD, incomplete]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instance", None),
        ("model", 1),
        ("device", ["cpu"]),
        ("gpu_id", "0"),
        ("gpu_id", False),
        ("running", None),
        ("waiting", True),
        ("running", 1.5),
        ("memory_used", 1.0),
        ("memory_total", "many"),
        ("ready", 1),
        ("ready", None),
    ],
)
def test_wrong_type_in_a_load_is_a_server_error(name: str, value: Any) -> None:
    with pytest.raises(ServerError, match=f"TASK holds InstanceLoad with {name} "):
        instance_loads(outputs([{**LOAD, name: value}]))


@pytest.mark.parametrize("name", ["model", "name", "source"])
def test_wrong_setting_is_a_server_error(name: str) -> None:
    with pytest.raises(ServerError, match=f"TASK holds Setting with {name} None"):
        settings_in_force(outputs([{**SETTING, name: None}]))
    with pytest.raises(ServerError, match="TASK holds Setting without value"):
        settings_in_force(outputs([{key: value for key, value in SETTING.items() if key != "value"}]))


@pytest.mark.parametrize("parse", [instance_loads, settings_in_force])
@pytest.mark.parametrize("task", [{}, [1], [None], ["x"], [[]], b"", b"[", b"\xff"], ids=str)
def test_malformed_answer_is_a_server_error(parse: Any, task: Any) -> None:
    with pytest.raises(ServerError, match="TASK"):
        parse(outputs(task))
