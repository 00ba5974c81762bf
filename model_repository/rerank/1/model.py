"""The `rerank` model, query against documents: tensors to requests, and results to tensors."""

from __future__ import annotations

import json
from typing import Any

from genserve_backend.adapter.instance import Instance
from genserve_backend.adapter.reply import Reply
from genserve_backend.adapter.rows import AnsweredRow, ParsedRow, parse_options, task_ids
from genserve_backend.adapter.tensors import bytes_tensor, number_tensor, parse_rows
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.metrics import METRICS
from genserve_backend.rerank.request import parse
from genserve_backend.settings import RerankSettings

INPUTS = ("QUERY", "INSTRUCTION", "WINDOWS")
LIST_INPUTS = ("DOCUMENTS",)


class TritonPythonModel:
    """Interface to Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the worker and wait until it has loaded the checkpoint."""
        self.instance: Instance[RerankSettings, RerankCheckpoint] = Instance(
            args,
            settings=RerankSettings,
            load_checkpoint=RerankCheckpoint.load,
            engine="genserve_backend.rerank.build:build",
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
        rows = parse_rows(request, scalars=INPUTS, lists=LIST_INPUTS)
        rankings = [parse(values) for values in rows]
        return [ParsedRow(*row) for row in zip(task_ids(rows, request.request_id()), rankings, strict=True)]

    def outputs(self, rows: list[AnsweredRow]) -> list[Any]:
        """Return SCORES ``[B, N]`` in the order of the documents, and INFO ``[B, 1]``."""
        scores = [row.result.scores for row in rows]
        return [
            number_tensor("SCORES", scores, (len(rows), len(scores[0])), "float32"),
            bytes_tensor("INFO", [self.info(row) for row in rows], (len(rows), 1)),
        ]

    def info(self, row: AnsweredRow) -> str:
        """Return the INFO of one row, as JSON."""
        return json.dumps(
            {
                "task_id": row.task_id,
                "model": self.instance.checkpoint.name,
                **self.instance.place.describe(),
                "tokens": row.result.tokens,
                "truncated": row.result.truncated,
                "queue_s": round(row.result.queue_s, 6),
                "elapsed_time": round(row.result.elapsed_time, 6),
            }
        )

    def finalize(self) -> None:
        """End the worker."""
        self.instance.close()
