"""Compiled blocks of the transformer: a fixed number of graphs, all of them made before the first request.

Each class of blocks is compiled once for all of its blocks, with the number of batch rows and of image tokens left
open. torch makes separate code for one batch row and for several, for forwards with a mask, and for those with
adapters. The warm-up runs each of these. From then on nothing is compiled: a shape that no code fits runs eagerly, and
is logged.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch.fx.experimental import _config as shapes

from genserve_backend.compilation import stop_compilers, use_cache
from genserve_backend.flux.attention import RaggedAttention
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.denoise import Denoiser
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.lora.cache import NeutralCombination
from genserve_backend.flux.prompts import Embedding
from genserve_backend.flux.request import PIXELS_PER_TOKEN, SIZE_MULTIPLE, parse
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.flux.state import ImageState
from genserve_backend.logs import log
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import Submit

ROWS = 3
"""Batch rows of the warm-up with several. Not 2: there is a tensor of 2 positions, and sizes that are equal in the
first forward may be taken for the same size."""
MAX_GRAPHS = 16
"""Graphs of a class of blocks, at most: more than the warm-up makes. torch's own limit is 8."""
LOGGED_SHAPES = 32
"""Shapes without compiled code that are logged, at most."""

logger = logging.getLogger(__name__)


class WatchedAttention(RaggedAttention):
    """`RaggedAttention` that notices when it is not part of compiled code."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend; see `RaggedAttention`."""
        if not torch.compiler.is_compiling():  # constant in compiled code
            self._log(hidden_states)
        return super().__call__(attn, hidden_states, *args, **kwargs)

    __call__.__signature__ = inspect.signature(RaggedAttention.__call__)  # type: ignore[attr-defined]

    @property
    def eager_shapes(self) -> int:
        """Shapes that ran without compiled code, at most `LOGGED_SHAPES`."""
        return len(self._seen)

    def _log(self, states: torch.Tensor) -> None:
        shape = tuple(states.shape[:2])
        if shape not in self._seen and len(self._seen) < LOGGED_SHAPES:
            self._seen.add(shape)
            log(logger, logging.WARNING, "no compiled code for a shape", batch_rows=shape[0], tokens=shape[1])


def compile_blocks(
    pipeline: FluxPipeline,
    denoiser: Denoiser,
    scheduler: Scheduler,
    *,
    adapters: Adapters,
    checkpoint: FluxCheckpoint,
    settings: FluxSettings,
) -> None:
    """Compile the blocks of a pipeline's transformer by running every kind of forward. Call it in the engine's thread.

    Args:
        pipeline: The denoiser's pipeline. The attention of its transformer is replaced.
        denoiser: One with real rotations.
        scheduler: Plans the steps of the images.
        adapters: The denoiser's. If any are served, every kind of forward also runs with them.
        checkpoint: The images are about as large as its native ones.
        settings: The limits.

    Raises:
        Exception: torch cannot compile the blocks, for example without a compiler on the machine.
    """
    use_cache(settings.compile_cache)
    if settings.deterministic:
        from torch._inductor import config

        config.deterministic = True  # no choice between kernels by their speed
    before, started = _graphs(), time.monotonic()
    transformer = pipeline.transformer
    transformer.set_attn_processor(WatchedAttention())
    transformer.compile_repeated_blocks(dynamic=True, fullgraph=True)
    tokens = min(checkpoint.native_size**2 // PIXELS_PER_TOKEN, settings.max_batched_tokens // ROWS)
    is_masked = settings.padding_limit(denoiser.device.type) > 0 and not settings.deterministic
    prompt = _no_prompt(transformer, checkpoint, denoiser)
    with (
        torch.inference_mode(),  # like the engine's turns: compiled code is for one mode
        torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS),
        # Ranks that are equal now may differ later.
        shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        for combination in (None, NeutralCombination()) if adapters.served else (None,):
            for sizes in warm_up_sizes(tokens, masked=is_masked):
                images = [_image(size, prompt, denoiser, scheduler, checkpoint) for size in sizes]
                for image in images:
                    image.adapters = combination
                denoiser.step(images)
    adapters.release()
    stop_compilers()
    for block in _blocks(transformer):
        block._compiled_call_impl = torch._dynamo.run(block._call_impl)  # compiles nothing, unlike torch.compile
    log(logger, logging.INFO, "flux compiled", graphs=_graphs() - before, seconds=time.monotonic() - started)


def warm_up_sizes(tokens: int, *, masked: bool) -> list[list[tuple[int, int]]]:
    """Return the sizes of the images in each forward of the warm-up, height and width in pixels.

    Two sizes that are equal in the first forward may be taken for the same size: odd numbers of image tokens differ
    from all widths of the model.

    Args:
        tokens: Image tokens of the largest image, about.
        masked: Whether forwards may hold images of several sizes.
    """
    side = max(7, math.isqrt(tokens) - 1 | 1)
    large = (side * SIZE_MULTIPLE, (side - 2) * SIZE_MULTIPLE)
    small = (large[1], large[1])
    return [[large], [large] * ROWS, *([[large, large, small]] if masked else [])]


def _image(
    size: tuple[int, int], prompt: Embedding, denoiser: Denoiser, scheduler: Scheduler, checkpoint: FluxCheckpoint
) -> ImageState:
    """Return an image before its first step, as the engine initializes it."""
    height, width = size
    values = {"PROMPT": "-", "STEPS": 1, "SEED": 0, "HEIGHT": height, "WIDTH": width}
    request = parse(values, checkpoint, max_pixels=height * width)
    image = ImageState(Job(Submit(0, "warm-up", request, math.inf), lambda event: None), request)
    image.schedule = scheduler.plan(request.steps, request.tokens)
    image.latents, image.prompt = denoiser.noise(image), prompt
    return image


def _no_prompt(transformer: FluxTransformer2DModel, checkpoint: FluxCheckpoint, denoiser: Denoiser) -> Embedding:
    kind: Any = {"device": denoiser.device, "dtype": denoiser.dtype}
    tokens = torch.zeros(checkpoint.max_sequence_length, transformer.config.joint_attention_dim, **kind)
    return Embedding(tokens, torch.zeros(transformer.config.pooled_projection_dim, **kind))


def _blocks(transformer: FluxTransformer2DModel) -> list[Any]:
    return [part for part in transformer.modules() if type(part).__name__ in transformer._repeated_blocks]


def _graphs() -> int:
    """Return the number of graphs that torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
