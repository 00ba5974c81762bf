"""The load test's inputs: accepted by the models, and varied enough for a meaningful load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest
from genserve_backend.flux.request import parse as parse_flux
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.request import parse as parse_rerank

ROOT = Path(__file__).parents[2]
CHECKPOINT = FluxCheckpoint(
    path=Path("flux"), name="flux", native_size=128, guidance_embeds=True, max_sequence_length=64
)


def entries(model: str) -> list[dict[str, Any]]:
    data = json.loads((ROOT / "perf" / "load" / "inputs" / f"{model}.json").read_text(encoding="utf-8"))["data"]
    assert isinstance(data, list)
    return data


def flux_request(entry: dict[str, Any]) -> FluxRequest:
    assert all(len(content) == 1 for content in entry.values())
    return parse_flux({name: content[0] for name, content in entry.items()}, CHECKPOINT, max_pixels=128 * 128)


def rerank_request(entry: dict[str, Any]) -> RerankRequest:
    documents = entry["DOCUMENTS"]
    assert documents["shape"] == [len(documents["content"])]
    scalars = {name: content[0] for name, content in entry.items() if name != "DOCUMENTS"}
    return parse_rerank({**scalars, "DOCUMENTS": documents["content"]})


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_requests_have_the_models_tensors(model: str) -> None:
    text = (ROOT / "model_repository" / model / "config.pbtxt").read_text()
    inputs = text_format.Parse(text, model_config_pb2.ModelConfig()).input
    required = {each.name for each in inputs if not each.optional}
    for entry in entries(model):
        assert required <= set(entry) <= {each.name for each in inputs}


@pytest.mark.parametrize("entry", entries("flux"), ids=lambda entry: entry["PROMPT"][0][:24])
def test_flux_accepts_request(entry: dict[str, Any]) -> None:
    request = flux_request(entry)
    assert request.seed == entry["SEED"][0], "a random seed would make runs differ"


def test_flux_requests_vary() -> None:
    requests = [flux_request(entry) for entry in entries("flux")]
    assert len({request.prompt for request in requests}) == len(requests) >= 16
    assert len({request.seed for request in requests}) >= 12
    assert {request.steps for request in requests} == {4, 8, 20}
    assert len({(request.height, request.width) for request in requests}) >= 4
    assert any(request.negative_prompt for request in requests)


@pytest.mark.parametrize("entry", entries("rerank"), ids=lambda entry: entry["QUERY"][0][:24])
def test_rerank_accepts_request(entry: dict[str, Any]) -> None:
    request = rerank_request(entry)
    lengths = [len(document) for document in request.documents]
    assert len(set(request.documents)) == 8
    assert max(lengths) > 10 * min(lengths), "lengths vary as they do in real use"


def test_rerank_requests_vary() -> None:
    requests = [rerank_request(entry) for entry in entries("rerank")]
    assert len({request.query for request in requests}) == len(requests) >= 8
