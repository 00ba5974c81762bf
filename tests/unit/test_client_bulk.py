"""Bulk calls: order, memory, errors, full queues, and the number of requests in flight."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fake_servers import FakeServer, after, image

from genserve import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    MapResult,
    QueueFull,
    ServerError,
    ServerUnavailable,
    bulk,
)
from genserve.concurrency import FIRST_PER_SERVER, MOST_PER_SERVER, WINDOWS_HELD, Concurrency
from genserve.protocol import Call, Outputs

BOTH = pytest.mark.parametrize("blocking", [False, True], ids=["async", "sync"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PAUSE_S", 0.01)


def collect(
    servers: list[FakeServer], items: Any, *, blocking: bool, verb: str = "map_generate", **options: Any
) -> list[MapResult[Any]]:
    """Return all results of a bulk call of either client."""

    async def run() -> list[MapResult[Any]]:
        async with AsyncClient(transport=servers) as client:
            return [result async for result in getattr(client, verb)(items, **options)]

    if not blocking:
        return asyncio.run(run())
    with Client(transport=servers) as client:
        return list(getattr(client, verb)(items, **options))


def pictures(results: list[MapResult[Any]]) -> list[str]:
    return [result.result.data.decode() for result in results]


async def in_reverse(call: Call) -> Outputs:
    """Answer the later of ten prompts first."""
    await asyncio.sleep(0.02 * (10 - int(call.inputs["PROMPT"].item())))
    return image(call)


@BOTH
def test_results_keep_the_order_of_the_items(blocking: bool) -> None:
    server = FakeServer()
    server.always = in_reverse
    results = collect([server], map(str, range(10)), blocking=blocking, concurrency=10)
    assert [(result.index, result.item, result.ok) for result in results] == [(n, str(n), True) for n in range(10)]
    assert pictures(results) == [str(number) for number in range(10)]


@BOTH
def test_unordered_results_come_as_they_complete(blocking: bool) -> None:
    server = FakeServer()
    server.always = in_reverse
    results = collect([server], map(str, range(10)), blocking=blocking, concurrency=10, ordered=False)
    assert [result.index for result in results] == list(reversed(range(10)))


@BOTH
@pytest.mark.parametrize("ordered", [True, False])
def test_items_are_read_as_needed(blocking: bool, ordered: bool) -> None:
    server = FakeServer()
    server.always = after(0.001)
    read, returned, ahead = 0, 0, 0

    def items() -> Iterator[str]:
        nonlocal read, ahead
        for number in range(500):
            read += 1
            ahead = max(ahead, read - returned)
            yield str(number)

    async def run() -> None:
        nonlocal returned
        async with AsyncClient(transport=[server]) as client:
            async for _ in client.map_generate(items(), concurrency=5, ordered=ordered):
                returned += 1

    if blocking:
        with Client(transport=[server]) as client:
            for _ in client.map_generate(items(), concurrency=5, ordered=ordered):
                returned += 1
    else:
        asyncio.run(run())
    assert returned == 500
    assert ahead <= bulk.AHEAD * 5 + 2
    assert server.most_running == 5


def test_slow_first_item_holds_back_a_bounded_number_of_results() -> None:
    server = FakeServer()
    gate = asyncio.Event()

    async def slow_first(call: Call) -> Outputs:
        if call.inputs["PROMPT"].item() == b"0":
            await gate.wait()
        return image(call)

    async def run() -> list[MapResult[Any]]:
        server.always = slow_first
        async with AsyncClient(transport=[server]) as client:
            asyncio.get_running_loop().call_later(0.2, lambda: (seen.append(len(server.calls)), gate.set()))
            return [each async for each in client.map_generate(map(str, range(300)), concurrency=4)]

    seen: list[int] = []
    assert [result.index for result in asyncio.run(run())] == list(range(300))
    assert seen == [bulk.AHEAD * 4]


@BOTH
def test_items_are_read_in_the_callers_thread(blocking: bool) -> None:
    threads = set()

    def items() -> Iterator[str]:
        for number in range(20):
            threads.add(threading.get_ident())
            yield str(number)

    collect([FakeServer()], items(), blocking=blocking)
    assert threads == {threading.get_ident()}


def test_asynchronous_items_are_accepted() -> None:
    async def items() -> AsyncIterator[dict[str, Any]]:
        for number in range(5):
            await asyncio.sleep(0)
            yield {"prompt": str(number), "seed": number}

    assert pictures(collect([FakeServer()], items(), blocking=False)) == ["0", "1", "2", "3", "4"]


@BOTH
def test_failed_item_does_not_stop_the_others(blocking: bool) -> None:
    server = FakeServer()

    async def answer(call: Call) -> Outputs:
        if call.inputs["PROMPT"].item() == b"2":
            raise ServerError("broken")
        return image(call)

    server.always = answer
    items = ["0", {"prompt": "1", "stepz": 3}, "2", 3, {"steps": 3}, {"prompt": "5", "steps": "many"}, "6"]
    results = collect([server], items, blocking=blocking)
    assert [result.index for result in results if result.ok] == [0, 6]
    errors = {
        result.index: (type(result.error), str(result.error), result.result) for result in results if result.error
    }
    assert errors == {
        1: (InvalidInput, "item: got an unexpected keyword argument 'stepz'", None),
        2: (ServerError, "broken", None),
        3: (InvalidInput, "item is 3; allowed: prompt, or a mapping of arguments", None),
        4: (InvalidInput, "item: missing a required argument: 'prompt'", None),
        5: (InvalidInput, errors[5][1], None),
    }
    assert errors[5][1].startswith("STEPS cannot be sent as INT32")


@BOTH
def test_rankings_and_shared_arguments(blocking: bool) -> None:
    items = [("q", ["a", "bcd"]), {"query": "q", "documents": ["ab"], "top_n": 5}, "q"]
    results = collect([FakeServer()], items, blocking=blocking, verb="map_rerank", top_n=1)
    assert [[document.score for document in result.result] for result in results[:2]] == [[3.0], [2.0]]
    assert isinstance(results[2].error, InvalidInput)


def test_mixed_items_choose_their_verb() -> None:
    items = [{"prompt": "x"}, {"query": "q", "documents": ["abc"]}, {"neither": 1}]
    results = collect([FakeServer()], items, blocking=True, verb="map", priority="low")
    assert results[0].result.data == b"x"
    assert results[1].result.scores == (3.0,)
    assert isinstance(results[2].error, InvalidInput)


def test_full_queue_lowers_the_concurrency_and_is_no_failure() -> None:
    server = FakeServer()

    async def bounded(call: Call) -> Outputs:
        if server.running > 3:
            raise QueueFull("full")
        await asyncio.sleep(0.002)
        return image(call)

    server.always = bounded
    results = collect([server], map(str, range(100)), blocking=False, concurrency=None)
    assert all(result.ok for result in results)
    assert pictures(results) == [str(number) for number in range(100)]


def test_full_queue_for_longer_than_the_timeout_fails_the_item() -> None:
    server = FakeServer()
    server.always = QueueFull("full")
    (result,) = collect([server], ["x"], blocking=False, timeout=0.1)
    assert isinstance(result.error, QueueFull)
    assert len(server.calls) > 3


@pytest.mark.parametrize(("sent", "kind"), [(False, QueueFull), (True, DeadlineExceeded)])
def test_refused_item_without_time_for_another_attempt_reports_the_refusal(
    sent: bool, kind: type[GenServeError]
) -> None:
    late = DeadlineExceeded("no time left")
    late.sent = sent
    server = FakeServer()
    server.script = [QueueFull("full"), late]
    (result,) = collect([server], ["x"], blocking=False)
    assert type(result.error) is kind


def test_items_wait_for_a_server_that_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    from genserve import retry

    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    server = FakeServer()
    server.script = [ServerUnavailable("restarting")] * 12
    assert all(result.ok for result in collect([server], ["x"] * 4, blocking=True))
    server.script = [ServerUnavailable("restarting")] * 4
    (result,) = collect([server], ["x"], blocking=True, retry_for=0)
    assert isinstance(result.error, ServerUnavailable)


@BOTH
def test_leaving_early_cancels_what_is_in_flight(blocking: bool) -> None:
    server = FakeServer()

    async def answer(call: Call) -> Outputs:
        if call.inputs["PROMPT"].item() != b"0":
            await asyncio.Event().wait()
        return image(call)

    server.always = answer

    async def run() -> None:
        async with AsyncClient(transport=[server]) as client:
            results = aiter(client.map_generate(map(str, range(50)), concurrency=6))
            assert (await anext(results)).ok
            await results.aclose()
            assert server.running == 0

    if blocking:
        with Client(transport=[server]) as client:
            found = client.map_generate(map(str, range(50)), concurrency=6)
            assert next(found).ok
            found.close()
            assert server.running == 0
    else:
        asyncio.run(run())
    assert {action for action, _ in server.tasks} == {"cancel"}
    assert len(server.tasks) == len(server.calls) - 1


def test_error_of_the_iterable_is_raised_and_cancels_the_rest() -> None:
    server = FakeServer()
    server.hung = True

    def items() -> Iterator[str]:
        yield "x"
        raise KeyError("mine")

    with Client(transport=[server]) as client, pytest.raises(KeyError, match="mine"):
        list(client.map_generate(items()))
    assert server.running == 0


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"retry_for": -1}, {"timeout": 0}], ids=str)
def test_invalid_options_are_rejected_before_anything_is_sent(options: dict[str, Any]) -> None:
    server = FakeServer()
    with Client(transport=[server]) as client, pytest.raises(InvalidInput):
        client.map_generate(["x"], **options)
    assert server.calls == []


def test_progress_bar_shows_done_failed_and_total(capsys: pytest.CaptureFixture[str]) -> None:
    collect([FakeServer()], ["x", "y", 3], blocking=True, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "3/3" in last
    assert "failed=1" in last
    collect([FakeServer()], ["x"], blocking=True)
    assert capsys.readouterr().err == ""


class Load:
    """Simulated load on servers that need a second for up to `slots` requests at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
        self.slots = slots
        self.now = 0.0
        monkeypatch.setattr("genserve.concurrency.time.monotonic", lambda: self.now)

    def run(self, concurrency: Concurrency, rounds: int) -> list[int]:
        """Return the limits after each round."""
        limits = []
        for _ in range(rounds):
            in_flight = concurrency.limit
            assert concurrency.room(in_flight) == 0
            self.now += max(1.0, in_flight / self.slots)
            for _ in range(in_flight):
                concurrency.completed(in_flight)
            limits.append(concurrency.limit)
        return limits


