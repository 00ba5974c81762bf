"""The event loop of all synchronous clients: threads, interruptions, forks, and the end of the program."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_servers import FakeServer
from fake_triton import FakeTriton, fake_triton

from genserve import AsyncClient, Client, background
from genserve.background import LOOP, Background
from genserve.types import TaskStatus

EXIT_LIMIT_S = 20
NEVER_AWAITED_IS_AN_ERROR = pytest.mark.filterwarnings(
    "error:coroutine:RuntimeWarning", "error::pytest.PytestUnraisableExceptionWarning"
)
THREADS = 64


@pytest.fixture(autouse=True)
def endless_cleanup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a wait for the end of a cancelled coroutine that never comes a hang, rather than a pause."""
    monkeypatch.setattr(background, "CLEANUP_S", 1000.0)


async def number(value: int, pause_s: float = 0.0) -> int:
    await asyncio.sleep(pause_s)
    return value


class Probe:
    """Coroutine that waits forever, and tells its start and its cancellation."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.cancelled = False

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            for _ in range(20):  # as many turns as a request that tells its server
                await asyncio.sleep(0)
            self.cancelled = True
            raise


# Calls.


def test_calls_from_many_threads_share_one_loop() -> None:
    loops, barrier = Background(), threading.Barrier(THREADS)
    before = threading.active_count()

    async def where(value: int) -> tuple[int, int]:
        return await number(value), threading.get_ident()

    def call(value: int) -> tuple[int, int]:
        barrier.wait(10)
        return loops.run(where(value))

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(call, range(THREADS)))
        assert threading.active_count() == before + THREADS + 1
    assert [value for value, _ in results] == list(range(THREADS))
    assert len({thread for _, thread in results}) == 1


def test_client_is_used_by_many_threads() -> None:
    server, barrier = FakeServer(), threading.Barrier(THREADS)

    def call(value: int) -> bytes:
        barrier.wait(10)
        return client.generate(f"prompt {value}").data

    with Client(transport=server) as client, ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(call, range(THREADS))) == [f"prompt {value}".encode() for value in range(THREADS)]
    assert (len(server.calls), server.running) == (THREADS, 0)


def test_thread_that_cannot_start_fails_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds for Ctrl-C at this moment."""
    loops = Background()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    coroutine = number(1)
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        loops.run(coroutine)
    assert len(list(files.iterdir())) == before
    coroutine.close()
    monkeypatch.undo()
    assert loops.run(number(2)) == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(3), SystemExit),
        (asyncio.CancelledError(), CancelledError),
    ],
)
def test_exception_reaches_its_caller_alone(error: BaseException, expected: type[BaseException]) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    async def fail_below() -> None:
        await asyncio.ensure_future(fail())

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(LOOP.run, number(7, pause_s=0.05))
        for coroutine in (fail(), fail_below()):
            with pytest.raises(expected):
                LOOP.run(coroutine)
        assert other.result(10) == 7
    assert LOOP.run(number(8)) == 8


def test_context_of_the_caller_is_that_of_the_coroutine() -> None:
    variable = contextvars.ContextVar("variable", default="outside")

    async def read() -> str:
        return variable.get()

    variable.set("caller")
    assert LOOP.run(read()) == "caller"


def iteration(loop: Background) -> Any:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    return list(loop.iterate(numbers()))


@pytest.mark.parametrize(
    "call",
    [
        lambda loop: loop.run(number(1)),
        lambda loop: loop.run_with_calls(lambda _: number(1), print),
        iteration,
    ],
    ids=["run", "run_with_calls", "iterate"],
)
@NEVER_AWAITED_IS_AN_ERROR
def test_call_inside_the_loop_is_an_error(call: Callable[[Background], Any]) -> None:
    async def inside() -> None:
        call(LOOP)

    with pytest.raises(RuntimeError, match="^a synchronous Client was called inside the event loop"):
        LOOP.run(inside())
    gc.collect()  # A coroutine that was never awaited would be a warning.
    assert LOOP.run(number(1)) == 1


def test_client_inside_a_transport_is_an_error() -> None:
    server = FakeServer()

    async def nested(call: Any) -> Any:
        return client.rerank("q", ["d"])

    server.always = nested
    with Client(transport=server) as client, pytest.raises(RuntimeError, match="inside the event loop"):
        client.generate("x")


# Functions of the caller.


