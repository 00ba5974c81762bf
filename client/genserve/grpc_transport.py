"""Transport over Triton's gRPC endpoint."""

from __future__ import annotations

from typing import Any

import tritonclient.grpc as triton_grpc

from genserve.access import TLS, Address
from genserve.errors import InvalidInput
from genserve.protocol import Call, Outputs
from genserve.wire import PROBE_TIMEOUT_S, infer_options, input_tensor, parse_outputs, translated

MAX_MESSAGE_BYTES = 2**31 - 1


class GrpcTransport:
    """Transport over gRPC. Headers are sent as metadata."""

    def __init__(self, url: str, address: Address, tls: TLS, headers: dict[str, str]) -> None:
        self.url = url
        # gRPC requires lower-case names.
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._client = triton_grpc.InferenceServerClient(
            address.authority,
            channel_args=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # Reconnect to a restarted server within a second; gRPC's default backoff is longer.
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
            **(_security(tls) if address.is_secure else {}),
        )

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        inputs = [input_tensor(triton_grpc.InferInput, name, array) for name, array in call.inputs.items()]
        with translated(self.url, call.request_id):
            result = self._client.infer(
                call.model,
                inputs,
                outputs=[triton_grpc.InferRequestedOutput(name) for name in call.outputs],
                headers=self._headers,
                client_timeout=timeout_s,
                **infer_options(call, timeout_s),
            )
            return parse_outputs(result, call)

    def live(self) -> bool:
        """See Transport."""
        return bool(self._probe(self._client.is_server_live))

    def ready(self) -> bool:
        """See Transport."""
        return bool(self._probe(self._client.is_server_ready))

    def metadata(self) -> dict[str, Any]:
        """See Transport."""
        return dict(self._probe(self._client.get_server_metadata, as_json=True))

    def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        return list(self._probe(self._client.get_model_repository_index, as_json=True).get("models", []))

    def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        return list(self._probe(self._client.get_inference_statistics, as_json=True).get("model_stats", []))

    def close(self) -> None:
        """See Transport."""
        self._client.close()

    def _probe(self, method: Any, **options: Any) -> Any:
        with translated(self.url):
            return method(headers=self._headers, client_timeout=PROBE_TIMEOUT_S, **options)


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
