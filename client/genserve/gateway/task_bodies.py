"""Requests for durable tasks."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from genserve.gateway.adapters import STRICT, Adapters
from genserve.gateway.records import Kind, NewTask, fingerprint
from genserve.protocol import generate_call, rerank_call
from genserve.types import ImageFormat, Priority

DAY_S = 86_400.0
LONGEST_TIMEOUT_S = 30 * DAY_S
MAX_SEED = 2**63
DRAWN_SEEDS = 2**53
"""Limit of the seeds drawn here: JavaScript rounds greater numbers in JSON."""

Prompt = Annotated[str, Field(min_length=1, max_length=10_000)]


class TaskBody(BaseModel):
    """Fields of both kinds of tasks."""

    model_config = STRICT

    priority: Priority = "normal"
    timeout: Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT_S)] = DAY_S
    """Seconds in which the task has to be done."""
    webhook_url: str | None = None
    """Address that is told of the task's end."""

    def task(self, *, owner: str, idempotency_key: str | None) -> NewTask:
        """Return the task, with its seed drawn, so that a second attempt makes the same image.

        Args:
            owner: Name of the caller's key.
            idempotency_key: The caller's key for this request.

        Raises:
            InvalidInput: A value cannot be sent to a server.
        """
        return NewTask(
            self._kind(),
            self._arguments(),
            owner,
            timeout_s=self.timeout,
            fingerprint=fingerprint({"kind": self._kind(), **self.model_dump(exclude_none=True)}),
            priority=self.priority,
            webhook_url=self.webhook_url,
            idempotency_key=idempotency_key,
        )

    def _kind(self) -> Kind:
        raise NotImplementedError

    def _arguments(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude=set(TaskBody.model_fields))


class ImageTask(TaskBody):
    """Image to generate."""

    prompt: Prompt
    negative_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    true_cfg_scale: float | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: Annotated[int, Field(ge=0, lt=MAX_SEED)] | None = None
    lora: Adapters | None = None
    cache: float | None = None
    format: ImageFormat | None = None

    def _kind(self) -> Kind:
        return "image"

    def _arguments(self) -> dict[str, Any]:
        arguments = {"seed": secrets.randbelow(DRAWN_SEEDS), **super()._arguments()}
        generate_call(**arguments, priority=self.priority, task_id="")
        return arguments


class RerankTask(TaskBody):
    """Documents to rank."""

    query: Prompt
    documents: Annotated[list[str], Field(min_length=1, max_length=1_000)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    instruction: str | None = None
    windows: int = 1

    def _kind(self) -> Kind:
        return "rerank"

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        call = {"instruction": None, **arguments}
        call.pop("top_n", None)
        rerank_call(**call, priority=self.priority, task_id="")
        return arguments


def _kind_of(body: Any) -> Literal["image", "rerank"]:
    """Return the kind of a task by its fields."""
    return "rerank" if isinstance(body, RerankTask) or (isinstance(body, dict) and "query" in body) else "image"


AnyTask = Annotated[Annotated[ImageTask, Tag("image")] | Annotated[RerankTask, Tag("rerank")], Discriminator(_kind_of)]
"""Request for a task: the one with a `query` is a ranking."""
