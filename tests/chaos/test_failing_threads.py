"""Unexpected exceptions in each thread that requests depend on: no request is lost, and the next one succeeds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import failing_threads
import pytest
from conftest import ROOT, Server, serving, wait_until

from genserve import Client

MODEL = """
import sys
sys.path.insert(0, {helpers!r})
import failing_threads
failing_threads.prepare_stub()
{source}
"""
REPOSITORY = ROOT / "model_repository"
IN_STUB = ("supervisor", "worker-writer", "worker-reader")
IN_WORKER = {"flux": ("MainThread", "listen", "decode", "write"), "rerank": ("listen", "tokenize")}


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("armed") / "thread"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, armed: Path) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("faulty") / "model_repository"
    shutil.copytree(REPOSITORY, repository)
    for model in IN_WORKER:
        file = repository / model / "1" / "model.py"
        source = file.read_text().replace("from __future__ import annotations\n", "")
        engine = f'engine="genserve_backend.{model}.build:build"'
        assert engine in source
        source = source.replace(engine, f'engine="failing_threads:build_{model}"')
        file.write_text(MODEL.format(helpers=str(Path(failing_threads.__file__).parent), source=source))
    environment = {failing_threads.ARMED_ENV: str(armed)}
    yield from serving(tmp_path_factory, "--repository", str(repository), **environment)


def calls(model: str) -> list[Callable[[Client], Any]]:
    if model == "flux":
        return [lambda client, seed=seed: client.generate("a circle", steps=8, seed=seed).data for seed in range(4)]
    documents = [f"document {number} " + "word " * number for number in range(1, 40)]
    return [lambda client, query=query: list(client.rerank(query, documents)) for query in ("one", "two", "three")]


@pytest.mark.parametrize(
    ("model", "thread"),
    [("flux", thread) for thread in IN_STUB] + [(model, thread) for model in IN_WORKER for thread in IN_WORKER[model]],
    ids=str,
)
def test_failing_thread_fails_no_request(model: str, thread: str, faulty: Server, armed: Path) -> None:
    faulty.wait_ready()
    with Client(faulty.grpc, timeout=120, retry_for=60) as client, ThreadPoolExecutor(8) as pool:
        expected = [call(client) for call in calls(model)]
        armed.write_text(thread)
        answers = [pool.submit(call, client) for call in calls(model)]
        wait_until(lambda: not armed.exists(), what=f"{thread} to fail")
        assert [answer.result(120) for answer in answers] == expected
        assert f"thread={thread}" in faulty.log
        assert [call(client) for call in calls(model)] == expected
