"""Transport over Triton's gRPC endpoint."""

from __future__ import annotations

import asyncio
from typing import Any

import tritonclient.grpc.aio as triton_grpc

from genserve.access import TLS, Address
from genserve.errors import DeadlineExceeded, InvalidInput
from genserve.per_loop import PerLoop
from genserve.protocol import Call, Outputs
from genserve.wire import PROBE_TIMEOUT_S, all_headers, infer_options, input_tensor, parse_outputs, translated

MAX_MESSAGE_BYTES = 2**31 - 1
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Reconnect to a restarted server within a second; gRPC's default backoff is longer.
    ("grpc.max_reconnect_backoff_ms", 1000),
)
LINGER_S = 5.0
"""Seconds for a request that was given up to end by itself, before it is cancelled over gRPC."""
CLOSE_S = 1.0
"""Part of them for which closing waits."""


class GrpcTransport:
    """Transport over gRPC. Headers are sent as metadata.

    A request that is given up is not cancelled over gRPC at once. Before release 25.04, a cancellation that meets a
    request's arrival or answer can crash Triton (github.com/triton-inference-server/server/issues/8034), and with it
    all other requests. The pool cancels the task instead, as over HTTP, and the request ends by itself.
    """

    def __init__(self, url: str, address: Address, tls: TLS, headers: dict[str, str]) -> None:
        self.url = url
        # gRPC requires lower-case names.
        self._headers = {name.lower(): value for name, value in headers.items()}
        options = [*CHANNEL_OPTIONS, *_names(address)]
        security = _security(tls) if address.is_secure else {}
        self._clients = PerLoop(
            lambda: triton_grpc.InferenceServerClient(address.authority, channel_args=options, **security)
        )
        self._lingering: set[asyncio.Task[Any]] = set()

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        inputs = [input_tensor(triton_grpc.InferInput, name, array) for name, array in call.inputs.items()]
        answer = asyncio.ensure_future(
            self._clients.get().infer(
                call.model,
                inputs,
                outputs=[triton_grpc.InferRequestedOutput(name) for name in call.outputs],
                headers=all_headers(self._headers),
                client_timeout=timeout_s + LINGER_S,
                **infer_options(call, timeout_s),
            )
        )
        try:
            with translated(self.url, call.request_id):
                await asyncio.wait({answer}, timeout=timeout_s)
                if not answer.done():
                    raise DeadlineExceeded(f"{self.url} did not answer in time")
                return parse_outputs(answer.result(), call)
        finally:
            self._let_end(answer)

    async def live(self) -> bool:
        """See Transport."""
        return bool(await self._ask("is_server_live"))

    async def ready(self, model: str = "") -> bool:
        """See AsyncTransport."""
        return bool(await (self._ask("is_model_ready", model) if model else self._ask("is_server_ready")))

    async def metadata(self) -> dict[str, Any]:
        """See Transport."""
        return dict(await self._ask("get_server_metadata", as_json=True))

    async def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        return list((await self._ask("get_model_repository_index", as_json=True)).get("models", []))

    async def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        return list((await self._ask("get_inference_statistics", as_json=True)).get("model_stats", []))

    async def close(self) -> None:
        """See Transport."""
        if self._lingering:
            await asyncio.wait(self._lingering, timeout=CLOSE_S)
        client = self._clients.pop()
        if client is not None:
            await client.close()

    def _let_end(self, answer: asyncio.Task[Any]) -> None:
        """Give an unfinished request time to end. Nobody is left to hear of its result."""
        answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        if answer.done():
            return
        self._lingering.add(answer)
        answer.add_done_callback(self._lingering.discard)
        asyncio.get_running_loop().call_later(LINGER_S, answer.cancel)

    async def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        with translated(self.url):
            ask = getattr(self._clients.get(), method)
            return await ask(*arguments, headers=all_headers(self._headers), client_timeout=PROBE_TIMEOUT_S, **options)


def _names(address: Address) -> list[tuple[str, str]]:
    """Return the options that connect to one address of a name as if it were the name."""
    if not address.named:
        return []
    name = address.named.rpartition(":")[0].strip("[]")
    return [
        ("grpc.default_authority", address.named),
        *([("grpc.ssl_target_name_override", name)] if address.is_secure else []),
    ]


def _security(tls: TLS) -> dict[str, Any]:
    tls.context()  # Rejects invalid files now; gRPC would only fail to connect later.
    if not tls.verify:
        raise InvalidInput("TLS verify is False; allowed over gRPC: True, with the server's own certificate as ca")
    return {
        "ssl": True,
        "root_certificates": tls.ca and str(tls.ca),
        "certificate_chain": tls.cert and str(tls.cert),
        "private_key": tls.key and str(tls.key),
    }