def test_on_progress_may_use_the_client() -> None:
    server = FakeServer()
    seen: list[tuple[str, str]] = []

    def on_progress(status: TaskStatus) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((status.state, client.rerank("q", ["long", "d"], top_n=1)[0].document))

    with Client(transport=server) as client:
        assert client.generate("x", on_progress=on_progress).data == b"x"
    assert seen[-1] == ("done", "long")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_in_on_progress_cancels_the_request(error: BaseException) -> None:
    server = FakeServer()
    server.hung = True

    def on_progress(status: TaskStatus) -> None:
        while not server.calls:
            time.sleep(0.001)
        assert server.running == 1
        raise error

    with Client(transport=server) as client:
        with pytest.raises(type(error)) as caught:
            client.generate("x", on_progress=on_progress)
        assert caught.value is error
        assert server.running == 0, "cancelled before the exception is there"
        server.hung = False
        assert client.generate("y").data == b"y"


def test_calls_come_in_order_and_before_the_result() -> None:
    seen: list[int] = []

    async def count(call: Callable[..., None]) -> str:
        for value in range(1000):
            call(value)
            if value % 100 == 0:
                await asyncio.sleep(0)
        return "result"

    assert LOOP.run_with_calls(count, seen.append) == "result"
    assert seen == list(range(1000))


