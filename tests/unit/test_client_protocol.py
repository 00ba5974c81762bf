"""Arguments to tensors, and outputs to results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from genserve import Client, InvalidInput, ServerError, TaskStatus
from genserve.protocol import (
    DTYPES,
    PRIORITIES,
    Call,
    generate_call,
    generated_image,
    ranking,
    rerank_call,
    task_list,
    task_status,
    tasks_call,
)

NUMPY_KINDS = {"BYTES": np.object_, "FP32": np.float32, "INT32": np.int32, "INT64": np.int64}
EVERY_SETTING: dict[str, Any] = {
    "negative_prompt": "dogs",
    "true_cfg_scale": 2.5,
    "height": 512,
    "width": 768,
    "steps": 4,
    "guidance": 3.5,
    "seed": 2**63 - 1,
    "format": "webp",
    "cache": 0.25,
}


def generate(prompt: Any = "a cat", **given: Any) -> Call:
    values = {"priority": "normal", "task_id": "id", "lora": (), **given}
    return generate_call(prompt, **values)


def rerank(query: Any = "q", documents: Any = ("a", "b"), **given: Any) -> Call:
    values = {"instruction": None, "windows": 1, "priority": "normal", "task_id": "id", **given}
    return rerank_call(query, documents, **values)


def test_missing_settings_are_not_sent() -> None:
    call = generate(**dict.fromkeys(EVERY_SETTING))
    assert call.model == "flux"
    assert call.inputs.keys() == {"PROMPT", "TASK_ID"}
    assert call.outputs == ("IMAGE", "SEED", "INFO")
    assert rerank().inputs.keys() == {"QUERY", "DOCUMENTS"}


def test_every_setting_has_its_tensor() -> None:
    call = generate(**EVERY_SETTING, lora=[{"name": "x", "weight": 0.5}])
    sent = {name: array.item() for name, array in call.inputs.items()}
    assert sent == {
        "PROMPT": b"a cat",
        "TASK_ID": b"id",
        "NEGATIVE_PROMPT": b"dogs",
        "TRUE_CFG_SCALE": 2.5,
        "HEIGHT": 512,
        "WIDTH": 768,
        "STEPS": 4,
        "GUIDANCE": 3.5,
        "SEED": 2**63 - 1,
        "FORMAT": b"webp",
        "CACHE": 0.25,
        "LORA": b'[{"name": "x", "weight": 0.5}]',
    }
    assert call.request_id == "id"


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (generate(**EVERY_SETTING, lora="x"), {}),
        (rerank(documents=["a", "b", "c"], instruction="i"), {"DOCUMENTS": (1, 3)}),
        (rerank(documents=["a"]), {"DOCUMENTS": (1, 1)}),
        (tasks_call("status", "id"), {"ACTION": (1,), "TASK_ID": (1,)}),
        (tasks_call("list"), {"ACTION": (1,), "TASK_ID": (1,)}),
    ],
    ids=["generate", "rerank", "one-document", "status", "list"],
)
def test_inputs_have_the_contract_dtypes_and_shapes(call: Call, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, array in call.inputs.items():
        assert array.dtype == NUMPY_KINDS[DTYPES[name]], name
        assert array.shape == shapes.get(name, (1, 1)), name
        if DTYPES[name] == "BYTES":
            assert all(isinstance(value, bytes) for value in array.reshape(-1)), name


@pytest.mark.parametrize("text", ["", "a\x00", "\x00", "\u4e00", "\U0001f43c" * 3, "trailing \n"], ids=repr)
def test_text_is_sent_unchanged(text: str) -> None:
    assert generate(text).inputs["PROMPT"].item() == text.encode()
    call = rerank(documents=[text, "x", text])
    assert list(call.inputs["DOCUMENTS"][0]) == [text.encode(), b"x", text.encode()]


@pytest.mark.parametrize(
    ("call", "tensor"),
    [
        (lambda: generate(b"bytes"), "PROMPT"),
        (lambda: generate(None), "PROMPT"),
        (lambda: generate(["a", "b"]), "PROMPT"),
        (lambda: generate(negative_prompt=5), "NEGATIVE_PROMPT"),
        (lambda: generate(height="512"), "HEIGHT"),
        (lambda: generate(height=512.5), "HEIGHT"),
        (lambda: generate(width=[512]), "WIDTH"),
        (lambda: generate(width=2**31), "WIDTH"),
        (lambda: generate(steps=4.7), "STEPS"),
        (lambda: generate(steps=float("nan")), "STEPS"),
        (lambda: generate(seed=2**63), "SEED"),
        (lambda: generate(seed="7"), "SEED"),
        (lambda: generate(guidance="3.5"), "GUIDANCE"),
        (lambda: generate(guidance=3.5j), "GUIDANCE"),
        (lambda: generate(true_cfg_scale=[4.0]), "TRUE_CFG_SCALE"),
        (lambda: generate(true_cfg_scale=10**400), "TRUE_CFG_SCALE"),
        (lambda: generate(format=b"png"), "FORMAT"),
        (lambda: generate(task_id=7), "TASK_ID"),
        (lambda: generate(cache="0.1"), "CACHE"),
        (lambda: generate(task_id="\ud800"), "TASK_ID"),
        (lambda: generate(task_id="x" * 257), "TASK_ID"),
        (lambda: rerank(task_id=7), "TASK_ID"),
        (lambda: rerank(task_id="x" * 257), "TASK_ID"),
        (lambda: rerank(query=5), "QUERY"),
        (lambda: rerank(documents=["a", None]), "DOCUMENTS"),
        (lambda: rerank(documents=[["a"], ["b"]]), "DOCUMENTS"),
        (lambda: rerank(documents=[b"a"]), "DOCUMENTS"),
        (lambda: rerank(instruction=5), "INSTRUCTION"),
        (lambda: generate("\ud800"), "PROMPT"),
        (lambda: rerank(documents=["ok", "half \udc00 of a pair"]), "DOCUMENTS"),
    ],
    ids=str,
)
def test_value_of_wrong_type_is_rejected_by_tensor_name(call: Callable[[], Call], tensor: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{tensor} ") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("neon", [("neon", 1.0)]),
        (("neon", 0.5), [("neon", 0.5)]),
        (["neon", np.float32(0.5)], [("neon", 0.5)]),
        ({"neon": 0.5, "other": -1}, [("neon", 0.5), ("other", -1.0)]),
        ({"name": 1.0}, [("name", 1.0)]),
        ({"name": "neon"}, [("neon", 1.0)]),
        ({"name": "neon", "weight": 0.5}, [("neon", 0.5)]),
        (["neon", "other"], [("neon", 1.0), ("other", 1.0)]),
        (("neon", ("other", 0.5), {"name": "third", "weight": 2}), [("neon", 1.0), ("other", 0.5), ("third", 2.0)]),
        ([("neon", 0.5), ("other", 0.25)], [("neon", 0.5), ("other", 0.25)]),
        ([["neon", 0.5], ["other", 0.25]], [("neon", 0.5), ("other", 0.25)]),
        (["\u4e00\U0001f43c"], [("\u4e00\U0001f43c", 1.0)]),
    ],
    ids=repr,
)
def test_every_form_of_adapters_becomes_the_tensor_s(given: Any, sent: list[tuple[str, float]]) -> None:
    tensor = json.loads(generate(lora=given).inputs["LORA"].item())
    assert tensor == [{"name": name, "weight": weight} for name, weight in sent]
    assert all(type(each["weight"]) is float for each in tensor)


@pytest.mark.parametrize("given", [None, (), [], {}], ids=repr)
def test_no_adapters_send_no_tensor(given: Any) -> None:
    assert "LORA" not in generate(lora=given).inputs


DEEP: list[Any] = []
for _ in range(5_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "LORA is 5; allowed: a name, (name, weight), {name: weight}, or a list of names"),
        (b"neon", "LORA is b'neon'; allowed: a name"),
        ([object()], "LORA is <object obj"),
        ([("neon", 0.5, 1)], "LORA is ('neon', 0.5, 1); allowed: a name"),
        ([{}], "LORA is {}; allowed: a name"),
        ([{"weight": 1.0}], "LORA is {'weight': 1.0}; allowed: a name"),
        ([{"name": "neon", "scale": 1.0}], "LORA is {'name': 'neon', 'scale': 1.0}; allowed: a name"),
        ([(7, 0.5)], "LORA is (7, 0.5); allowed: a name"),
        ([["a", ["b"]]], "LORA has the weight ['b'] for 'a'; allowed: a finite number"),
        (DEEP, "LORA is [[[["),
        ("", "LORA has the name ''; allowed: text, not empty"),
        ("\ud800", "LORA has the name '\\ud800'; allowed: text, not empty"),
        (("neon", None), "LORA has the weight None for 'neon'; allowed: a finite number"),
        (("neon", True), "LORA has the weight True for 'neon'; allowed: a finite number"),
        (("neon", float("nan")), "LORA has the weight nan for 'neon'; allowed: a finite number"),
        ({"neon": float("inf")}, "LORA has the weight inf for 'neon'; allowed: a finite number"),
        ({"neon": 10**400}, "LORA has the weight 1000"),
        ({"neon": "0.5"}, "LORA has the weight '0.5' for 'neon'; allowed: a finite number"),
    ],
    ids=lambda value: repr(value)[:40] if value is not DEEP else "deep",
)
def test_unusable_adapters_are_rejected(given: Any, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        generate(lora=given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("number", [np.int64(512), np.int32(512), True], ids=repr)
def test_integer_types_are_accepted(number: Any) -> None:
    assert generate(height=number).inputs["HEIGHT"].item() == int(number)


@pytest.mark.parametrize("number", [3, np.float32(3.0), np.int64(3)], ids=repr)
def test_real_number_types_are_accepted(number: Any) -> None:
    assert generate(guidance=number).inputs["GUIDANCE"].item() == 3.0


@pytest.mark.parametrize("level", [("high", 1), ("normal", 2), ("low", 3)], ids=str)
def test_priority_names_map_to_triton_levels(level: tuple[str, int]) -> None:
    name, number = level
    assert generate(priority=name).priority == number
    assert rerank(priority=name).priority == number
    assert tasks_call("list").priority == PRIORITIES["normal"]


@pytest.mark.parametrize("priority", ["urgent", "", "HIGH", 1, None], ids=repr)
def test_unknown_priority_is_rejected(priority: Any) -> None:
    with pytest.raises(InvalidInput, match="priority is .*; allowed: high, normal, low"):
        generate(priority=priority)


@pytest.mark.parametrize(
    "task_id", ["mine", "x" * 256, "\u4e00", "\U0001f43c"], ids=["short", "longest", "han", "panda"]
)
def test_task_id_is_the_request_id(task_id: str) -> None:
    call = generate(task_id=task_id)
    assert (call.request_id, call.inputs["TASK_ID"].item()) == (task_id, task_id.encode())
    assert rerank(task_id=task_id).request_id == task_id


def scores(*values: float, info: Any = None) -> dict[str, Any]:
    encoded = json.dumps(info or {}).encode()
    return {"SCORES": np.array([values], dtype=np.float32), "INFO": np.array([[encoded]], dtype=np.object_)}


def test_ranking_descends_and_keeps_indices() -> None:
    found = ranking(scores(0.25, 1.0, 0.5), ["a", "b", "c"], None)
    assert [(each.index, each.score, each.document) for each in found] == [(1, 1.0, "b"), (2, 0.5, "c"), (0, 0.25, "a")]


def test_ranking_has_all_scores_in_request_order_and_info() -> None:
    info = {"truncated": [2], "tokens": 7}
    found = ranking(scores(0.25, 1.0, 0.5, info=info), ["a", "b", "c"], 1)
    assert len(found) == 1
    assert found.scores == (0.25, 1.0, 0.5)
    assert found.truncated == (2,)
    assert found.info == info


def test_wrong_number_of_scores_is_a_server_error() -> None:
    with pytest.raises(ServerError, match="SCORES has 2 values for 3 documents"):
        ranking(scores(0.25, 1.0), ["a", "b", "c"], None)


def test_ties_keep_request_order() -> None:
    found = ranking(scores(0.5, 1.0, 0.5, 1.0, 0.5), list("abcde"), None)
    assert [each.document for each in found] == list("bdace")


@pytest.mark.parametrize(("top_n", "documents"), [(1, "b"), (2, "bc"), (3, "bca"), (99, "bca"), (None, "bca")], ids=str)
def test_top_n_limits_the_ranking(top_n: int | None, documents: str) -> None:
    found = ranking(scores(0.25, 1.0, 0.5), ["a", "b", "c"], top_n)
    assert [each.document for each in found] == list(documents)


def test_outputs_become_an_image() -> None:
    outputs = {
        "IMAGE": np.array([[b"\x89PNG\x00\x00"]], dtype=np.object_),
        "SEED": np.array([[2**63 - 1]], dtype=np.int64),
        "INFO": np.array([['{"steps": 4, "model": "\u4e00"}'.encode()]], dtype=np.object_),
    }
    image = generated_image(outputs)
    assert (image.data, image.seed, image.info) == (b"\x89PNG\x00\x00", 2**63 - 1, {"steps": 4, "model": "\u4e00"})


@pytest.mark.parametrize("info", [b"[]", b"{", b"\xff", b""], ids=["list", "half", "no-text", "empty"])
def test_malformed_info_is_a_server_error(info: bytes) -> None:
    outputs = {
        "IMAGE": np.array([[b""]], dtype=np.object_),
        "SEED": np.array([[0]], dtype=np.int64),
        "INFO": np.array([[info]], dtype=np.object_),
    }
    with pytest.raises(ServerError, match="INFO"):
        generated_image(outputs)


def task_outputs(task: Any, preview: bytes = b"") -> dict[str, Any]:
    return {
        "TASK": np.array([json.dumps(task).encode()], dtype=np.object_),
        "PREVIEW": np.array([preview], dtype=np.object_),
    }


RUNNING = {
    "task_id": "\u4e00",
    "state": "running",
    "step": 3,
    "steps": 28,
    "model": "flux",
    "instance": "flux_0_0",
    "error": None,
    "arrived": 1.5,
    "changed": 2.5,
}


def test_outputs_become_a_task_status_with_preview() -> None:
    expected: dict[str, Any] = {**RUNNING, "preview": b"\xff\xd8\x00"}
    assert task_status(task_outputs(RUNNING, b"\xff\xd8\x00")) == TaskStatus(**expected)


def test_unknown_task_has_default_fields() -> None:
    unknown = {"task_id": "x", "state": "unknown", "step": 0, "steps": 0, "instance": None}
    assert task_status(task_outputs(unknown)) == TaskStatus("x", "unknown")


def test_unknown_task_fields_are_ignored() -> None:
    assert task_status(task_outputs({**RUNNING, "speed": 3})) == task_status(task_outputs(RUNNING))


def test_task_list_is_parsed() -> None:
    assert [task.as_dict() for task in task_list(task_outputs([RUNNING, RUNNING]))] == [RUNNING, RUNNING]


@pytest.mark.parametrize(
    "outputs",
    [task_outputs([]), task_outputs({}), task_outputs({**RUNNING, "state": "lost"})],
    ids=["list", "empty", "state"],
)
def test_malformed_task_is_a_server_error(outputs: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="TASK"):
        task_status(outputs)


def test_malformed_task_list_is_a_server_error() -> None:
    with pytest.raises(ServerError, match="TASK is not a JSON list"):
        task_list(task_outputs({}))


# Rejected before any server is called: nothing listens at this address.


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda client: client.rerank("q", []), "DOCUMENTS is an empty list"),
        (lambda client: client.rerank("q", "one text"), "DOCUMENTS is one text"),
        (lambda client: client.rerank("q", ["a"], top_n=0), "top_n is 0; allowed: at least 1"),
        (lambda client: client.rerank("q", ["a"], timeout=0), "timeout is 0; allowed"),
        (lambda client: client.generate("p", timeout=-1), "timeout is -1; allowed"),
        (lambda client: client.generate("p", timeout=float("nan")), "timeout is nan; allowed"),
        (lambda client: client.generate("p", timeout=float("inf")), "timeout is inf; allowed"),
        (lambda client: client.generate("\ud800"), "PROMPT cannot be sent"),
        (lambda client: client.task(""), "TASK_ID is empty; allowed"),
        (lambda client: client.cancel(""), "TASK_ID is empty; allowed"),
    ],
    ids=[
        "no-documents",
        "one-text",
        "top_n",
        "timeout-0",
        "timeout-negative",
        "timeout-nan",
        "timeout-inf",
        "surrogate",
        "task",
        "cancel",
    ],
)
def test_client_rejects_invalid_arguments_without_a_server(ask: Callable[[Client], Any], message: str) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidInput) as caught:
        ask(client)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("option", ["url", "transport"])
def test_empty_server_list_is_rejected(option: str) -> None:
    with pytest.raises(InvalidInput, match=f"{option} is an empty list; allowed: at least one"):
        Client(**{option: []})


@pytest.mark.parametrize("retry_for", [-1, float("nan"), float("inf")], ids=str)
def test_invalid_retry_for_is_rejected(retry_for: float) -> None:
    with pytest.raises(InvalidInput, match="retry_for is"):
        Client("localhost:1", retry_for=retry_for)
