"""Small servers that speak Triton's protocols, for tests of whole client processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

LENGTH = "Inference-Header-Content-Length"
LONGEST_S = 20.0
"""Seconds after which a held request is answered, so that no thread is left behind."""
ANSWERS: dict[str, dict[str, Any]] = {
    "flux": {"IMAGE": [[b""]], "SEED": [[7]], "INFO": [[b'{"steps": 4}']]},
    "rerank": {"SCORES": [[0.5]], "INFO": [[b"{}"]]},
    "tasks": {"TASK": [b'{"task_id": "x", "state": "unknown", "step": 0, "steps": 0}'], "PREVIEW": [b""]},
}
DATATYPES = {"SEED": "INT64", "SCORES": "FP32"}
NUMPY = {"INT64": np.int64, "FP32": np.float32, "BYTES": np.object_}


class FakeTriton:
    """State of a server.

    Attributes:
        url: Its address for clients.
        prompts: Prompts of the flux requests, in order.
        cancelled: Ids of the requests that a client has cancelled.
        delay_s: Seconds until a flux request is answered with its prompt as the image.
        held: Flux requests are not answered until `release` is set.
        arrived: Set once a held request is there.
    """

    def __init__(self) -> None:
        self.url = ""
        self.prompts: list[str] = []
        self.cancelled: list[str] = []
        self.delay_s = 0.0
        self.held = False
        self.arrived = threading.Event()
        self.release = threading.Event()

    def answer(self, model: str, request_id: str, inputs: dict[str, bytes]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs by name."""
        values = dict(ANSWERS[model])
        if model == "flux":
            self.prompts.append(inputs["PROMPT"].decode())
            values["IMAGE"] = [[inputs["PROMPT"]]]
            if self.held:
                self.arrived.set()
                self.release.wait(LONGEST_S)
            time.sleep(self.delay_s)
        elif model == "tasks" and inputs["ACTION"] == b"cancel":
            self.cancelled.append(inputs["TASK_ID"].decode())
        return {name: np.array(value, NUMPY[DATATYPES.get(name, "BYTES")]) for name, value in values.items()}


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, state: FakeTriton) -> None:
        super().__init__(("127.0.0.1", 0), HttpHandler)
        self.state = state

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Expect clients that are killed."""


class HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for an acknowledgement of its headers
    server: HttpServer

    def do_GET(self) -> None:
        self.send([], b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers.get(LENGTH, len(body)))
        request, data = json.loads(body[:length]), body[length:]
        inputs = {}
        for tensor in request["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            if tensor["datatype"] == "BYTES":
                inputs[tensor["name"]] = deserialize_bytes_tensor(data[:size])[0]
            data = data[size:]
        outputs = self.server.state.answer(self.path.split("/")[3], request.get("id", ""), inputs)
        contents = [raw(array) for array in outputs.values()]
        described = [
            {
                "name": name,
                "datatype": DATATYPES.get(name, "BYTES"),
                "shape": array.shape,
                "parameters": {"binary_data_size": len(content)},
            }
            for (name, array), content in zip(outputs.items(), contents, strict=True)
        ]
        self.send(described, b"".join(contents))

    def send(self, outputs: list[dict[str, Any]], data: bytes) -> None:
        header = json.dumps({"model_name": "x", "outputs": outputs}).encode()
        self.send_response(200)
        self.send_header(LENGTH, str(len(header)))
        self.send_header("Content-Length", str(len(header) + len(data)))
        self.end_headers()
        self.wfile.write(header + data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


class GrpcHandler(grpc.GenericRpcHandler):
    def __init__(self, state: FakeTriton) -> None:
        self.state = state

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            self.infer if call.method.endswith("/ModelInfer") else lambda *_: messages.ServerReadyResponse(ready=True),
            request_deserializer=messages.ModelInferRequest.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )

    def infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        answered = threading.Event()
        context.add_callback(lambda: answered.is_set() or self.state.cancelled.append(request.id))
        inputs = {
            tensor.name: deserialize_bytes_tensor(data)[0]
            for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True)
            if tensor.datatype == "BYTES"
        }
        outputs = self.state.answer(request.model_name, request.id, inputs)
        answered.set()
        return messages.ModelInferResponse(
            model_name=request.model_name,
            outputs=[
                messages.ModelInferResponse.InferOutputTensor(
                    name=name, datatype=DATATYPES.get(name, "BYTES"), shape=array.shape
                )
                for name, array in outputs.items()
            ],
            raw_output_contents=[raw(array) for array in outputs.values()],
        )


def raw(array: np.ndarray[Any, Any]) -> bytes:
    """Return an array in Triton's binary form."""
    return bytes(serialize_byte_tensor(array).item()) if array.dtype == np.object_ else array.tobytes()


@contextmanager
def fake_triton(protocol: str = "http") -> Iterator[FakeTriton]:
    """Run a server that answers flux, rerank and tasks over ``http`` or ``grpc``."""
    state = FakeTriton()
    if protocol == "http":
        with HttpServer(state) as server:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            state.url = f"http://127.0.0.1:{server.server_port}"
            try:
                yield state
            finally:
                state.release.set()
                server.shutdown()
        return
    with ThreadPoolExecutor(16) as pool:
        rpc = grpc.server(pool, handlers=[GrpcHandler(state)])
        state.url = f"127.0.0.1:{rpc.add_insecure_port('127.0.0.1:0')}"
        rpc.start()
        try:
            yield state
        finally:
            state.release.set()
            rpc.stop(0).wait(10)
