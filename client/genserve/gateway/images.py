"""Images in OpenAI's dialect, at once or as a stream of events."""

from __future__ import annotations

import re
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from genserve.errors import InvalidInput, ServerUnavailable
from genserve.gateway import names
from genserve.gateway.adapters import Adapters, lora_argument
from genserve.gateway.context import Context, InContext
from genserve.gateway.errors import Failure
from genserve.gateway.files import PATH, ResultFiles
from genserve.gateway.image_events import Painting, PaintingResponse, encoded, image_properties
from genserve.gateway.json_body import StrictRoute
from genserve.gateway.names import Model
from genserve.together import together
from genserve.types import GeneratedImage, ImageFormat, Priority

router = APIRouter(tags=["images"], route_class=StrictRoute)

MODEL: Model = "flux"
MAX_IMAGES = 10
IGNORED = ("quality", "style", "background", "moderation", "output_compression", "complexity")
"""OpenAI's fields without effect here; a header of the answer names those that were given."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class ImageBody(BaseModel):
    """OpenAI's request, with the further settings under the names that other servers use for them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=10_000)]
    model: str | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_IMAGES)] = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: ImageFormat | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    complexity: str | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    lora: Adapters | None = None
    cache: float | None = None
    priority: Priority = "normal"
    stream_progress: bool | None = None

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
            "lora": lora_argument(self.lora),
            "cache": self.cache,
            "format": self.output_format,
            "priority": self.priority,
        }

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and have no effect."""
        return [name for name in IGNORED if getattr(self, name) not in {None, "auto"}]


@router.post("/v1/images/generations", summary="Generate images as OpenAI's API does", response_model=None)
async def generations(body: ImageBody, context: InContext, response: Response) -> dict[str, Any] | PaintingResponse:
    """Generate `n` images; their seeds follow each other. With `stream`, send events instead of one answer."""
    names.checked(body.model, MODEL, context.settings.aliases)
    try:
        arguments = body.arguments()
    except InvalidInput as error:
        raise context.failure(error) from error
    seed = secrets.randbelow(2**62) if body.seed is None else body.seed
    requests = [
        {**arguments, "seed": (seed + number) % 2**63, "task_id": f"{context.id}-{number}" if number else context.id}
        for number in range(body.n or 1)
    ]
    files = context.durable.files if body.response_format == "url" else None
    if body.response_format == "url" and files is None:
        message = "response_format is url, but this gateway has no folder for images; allowed: b64_json"
        raise Failure(400, "InvalidInput", message, parameter="response_format")
    headers = {"x-ignored-fields": ", ".join(body.ignored)} if body.ignored else {}
    if body.stream:
        painting = Painting(
            context, requests, partial_images=body.partial_images or 0, progress=bool(body.stream_progress)
        )
        if failure := await painting.refused():
            raise failure
        return PaintingResponse(painting, headers)
    response.headers.update(headers)
    images = await context.run(together(*(context.generate(**request) for request in requests)))
    return {
        "created": int(time.time()),
        "data": [{**await _answered(image, body, context, files), "seed": image.seed} for image in images],
        **image_properties(images, body.output_format or "png"),
    }


@router.get("/v1/models", summary="List the models as OpenAI's API does")
async def models(context: InContext) -> dict[str, Any]:
    """List the models that callers can name."""
    return {"object": "list", "data": [_model(name) for name in await _served(context)]}


@router.get("/v1/models/{model:path}", summary="Describe a model as OpenAI's API does")
async def model(model: str, context: InContext) -> dict[str, Any]:
    """Describe one of the models in the list."""
    if model not in await _served(context):
        raise names.unknown(model)
    return _model(model)


async def _answered(
    image: GeneratedImage, body: ImageBody, context: Context, files: ResultFiles | None
) -> dict[str, str]:
    """Return an image as base64, or as the URL of its file if there is a folder for it."""
    if files is None:
        return {"b64_json": encoded(image.data)}
    try:
        name = await files.save(image.data, body.output_format or "png", context.settings.keep_files_s)
    except OSError as error:
        raise context.failure(ServerUnavailable("the image cannot be written")) from error
    return {"url": context.link(f"{PATH}{name}")}


async def _served(context: Context) -> list[str]:
    """Return the names of the served models, the reranker first: NVIDIA's packages use the first one as default."""
    found = {each.name for each in await context.run(context.client.models())}
    return [name for name in ("rerank", MODEL) if name in found]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "genserve"}
