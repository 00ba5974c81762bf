"""Programs that know OpenAI, Cohere, Jina, text-embeddings-inference, vLLM or NIM, unmodified, with a real gateway."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import cohere
import httpx
import openai
import pytest
from conftest import Server
from gateways import Gateway, running_gateway
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse
from PIL import Image

from genserve import Client

QUERY = "What is the capital of France?"
DOCUMENTS = ["Horses and cows are both animals.", "The capital of France is Paris.", "Brasilia is a capital."]
BEST = 1
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def running(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, running_server.grpc, options=("--alias", "ms-marco=rerank")) as gateway:
        yield gateway


@pytest.fixture
def gateway(running: Gateway, server: Server) -> Gateway:
    return running


@pytest.fixture
def images(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
def scores(server: Server) -> tuple[float, ...]:
    """The scores of `DOCUMENTS`, from the server itself."""
    with Client(server.grpc) as client:
        return client.rerank(QUERY, DOCUMENTS).scores


def ranked(scores: tuple[float, ...]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


# OpenAI.


def test_openai_generates_images(images: openai.OpenAI, server: Server) -> None:
    answer = images.images.generate(
        model="dall-e-3",
        prompt="a red circle",
        n=2,
        size="64x80",
        response_format="b64_json",
        quality="hd",
        extra_body={"seed": 5, **SETTINGS},
    )
    ImagesResponse.model_validate(answer.to_dict(), strict=True)
    assert (answer.size, answer.output_format) == ("64x80", "png")
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * 4 * 5
    files = [base64.b64decode(image.b64_json or "") for image in answer.data or []]
    with Client(server.grpc) as client:
        expected = [
            client.generate("a red circle", seed=seed, steps=2, guidance=3.0, width=64, height=80).data
            for seed in (5, 6)
        ]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(64, 80), (64, 80)]
    assert [pixels(file) for file in files] == [pixels(file) for file in expected]


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


def test_openai_names_the_ignored_fields(images: openai.OpenAI) -> None:
    answer = images.images.with_raw_response.generate(
        prompt="a red circle", quality="high", background="auto", size="64x64", extra_body=SETTINGS
    )
    assert answer.headers["x-ignored-fields"] == "quality"
    assert answer.parse().created > 0


def test_openai_streams_unfinished_images(images: openai.OpenAI) -> None:
    stream = images.images.generate(
        prompt="a red circle",
        size="256x256",
        output_format="webp",
        stream=True,
        partial_images=2,
        extra_body={"num_inference_steps": 40},
    )
    with stream:
        *partial, completed = list(stream)
    assert isinstance(completed, ImageGenCompletedEvent)
    ImageGenCompletedEvent.model_validate(completed.to_dict(), strict=True)
    assert completed.size == "256x256"
    assert Image.open(io.BytesIO(base64.b64decode(completed.b64_json))).format == "WEBP"
    assert partial
    for index, event in enumerate(partial):
        assert isinstance(event, ImageGenPartialImageEvent)
        ImageGenPartialImageEvent.model_validate(event.to_dict(), strict=True)
        assert event.partial_image_index == index
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).format == "WEBP"


def test_openai_lists_and_describes_the_models(images: openai.OpenAI) -> None:
    assert {model.id for model in images.models.list()} == {"flux", "rerank"}
    assert images.models.retrieve("flux").object == "model"
    with pytest.raises(openai.NotFoundError):
        images.models.retrieve("gpt-4")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("arguments", "kind", "code", "parameter"),
    [
        ({"model": "sdxl"}, openai.NotFoundError, "model_not_found", "model"),
        ({"size": "70x64"}, openai.BadRequestError, "InvalidInput", None),
        ({"size": "large"}, openai.BadRequestError, "InvalidInput", None),
        ({"n": 11}, openai.BadRequestError, "InvalidInput", "n"),
        ({"prompt": ""}, openai.BadRequestError, "InvalidInput", "prompt"),
        ({"output_format": "gif"}, openai.BadRequestError, "InvalidInput", "output_format"),
    ],
    ids=["model", "multiple", "size", "n", "prompt", "format"],
)
def test_openai_raises_its_own_errors(
    images: openai.OpenAI,
    arguments: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str,
    parameter: str | None,
    stream: bool,
) -> None:
    with pytest.raises(kind) as caught:
        images.images.generate(**{"prompt": "a red circle", "stream": stream, **arguments})
    assert (caught.value.code, caught.value.type, caught.value.param) == (code, "invalid_request_error", parameter)
    assert caught.value.request_id


# Cohere.


def test_cohere_reranks(gateway: Gateway, scores: tuple[float, ...]) -> None:
    client = cohere.ClientV2("none", base_url=gateway.url)
    answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=4096)
    assert [each.index for each in answer.results] == ranked(scores)[:2]
    assert [each.relevance_score for each in answer.results] == pytest.approx(sorted(scores, reverse=True)[:2])
    assert answer.id
    assert answer.meta is not None
    assert answer.meta.billed_units is not None
    assert answer.meta.billed_units.search_units == 1


def test_cohere_reranks_with_its_first_version(gateway: Gateway, scores: tuple[float, ...]) -> None:
    client = cohere.Client("none", base_url=gateway.url)
    answer = client.rerank(query=QUERY, documents=DOCUMENTS, model="rerank-english-v3.0", return_documents=True)
    texts = [each.document.text for each in answer.results if each.document]
    assert texts == [DOCUMENTS[index] for index in ranked(scores)]


def test_cohere_ranks_objects_by_the_given_fields(gateway: Gateway, scores: tuple[float, ...]) -> None:
    documents = [{"title": text, "text": "nothing", "id": str(index)} for index, text in enumerate(DOCUMENTS)]
    client = cohere.Client("none", base_url=gateway.url)
    answer = client.rerank(query=QUERY, documents=documents, rank_fields=["title"], return_documents=True)
    assert answer.results[0].index == BEST
    assert answer.results[0].document is not None
    assert answer.results[0].document.dict() == documents[BEST]
    everything = client.rerank(query=QUERY, documents=[{"text": text} for text in DOCUMENTS])
    assert [each.index for each in everything.results] == ranked(scores)


def test_cohere_reranks_asynchronously(gateway: Gateway, scores: tuple[float, ...]) -> None:
    async def rerank() -> list[int]:
        async with cohere.AsyncClientV2("none", base_url=gateway.url) as client:
            answers = await asyncio.gather(
                *(client.rerank(model="rerank", query=QUERY, documents=DOCUMENTS) for _ in range(4))
            )
        return [each.index for answer in answers for each in answer.results]

    assert asyncio.run(rerank()) == ranked(scores) * 4


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"model": "command-r"}, cohere.NotFoundError),
        ({"documents": []}, cohere.UnprocessableEntityError),
        ({"top_n": -1}, cohere.UnprocessableEntityError),
        ({"query": ""}, cohere.UnprocessableEntityError),
        ({"documents": ["x" * 1_000_001]}, cohere.BadRequestError),
    ],
    ids=["model", "documents", "top_n", "query", "long"],
)
@pytest.mark.parametrize("make", [cohere.ClientV2, cohere.Client], ids=["v2", "v1"])
def test_cohere_raises_its_own_errors(
    gateway: Gateway, make: Callable[..., Any], arguments: dict[str, Any], kind: type[cohere.core.ApiError]
) -> None:
    client = make("none", base_url=gateway.url)
    with pytest.raises(kind) as caught:
        client.rerank(**{"model": "rerank", "query": QUERY, "documents": DOCUMENTS, **arguments})
    assert caught.value.body["message"]
    assert caught.value.body["id"]


def test_langchain_reranks_with_its_cohere_class(gateway: Gateway, scores: tuple[float, ...]) -> None:
    reranker = CohereRerank(base_url=gateway.url, cohere_api_key="none", model="rerank-v3.5", top_n=2)
    found = reranker.compress_documents([Document(text, metadata={"n": n}) for n, text in enumerate(DOCUMENTS)], QUERY)
    assert [each.metadata["n"] for each in found] == ranked(scores)[:2]
    assert found[0].metadata["relevance_score"] == pytest.approx(scores[BEST])


# LlamaIndex' classes for Jina, text-embeddings-inference and NIM.


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=str(index))) for index, text in enumerate(DOCUMENTS)]


def found_by(reranker: Any) -> list[int]:
    return [int(each.node.id_) for each in reranker.postprocess_nodes(nodes(), query_str=QUERY)]


@pytest.mark.parametrize("prefix", ["", "/v1"], ids=["rerank", "v1"])
def test_jina_class_reranks(gateway: Gateway, scores: tuple[float, ...], prefix: str) -> None:
    assert found_by(JinaRerank(top_n=2, base_url=f"{gateway.url}{prefix}", api_key="none")) == ranked(scores)[:2]


@pytest.mark.parametrize("prefix", ["", "/v1"], ids=["rerank", "v1"])
def test_jina_class_shows_the_reason_of_an_error(gateway: Gateway, prefix: str) -> None:
    reranker = JinaRerank(base_url=f"{gateway.url}{prefix}", api_key="none", model="jina-embeddings-v3")
    with pytest.raises(RuntimeError, match="model is 'jina-embeddings-v3'"):
        found_by(reranker)


def test_tei_class_reranks(gateway: Gateway, scores: tuple[float, ...]) -> None:
    assert found_by(TextEmbeddingInference(base_url=gateway.url, top_n=3)) == ranked(scores)


@pytest.mark.filterwarnings("ignore:Default model is set")
@pytest.mark.parametrize("model", [None, "rerank", "nvidia/llama-3.2-nv-rerankqa-1b-v2"])
def test_nvidia_class_reranks(gateway: Gateway, scores: tuple[float, ...], model: str | None) -> None:
    assert found_by(NVIDIARerank(base_url=f"{gateway.url}/v1", model=model, truncate="END")) == ranked(scores)


# The published requests and answers of services without a package of their own.


def ask(gateway: Gateway, path: str, body: dict[str, Any], status: int = 200) -> Any:
    answer = httpx.post(f"{gateway.url}{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    return answer.json()


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (QUERY, DOCUMENTS[1]),
        (QUERY, DOCUMENTS),
        ([QUERY], DOCUMENTS),
        ([QUERY] * 3, DOCUMENTS),
        ([QUERY, "animals", QUERY], DOCUMENTS),
    ],
    ids=["one", "text", "list", "pairs", "different"],
)
def test_vllm_score(gateway: Gateway, server: Server, path: str, first: Any, second: Any) -> None:
    body = {"model": "BAAI/bge-reranker-v2-m3", "encoding_format": "float", "text_1": first, "text_2": second}
    answer = ask(gateway, path, body)
    documents = [second] if isinstance(second, str) else second
    queries = [first] * len(documents) if isinstance(first, str) else first * (1 if len(first) > 1 else len(documents))
    with Client(server.grpc) as client:
        expected = [
            client.rerank(*pair).scores[0] for pair in zip(queries, ([text] for text in documents), strict=True)
        ]
    assert answer.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert (answer["object"], answer["model"]) == ("list", body["model"])
    assert [each["index"] for each in answer["data"]] == list(range(len(documents)))
    assert {each["object"] for each in answer["data"]} == {"score"}
    assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-5)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0


def test_vllm_score_errors(gateway: Gateway) -> None:
    error = ask(gateway, "/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400)["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    error = ask(gateway, "/score", {"model": "llama", "text_1": "a", "text_2": "b"}, 404)["error"]
    assert (error["type"], error["code"], error["param"]) == ("NotFoundError", 404, "model")


def test_vllm_rerank_returns_all_without_a_number(gateway: Gateway, scores: tuple[float, ...]) -> None:
    answer = ask(gateway, "/rerank", {"model": "ms-marco", "query": QUERY, "documents": DOCUMENTS, "top_n": 0})
    assert [each["index"] for each in answer["results"]] == ranked(scores)
    assert answer["model"] == "ms-marco"
    assert answer["usage"]["total_tokens"] > 0


def test_tei_rerank(gateway: Gateway, scores: tuple[float, ...]) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": False, "truncation_direction": "Right"}
    answer = ask(gateway, "/rerank", {**body, "return_text": True, "raw_scores": False})
    assert answer == [
        {"index": index, "text": DOCUMENTS[index], "score": pytest.approx(scores[index])} for index in ranked(scores)
    ]
    raw = ask(gateway, "/rerank", {**body, "return_text": False, "raw_scores": True})
    assert raw[0].keys() == {"index", "score"}
    assert 1 / (1 + math.exp(-raw[0]["score"])) == pytest.approx(scores[BEST])


def test_tei_errors(gateway: Gateway) -> None:
    error = ask(gateway, "/rerank", {"query": QUERY, "texts": []}, 422)
    assert error["error_type"] == "Validation"
    assert "texts" in error["error"]


def test_nim_ranking(gateway: Gateway, scores: tuple[float, ...]) -> None:
    body = {
        "model": "nvidia/llama-nemotron-rerank-1b-v2",
        "query": {"text": QUERY},
        "passages": [{"text": text} for text in DOCUMENTS],
        "truncate": "END",
    }
    answer = ask(gateway, "/v1/ranking", body)
    assert answer.keys() == {"rankings", "usage"}
    assert [each["index"] for each in answer["rankings"]] == ranked(scores)
    logits = [each["logit"] for each in answer["rankings"]]
    assert [1 / (1 + math.exp(-logit)) for logit in logits] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)
    assert answer["usage"].keys() == {"prompt_tokens", "total_tokens"}


def test_nim_errors(gateway: Gateway) -> None:
    error = ask(gateway, "/v1/ranking", {"query": QUERY, "passages": []}, 422)
    assert (error["object"], error["type"]) == ("error", "invalid_request_error")
    error = ask(gateway, "/v1/ranking", {"model": "flux", "query": {"text": "q"}, "passages": [{"text": "a"}]}, 404)
    assert "model is 'flux'" in error["message"]
