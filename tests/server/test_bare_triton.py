"""The models through plain tritonclient, HTTP and Prometheus."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import Server
from pictures import levels
from PIL import Image
from tritonclient.utils import InferenceServerException

TYPES = {np.dtype("int32"): "INT32", np.dtype("int64"): "INT64", np.dtype("float32"): "FP32"}


@pytest.fixture(params=["grpc", "http"])
def triton(request: pytest.FixtureRequest, server: Server) -> tuple[ModuleType, Any]:
    module = triton_grpc if request.param == "grpc" else triton_http
    return module, module.InferenceServerClient(f"localhost:{server.ports[request.param == 'grpc']}")


def tensor(module: ModuleType, name: str, values: Any, dtype: Any = object) -> Any:
    array = np.array(values, dtype=dtype)
    made = module.InferInput(name, list(array.shape), TYPES.get(array.dtype, "BYTES"))
    made.set_data_from_numpy(array)
    return made


def infer(triton: tuple[ModuleType, Any], model: str, **inputs: Any) -> dict[str, Any]:
    module, client = triton
    tensors = [
        tensor(module, name, *value) if isinstance(value, tuple) else tensor(module, name, value)
        for name, value in inputs.items()
    ]
    result = client.infer(model, tensors)
    outputs = result.get_response()
    names = (
        [output.name for output in outputs.outputs]
        if module is triton_grpc
        else [o["name"] for o in outputs["outputs"]]
    )
    return {name: result.as_numpy(name) for name in names}


def test_returned_seed_reproduces_the_bytes(triton: tuple[ModuleType, Any]) -> None:
    first = infer(triton, "flux", PROMPT=[[b"a green square"]], STEPS=([[3]], "int32"))
    again = infer(triton, "flux", PROMPT=[[b"a green square"]], STEPS=([[3]], "int32"), SEED=(first["SEED"], "int64"))
    assert again["IMAGE"][0, 0] == first["IMAGE"][0, 0]


def test_each_flux_row_is_an_image(triton: tuple[ModuleType, Any]) -> None:
    both = infer(
        triton,
        "flux",
        PROMPT=[[b"one"], [b"two"]],
        STEPS=([[2], [3]], "int32"),
        HEIGHT=([[64], [128]], "int32"),
        SEED=([[5], [6]], "int64"),
    )
    assert both["IMAGE"].shape == both["SEED"].shape == both["INFO"].shape == (2, 1)
    assert [Image.open(io.BytesIO(data)).size for data in both["IMAGE"][:, 0]] == [(128, 64), (128, 128)]
    two = infer(triton, "flux", PROMPT=[[b"two"]], STEPS=([[3]], "int32"), SEED=([[6]], "int64"))
    assert two["IMAGE"][0, 0] == both["IMAGE"][1, 0]


def test_cache_skips_steps_of_its_row_only(triton: tuple[ModuleType, Any]) -> None:
    same: dict[str, Any] = {"STEPS": ([[20], [20]], "int32"), "SEED": ([[5], [5]], "int64")}
    answer = infer(triton, "flux", PROMPT=[[b"a red star"]] * 2, CACHE=([[0], [1]], "float32"), **same)
    plain, cached = (json.loads(info) for info in answer["INFO"][:, 0])
    assert plain["skipped_steps"] == 0
    assert "cache" not in plain
    assert 0 < cached["skipped_steps"] < 20
    assert cached.items() >= {"cache": 1.0, "cache_method": "magcache"}.items()
    without = infer(triton, "flux", PROMPT=[[b"a red star"]] * 2, **same)
    one, other, *alike = (levels(data) for data in [*answer["IMAGE"][:, 0], *without["IMAGE"][:, 0]])
    assert all(np.abs(one - image).max() <= 1 for image in alike)
    assert np.abs(one - other).max() > 1


def test_invalid_row_fails_only_its_request(triton: tuple[ModuleType, Any]) -> None:
    with pytest.raises(InferenceServerException, match="InvalidInput: STEPS is 0; allowed: 1 to 100"):
        infer(triton, "flux", PROMPT=[[b"one"], [b"two"]], STEPS=([[2], [0]], "int32"))
    assert infer(triton, "flux", PROMPT=[[b"one"]], STEPS=([[1]], "int32"))["SEED"].shape == (1, 1)


def test_each_rerank_row_is_a_query(triton: tuple[ModuleType, Any]) -> None:
    answer = infer(
        triton,
        "rerank",
        QUERY=[[b"capital of France"], [b"pastry"]],
        DOCUMENTS=[[b"Paris", b"croissant"], [b"Paris", b"croissant"]],
    )
    assert answer["SCORES"].dtype == np.float32
    assert answer["SCORES"].shape == (2, 2)
    assert answer["SCORES"][0].argmax() == 0
    assert answer["SCORES"][1].argmax() == 1
    info = json.loads(answer["INFO"][0, 0])
    assert info.items() >= {"instance": "rerank_0_0", "device": "cpu", "truncated": []}.items()
    assert info["tokens"] > 0


def test_tasks_responds_with_json(triton: tuple[ModuleType, Any]) -> None:
    infer(triton, "flux", PROMPT=[[b"one"]], STEPS=([[1]], "int32"), TASK_ID=[[b"by-name"]])
    answer = infer(triton, "tasks", ACTION=[b"status"], TASK_ID=[b"by-name"])
    task = json.loads(answer["TASK"][0])
    assert task.items() >= {"task_id": "by-name", "state": "done", "step": 1, "steps": 1}.items()
    assert answer["PREVIEW"][0] == b""
    unknown = json.loads(infer(triton, "tasks", ACTION=[b"status"], TASK_ID=[b"nobody"])["TASK"][0])
    assert unknown["state"] == "unknown"
    assert json.loads(infer(triton, "tasks", ACTION=[b"list"])["TASK"][0]) == []


@pytest.mark.parametrize(
    ("action", "task_id"),
    [
        pytest.param(b"drop", b"x", id="unknown-action"),
        pytest.param(b"status", b"", id="no-id"),
        pytest.param(b"status", b"x" * 257, id="long-id"),
        pytest.param(b"status", b"\xff", id="not-utf-8"),
    ],
)
def test_tasks_rejects_invalid_input(triton: tuple[ModuleType, Any], action: bytes, task_id: bytes) -> None:
    with pytest.raises(InferenceServerException, match="InvalidInput: (ACTION|TASK_ID)"):
        infer(triton, "tasks", ACTION=[action], TASK_ID=[task_id])


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_generate_endpoint_returns_base64(server: Server) -> None:
    body = {"PROMPT": "a red circle", "STEPS": 2, "SEED": 9, "ENCODING": "base64"}
    status, answer = post(f"{server.http}/v2/models/flux/generate", body)
    assert status == 200
    assert answer["SEED"] == 9
    assert Image.open(io.BytesIO(base64.b64decode(answer["IMAGE"]))).size == (128, 128)
    assert json.loads(answer["INFO"])["steps"] == 2


def test_generate_endpoint_returns_a_ranking(server: Server) -> None:
    body = {"QUERY": "capital of France", "DOCUMENTS": ["Berlin", "Paris"]}
    status, answer = post(f"{server.http}/v2/models/rerank/generate", body)
    assert status == 200
    assert answer["SCORES"][1] > answer["SCORES"][0]


def test_generate_endpoint_rejects_invalid_input_with_400(server: Server) -> None:
    status, answer = post(f"{server.http}/v2/models/flux/generate", {"PROMPT": "x", "STEPS": 101})
    assert status == 400
    assert "InvalidInput: STEPS is 101; allowed: 1 to 100" in answer["error"]


def test_health_and_metrics(server: Server) -> None:
    for path in ("live", "ready"):
        with urllib.request.urlopen(f"{server.http}/v2/health/{path}", timeout=10) as answer:
            assert answer.status == 200
    with urllib.request.urlopen(server.metrics, timeout=10) as answer:
        text = answer.read().decode()
    for model in ("flux", "rerank", "tasks"):
        assert f'nv_inference_request_success{{model="{model}"' in text
