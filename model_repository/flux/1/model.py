"""The `flux` model, text to image: tensors to requests, and results to tensors."""

from __future__ import annotations

import base64
import json
from typing import Any

from genserve_backend.adapter.instance import Instance
from genserve_backend.adapter.reply import Reply
from genserve_backend.adapter.rows import AnsweredRow, ParsedRow, parse_options, task_ids
from genserve_backend.adapter.tensors import bytes_tensor, number_tensor, parse_rows
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.image_file import generation_settings
from genserve_backend.flux.metrics import METRICS
from genserve_backend.flux.request import parse
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
    "CACHE",
    "LORA",
    "FORMAT",
    "ENCODING",
    "TASK_ID",
)
TIMINGS = (
    "queue_s",
    "encode_s",
    "denoise_s",
    "decode_s",
    "elapsed_time",
    "deadline_left_s",
    "mean_batch_size",
    "skipped_steps",
)


class TritonPythonModel:
    """Interface to Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the worker and wait until it has loaded the checkpoint."""
        self.instance: Instance[FluxSettings, FluxCheckpoint] = Instance(
            args,
            settings=FluxSettings,
            load_checkpoint=FluxCheckpoint.load,
            engine="genserve_backend.flux.build:build",
            metrics=METRICS,
        )

    def execute(self, requests: list[Any]) -> None:
        """Submit the requests, then block while the instance is full. Each answer is sent when it is ready."""
        for request in requests:
            reply = Reply(request, self.outputs)
            with reply.catch_errors():
                options = parse_options(request)
                self.instance.submit(reply, self.parse(request), options)
        self.instance.wait_for_slot()

    def parse(self, request: Any) -> list[ParsedRow]:
        """Parse the rows of a request."""
        rows = parse_rows(request, scalars=INPUTS)
        settings = self.instance.settings
        images = [
            parse(
                values,
                self.instance.checkpoint,
                max_pixels=settings.max_pixels,
                cache_method=settings.cache_method,
            )
            for values in rows
        ]
        return [ParsedRow(*row) for row in zip(task_ids(rows, request.request_id()), images, strict=True)]

    def outputs(self, rows: list[AnsweredRow]) -> list[Any]:
        """Return IMAGE, SEED and INFO, each ``[B, 1]``."""
        shape = (len(rows), 1)
        return [
            bytes_tensor("IMAGE", [self.image(row) for row in rows], shape),
            number_tensor("SEED", [row.request.seed for row in rows], shape, "int64"),
            bytes_tensor("INFO", [self.info(row) for row in rows], shape),
        ]

    def image(self, row: AnsweredRow) -> bytes:
        """Return the image file in the encoding that the caller chose."""
        data: bytes = row.result.image
        return base64.b64encode(data) if row.request.encoding == "base64" else data

    def info(self, row: AnsweredRow) -> str:
        """Return the INFO of one image, as JSON."""
        place = self.instance.place
        timings = {name: round(getattr(row.result, name), 6) for name in TIMINGS}
        settings = generation_settings(row.request, model=self.instance.checkpoint.name, dtype=row.result.dtype)
        return json.dumps({"task_id": row.task_id, **place.describe(), "gpu_id": place.gpu_id, **timings, **settings})

    def finalize(self) -> None:
        """End the worker."""
        self.instance.close()