def test_error_of_a_coroutine_with_calls_is_raised_after_them() -> None:
    seen: list[int] = []

    async def fail(call: Callable[..., None]) -> None:
        call(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        LOOP.run_with_calls(fail, seen.append)
    assert seen == [1]


# Iteration.


class Numbers:
    """Asynchronous iterator that tells whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    async def iterate(self, count: int = 5) -> AsyncIterator[int]:
        try:
            for value in range(count):
                await asyncio.sleep(0)
                yield value
        finally:
            await asyncio.sleep(0)
            self.closed = True


def test_iteration_yields_everything_and_closes() -> None:
    numbers = Numbers()
    assert list(LOOP.iterate(numbers.iterate())) == [0, 1, 2, 3, 4]
    assert numbers.closed


@pytest.mark.parametrize("how", ["break", "error", "close", "delete"])
def test_iteration_left_early_closes_the_iterator(how: str) -> None:
    numbers = Numbers()
    found = LOOP.iterate(numbers.iterate())
    assert next(found) == 0
    match how:
        case "break":
            for _ in found:
                break
            del found
        case "error":
            with pytest.raises(ValueError, match="mine"):
                found.throw(ValueError("mine"))  # type: ignore[attr-defined]
        case "close":
            found.close()  # type: ignore[attr-defined]
        case _:
            del found
    assert numbers.closed


def test_iteration_that_never_began_is_closed() -> None:
    numbers = Numbers()
    LOOP.iterate(numbers.iterate()).close()  # type: ignore[attr-defined]
    assert not numbers.closed


def test_error_of_an_iterator_is_raised() -> None:
    async def fail() -> AsyncIterator[int]:
        yield 1
        raise ValueError("mine")

    found = LOOP.iterate(fail())
    assert next(found) == 1
    with pytest.raises(ValueError, match="mine"):
        next(found)


def test_iterator_that_is_no_generator_is_iterated() -> None:
    class Three:
        left = 3

        def __aiter__(self) -> Three:
            return self

        async def __anext__(self) -> int:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return self.left

    assert list(LOOP.iterate(Three())) == [2, 1, 0]


# Interruptions.


def interrupt_when(event: threading.Event) -> None:
    """Interrupt the main thread, as Ctrl-C does, once it waits."""

    def wait_and_interrupt() -> None:
        if event.wait(10):
            time.sleep(0.05)  # A signal just before a thread begins to wait does not wake it.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=wait_and_interrupt, daemon=True).start()


def test_interrupted_call_cancels_its_coroutine_alone() -> None:
    probe = Probe()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(LOOP.run, number(7, pause_s=0.1))
        interrupt_when(probe.started)
        with pytest.raises(KeyboardInterrupt):
            LOOP.run(probe.run())
        assert probe.cancelled, "it has ended when the caller goes on"
        assert other.result(10) == 7


def test_error_of_an_interrupted_coroutine_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    probe = Probe()

    async def fail() -> None:
        try:
            await probe.run()
        finally:
            raise ValueError("too late")

    interrupt_when(probe.started)
    with pytest.raises(KeyboardInterrupt):
        LOOP.run(fail())
    gc.collect()
    assert probe.cancelled
    assert caplog.text == "", "asyncio logs errors that nobody has seen"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("with_calls", [False, True])
@NEVER_AWAITED_IS_AN_ERROR
def test_call_interrupted_while_it_starts_leaves_nothing_behind(
    with_calls: bool, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe()
    call_soon = background.Loop.call_soon_threadsafe

    def interrupted(loop: background.Loop, *arguments: Any) -> Any:
        monkeypatch.undo()
        if moment == "after":
            call_soon(loop, *arguments)
            assert probe.started.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(background.Loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LOOP.run_with_calls(lambda _: probe.run(), print) if with_calls else LOOP.run(probe.run())
    assert probe.cancelled == probe.started.is_set() == (moment == "after")
    gc.collect()  # A coroutine that was never awaited would be a warning.


def test_interrupted_call_with_calls_cancels_its_coroutine() -> None:
    probe = Probe()
    interrupt_when(probe.started)
    with pytest.raises(KeyboardInterrupt):
        LOOP.run_with_calls(lambda _: probe.run(), print)
    assert probe.cancelled


def test_interrupted_iteration_closes_its_iterator() -> None:
    probe = Probe()

    async def iterate() -> AsyncIterator[int]:
        yield 1
        await probe.run()

    interrupt_when(probe.started)
    with pytest.raises(KeyboardInterrupt):
        list(LOOP.iterate(iterate()))
    assert probe.cancelled


# Whole programs.


def program(text: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a Python program."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Python warns of every fork of a process with threads.
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text, *arguments]
    return subprocess.Popen(words, text=True, **pipes, **options)


def outcome(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Return exit code, printed lines and stderr; fail unless the program ends."""
    try:
        output, errors = process.communicate(timeout=EXIT_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        pytest.fail(f"the program hangs after {output!r} {errors!r}")
    return process.returncode, output.splitlines(), errors


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest) -> Iterator[FakeTriton]:
    with fake_triton(request.param) as server:
        yield server


@pytest.fixture
def http() -> Iterator[FakeTriton]:
    with fake_triton("http") as server:
        yield server


INTERRUPTED = """
import sys
from genserve import Client
client = Client(sys.argv[1])
try:
    client.generate("x", task_id="mine")
except KeyboardInterrupt:
    print("interrupted")
client.close()
"""


def test_ctrl_c_cancels_the_request_on_its_server(triton: FakeTriton) -> None:
    triton.held = True
    process = program(INTERRUPTED, triton.url)
    assert triton.arrived.wait(10)
    process.send_signal(signal.SIGINT)
    assert outcome(process) == (0, ["interrupted"], "")
    assert_cancelled(triton, "mine")


UNHANDLED = """
import sys
from genserve import Client
Client(sys.argv[1]).generate("x", task_id="mine")
"""


def test_ctrl_c_that_ends_the_program_cancels_the_request(triton: FakeTriton) -> None:
    triton.held = True
    process = program(UNHANDLED, triton.url)
    assert triton.arrived.wait(10)
    process.send_signal(signal.SIGINT)
    code, _, errors = outcome(process)
    assert code != 0
    assert errors.count("Traceback") == 1, "the program's own"
    assert errors.endswith("KeyboardInterrupt\n")
    assert_cancelled(triton, "mine")


def assert_cancelled(triton: FakeTriton, *task_ids: str) -> None:
    """Fail unless the server hears of it: over gRPC, its threads may hear after the program has ended."""
    deadline = time.monotonic() + 5
    while not set(task_ids) <= set(triton.cancelled):
        assert time.monotonic() < deadline, triton.cancelled
        time.sleep(0.01)


EXIT = """
import sys, threading
from genserve import Client
client = Client(sys.argv[1])
assert client.rerank("q", ["d"])[0].document == "d"
task = client.submit("submitted", task_id="submitted")
states = iter(task)
print(next(states).state)
def prompts():
    yield {"prompt": "first", "task_id": "first"}
    yield {"prompt": "mapped", "task_id": "mapped"}
    yield {"prompt": "not reached"}
results = client.map_generate(prompts(), concurrency=1)
started = threading.Event()
def call():
    started.set()
    client.generate("in a thread", task_id="thread")
threading.Thread(target=call, daemon=True).start()
def wait_in_map():
    next(results)
threading.Thread(target=wait_in_map, daemon=True).start()
sys.stdin.readline()
print("end")
"""


def test_program_ends_with_requests_in_flight(triton: FakeTriton) -> None:
    """Submitted, in daemon threads, and in iterators that were left and are deleted with the program's variables."""
    triton.held = True
    process = program(EXIT, triton.url, stdin=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while len(triton.prompts) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(triton.prompts) == ["first", "in a thread", "submitted"]
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    assert outcome(process) == (0, ["waiting", "end"], "")
    assert_cancelled(triton, "first", "submitted", "thread")


LEFT = """
import sys
from genserve import Client
client = Client(sys.argv[1])
results = client.map_generate(["first", "second", "third"], concurrency=2)
print(next(results).result.data)
task = client.submit("submitted")
states = iter(task)
print(next(states).task_id == task.id)
"""


def test_program_ends_with_iterations_left_early(triton: FakeTriton) -> None:
    triton.delay_s = 0.05
    assert outcome(program(LEFT, triton.url)) == (0, ["b'first'", "True"], "")


AT_EXIT = """
import atexit, sys
def late():
    print(client.generate("late").data)
    states = []
    print(client.generate("later", on_progress=states.append).data, states[-1].state)
atexit.register(late)
from genserve import Client
client = Client(sys.argv[1])
if sys.argv[2] == "used":
    print(client.generate("early").data)
"""


@pytest.mark.parametrize("before", ["used", "unused"])
def test_client_works_in_exit_functions(before: str, triton: FakeTriton) -> None:
    early = ["b'early'"] if before == "used" else []
    assert outcome(program(AT_EXIT, triton.url, before)) == (0, [*early, "b'late'", "b'later' done"], "")


FORK = """
import os, sys
from genserve import Client
client = Client(sys.argv[1], timeout=5)
def ask(who):
    print(who, client.generate(who).data.decode(), flush=True)
ask("parent")
for child in "uses it", "closes it", "only ends", "forks":
    pid = os.fork()
    if pid == 0:
        if child != "only ends":
            ask(child)
        if child == "closes it":
            client.close()
        if child == "forks":
            if grandchild := os.fork():
                os.waitpid(grandchild, 0)
            ask("both")
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
    ask("parent after " + child)
client.close()
"""


def test_client_works_before_and_after_a_fork(http: FakeTriton) -> None:
    """In the child, its end included, nothing harms the parent's open connections."""
    said = [
        "parent",
        "uses it",
        "parent after uses it",
        "closes it",
        "parent after closes it",
        "parent after only ends",
    ]
    said += ["forks", "both", "both", "parent after forks"]
    assert outcome(program(FORK, http.url)) == (0, [f"{each} {each}" for each in said], "")


FORK_IN_FLIGHT = """
import os, sys, threading
from genserve import Client
client = Client(sys.argv[1], timeout=10)
def ask():
    print("parent", client.generate("held").data, flush=True)
thread = threading.Thread(target=ask)
thread.start()
sys.stdin.readline()
pid = os.fork()
if pid == 0:
    print("child", client.rerank("q", ["d"])[0].document, flush=True)
    sys.exit()
assert os.waitpid(pid, 0)[1] == 0
print("forked", flush=True)
thread.join()
client.close()
"""


def test_fork_with_a_request_in_flight(http: FakeTriton) -> None:
    http.held = True
    process = program(FORK_IN_FLIGHT, http.url, stdin=subprocess.PIPE)
    assert http.arrived.wait(10)
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    lines = [process.stdout.readline().rstrip() for _ in range(2)]
    http.release.set()
    code, rest, errors = outcome(process)
    assert (code, [*lines, *rest], errors) == (0, ["child d", "forked", "parent b'held'"], "")
    assert http.cancelled == []


def test_asynchronous_client_works_in_several_runs(triton: FakeTriton) -> None:
    client = AsyncClient(triton.url)

    async def ask(prompt: str) -> bytes:
        images = await asyncio.gather(*(client.generate(f"{prompt} {value}") for value in range(3)))
        return b"; ".join(image.data for image in images)

    assert asyncio.run(ask("a")) == b"a 0; a 1; a 2"
    assert asyncio.run(ask("b")) == b"b 0; b 1; b 2"
    asyncio.run(client.close())


def test_both_clients_work_side_by_side(triton: FakeTriton) -> None:
    """A synchronous client may be called in a coroutine of another loop, which it only blocks."""
    client = AsyncClient(triton.url)

    async def ask() -> list[bytes]:
        with Client(triton.url) as blocking:
            found = [(await client.generate("a")).data, blocking.generate("b").data, (await client.generate("c")).data]
        await client.close()
        return found

    assert asyncio.run(ask()) == [b"a", b"b", b"c"]