@BOTH
def test_bulk_call_grows_with_a_server_that_takes_more(blocking: bool) -> None:
    server = FakeServer()
    server.always = after(0.02)
    results = collect([server], map(str, range(300)), blocking=blocking)
    assert all(result.ok for result in results)
    assert server.most_running >= 4 * FIRST_PER_SERVER


@pytest.mark.parametrize("slots", [4, 8, 16, 40])
def test_concurrency_grows_while_throughput_does(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(monkeypatch, slots)
    limits = load.run(Concurrency(None, 2), 40)
    assert limits[0] == 2 * FIRST_PER_SERVER
    assert max(limits) <= 3 * slots
    assert slots * 0.7 <= limits[-1] <= 1.6 * slots + 1


def test_found_concurrency_is_questioned_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(monkeypatch, 4)
    concurrency = Concurrency(None, 2)
    load.run(concurrency, 10)
    load.slots = 32
    limits = load.run(concurrency, 2 * WINDOWS_HELD + 40)
    assert limits[-1] >= 20


def test_concurrency_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(monkeypatch, 10**6)
    assert load.run(Concurrency(None, 2), 40)[-1] == 2 * MOST_PER_SERVER


def test_unused_concurrency_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(monkeypatch, 100)
    concurrency = Concurrency(None, 1)
    for _ in range(200):
        assert concurrency.room(concurrency.limit - 1) == 1
        load.now += 0.01
        concurrency.completed(concurrency.limit // 2)
    assert concurrency.limit == FIRST_PER_SERVER


def test_given_concurrency_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(monkeypatch, 100)
    concurrency = Concurrency(5, 3)
    assert set(load.run(concurrency, 30)) == {5}
    concurrency.refused(3)
    assert concurrency.limit == 5
    assert concurrency.room(3) == 0
    load.now += 1
    assert concurrency.room(3) == 2


def test_full_queue_lowers_the_limit_to_what_the_servers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(monkeypatch, 100)
    concurrency = Concurrency(None, 2)
    load.run(concurrency, 12)
    before = concurrency.limit
    concurrency.refused(before - 3)
    assert concurrency.limit == before - 3
    concurrency.refused(0)
    assert concurrency.limit == 1
    assert concurrency.room(0) == 1
