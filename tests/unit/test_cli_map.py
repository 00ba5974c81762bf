"""`genserve map`: what it sends, writes, prints, and leaves behind when it ends early."""

from __future__ import annotations

import asyncio
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from fake_servers import FakeServer, after, image
from fake_triton import FakeTriton, fake_triton

from genserve import ServerError, ServerUnavailable
from genserve.cli import main
from genserve.map_files import Results
from genserve.protocol import Call, Outputs

GENSERVE = str(Path(sys.executable).parent / "genserve")
KILLS = 3

Map = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GENSERVE_URL", "GENSERVE_HEADERS", "GENSERVE_CA", "GENSERVE_CERT", "GENSERVE_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def run(server: FakeServer) -> Map:
    """Run the verb with the fake server, from tasks.jsonl to out.jsonl."""

    def run(*arguments: str, tasks: str = "tasks.jsonl", **options: Any) -> Result:
        words = ["map", tasks, "-o", "out.jsonl", *arguments]
        return CliRunner().invoke(main, words, prog_name="genserve", **{"obj": server, **options})

    return run


def write(*tasks: dict[str, Any] | str) -> None:
    lines = (task if isinstance(task, str) else json.dumps(task) for task in tasks)
    Path("tasks.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prompts(count: int, **arguments: Any) -> list[dict[str, Any]]:
    return [{"id": f"task-{number}", "prompt": f"prompt {number}", **arguments} for number in range(count)]


def results(path: str = "out.jsonl") -> dict[str, dict[str, Any]]:
    """Return the results by id; fail if an id is there twice."""
    lines = [json.loads(line) for line in Path(path).read_bytes().splitlines()]
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def failure(result: Result) -> str:
    """Return the only line on stderr of a run that failed."""
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("genserve: ")
    return line.removeprefix("genserve: ")


def interrupt_main() -> None:
    """Send the main thread what Ctrl-C sends it."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


# What is sent and written.


def test_images_and_rankings_are_written(run: Map, server: FakeServer) -> None:
    write(
        {"id": "circle", "prompt": "a red circle", "seed": 7, "format": "webp"},
        {"query": "capital", "documents": ["a", "abc"], "top_n": 1},
        "",
        {"id": "a/b", "prompt": "a blue star", "negative_prompt": "red"},
    )
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    assert results() == {
        "circle": {
            "id": "circle",
            "ok": True,
            "file": "out-images/circle.webp",
            "seed": 7,
            "info": {"steps": 4, "prompt": "a red circle"},
        },
        "2": {"id": "2", "ok": True, "ranking": [{"index": 1, "score": 3.0, "document": "abc"}], "info": {}},
        "a/b": results()["a/b"],
    }
    assert Path("out-images/circle.webp").read_bytes() == b"a red circle"
    assert Path(results()["a/b"]["file"]).read_bytes() == b"a blue star"
    assert len(list(Path("out-images").iterdir())) == 2
    sent = {call.model: call.inputs for call in server.calls}
    assert "INSTRUCTION" not in sent["rerank"]
    assert {call.inputs["FORMAT"].item() for call in server.calls if "FORMAT" in call.inputs} == {b"webp"}


def test_adapters_and_cache_of_a_task_are_sent(run: Map, server: FakeServer) -> None:
    lora = [["neon", 0.5], {"neon": 0.5}, [{"name": "neon", "weight": 0.5}], ["neon"], "neon"]
    write(*({"prompt": "x", "lora": each, "cache": 0.25} for each in lora), {"id": "bad", "prompt": "x", "lora": 5})
    assert run().exit_code == 1
    assert results()["bad"]["error"]["message"].startswith("LORA is 5; allowed: a name")
    sent = sorted(call.inputs["LORA"].item() for call in server.calls)
    assert sent == [b'[{"name": "neon", "weight": 0.5}]'] * 3 + [b'[{"name": "neon", "weight": 1.0}]'] * 2
    assert {call.inputs["CACHE"].item() for call in server.calls} == {0.25}


def test_images_go_to_the_given_folder(run: Map) -> None:
    write({"id": "a", "prompt": "x"})
    assert run("--images", "deep/er").exit_code == 0
    assert results()["a"]["file"] == "deep/er/a.png"
    assert Path("deep/er/a.png").read_bytes() == b"x"


def test_standard_input_is_read(run: Map) -> None:
    result = run(tasks="-", input='{"id": "a", "prompt": "x"}\n{"query": "q", "documents": ["d"]}')
    assert (result.exit_code, result.stderr) == (0, "")
    assert set(results()) == {"a", "2"}


def test_options_are_sent_and_a_task_has_the_last_word(run: Map, server: FakeServer) -> None:
    write({"id": "a", "prompt": "a"}, {"id": "b", "prompt": "b", "priority": "high"})
    assert run("--priority", "low").exit_code == 0
    assert {call.inputs["PROMPT"].item(): call.priority for call in server.calls} == {b"a": 3, b"b": 1}


@pytest.mark.parametrize(
    ("options", "most"), [(["--serial"], 1), (["--concurrency", "1"], 1), (["--concurrency", "5"], 5)]
)
def test_requests_in_flight(options: list[str], most: int, run: Map, server: FakeServer) -> None:
    server.always = after(0.005)
    write(*prompts(20))
    assert run(*options).exit_code == 0
    assert server.most_running == most
    assert len(results()) == 20


def test_results_are_written_as_they_complete(run: Map, server: FakeServer) -> None:
    async def slow_first(call: Call) -> Outputs:
        while call.inputs["PROMPT"].item() == b"prompt 0" and len(server.calls) < 20:
            await asyncio.sleep(0.001)
        return image(call)

    server.always = slow_first
    write(*prompts(20))
    assert run("--concurrency", "2").exit_code == 0
    assert next(iter(results())) != "task-0"
    assert len(results()) == 20


def test_timeout_counts_per_task(run: Map, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bytes, float] = {}
    infer = server.infer

    async def watched(call: Call, timeout_s: float) -> Outputs:
        seen[call.inputs["PROMPT"].item()] = timeout_s
        return await infer(call, timeout_s)

    monkeypatch.setattr(server, "infer", watched)
    write({"prompt": "its own", "timeout": 5}, {"prompt": "everyone's"})
    assert run("--timeout", "7777").exit_code == 0
    assert seen[b"its own"] <= 5
    assert 5000 < seen[b"everyone's"] <= 7777


# Summaries and failures.


def test_summary(run: Map) -> None:
    write(*prompts(3), {"id": "task-0", "prompt": "again"})
    first = run().stdout
    assert first.startswith("done: 3 tasks in ")
    assert first.endswith(" per second, 0 failed, 0 had a result already, 1 lines repeat an id\n")
    second = run()
    assert second.exit_code == 0
    assert second.stdout.startswith("done: 0 tasks in ")
    assert second.stdout.endswith(" s, 0 failed, 3 had a result already, 1 lines repeat an id\n")


def test_json_summary(run: Map, server: FakeServer) -> None:
    write(*prompts(3), "no JSON")
    shown = json.loads(run("--json").stdout)
    assert shown.pop("seconds") >= 0
    assert shown == {"done": 4, "failed": 1, "skipped": 0, "failed_before": 0, "repeated": 0}
    shown = json.loads(run("--json").stdout)
    assert shown.pop("seconds") >= 0
    assert shown == {"done": 0, "failed": 0, "skipped": 4, "failed_before": 1, "repeated": 0}
    assert len(server.calls) == 3


UNUSABLE = {
    "a red circle": "line 1 is not JSON",
    "[]": "line 1 is not a JSON object",
    '{"id": 7, "prompt": "x"}': "line 1: id is 7; allowed: a text, not empty",
    "{}": "item: missing a required argument: 'prompt'",
    '{"query": "q"}': "item: missing a required argument: 'documents'",
    '{"prompt": "x", "colour": "red"}': "item: got an unexpected keyword argument 'colour'",
    '{"prompt": "x", "query": "q"}': "item: got an unexpected keyword argument 'query'",
    '{"prompt": "x", "\\ud800": 1}': "item: got an unexpected keyword argument '\\ud800'",
    '{"prompt": 5}': "PROMPT cannot be sent as BYTES: int is not text",
    '{"prompt": "x", "seed": "7"}': "SEED cannot be sent as INT64: 'str' object cannot be interpreted as an integer",
    '{"prompt": "x", "priority": "urgent"}': "priority is 'urgent'; allowed: high, normal, low",
    '{"query": "q", "documents": []}': "DOCUMENTS is an empty list; allowed: 1 to 1,000 documents",
    '{"query": "q", "documents": ["d"], "top_n": 0}': "top_n is 0; allowed: at least 1",
}


@pytest.mark.parametrize("line", UNUSABLE, ids=ascii)
def test_unusable_task_fails_alone(line: str, run: Map, server: FakeServer) -> None:
    write(line, *prompts(3))
    assert failure(run()) == "1 of 4 tasks failed; see out.jsonl"
    found = results()
    assert found.pop("1") == {"id": "1", "ok": False, "error": {"class": "InvalidInput", "message": UNUSABLE[line]}}
    assert set(found) == {"task-0", "task-1", "task-2"}
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_n": "3"},
        {"top_n": []},
        {"documents": 5},
        {"documents": None},
        {"priority": []},
        {"priority": {}},
        {"timeout": "soon"},
        {"timeout": []},
        {"on_progress": "print"},
    ],
    ids=str,
)
def test_argument_of_a_wrong_type_fails_alone(arguments: dict[str, Any], run: Map, server: FakeServer) -> None:
    verb = {"prompt": "x"} if "on_progress" in arguments else {"query": "q", "documents": ["d"]}
    write({**verb, **arguments}, *prompts(3))
    assert failure(run("--timeout", "5")) == "1 of 4 tasks failed; see out.jsonl"
    found = results()
    assert found.pop("1")["error"]["class"] == "InvalidInput"
    assert all(result["ok"] for result in found.values())
    assert len(found) == 3


async def every_second_fails(call: Call) -> Outputs:
    if int(call.inputs["PROMPT"].item().split()[1]) % 2:
        raise ServerError("defect")
    return image(call)


def test_failed_tasks_are_not_done_again_unless_asked(run: Map, server: FakeServer) -> None:
    server.always = every_second_fails
    write(*prompts(6))
    assert failure(run()) == "3 of 6 tasks failed; see out.jsonl"
    assert results()["task-1"] == {"id": "task-1", "ok": False, "error": {"class": "ServerError", "message": "defect"}}
    assert len(server.calls) == 6

    assert failure(run()) == "3 failed before, and --retry-failed does them again; see out.jsonl"
    assert len(server.calls) == 6

    write(*prompts(8))
    again = "1 of 2 tasks failed; 3 failed before, and --retry-failed does them again; see out.jsonl"
    assert failure(run()) == again
    assert len(server.calls) == 8

    server.always = None
    result = run("--retry-failed")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(server.calls) == 12
    assert all(each["ok"] for each in results().values())
    assert len(results()) == 8


def test_unreachable_server_fails_each_task(run: Map, server: FakeServer) -> None:
    server.always = ServerUnavailable("gone")
    write(*prompts(3))
    assert failure(run("--retry-for", "0")) == "3 of 3 tasks failed; see out.jsonl"
    assert {each["error"]["class"] for each in results().values()} == {"ServerUnavailable"}


def test_no_tasks_are_no_failure(run: Map, server: FakeServer) -> None:
    write("", " ")
    result = run()
    assert result.exit_code == 0
    assert result.stdout.startswith("done: 0 tasks in ")
    assert results() == {}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "genserve: cannot read tasks.jsonl: No such file or directory"),
        (["--serial", "--concurrency", "2"], 2, "Error: --serial and --concurrency exclude each other."),
        (["--concurrency", "0"], 2, "Error: Invalid value for '--concurrency'"),
        (["--retry-for", "-1"], 2, "Error: Invalid value for '--retry-for'"),
        (["--timeout", "0"], 1, "genserve: InvalidInput: timeout is 0.0; allowed: seconds, above 0"),
        (["--timeout", "nan"], 1, "genserve: InvalidInput: timeout is nan; allowed: seconds, above 0"),
        (["--retry-for", "inf"], 1, "genserve: InvalidInput: retry_for is inf; allowed: seconds, 0 or more"),
        (["--priority", "urgent"], 2, "Error: Invalid value for '--priority'"),
        (["--url", "nonsense"], 1, "genserve: InvalidInput: url is 'nonsense'; allowed: "),
    ],
    ids=lambda value: " ".join(value) or "no-tasks" if isinstance(value, list) else "",
)
def test_unusable_options_leave_no_file(
    arguments: list[str], code: int, message: str, run: Map, server: FakeServer, tmp_path: Path
) -> None:
    if arguments:
        write(*prompts(1))
    before = set(tmp_path.iterdir())
    result = run(*arguments, obj=None if "--url" in arguments else server)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert set(tmp_path.iterdir()) == before
    assert server.calls == []


@pytest.mark.parametrize("content", ["hello\n", "hello", '{"id": "a", "prompt": "x"}\n', '{"id": "a", "prompt": "x"}'])
def test_foreign_output_is_refused_before_any_request(content: str, run: Map, server: FakeServer) -> None:
    write(*prompts(1))
    Path("out.jsonl").write_text(content, encoding="utf-8")
    for option in ([], ["--retry-failed"]):
        assert failure(run(*option)) == "out.jsonl, line 1, is not a result of `genserve map`; choose another file"
    assert Path("out.jsonl").read_text(encoding="utf-8") == content
    assert server.calls == []


def test_tasks_as_output_are_refused(run: Map, server: FakeServer) -> None:
    write(*prompts(2))
    before = Path("tasks.jsonl").read_bytes()
    assert "is not a result" in failure(run("-o", "tasks.jsonl"))
    assert Path("tasks.jsonl").read_bytes() == before
    assert server.calls == []


def test_output_in_use_is_refused(run: Map, server: FakeServer) -> None:
    write(*prompts(1))
    other = Results(Path("out.jsonl"), Path("images"))
    assert failure(run()) == "out.jsonl is in use by another `genserve map`"
    assert server.calls == []
    other.close()
    assert run().exit_code == 0


def test_failed_write_is_one_line_and_the_run_is_continued(
    run: Map, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(*prompts(5))
    Path("out-images").write_bytes(b"mine")
    assert failure(run("--serial", "--images", "out-images/x")).startswith("cannot write out-images/x/task-0.png: ")
    assert results() == {}
    Path("out-images").unlink()
    assert run().exit_code == 0
    assert len(results()) == 5


def test_help_is_complete(run: Map) -> None:
    text = " ".join(run("--help").stdout.split())
    for part in (
        "one JSON object per line, - for standard input",
        "an id; without one, its line's number is its id",
        "are not done again, so the same command continues after an interruption",
        "exit status is 1 if tasks failed, and 130 after Ctrl-C",
        "Examples: genserve map ",
    ):
        assert part in text
    explained = [option for option in main.commands["map"].params if isinstance(option, click.Option)]
    assert [option.name for option in explained if not option.help and option.name != "priority"] == []


# Interruptions.


def test_interruption_leaves_a_file_that_is_continued(run: Map, server: FakeServer) -> None:
    async def interrupt(call: Call) -> Outputs:
        if len(server.calls) == 8:
            interrupt_main()
            await asyncio.Event().wait()
        return image(call)

    server.always = interrupt
    write(*prompts(20))
    result = run("--concurrency", "2")
    assert (result.exit_code, result.stderr) == (130, "")
    assert result.stdout.startswith("interrupted; the same command continues: ")
    assert server.running == 0, "requests are cancelled"
    assert server.closed == 1
    before = results()
    assert 1 <= len(before) <= 8
    server.always = None
    sent = len(server.calls)
    assert run().exit_code == 0
    assert len(server.calls) - sent == 20 - len(before)
    assert set(results()) == {f"task-{number}" for number in range(20)}
    assert {key: results()[key] for key in before} == before


def test_interruption_raised_by_the_transport_ends_the_run(run: Map, server: FakeServer) -> None:
    async def interrupt(call: Call) -> Outputs:
        if len(server.calls) == 8:
            raise KeyboardInterrupt
        return image(call)

    server.always = interrupt
    write(*prompts(20))
    result = run("--concurrency", "2", "--json")
    assert result.exit_code == 130
    done = json.loads(result.stdout)["done"]
    assert done == len(results()) < 20
    server.always = None
    assert run().exit_code == 0
    assert len(results()) == 20


def test_interruption_while_tasks_are_read(run: Map, server: FakeServer) -> None:
    class Tasks(io.BufferedIOBase):
        read_lines = 0

        def read(self, size: int | None = -1) -> bytes:
            return b""

        def readable(self) -> bool:
            return True

        def readline(self, size: int | None = -1) -> bytes:
            self.read_lines += 1
            if self.read_lines == 4:
                raise KeyboardInterrupt
            return f'{{"prompt": "{self.read_lines}"}}\n'.encode()

    result = run("--serial", tasks="-", input=Tasks())
    assert result.exit_code == 130
    assert set(results()) <= {"1", "2", "3"}
    assert server.closed == 1


# Memory.


class EndlessTasks(io.BufferedIOBase):
    """20,000 tasks, of which each is made when it is read."""

    def __init__(self) -> None:
        self.lines = 0

    def read(self, size: int | None = -1) -> bytes:
        return b""

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> bytes:
        if self.lines == 20_000:
            return b""
        self.lines += 1
        return f'{{"id": "task-{self.lines}", "prompt": "x"}}\n'.encode()


@pytest.mark.parametrize("options", [["--concurrency", "8"], ["--serial"], []], ids=" ".join)
def test_tasks_are_not_read_ahead_of_what_runs(options: list[str], run: Map, server: FakeServer) -> None:
    """A server that answers some requests and then no more: no task is read that could not be sent."""
    tasks = EndlessTasks()
    seen: list[tuple[int, int]] = []

    async def answer(call: Call) -> Outputs:
        if len(server.calls) > 50:
            asyncio.get_running_loop().call_later(0.3, stop)
            await asyncio.Event().wait()
        return image(call)

    def stop() -> None:
        if not seen:
            seen.append((tasks.lines, len(server.calls)))
            interrupt_main()

    server.always = answer
    assert run(*options, tasks="-", input=tasks).exit_code == 130
    ((read, sent),) = seen
    assert 50 < sent <= read <= sent + 1


# Real processes.


def start(server: FakeTriton, *options: str) -> subprocess.Popen[str]:
    words = [GENSERVE, "map", "tasks.jsonl", "-o", "out.jsonl", "--url", server.url, *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line_count() -> int:
    path = Path("out.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], lines: int) -> None:
    deadline = time.monotonic() + 10
    while line_count() < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with fake_triton() as server:
        server.delay_s = 0.004
        yield server


def assert_complete(count: int) -> None:
    assert set(results()) == {f"task-{number}" for number in range(count)}
    for number in range(count):
        result = results()[f"task-{number}"]
        assert result["ok"]
        assert Path(result["file"]).read_bytes() == f"prompt {number}".encode()


def test_ctrl_c_is_continued_by_the_same_command(triton: FakeTriton) -> None:
    write(*prompts(150))
    process = start(triton, "--concurrency", "4")
    wait_for_lines(process, 20)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=15)
    assert (process.returncode, errors) == (130, "")
    assert output.startswith("interrupted; the same command continues: ")
    done = len(results())
    assert f": {done} tasks in " in output
    assert 20 <= done < 150
    process = start(triton)
    output, errors = process.communicate(timeout=15)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith(f"done: {150 - done} tasks in ")
    assert output.endswith(f" 0 failed, {done} had a result already\n")
    assert_complete(150)


def test_kills_lose_and_repeat_nothing(triton: FakeTriton) -> None:
    draw = random.Random(7)
    write(*prompts(200))
    killed_at = []
    for lines in sorted(draw.sample(range(1, 150), KILLS)):
        process = start(triton, "--concurrency", "4")
        wait_for_lines(process, lines)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        killed_at.append(line_count())
    assert killed_at[-1] < 200, "the last kill met a run"
    process = start(triton)
    _, errors = process.communicate(timeout=15)
    assert (process.returncode, errors) == (0, "")
    assert_complete(200)
    sent = Counter(triton.prompts)
    assert len(sent) == 200
    assert sent.total() <= 200 + KILLS * 5, "only what was in flight is done again"
