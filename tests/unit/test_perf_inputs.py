"""The load test's inputs are ones that the models accept, and are varied enough to mean something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, parse
from genserve_backend.rerank.request import RerankRequest, validate

ROOT = Path(__file__).parents[2]
CHECKPOINT = FluxCheckpoint(
    path=Path("flux"), name="flux", native_size=128, guidance_embeds=True, max_sequence_length=64
)


def rows(model: str) -> list[dict[str, Any]]:
    data = json.loads((ROOT / "perf" / "inputs" / f"{model}.json").read_text(encoding="utf-8"))["data"]
    assert isinstance(data, list)
    return data


def flux_request(row: dict[str, Any]) -> FluxRequest:
    assert all(len(content) == 1 for content in row.values())
    return parse({name: content[0] for name, content in row.items()}, CHECKPOINT, max_pixels=128 * 128)


def rerank_request(row: dict[str, Any]) -> RerankRequest:
    documents = row["DOCUMENTS"]
    assert documents["shape"] == [len(documents["content"])]
    return RerankRequest(row["QUERY"][0], tuple(documents["content"]), row.get("INSTRUCTION", [None])[0])


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_rows_have_the_models_tensors(model: str) -> None:
    text = (ROOT / "model_repository" / model / "config.pbtxt").read_text()
    inputs = text_format.Parse(text, model_config_pb2.ModelConfig()).input
    required = {each.name for each in inputs if not each.optional}
    for row in rows(model):
        assert required <= set(row) <= {each.name for each in inputs}


@pytest.mark.parametrize("row", rows("flux"), ids=lambda row: row["PROMPT"][0][:24])
def test_flux_accepts(row: dict[str, Any]) -> None:
    request = flux_request(row)
    assert request.seed == row["SEED"][0], "a drawn seed would make runs differ"


def test_flux_rows_vary() -> None:
    requests = [flux_request(row) for row in rows("flux")]
    assert len({request.prompt for request in requests}) == len(requests) >= 16
    assert len({request.seed for request in requests}) >= 12
    assert {request.steps for request in requests} == {4, 8, 20}
    assert len({(request.height, request.width) for request in requests}) >= 4
    assert any(request.negative_prompt for request in requests)


@pytest.mark.parametrize("row", rows("rerank"), ids=lambda row: row["QUERY"][0][:24])
def test_rerank_accepts(row: dict[str, Any]) -> None:
    request = rerank_request(row)
    validate(request)
    lengths = [len(document) for document in request.documents]
    assert len(set(request.documents)) == 8
    assert max(lengths) > 10 * min(lengths), "lengths vary as they do in real use"


def test_rerank_rows_vary() -> None:
    requests = [rerank_request(row) for row in rows("rerank")]
    assert len({request.query for request in requests}) == len(requests) >= 8
