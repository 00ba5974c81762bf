"""Invalid input: every error of the contract that input can cause, and malformed bytes."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from blocking import BlockingTransport
from conftest import Server
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from genserve import Client, InvalidInput, ServerUnavailable

GOOD = {"PROMPT": b"good"}
NUMPY = {"STEPS": np.int32, "HEIGHT": np.int32, "WIDTH": np.int32, "SEED": np.int64}
NUMPY |= {"GUIDANCE": np.float32, "TRUE_CFG_SCALE": np.float32, "CACHE": np.float32}
TRITON = {np.int32: "INT32", np.int64: "INT64", np.float32: "FP32"}

BAD = [
    pytest.param({"PROMPT": b""}, "PROMPT", id="empty-prompt"),
    pytest.param({"PROMPT": b"x" * 10_001}, "PROMPT", id="long-prompt"),
    pytest.param({"PROMPT": b"\xff\xfe"}, "PROMPT", id="not-utf-8"),
    pytest.param({"NEGATIVE_PROMPT": b"x" * 10_001}, "NEGATIVE_PROMPT", id="long-negative-prompt"),
    pytest.param({"STEPS": 0}, "STEPS", id="no-steps"),
    pytest.param({"STEPS": 101}, "STEPS", id="too-many-steps"),
    pytest.param({"STEPS": -(2**31)}, "STEPS", id="negative-steps"),
    pytest.param({"HEIGHT": 48}, "HEIGHT", id="small"),
    pytest.param({"HEIGHT": 100}, "HEIGHT", id="odd-size"),
    pytest.param({"WIDTH": -64}, "WIDTH", id="negative-size"),
    pytest.param({"WIDTH": 2**31 - 16}, "HEIGHT x WIDTH", id="huge"),
    pytest.param({"GUIDANCE": float("nan")}, "GUIDANCE", id="nan"),
    pytest.param({"GUIDANCE": float("inf")}, "GUIDANCE", id="infinite"),
    pytest.param({"GUIDANCE": 20.5}, "GUIDANCE", id="guidance-above-range"),
    pytest.param({"TRUE_CFG_SCALE": 0.5}, "TRUE_CFG_SCALE", id="cfg-below-range"),
    pytest.param({"CACHE": float("nan")}, "CACHE", id="cache-nan"),
    pytest.param({"CACHE": -0.1}, "CACHE", id="negative-cache"),
    pytest.param({"CACHE": 1.5}, "CACHE", id="cache-above-range"),
    pytest.param({"SEED": -2}, "SEED", id="negative-seed"),
    pytest.param({"SEED": -(2**63)}, "SEED", id="smallest-seed"),
    pytest.param({"FORMAT": b"gif"}, "FORMAT", id="unknown-format"),
    pytest.param({"ENCODING": b"hex"}, "ENCODING", id="unknown-encoding"),
    pytest.param({"LORA": b"{"}, "LORA", id="bad-json"),
    pytest.param({"LORA": b"[" * 4_000}, "LORA", id="deep-json"),
    pytest.param({"LORA": b"[" * 100_000}, "LORA", id="long-json"),
    pytest.param({"LORA": b'[{"name": "../../etc/passwd", "weight": 1.0}]'}, "LORA", id="path-as-adapter"),
    pytest.param({"TASK_ID": b"x" * 257}, "TASK_ID", id="long-task-id"),
]


def tensors(module: Any, values: dict[str, Any]) -> list[Any]:
    made = []
    for name, value in {**GOOD, **values}.items():
        dtype = NUMPY.get(name)
        tensor = module.InferInput(name, [1, 1], TRITON[dtype] if dtype else "BYTES")
        tensor.set_data_from_numpy(np.array([[value]], dtype=dtype or object))
        made.append(tensor)
    return made


@pytest.fixture(scope="module")
def both(running_server: Server) -> list[tuple[Any, Any, str]]:
    running_server.wait_ready()
    return [
        (triton_grpc, triton_grpc.InferenceServerClient(running_server.grpc), "StatusCode.INVALID_ARGUMENT"),
        (triton_http, triton_http.InferenceServerClient(f"localhost:{running_server.http_port}"), "400"),
    ]


@pytest.fixture(autouse=True)
def unharmed(running_server: Server) -> Iterator[None]:
    """Check after a test that no process ended and that a valid request succeeds."""
    running_server.wait_ready()
    before = {process.pid for process in running_server.family()}
    yield
    with Client(running_server.grpc) as client:
        assert client.generate("still well", steps=1, height=64, width=64).data
        assert client.rerank("still well", ["yes"])
    assert {process.pid for process in running_server.family()} == before


@pytest.mark.parametrize(("values", "tensor"), BAD)
def test_value_out_of_range_names_its_tensor(
    both: list[tuple[Any, Any, str]], values: dict[str, Any], tensor: str
) -> None:
    for module, client, status in both:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("flux", tensors(module, values))
        assert caught.value.status() == status
        assert caught.value.message().startswith(f"InvalidInput: {tensor} ")
        assert "; allowed: " in caught.value.message()
        assert len(caught.value.message()) < 300


def test_wrong_shapes_and_types_are_rejected(both: list[tuple[Any, Any, str]]) -> None:
    for module, client, status in both:
        wide = module.InferInput("PROMPT", [1, 2], "BYTES")
        wide.set_data_from_numpy(np.array([[b"a", b"b"]], dtype=object))
        flat = module.InferInput("PROMPT", [1], "BYTES")
        flat.set_data_from_numpy(np.array([b"a"], dtype=object))
        number = module.InferInput("PROMPT", [1, 1], "INT32")
        number.set_data_from_numpy(np.array([[1]], dtype=np.int32))
        many = module.InferInput("PROMPT", [9, 1], "BYTES")
        many.set_data_from_numpy(np.array([[b"a"]] * 9, dtype=object))
        none = module.InferInput("PROMPT", [0, 1], "BYTES")
        none.set_data_from_numpy(np.empty((0, 1), dtype=object))
        steps = module.InferInput("STEPS", [1, 1], "INT32")
        steps.set_data_from_numpy(np.array([[1]], dtype=np.int32))
        for inputs in ([wide], [flat], [number], [many], [none], [steps], [many, steps], []):
            with pytest.raises(InferenceServerException) as caught:
                client.infer("flux", inputs)
            assert caught.value.status() == status, (caught.value, [each.shape() for each in inputs])


def test_uneven_documents_and_missing_tensors_are_rejected(both: list[tuple[Any, Any, str]]) -> None:
    for module, client, status in both:
        query = module.InferInput("QUERY", [1, 1], "BYTES")
        query.set_data_from_numpy(np.array([[b"q"]], dtype=object))
        documents = module.InferInput("DOCUMENTS", [1, 0], "BYTES")
        documents.set_data_from_numpy(np.empty((1, 0), dtype=object))
        raw = module.InferInput("DOCUMENTS", [1, 2], "BYTES")
        raw.set_data_from_numpy(np.array([[b"fine", b"\xc3\x28"]], dtype=object))
        for inputs in ([query], [query, documents], [query, raw]):
            with pytest.raises(InferenceServerException) as caught:
                client.infer("rerank", inputs)
            assert caught.value.status() == status, caught.value


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x05\x00\x00", id="cut-length"),
        pytest.param(struct.pack("<I", 2**32 - 1) + b"abc", id="length-beyond-the-end"),
        pytest.param(struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b", id="two-strings-for-one"),
    ],
)
def test_malformed_strings_do_not_reach_the_model(server: Server, raw: bytes) -> None:
    request = service_pb2.ModelInferRequest(model_name="flux")
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = "PROMPT", "BYTES"
    tensor.shape.extend([1, 1])
    request.raw_input_contents.append(raw)
    with grpc.insecure_channel(server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def prompt_of_shape(*shape: int) -> bytes:
    prompt = {"name": "PROMPT", "shape": shape, "datatype": "BYTES", "data": ["x"]}
    return json.dumps({"inputs": [prompt]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half-json"),
        pytest.param(b"[" * 100_000, id="deep-json"),
        pytest.param(b"\xff\x00", id="no-text"),
        pytest.param(json.dumps({"inputs": "x"}).encode(), id="wrong-kind"),
        pytest.param(
            json.dumps(
                {"inputs": [{"name": "PROMPT", "shape": [2**40, 1], "datatype": "BYTES", "data": ["x"]}]}
            ).encode(),
            id="huge-shape",
        ),
        pytest.param(
            json.dumps({"inputs": [{"name": "PROMPT", "shape": [-1, 1], "datatype": "BYTES", "data": ["x"]}]}).encode(),
            id="negative-shape",
        ),
    ],
)
def test_malformed_http_body_gets_an_error(server: Server, body: bytes) -> None:
    for verb in ("infer", "generate"):
        connection = http.client.HTTPConnection("localhost", server.http_port, timeout=30)
        connection.request("POST", f"/v2/models/flux/{verb}", body)
        assert 400 <= connection.getresponse().status < 600
        connection.close()


def test_connection_cut_within_a_request_does_no_harm(server: Server) -> None:
    with socket.create_connection(("localhost", server.http_port)) as connection:
        connection.sendall(b"POST /v2/models/flux/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")


def test_unknown_model_and_missing_server_are_reported(server: Server) -> None:
    from genserve.protocol import Call

    call = Call("nothing", {"PROMPT": np.array([[b"x"]], dtype=object)}, ("IMAGE",))
    for url in (server.grpc, server.http):
        with pytest.raises((ServerUnavailable, InvalidInput), match="nothing"):
            BlockingTransport(url).infer(call, 10.0)
    for url in ("localhost:1", "http://localhost:1"):
        with Client(url) as client, pytest.raises(ServerUnavailable, match="localhost:1"):
            client.generate("x")
