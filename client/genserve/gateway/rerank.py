"""Reranking in the dialects of Cohere, Jina, text-embeddings-inference, vLLM and NVIDIA NIM."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from genserve.gateway import names
from genserve.gateway.context import Context, InContext
from genserve.gateway.json_body import StrictRoute
from genserve.gateway.names import Model
from genserve.together import together
from genserve.types import Ranking

router = APIRouter(tags=["rerank"], route_class=StrictRoute)

MODEL: Model = "rerank"
MAX_DOCUMENTS = 1_000
MAX_CHARACTERS = 10_000
SCORED_AT_ONCE = 8
"""Requests in flight for pairs with different queries."""

Query = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
Texts = Annotated[list[str], Field(max_length=MAX_DOCUMENTS)]
"""Every list has a limit of its own: each wrong item of a list without one costs a message."""
TopN = Annotated[int | None, Field(ge=0)]
"""Number of results; vLLM's clients say 0 for all."""


class Lenient(BaseModel):
    """Body that may have fields which this server does not use."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextQuery(Lenient):
    """Query as an object."""

    text: Query


Document = str | dict[str, Any]
Documents = Annotated[list[Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]


class RerankBody(Lenient):
    """Cohere's and Jina's request."""

    query: Query | TextQuery
    documents: Documents
    model: str | None = None
    top_n: TopN = None
    return_documents: bool | None = None
    rank_fields: Texts | None = None
    instruction: str | None = None


class TeiBody(Lenient):
    """text-embeddings-inference's request, with Jina's fields: `texts` selects the former's answer."""

    query: Query
    texts: Annotated[Texts | None, Field(min_length=1)] = None
    documents: Documents | None = None
    model: str | None = None
    top_n: TopN = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    return_documents: bool | None = None
    instruction: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TeiBody:
        if (self.texts is None) == (self.documents is None):
            raise ValueError("give either texts or documents")
        return self


class ScoreBody(Lenient):
    """vLLM's request."""

    model: str | None = None
    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None
    items: str | Texts | None = None
    instruction: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ScoreBody:
        if not self.first or not self.second:
            raise ValueError("give text_1 and text_2, or queries and documents")
        if len(self.first) > 1 and len(self.first) != len(self.second):
            raise ValueError("the numbers of queries and documents differ")
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
    model: str | None = None


@router.post("/v1/rerank", summary="Rerank documents as Cohere's and Jina's API do")
@router.post("/v2/rerank", summary="Rerank documents as Cohere's API does")
async def cohere(body: RerankBody, context: InContext) -> dict[str, Any]:
    """Rank documents; the best ones first."""
    model = _checked(context, body.model)
    documents = [_text(each, body.rank_fields) for each in body.documents]
    ranking = await _rank(context, _text(body.query), documents, top_n=body.top_n, instruction=body.instruction)
    return {
        "id": context.id,
        "model": model,
        "results": _results(ranking, body.documents if body.return_documents else None),
        "usage": _usage(ranking),
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": _usage(ranking)["prompt_tokens"]},
        },
    }


@router.post("/rerank", summary="Rerank texts as text-embeddings-inference does, or documents as Jina's API does")
async def tei(body: TeiBody, context: InContext) -> Any:
    """Rank texts; the answer to `texts` is a list, the answer to `documents` an object."""
    model = _checked(context, body.model)
    documents: list[Any] = list(body.texts or body.documents or [])
    texts = [_text(each) for each in documents]
    ranking = await _rank(context, body.query, texts, top_n=body.top_n, instruction=body.instruction)
    if body.texts is None:
        results = _results(ranking, documents if body.return_documents else None)
        return {"id": context.id, "model": model, "results": results, "usage": _usage(ranking)}
    return [
        {
            "index": each.index,
            "score": _logit(each.score) if body.raw_scores else each.score,
            **({"text": each.document} if body.return_text else {}),
        }
        for each in ranking
    ]


@router.post("/score", summary="Score pairs of texts as vLLM does")
@router.post("/v1/score", summary="Score pairs of texts as vLLM does")
async def score(body: ScoreBody, context: InContext) -> dict[str, Any]:
    """Score each document against its query, or all against one query."""
    model = _checked(context, body.model)
    queries = body.first * len(body.second) if len(body.first) == 1 else body.first
    places: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        places.setdefault(query, []).append(index)
    rankings = await context.run(_score_each(context, places, body))
    scores = dict.fromkeys(range(len(queries)), 0.0)
    for indices, ranking in zip(places.values(), rankings, strict=True):
        scores.update(zip(indices, ranking.scores, strict=True))
    tokens = sum(_usage(ranking)["prompt_tokens"] for ranking in rankings)
    return {
        "id": context.id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": scores[index]} for index in scores],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


@router.post("/v1/ranking", summary="Rank passages as NVIDIA NIM does")
async def nim(body: NimBody, context: InContext) -> dict[str, Any]:
    """Rank passages; a logit is the log-odds of the score."""
    _checked(context, body.model)
    ranking = await _rank(context, body.query.text, [passage.text for passage in body.passages])
    return {
        "rankings": [{"index": each.index, "logit": _logit(each.score)} for each in ranking],
        "usage": _usage(ranking),
    }


def _checked(context: Context, model: str | None) -> str:
    return names.checked(model, MODEL, context.settings.aliases)


async def _rank(
    context: Context, query: str, documents: list[str], *, top_n: int | None = None, instruction: str | None = None
) -> Ranking:
    return await context.run(
        context.client.rerank(query, documents, top_n=top_n or None, instruction=instruction, task_id=context.id)
    )


async def _score_each(context: Context, places: Mapping[str, list[int]], body: ScoreBody) -> list[Ranking]:
    """Return one ranking per query: documents with equal queries are one request, and a few requests go at once."""
    turns = asyncio.Semaphore(SCORED_AT_ONCE)

    async def rank(number: int, query: str, indices: list[int]) -> Ranking:
        async with turns:
            return await context.client.rerank(
                query,
                [body.second[index] for index in indices],
                instruction=body.instruction,
                task_id=f"{context.id}-{number}" if number else context.id,
            )

    return await together(*(rank(number, *place) for number, place in enumerate(places.items())))


def _usage(ranking: Ranking) -> dict[str, int]:
    tokens = int(ranking.info.get("tokens", 0))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _results(ranking: Ranking, documents: list[Any] | None) -> list[dict[str, Any]]:
    """Return Cohere's results, with the documents as they were given if they are wanted."""
    return [
        {
            "index": each.index,
            "relevance_score": each.score,
            **({"document": _as_object(documents[each.index])} if documents else {}),
        }
        for each in ranking
    ]


def _as_object(document: str | dict[str, Any]) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


def _text(document: Any, fields: list[str] | None = None) -> str:
    """Return the text of a document: itself, its field `text`, or a line per field, as Cohere reads them.

    Args:
        document: A text or an object.
        fields: The fields that count, in this order; None selects all.
    """
    if isinstance(document, str):
        return document
    values = document.model_dump() if isinstance(document, BaseModel) else document
    if fields:
        values = {name: values[name] for name in fields if name in values}
    if isinstance(values.get("text"), str) and (not fields or len(values) == 1):
        return str(values["text"])
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _logit(score: float) -> float:
    """Return the log-odds of a score in 0 to 1, within the limits of float32 scores."""
    least = 1e-7
    clipped = min(max(score, least), 1 - least)
    return math.log(clipped / (1 - clipped))
