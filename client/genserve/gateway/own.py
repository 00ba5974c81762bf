"""GenServe's own routes: one image per request, status, models, tasks, load and settings."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from genserve.gateway.context import InContext
from genserve.gateway.errors import Failure
from genserve.types import InstanceLoad, Priority, ServerStatus, Setting

router = APIRouter(tags=["genserve"])

MODEL_FAMILY = "flux"
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
"""Priorities 0, 1 and 2."""


class GenerateBody(BaseModel):
    """Request for one image."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=10_000)]
    model_id: str = MODEL_FAMILY
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    cfg: float | None = None
    seed: Annotated[int | None, Field(ge=-1, lt=2**63)] = None
    priority: Annotated[int, Field(ge=0, le=2)] = 1


@router.post("/generate", summary="Generate one image")
async def generate(body: GenerateBody, context: InContext) -> dict[str, Any]:
    """Generate one image; the answer has it as base64."""
    if not body.model_id.lower().startswith(MODEL_FAMILY):
        raise Failure(404, "InvalidInput", f"model_id is {body.model_id!r:.80}; allowed: {MODEL_FAMILY}")
    image = await context.run(
        context.client.generate(
            body.prompt,
            negative_prompt=body.negative_prompt,
            height=body.height,
            width=body.width,
            steps=body.num_inference_steps,
            guidance=body.cfg,
            seed=None if body.seed == -1 else body.seed,
            priority=PRIORITIES[body.priority],
            task_id=context.id,
        )
    )
    info = image.info
    return {
        "success": True,
        "task_id": context.id,
        "model_id": body.model_id,
        "image": base64.b64encode(image.data).decode(),
        "seed": image.seed,
        "height": info["height"],
        "width": info["width"],
        "num_inference_steps": info["steps"],
        "cfg": info["guidance"],
        "gpu_id": info["gpu_id"],
        "device": info["device"],
        "elapsed_time": info["elapsed_time"],
    }


@router.get("/health", summary="Whether a server is ready")
async def health(context: InContext, response: Response) -> dict[str, str]:
    """Answer 200 if at least one server has all models ready, else 503."""
    is_ready = await context.run(context.client.health())
    response.status_code = 200 if is_ready else 503
    return {"status": "healthy" if is_ready else "unhealthy"}


@router.get("/status", summary="Servers, models, and requests in flight")
async def status(context: InContext) -> dict[str, Any]:
    """Describe all servers, with the sums of their queues."""
    servers, loads = await context.run(asyncio.gather(context.client.status(), _loads(context)))
    return {
        "status": "healthy" if any(server.ready for server in servers) else "unhealthy",
        "concurrent_manager": {
            "global_queue_size": sum(load.waiting for load in loads),
            "running_tasks": sum(load.running for load in loads),
            "instances": len(loads),
            "ready_instances": sum(load.ready for load in loads),
        },
        "servers": [_server(server) for server in servers],
    }


@router.get("/models", summary="Models and their states")
async def models(context: InContext) -> dict[str, Any]:
    """List the models of the first reachable server."""
    return {"models": [asdict(model) for model in await context.run(context.client.models())]}


@router.get("/task/{task_id}", summary="State of a task")
async def task(task_id: str, context: InContext) -> dict[str, Any]:
    """Show a task by the id of its request."""
    found = await context.run(context.client.task(task_id))
    return {**found.as_dict(), "progress": found.progress}


@router.get("/gpu/load", summary="Load and memory of each instance")
async def gpu_load(context: InContext) -> dict[str, Any]:
    """Show each instance's device, memory, and running and waiting tasks."""
    return {"instances": [asdict(load) for load in await context.run(context.client.gpu_load())]}


@router.get("/config", summary="Settings in force")
async def config(context: InContext) -> dict[str, Any]:
    """Show the settings of the models with their sources."""
    found: list[Setting] = await context.run(context.client.config())
    return {"settings": [asdict(setting) for setting in found]}


async def _loads(context: InContext) -> list[InstanceLoad]:
    """Return the instances' loads, none if no server answers."""
    from genserve.errors import GenServeError

    try:
        return await context.client.gpu_load()
    except GenServeError:
        return []


def _server(server: ServerStatus) -> dict[str, Any]:
    tasks = [task.as_dict() for task in server.tasks]
    return {**asdict(server), "tasks": tasks}
