"""Images as server-sent events of OpenAI's dialect: unfinished ones on the way, and each finished one."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from genserve.errors import GenServeError
from genserve.gateway import errors
from genserve.gateway.context import Context
from genserve.gateway.errors import Failure
from genserve.together import together
from genserve.types import GeneratedImage, ImageFormat, TaskStatus

PARTIAL_EVENT = "image_generation.partial_image"
COMPLETED_EVENT = "image_generation.completed"
PROGRESS_EVENT = "image_generation.progress"
"""Event beyond OpenAI's, for those who ask for it."""
ERROR_EVENT = "error"
REFUSAL_S = 1.0
"""Seconds in which a refused request gets its own status; after them the answer has begun, and errors are events."""
PIXELS_PER_TOKEN = 16
"""Pixels of an image's side that are one of the model's tokens."""


class Painting:
    """Images in the making. They start at once.

    Args:
        context: The request.
        requests: Arguments of `AsyncClient.generate`, one mapping per image.
        partial_images: Number of unfinished images to send of each.
        progress: Send an event at each change of state, place in the queue, or step, with the preview.
    """

    def __init__(
        self, context: Context, requests: Sequence[Mapping[str, Any]], *, partial_images: int, progress: bool = False
    ) -> None:
        self._context = context
        self._partial_images = partial_images
        self._progress = progress
        self._queue: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue()
        self._is_known = asyncio.Event()
        self._has_sent = False
        self._failure: Failure | None = None
        self._work = asyncio.ensure_future(self._paint_all(requests))

    async def refused(self) -> Failure | None:
        """Wait for the first event, or for a second; return the failure if the images have failed before any event."""
        try:
            await self._context.run(asyncio.wait({asyncio.ensure_future(self._is_known.wait())}, timeout=REFUSAL_S))
        except BaseException:
            await self.close()
            raise
        return None if self._has_sent else self._failure

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the events of all images, and that of a failure."""
        while event := await self._queue.get():
            yield event
        if self._failure:
            yield _event(ERROR_EVENT, **errors.openai(self._failure, self._context.id))

    async def close(self) -> None:
        """End the work on the server."""
        self._work.cancel()
        await asyncio.wait({self._work})

    async def _paint_all(self, requests: Sequence[Mapping[str, Any]]) -> None:
        try:
            await together(*(self._paint(index, request) for index, request in enumerate(requests)))
        except GenServeError as error:
            self._failure = self._context.failure(error)
        finally:
            self._is_known.set()
            self._queue.put_nowait(None)

    async def _paint(self, index: int, request: Mapping[str, Any]) -> None:
        image_format: ImageFormat = request["format"] or "png"
        if self._partial_images or self._progress:
            image = await self._paint_visibly(index, request, image_format)
        else:
            image = await self._context.generate(**request)
        properties = image_properties([image], image_format)
        self._say(COMPLETED_EVENT, b64_json=encoded(image.data), image_index=index, seed=image.seed, **properties)

    async def _paint_visibly(self, index: int, request: Mapping[str, Any], image_format: ImageFormat) -> GeneratedImage:
        partial = Partial(self._partial_images)
        width, height = request["width"], request["height"]
        async with self._context.client.submit(**request) as task:
            async for status, place in self._context.line.follow(task, request["priority"]):
                if self._progress:
                    self._say(PROGRESS_EVENT, image_index=index, **_progress(status, place))
                if preview := partial.due(status):
                    self._say(
                        PARTIAL_EVENT,
                        b64_json=encoded(_converted(preview, image_format)),
                        partial_image_index=partial.sent - 1,
                        image_index=index,
                        size=f"{width}x{height}" if width and height else "auto",
                        output_format=image_format,
                        background="opaque",
                    )
            return await task.result()

    def _say(self, kind: str, **values: Any) -> None:
        self._queue.put_nowait(_event(kind, quality="auto", **values))
        self._has_sent = True
        self._is_known.set()


class PaintingResponse(EventSourceResponse):
    """Answer with the events of a painting, which ends with it, however it ends."""

    def __init__(self, painting: Painting, headers: Mapping[str, str]) -> None:
        super().__init__(painting.events(), headers=headers)
        self._painting = painting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._painting.close()


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


def image_properties(images: Sequence[GeneratedImage], image_format: ImageFormat) -> dict[str, Any]:
    """Return OpenAI's fields on all images of a request: they differ only in their seeds.

    The tokens are those that the model works on: the prompt's, padded, and one per 16 x 16 pixels.
    """
    info = images[0].info
    width, height = info["width"], info["height"]
    prompt = info.get("max_sequence_length", 0) * len(images)
    output = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN) * len(images)
    return {
        "size": f"{width}x{height}",
        "output_format": image_format,
        "background": "opaque",
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"text_tokens": prompt, "image_tokens": 0},
            "output_tokens": output,
            "total_tokens": prompt + output,
        },
    }


def encoded(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode()


def _event(kind: str, **values: Any) -> ServerSentEvent:
    return ServerSentEvent(json.dumps({"type": kind, "created_at": int(time.time()), **values}), event=kind)


def _progress(status: TaskStatus, place: int | None) -> dict[str, Any]:
    values = {"state": status.state, "queue_position": place, "step": status.step, "steps": status.steps}
    return {**values, "preview_b64": encoded(status.preview)}


def _converted(preview: bytes, image_format: ImageFormat) -> bytes:
    """Return a preview, a JPEG, in the format of the final image."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(preview)).save(file, image_format)
    return file.getvalue()
