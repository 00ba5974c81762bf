"""Reranking in the dialects of Cohere, Jina, text-embeddings-inference, vLLM and NVIDIA NIM."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from genserve.gateway.context import Context, InContext
from genserve.types import Ranking

router = APIRouter(tags=["rerank"])

MODEL = "rerank"
MAX_DOCUMENTS = 1_000
MAX_CHARACTERS = 10_000

Query = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
TopN = Annotated[int | None, Field(ge=1)]


class Lenient(BaseModel):
    """Body that may have fields which this server does not use."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextDocument(Lenient):
    """Document as an object."""

    text: str


Document = str | TextDocument | dict[str, Any]
Documents = Annotated[list[Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]


class RerankBody(Lenient):
    """Cohere's and Jina's request."""

    query: Query | TextDocument
    documents: Documents
    model: str = MODEL
    top_n: TopN = None
    return_documents: bool = False
    instruction: str | None = None
    max_tokens_per_doc: int | None = None


class TeiBody(Lenient):
    """text-embeddings-inference's request, with Jina's fields: `texts` selects the former's answer."""

    query: Query
    texts: Annotated[list[str] | None, Field(min_length=1, max_length=MAX_DOCUMENTS)] = None
    documents: Documents | None = None
    model: str = MODEL
    top_n: TopN = None
    return_text: bool = False
    return_documents: bool = False
    instruction: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TeiBody:
        if (self.texts is None) == (self.documents is None):
            raise ValueError("give either texts or documents")
        return self


class ScoreBody(Lenient):
    """vLLM's request."""

    model: str = MODEL
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    instruction: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ScoreBody:
        if not self.first or not self.second:
            raise ValueError("give text_1 and text_2, or queries and documents")
        if len(self.first) > 1 and len(self.first) != len(self.second):
            raise ValueError("the numbers of queries and documents differ")
        if max(len(self.first), len(self.second)) > MAX_DOCUMENTS:
            raise ValueError(f"at most {MAX_DOCUMENTS:,} pairs")
        return self

    @property
    def first(self) -> list[str]:
        """The queries: one, or as many as documents."""
        return _listed(self.text_1 if self.text_1 is not None else self.queries)

    @property
    def second(self) -> list[str]:
        """The documents."""
        given = self.text_2 if self.text_2 is not None else self.documents
        return _listed(given if given is not None else self.items)


class NimText(Lenient):
    """Text of NIM's request."""

    text: str


class NimBody(Lenient):
    """NIM's request."""

    query: NimText
    passages: Annotated[list[NimText], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str = MODEL
    truncate: str = "NONE"


@router.post("/v1/rerank", summary="Rerank documents as Cohere's and Jina's API do")
@router.post("/v2/rerank", summary="Rerank documents as Cohere's API does")
async def cohere(body: RerankBody, context: InContext) -> dict[str, Any]:
    """Rank documents; the best ones first."""
    ranking = await _rank(context, _text(body.query), body.documents, top_n=body.top_n, instruction=body.instruction)
    return {
        "id": context.id,
        "model": body.model,
        "results": _results(ranking, body.documents if body.return_documents else None),
        "usage": {"total_tokens": ranking.info.get("tokens", 0), "prompt_tokens": ranking.info.get("tokens", 0)},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }


@router.post("/rerank", summary="Rerank texts as text-embeddings-inference does, or documents as Jina's API does")
async def tei(body: TeiBody, context: InContext) -> Any:
    """Rank texts; the answer to `texts` is a list, the answer to `documents` an object."""
    documents: list[Any] = list(body.texts or body.documents or [])
    ranking = await _rank(context, body.query, documents, top_n=body.top_n, instruction=body.instruction)
    if body.texts is None:
        results = _results(ranking, documents if body.return_documents else None)
        return {"model": body.model, "results": results, "usage": {"total_tokens": ranking.info.get("tokens", 0)}}
    return [
        {"index": each.index, "score": each.score, **({"text": each.document} if body.return_text else {})}
        for each in ranking
    ]


@router.post("/score", summary="Score pairs of texts as vLLM does")
async def score(body: ScoreBody, context: InContext) -> dict[str, Any]:
    """Score each document against its query, or all against one query."""
    scores: list[float] = []
    tokens = 0
    pairs = [(body.first[0], body.second)]
    if len(body.first) > 1:
        pairs = [(query, [document]) for query, document in zip(body.first, body.second, strict=True)]
    for query, documents in pairs:
        ranking = await _rank(context, query, list(documents), instruction=body.instruction)
        scores += ranking.scores
        tokens += ranking.info.get("tokens", 0)
    return {
        "id": context.id,
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


@router.post("/v1/ranking", summary="Rank passages as NVIDIA NIM does")
async def nim(body: NimBody, context: InContext) -> dict[str, Any]:
    """Rank passages; a logit is the log-odds of the score."""
    ranking = await _rank(context, body.query.text, [passage.text for passage in body.passages])
    tokens = ranking.info.get("tokens", 0)
    return {
        "rankings": [{"index": each.index, "logit": _logit(each.score)} for each in ranking],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _rank(
    context: Context, query: str, documents: list[Any], *, top_n: int | None = None, instruction: str | None = None
) -> Ranking:
    return await context.run(
        context.client.rerank(
            query, [_text(each) for each in documents], top_n=top_n, instruction=instruction, task_id=context.id
        )
    )


def _results(ranking: Ranking, documents: list[Any] | None) -> list[dict[str, Any]]:
    """Return Cohere's results, with the documents as they were given if they are wanted."""
    return [
        {
            "index": each.index,
            "relevance_score": each.score,
            **({"document": _returned(documents[each.index])} if documents else {}),
        }
        for each in ranking
    ]


def _returned(document: Any) -> Any:
    return {"text": document} if isinstance(document, str) else _plain(document)


def _plain(document: Any) -> Any:
    return document.model_dump() if isinstance(document, BaseModel) else document


def _text(document: Any) -> str:
    """Return the text of a document: itself, its field `text`, or a line per field, as Cohere reads them."""
    if isinstance(document, str):
        return document
    values = _plain(document)
    if isinstance(values.get("text"), str):
        return str(values["text"])
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _logit(score: float) -> float:
    """Return the log-odds of a score in 0 to 1, within the limits of float32 scores."""
    least = 1e-7
    clipped = min(max(score, least), 1 - least)
    return math.log(clipped / (1 - clipped))
