"""Cost of the gateway: requests through it against plain tritonclient over gRPC, before the same server.

Latency: one request at a time, in turn. Throughput: several in flight, in blocks of requests in turn. Every caller
reads its answers completely: images as bytes, scores as numbers. Documents and seeds are new each time. With --check
it fails if the gateway adds more than the project's promise.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import click
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.gateway import own_gateway
from genserve import GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server

QUERY = "the city on the river"
PROMPT = "a red circle on a blue background"
STEPS = 20
DOCUMENTS = 20
IN_FLIGHT = 16
MOST_ADDED_S = 0.003
"""Promised limit on what the gateway adds to the median of one request at a time."""
LEAST_SHARE = 0.97
"""Promised share of the throughput without the gateway."""
WARM_UP = 20
RERANK, IMAGE = "rerank", "image"
DIRECT, GATEWAY = "tritonclient", "gateway"
TYPES = {np.dtype(object): "BYTES", np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64"}

Send = Callable[[int], Awaitable[Any]]
"""Sends one request, different for every number, and reads its answer."""


def documents(number: int, size: int) -> list[str]:
    """Return documents that no earlier request had."""
    return [f"Bridge number {number}-{each} crosses the river in the old part of the city." for each in range(size)]


def direct_rerank(client: Any, size: int) -> Send:
    """Return tritonclient's call that ranks `size` documents."""

    async def send(number: int) -> None:
        texts = [text.encode() for text in documents(number, size)]
        inputs = _tensors(QUERY=np.array([[QUERY.encode()]], object), DOCUMENTS=np.array([texts], object))
        result = await client.infer("rerank", inputs)
        scores = result.as_numpy("SCORES")[0]
        sorted(range(size), key=lambda index: -scores[index])

    return send


def direct_image(client: Any) -> Send:
    """Return tritonclient's call that makes an image."""

    async def send(number: int) -> None:
        prompt, seed = np.array([[PROMPT.encode()]], object), np.array([[number]], np.int64)
        inputs = _tensors(PROMPT=prompt, SEED=seed, STEPS=np.array([[STEPS]], np.int32))
        _check_png((await client.infer("flux", inputs)).as_numpy("IMAGE").item())

    return send


def gateway_rerank(session: aiohttp.ClientSession, size: int) -> Send:
    """Return the gateway's call that ranks `size` documents."""

    async def send(number: int) -> None:
        answer = await _post(session, "/v2/rerank", query=QUERY, documents=documents(number, size))
        if len(answer["results"]) != size:
            raise GenServeError(f"the gateway ranked {len(answer['results'])} of {size} documents")

    return send


def gateway_image(session: aiohttp.ClientSession) -> Send:
    """Return the gateway's call that makes an image."""

    async def send(number: int) -> None:
        answer = await _post(session, "/v1/images/generations", prompt=PROMPT, seed=number, num_inference_steps=STEPS)
        _check_png(base64.b64decode(answer["data"][0]["b64_json"]))

    return send


async def _post(session: aiohttp.ClientSession, path: str, **body: Any) -> Any:
    async with session.post(path, json=body) as answer:
        data = await answer.read()
    if answer.status != 200:
        raise GenServeError(f"the gateway answered {answer.status}: {data[:200]!r}")
    return json.loads(data)


def _tensors(**arrays: Any) -> list[Any]:
    inputs = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, list(array.shape), TYPES[array.dtype])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _check_png(data: bytes) -> None:
    if not data.startswith(b"\x89PNG"):
        raise GenServeError(f"no PNG file: {data[:20]!r}")


