"""Time that the client adds to a call: genserve's clients against plain tritonclient, on one connection each.

All contenders take turns, call by call, with a document or a seed that is new each time. The import of the client is
timed in fresh processes. With --check it fails if a median is above the project's promise.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from genserve import AsyncClient, Client, GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import Addresses, own_server

QUERY = "the city on the river"
STEPS, SIZE = 20, 128
TYPES = {np.dtype(object): "BYTES", np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64"}
PROMISES = {"rerank": 0.10, "generate": 0.02}
"""Largest share that genserve may add to the median of tritonclient over the same protocol."""
IMPORT_PROMISE_S = 0.3
WARM_UP = 5
IMPORT = """
import json, sys, time
started = time.perf_counter()
import genserve
seconds = time.perf_counter() - started
print(json.dumps([seconds, "torch" in sys.modules]))
"""

Call = Callable[[int], float]
"""Sends one request, different for every number, and returns its seconds."""
Contenders = dict[tuple[str, str], Call]
"""By protocol and title; the title of tritonclient is `PLAIN`."""
PLAIN = "tritonclient"


def document(number: int) -> str:
    """Return a document that no earlier call had."""
    return f"Bridge number {number} crosses the river in the old part of the city."


def plain(module: Any, client: Any, model: str, outputs: tuple[str, ...], **arrays: Any) -> None:
    """Send one request with tritonclient, and read its outputs."""
    inputs = []
    for name, array in arrays.items():
        tensor = module.InferInput(name, list(array.shape), TYPES[array.dtype])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer(model, inputs, outputs=[module.InferRequestedOutput(name) for name in outputs])
    for name in outputs:
        result.as_numpy(name)


def plain_call(verb: str, module: Any, client: Any) -> Call:
    """Return tritonclient's call."""

    def rerank(number: int) -> None:
        query, text = (np.array([[each.encode()]], dtype=object) for each in (QUERY, document(number)))
        plain(module, client, "rerank", ("SCORES", "INFO"), QUERY=query, DOCUMENTS=text)

    def generate(number: int) -> None:
        numbers = {
            name: np.array([[value]], dtype=np.int32)
            for name, value in {"STEPS": STEPS, "HEIGHT": SIZE, "WIDTH": SIZE}.items()
        }
        prompt, seed = np.array([[b"a red circle"]], dtype=object), np.array([[number]], dtype=np.int64)
        plain(module, client, "flux", ("IMAGE", "SEED", "INFO"), PROMPT=prompt, SEED=seed, **numbers)

    return timed(rerank if verb == "rerank" else generate)


def arguments(verb: str, number: int) -> dict[str, Any]:
    """Return the arguments of a client's method for the same request."""
    if verb == "rerank":
        return {"query": QUERY, "documents": [document(number)]}
    return {"prompt": "a red circle", "seed": number, "steps": STEPS, "height": SIZE, "width": SIZE}


def timed(send: Callable[[int], object]) -> Call:
    """Return a call that measures `send`."""

    def call(number: int) -> float:
        started = time.perf_counter()
        send(number)
        return time.perf_counter() - started

    return call


def client_call(verb: str, client: Client) -> Call:
    """Return the call of genserve's synchronous client."""
    method = getattr(client, verb)
    return timed(lambda number: method(**arguments(verb, number)))


def async_call(verb: str, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> Call:
    """Return the call of genserve's asynchronous client, timed inside the event loop."""
    method = getattr(client, verb)

    async def send(number: int) -> float:
        started = time.perf_counter()
        await method(**arguments(verb, number))
        return time.perf_counter() - started

    return lambda number: loop.run_until_complete(send(number))


def close_in(loop: asyncio.AbstractEventLoop, client: AsyncClient) -> None:
    """Close an asynchronous client in its event loop."""
    loop.run_until_complete(client.close())


def take_turns(contenders: Contenders, repeats: int) -> dict[tuple[str, str], float]:
    """Return the median seconds of `repeats` calls of each contender. They take turns in random order."""
    # Shuffled: with a fixed order, each would always follow the same other one, and pay for what that leaves behind.
    draw = random.Random(0)
    order = list(contenders)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in order}
    number = 0
    for turn in range(-WARM_UP, repeats):
        draw.shuffle(order)
        for name in order:
            taken = contenders[name](number)
            number += 1
            if turn >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(each) for name, each in seconds.items()}


