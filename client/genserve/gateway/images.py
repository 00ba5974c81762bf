"""Images in OpenAI's dialect, at once or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse, ServerSentEvent

from genserve.errors import GenServeError, InvalidInput
from genserve.gateway import errors
from genserve.gateway.context import Context, InContext
from genserve.types import GeneratedImage, ImageFormat, Priority, TaskStatus

router = APIRouter(tags=["images"])

MODEL = "flux"
MAX_IMAGES = 10
PARTIAL_EVENT = "image_generation.partial_image"
COMPLETED_EVENT = "image_generation.completed"
ERROR_EVENT = "error"
IGNORED = ("quality", "style", "background", "moderation", "output_compression")
"""OpenAI's fields without effect here; a header of the answer names those that were given."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class ImageBody(BaseModel):
    """OpenAI's request, with the further settings under the names that other servers use for them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=10_000)]
    model: str | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_IMAGES)] = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: ImageFormat | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    priority: Priority = "normal"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `AsyncClient.generate`, without seed and task id.

        Raises:
            InvalidInput: `size` has another form.
        """
        size = self.size or "auto"
        sides = _SIZE.fullmatch(size)
        if not sides and size != "auto":
            raise InvalidInput(f"size is {size!r:.40}; allowed: auto, or WIDTHxHEIGHT as in 1024x1024")
        return {
            "prompt": self.prompt,
            "width": int(sides[1]) if sides else None,
            "height": int(sides[2]) if sides else None,
            "steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
            "true_cfg_scale": self.true_cfg_scale,
            "negative_prompt": self.negative_prompt,
            "format": self.output_format,
            "priority": self.priority,
        }

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and have no effect."""
        return [name for name in IGNORED if getattr(self, name) not in {None, "auto"}]


@router.post("/v1/images/generations", summary="Generate images as OpenAI's API does", response_model=None)
async def generations(body: ImageBody, context: InContext, response: Response) -> dict[str, Any] | EventSourceResponse:
    """Generate `n` images; their seeds follow each other. With `stream`, send events instead of one answer."""
    try:
        arguments = body.arguments()
    except InvalidInput as error:
        raise context.failure(error) from error
    seed = secrets.randbelow(2**62) if body.seed is None else body.seed
    requests = [
        {**arguments, "seed": (seed + number) % 2**63, "task_id": f"{context.id}-{number}" if number else context.id}
        for number in range(body.n or 1)
    ]
    headers = {"x-ignored-fields": ", ".join(body.ignored)} if body.ignored else {}
    if body.stream:
        events = _events(context, requests, partial_images=body.partial_images or 0)
        return EventSourceResponse(events, headers=headers)
    response.headers.update(headers)
    images = await context.run(asyncio.gather(*(context.client.generate(**request) for request in requests)))
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _encoded(image.data), "seed": image.seed} for image in images],
        **_properties(images[0]),
    }


@router.get("/v1/models", summary="List the models as OpenAI's API does")
async def models(context: InContext) -> dict[str, Any]:
    """List the models that callers can name."""
    found = await context.run(context.client.models())
    return {
        "object": "list",
        "data": [
            {"id": model.name, "object": "model", "created": 0, "owned_by": "genserve"}
            for model in found
            if model.name != "tasks"
        ],
    }


async def _events(
    context: Context, requests: list[dict[str, Any]], *, partial_images: int
) -> AsyncIterator[ServerSentEvent]:
    """Yield the events of all images. They end, and the images with them, when the caller goes away."""
    queue: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue()

    async def paint(request: dict[str, Any]) -> None:
        partial = Partial(partial_images)
        async with context.client.submit(**request) as task:
            async for status in task:
                if preview := partial.due(status):
                    queue.put_nowait(_partial_event(preview, partial.sent - 1, request["format"] or "png"))
            image = await task.result()
        queue.put_nowait(_event(COMPLETED_EVENT, b64_json=_encoded(image.data), seed=image.seed, **_properties(image)))

    async def paint_all() -> None:
        try:
            await asyncio.gather(*map(paint, requests))
        except GenServeError as error:
            queue.put_nowait(_event(ERROR_EVENT, **errors.openai(context.failure(error), context.id)))
        finally:
            queue.put_nowait(None)

    painting = asyncio.ensure_future(paint_all())
    try:
        while event := await queue.get():
            yield event
    finally:
        painting.cancel()
        await asyncio.wait({painting})


class Partial:
    """Choice of an image's previews to send: about evenly over its steps.

    Args:
        wanted: Number of previews.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self.sent = 0

    def due(self, status: TaskStatus) -> bytes:
        """Return the preview to send now, empty if there is none."""
        is_wanted = self.sent < self._wanted and status.progress >= (self.sent + 1) / (self._wanted + 1)
        if not is_wanted or not status.preview or status.state != "running":
            return b""
        self.sent += 1
        return status.preview


def _partial_event(preview: bytes, index: int, image_format: ImageFormat) -> ServerSentEvent:
    return _event(
        PARTIAL_EVENT,
        b64_json=_encoded(_converted(preview, image_format)),
        partial_image_index=index,
        output_format=image_format,
    )


def _event(kind: str, **values: Any) -> ServerSentEvent:
    return ServerSentEvent(json.dumps({"type": kind, "created_at": int(time.time()), **values}), event=kind)


def _converted(preview: bytes, image_format: ImageFormat) -> bytes:
    """Return a preview, a JPEG, in the format of the final image."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(preview)).save(file, image_format)
    return file.getvalue()


def _properties(image: GeneratedImage) -> dict[str, Any]:
    info = image.info
    return {
        "size": f"{info['width']}x{info['height']}",
        "output_format": info.get("format", "png"),
        "background": "opaque",
    }


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
