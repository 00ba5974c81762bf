"""`rerank`, query against documents: tensors to requests, results to tensors. The rest is in genserve_backend."""

from __future__ import annotations

import json
from typing import Any

from genserve_backend.adapter.instance import Instance
from genserve_backend.adapter.metrics import RERANK
from genserve_backend.adapter.reply import Row
from genserve_backend.adapter.tensors import Values, bytes_tensor, number_tensor, read_rows
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest, validate
from genserve_backend.settings import RerankSettings


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the worker and wait until it has loaded the checkpoint."""
        self.instance: Instance[RerankSettings, RerankCheckpoint] = Instance(
            args,
            settings=RerankSettings,
            read=RerankCheckpoint.read,
            engine="genserve_backend.rerank.load:build",
            families=RERANK,
        )

    def execute(self, requests: list[Any]) -> None:
        """Take the requests, then block while the instance is full. Their answers are sent as they get ready."""
        for request in requests:
            self.instance.take(request, read=self.read, build=self.outputs)
        self.instance.wait_for_slot()

    def read(self, request: Any) -> list[tuple[Values, RerankRequest]]:
        """Each row's values, and the checked request that they make."""
        rows = []
        for values in read_rows(request, scalars=("QUERY", "INSTRUCTION", "WINDOWS"), lists=("DOCUMENTS",)):
            engine_request = RerankRequest(
                query=values["QUERY"],
                documents=tuple(values["DOCUMENTS"]),
                instruction=values.get("INSTRUCTION") or None,
                windows=values.get("WINDOWS", 1),
            )
            validate(engine_request)
            rows.append((values, engine_request))
        return rows

    def outputs(self, rows: list[Row]) -> list[Any]:
        """SCORES ``[B, N]`` in the order of the documents, and INFO ``[B, 1]``."""
        scores = [row.result.scores for row in rows]
        return [
            number_tensor("SCORES", scores, (len(rows), len(scores[0])), "float32"),
            bytes_tensor("INFO", [self.info(row) for row in rows], (len(rows), 1)),
        ]

    def info(self, row: Row) -> str:
        """The INFO of one row, as JSON."""
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