def measure(addresses: Addresses, calls: Mapping[str, int]) -> dict[str, dict[tuple[str, str], float]]:
    """Return the medians by verb, for as many calls of each as `calls` has."""
    medians = {}
    urls = {"grpc": addresses["grpc"], "http": f"http://{addresses['http']}"}
    modules = {"grpc": triton_grpc, "http": triton_http}
    with ExitStack() as stack:
        loop = stack.enter_context(closing(asyncio.new_event_loop()))
        plains = {
            protocol: stack.enter_context(closing(module.InferenceServerClient(addresses[protocol])))
            for protocol, module in modules.items()
        }
        clients = {protocol: stack.enter_context(Client(url)) for protocol, url in urls.items()}
        asyncs = {protocol: AsyncClient(url) for protocol, url in urls.items()}
        for client in asyncs.values():
            stack.callback(close_in, loop, client)
        for verb, repeats in calls.items():
            click.echo(f"{verb}: {repeats} calls of each", err=True)
            contenders: Contenders = {}
            for protocol in urls:
                contenders[protocol, PLAIN] = plain_call(verb, modules[protocol], plains[protocol])
                contenders[protocol, "Client"] = client_call(verb, clients[protocol])
                contenders[protocol, "AsyncClient"] = async_call(verb, asyncs[protocol], loop)
            medians[verb] = take_turns(contenders, repeats)
    return medians


def measure_import(processes: int) -> tuple[float, bool]:
    """Return the median seconds of ``import genserve`` in fresh processes, and whether torch was imported."""
    command = [sys.executable, "-c", IMPORT]
    ended = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(processes)]
    found = [json.loads(each.stdout) for each in ended]
    return statistics.median(seconds for seconds, _ in found), any(torch for _, torch in found)


def broken_promises(
    medians: Mapping[str, Mapping[tuple[str, str], float]], import_s: float, has_torch: bool
) -> list[str]:
    """Return the promises that do not hold."""
    broken = []
    for verb, by_name in medians.items():
        for (protocol, title), seconds in by_name.items():
            added = seconds / by_name[protocol, PLAIN] - 1
            if added > PROMISES[verb]:
                broken.append(
                    f"{title} adds {added:.1%} to {verb} over {protocol}, promised at most {PROMISES[verb]:.0%}"
                )
    if import_s > IMPORT_PROMISE_S:
        broken.append(f"the import takes {import_s:.2f} s, promised at most {IMPORT_PROMISE_S:g} s")
    if has_torch:
        broken.append("the client imports torch")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--rerank", type=COUNT, default=400, show_default=True, help="Rerank calls of each client.")
@click.option("--generate", type=COUNT, default=100, show_default=True, help="Generate calls of each client.")
@click.option("--imports", type=COUNT, default=9, show_default=True, help="Processes that import the client.")
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(rerank: int, generate: int, imports: int, check: bool) -> None:
    """Measure the time that the client adds to a call, and the time of its import."""
    import_s, has_torch = measure_import(imports)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="genserve-overhead-") as folder,
            own_server(("flux", "rerank"), log=Path(folder) / "server.log") as addresses,
        ):
            medians = measure(addresses, {"rerank": rerank, "generate": generate})
    except (ServeError, GenServeError) as error:
        fail(error)
    drawn = new_table("Call, client", "Protocol", "Median, ms", "Added")
    drawn.box = box.MARKDOWN
    for verb, by_name in medians.items():
        for (protocol, title), seconds in by_name.items():
            added = "" if title == PLAIN else f"{seconds / by_name[protocol, PLAIN] - 1:+.1%}"
            drawn.add_row(f"{verb}, {title}", protocol, f"{seconds * 1e3:.2f}", added)
    show(drawn)
    click.echo(f"import genserve: {import_s:.3f} s, {'with' if has_torch else 'without'} torch")
    judge(broken_promises(medians, import_s, has_torch), check=check)


if __name__ == "__main__":
    main()