@dataclass
class Compared:
    """Measurements of a request with and without the gateway.

    Attributes:
        seconds: Seconds of each request at a time, by caller.
        blocks: Requests per second of each block, by caller.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {DIRECT: [], GATEWAY: []})
    blocks: dict[str, list[float]] = field(default_factory=lambda: {DIRECT: [], GATEWAY: []})

    def median_s(self, caller: str) -> float:
        """Return the median seconds of one request."""
        return statistics.median(self.seconds[caller])

    @property
    def added_s(self) -> float:
        """Seconds that the gateway adds to the median."""
        return self.median_s(GATEWAY) - self.median_s(DIRECT)

    def rate(self, caller: str) -> float:
        """Return the requests per second over all blocks, which have equally many requests."""
        return statistics.harmonic_mean(self.blocks[caller])

    @property
    def share(self) -> float:
        """Throughput through the gateway, as a share of that without it."""
        return self.rate(GATEWAY) / self.rate(DIRECT)


async def run_block(send: Send, numbers: Iterable[int], in_flight: int) -> float:
    """Send requests with `in_flight` of them at once; return the seconds."""
    left = iter(numbers)

    async def caller() -> None:
        for number in left:
            await send(number)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return time.perf_counter() - started


async def measure(grpc: str, gateway: str, *, single: int, block: dict[str, int], rounds: int) -> dict[str, Compared]:
    """Return the measurements by request."""
    numbers = count()
    found = {RERANK: Compared(), IMAGE: Compared()}
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(triton_aio.InferenceServerClient(grpc))
        connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(f"http://{gateway}", connector=connector, timeout=aiohttp.ClientTimeout(600))
        )
        alone = {
            RERANK: {DIRECT: direct_rerank(client, 1), GATEWAY: gateway_rerank(session, 1)},
            IMAGE: {DIRECT: direct_image(client), GATEWAY: gateway_image(session)},
        }
        many = {
            RERANK: {DIRECT: direct_rerank(client, DOCUMENTS), GATEWAY: gateway_rerank(session, DOCUMENTS)},
            IMAGE: alone[IMAGE],
        }
        for request, compared in found.items():
            click.echo(f"{request}: {single} at a time", err=True)
            for turn in range(-WARM_UP, single):
                for caller in (DIRECT, GATEWAY) if turn % 2 else (GATEWAY, DIRECT):
                    started = time.perf_counter()
                    await alone[request][caller](next(numbers))
                    if turn >= 0:
                        compared.seconds[caller].append(time.perf_counter() - started)
        for request, compared in found.items():
            for caller in (DIRECT, GATEWAY):
                await run_block(many[request][caller], [next(numbers) for _ in range(2 * IN_FLIGHT)], IN_FLIGHT)
            for turn in range(rounds):
                click.echo(f"{request}: {IN_FLIGHT} in flight, round {turn + 1} of {rounds}", err=True)
                for caller in (DIRECT, GATEWAY) if turn % 2 else (GATEWAY, DIRECT):
                    size = block[request]
                    seconds = await run_block(many[request][caller], [next(numbers) for _ in range(size)], IN_FLIGHT)
                    compared.blocks[caller].append(size / seconds)
    return found


def broken_promises(found: dict[str, Compared]) -> list[str]:
    """Return the promises that do not hold."""
    broken = []
    for request, compared in found.items():
        if compared.added_s > MOST_ADDED_S:
            broken.append(
                f"{request}: {compared.added_s * 1e3:.2f} ms more, promised at most {MOST_ADDED_S * 1e3:g} ms"
            )
        if compared.share < LEAST_SHARE:
            broken.append(f"{request}: {compared.share:.3f} of the throughput, promised {LEAST_SHARE}")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--single", type=COUNT, default=200, show_default=True, help="Requests of each kind and caller.")
@click.option("--images", type=COUNT, default=96, show_default=True, help="Images in a block.")
@click.option("--rankings", type=COUNT, default=192, show_default=True, help="Rankings in a block.")
@click.option("--rounds", type=COUNT, default=8, show_default=True, help="Blocks of each kind and caller.")
@click.option("--protocol", type=click.Choice(["grpc", "http"]), default="grpc", show_default=True, help="Behind it.")
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(single: int, images: int, rankings: int, rounds: int, protocol: str, check: bool) -> None:
    """Measure what the gateway adds to a request, and takes of the throughput."""
    block = {RERANK: rankings, IMAGE: images}
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-cost-") as folder:
            logs = Path(folder)
            with own_server(("flux", "rerank", "tasks"), log=logs / "server.log") as addresses:
                behind = addresses["grpc"] if protocol == "grpc" else f"http://{addresses['http']}"
                with own_gateway(behind, log=logs / "gateway.log") as gateway:
                    work = measure(addresses["grpc"], gateway, single=single, block=block, rounds=rounds)
                    found = asyncio.run(work)
    except (ServeError, GenServeError, triton.InferenceServerException) as error:
        fail(error)
    drawn = new_table(
        "Request", "tritonclient, ms", "Gateway, ms", "Added, ms", "tritonclient, 1/s", "Gateway, 1/s", "Share"
    )
    drawn.box = box.MARKDOWN
    for request, compared in found.items():
        drawn.add_row(
            request,
            *(f"{compared.median_s(caller) * 1e3:.2f}" for caller in (DIRECT, GATEWAY)),
            f"{compared.added_s * 1e3:+.2f}",
            *(f"{compared.rate(caller):.1f}" for caller in (DIRECT, GATEWAY)),
            f"{compared.share:.3f}",
        )
    show(drawn)
    judge(broken_promises(found), check=check)


if __name__ == "__main__":
    main()
