"""`flux`, text to image: tensors to requests, results to tensors. What happens between is in genserve_backend."""

from __future__ import annotations

import base64
import json
from typing import Any

from genserve_backend.adapter.instance import Instance
from genserve_backend.adapter.metrics import FLUX
from genserve_backend.adapter.reply import Row
from genserve_backend.adapter.tensors import Values, bytes_tensor, number_tensor, read_rows
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.images import generation_settings
from genserve_backend.flux.request import FluxRequest, parse
from genserve_backend.settings import FluxSettings

INPUTS = (
    "PROMPT",
    "NEGATIVE_PROMPT",
    "TRUE_CFG_SCALE",
    "HEIGHT",
    "WIDTH",
    "STEPS",
    "GUIDANCE",
    "SEED",
    "LORA",
    "FORMAT",
    "ENCODING",
    "TASK_ID",
)
TIMINGS = ("queue_s", "encode_s", "denoise_s", "decode_s", "elapsed_time", "mean_batch_size")


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the worker and wait until it has loaded the checkpoint."""
        self.instance: Instance[FluxSettings, FluxCheckpoint] = Instance(
            args,
            settings=FluxSettings,
            read=FluxCheckpoint.read,
            engine="genserve_backend.flux.load:build",
            families=FLUX,
        )

    def execute(self, requests: list[Any]) -> None:
        """Take the requests, then block while the instance is full. Their answers are sent as they get ready."""
        for request in requests:
            self.instance.take(request, read=self.read, build=self.outputs)
        self.instance.wait_for_slot()

    def read(self, request: Any) -> list[tuple[Values, FluxRequest]]:
        """Each row's values, and the checked request that they make."""
        rows = read_rows(request, scalars=INPUTS)
        max_pixels = self.instance.settings.max_pixels
        return [(row, parse(row, self.instance.checkpoint, max_pixels=max_pixels)) for row in rows]

    def outputs(self, rows: list[Row]) -> list[Any]:
        """IMAGE, SEED and INFO, each ``[B, 1]``."""
        shape = (len(rows), 1)
        return [
            bytes_tensor("IMAGE", [self.image(row) for row in rows], shape),
            number_tensor("SEED", [row.request.seed for row in rows], shape, "int64"),
            bytes_tensor("INFO", [self.info(row) for row in rows], shape),
        ]

    def image(self, row: Row) -> bytes:
        """The image file, as the caller wants it to travel."""
        data: bytes = row.result.image
        return base64.b64encode(data) if row.request.encoding == "base64" else data

    def info(self, row: Row) -> str:
        """The INFO of one image, as JSON."""
        place = self.instance.place
        timings = {name: round(getattr(row.result, name), 6) for name in TIMINGS}
        settings = generation_settings(row.request, model=self.instance.checkpoint.name, dtype=row.result.dtype)
        return json.dumps({"task_id": row.task_id, **place.describe(), "gpu_id": place.gpu_id, **timings, **settings})

    def finalize(self) -> None:
        """End the worker."""
        self.instance.close()
