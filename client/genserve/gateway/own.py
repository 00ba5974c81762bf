"""GenServe's own routes: one image per request, status, models, tasks, load and settings."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from genserve.errors import GenServeError
from genserve.gateway import names
from genserve.gateway.adapters import Adapters, lora_argument
from genserve.gateway.context import Context, InContext
from genserve.gateway.json_body import StrictRoute
from genserve.gateway.names import Model
from genserve.types import InstanceLoad, Priority, ServerStatus, Setting

router = APIRouter(tags=["genserve"], route_class=StrictRoute)

MODEL: Model = "flux"
HEALTH_S = 2.0
"""Seconds that a health check waits for the settings in force."""
RERANK_LIMITS = {
    "max_num_seqs": "max_num_seqs",
    "tensor_parallel_size": "tensor_parallel_size",
    "max_workers": "max_waiting_requests",
}
"""Limits of the reranker in the answer to a health check, with the names of their settings."""
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
"""Priorities 0, 1 and 2."""


class GenerateBody(BaseModel):
    """Request for one image."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=10_000)]
    model_id: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    cfg: float | None = None
    seed: Annotated[int | None, Field(ge=-1, lt=2**63)] = None
    lora: Adapters | None = None
    cache: float | None = None
    priority: Annotated[int | None, Field(ge=0, le=2)] = None


@router.post("/generate", summary="Generate one image")
async def generate(body: GenerateBody, context: InContext) -> dict[str, Any]:
    """Generate one image; the answer has it as base64."""
    model_id = names.checked(body.model_id, MODEL, context.settings.aliases, parameter="model_id")
    image = await context.run(
        context.generate(
            body.prompt,
            negative_prompt=body.negative_prompt,
            height=body.height,
            width=body.width,
            steps=body.num_inference_steps,
            guidance=body.cfg,
            seed=None if body.seed == -1 else body.seed,
            lora=lora_argument(body.lora),
            cache=body.cache,
            priority=PRIORITIES[1 if body.priority is None else body.priority],
            task_id=context.id,
        )
    )
    info = image.info
    return {
        "success": True,
        "task_id": context.id,
        "model_id": model_id,
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


@router.get("/health", summary="Whether a server is ready, and the limits of the reranker")
async def health(context: InContext, response: Response) -> dict[str, Any]:
    """Answer 200 if at least one server has all models ready, else 503. Limits that are not known are null."""
    is_ready, limits = await context.run(asyncio.gather(context.client.health(), _rerank_limits(context)))
    response.status_code = 200 if is_ready else 503
    return {"status": "healthy" if is_ready else "unhealthy", **limits}


@router.get("/status", summary="Servers, models, and requests in flight")
async def status(context: InContext) -> dict[str, Any]:
    """Describe all servers, with the sums of their queues."""
    servers, loads = await context.run(asyncio.gather(context.client.status(), _loads(context)))
    listed = {task.task_id for server in servers for task in server.tasks}
    return {
        "status": "healthy" if any(server.ready for server in servers) else "unhealthy",
        "concurrent_manager": {
            "global_queue_size": sum(load.waiting for load in loads) + context.line.unlisted(listed),
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


async def _loads(context: Context) -> list[InstanceLoad]:
    """Return the instances' loads, none if no server answers."""
    try:
        return await context.client.gpu_load()
    except GenServeError:
        return []


async def _rerank_limits(context: Context) -> dict[str, Any]:
    """Return the reranker's limits on the first server that has it."""
    try:
        found = await asyncio.wait_for(context.client.config(), HEALTH_S)
    except (GenServeError, asyncio.TimeoutError):
        found = []
    values = {setting.name: setting.value for setting in reversed(found) if setting.model == "rerank"}
    return {name: values.get(setting) for name, setting in RERANK_LIMITS.items()}


def _server(server: ServerStatus) -> dict[str, Any]:
    tasks = [task.as_dict() for task in server.tasks]
    return {**asdict(server), "tasks": tasks}
