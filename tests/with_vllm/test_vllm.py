"""ENGINE=vllm against ENGINE=torch, with the real package and a small random checkpoint. Run by `make test-vllm`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from turned_engine import TurnedEngine, count

from genserve_backend.errors import OutOfMemory, RequestError, ServerError
from genserve_backend.rerank.build import build
from genserve_backend.rerank.metrics import PREFIX_TOKENS_SAVED, TOKENS
from genserve_backend.rerank.request import RerankRequest, RerankResult
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.isolate import DeviceLost
from genserve_backend.worker.messages import Start
from genserve_backend.worker.supervisor import Supervisor

pytest.importorskip("vllm")

CLOSE = 1e-3
QUERY = "What is the capital of France?"
TOO_LONG = 3
DOCUMENTS = (
    "Paris is the capital of France.",
    "",
    "巴黎是法国的首都。大熊猫吃竹子。",
    "The giant panda eats bamboo. " * 200,
    "no",
    "Berlin \U0001f43c\U0001f1eb\U0001f1f7 \U0001f469\u200d\U0001f680 e\u0301",
    "  \n\t ",
    "Berlin is the capital of Germany, and yes, the giant panda lives in China.",
)
REQUEST = RerankRequest(QUERY, DOCUMENTS, None)
LIMITS = {"max_num_seqs": 5, "max_num_batched_tokens": 150}
"""The token budget is smaller than the longest prompt."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 of tests/parity, with a head size that vLLM has kernels for."""
    folder = tiny_models.qwen3_causal(tmp_path_factory.mktemp("checkpoint"))
    config = Qwen3Config.from_pretrained(folder, head_dim=32)
    torch.manual_seed(7)
    Qwen3ForCausalLM(config).eval().save_pretrained(folder)
    return folder


def engine(folder: Path, name: str, **settings: Any) -> TurnedEngine:
    """An engine without a score cache: equal requests are scored again."""
    chosen = RerankSettings(model_path=folder, engine=name, score_cache_bytes=0, **settings)
    return TurnedEngine(lambda emit: build(chosen, "cpu", emit))


@pytest.fixture(scope="module")
def torch_engine(folder: Path) -> TurnedEngine:
    return engine(folder, "torch", **LIMITS)


@pytest.fixture(scope="module")
def vllm_engine(folder: Path) -> TurnedEngine:
    return engine(folder, "vllm", **LIMITS)


@pytest.fixture
def llm(vllm_engine: TurnedEngine) -> Any:
    return vllm_engine.engine._scorer.llm


@pytest.fixture
def plan(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Make the model call a function, which may raise, with the number of tokens before each step."""

    def plan(before: Callable[[int], None]) -> None:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        forward = model.forward

        def planned(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before(len(input_ids))
            return forward(input_ids, *args, **kwargs)

        monkeypatch.setattr(model, "forward", planned)

    return plan


def same(one: RerankResult, other: RerankResult) -> bool:
    return (
        one.scores == pytest.approx(other.scores, abs=CLOSE)
        and one.truncated == other.truncated
        and one.tokens == other.tokens
    )


def numbered(count: int) -> list[RerankRequest]:
    """Return distinct requests of different sizes."""
    return [
        RerankRequest(f"{number}. {QUERY}", tuple(f"{text} {number}" for text in DOCUMENTS[: 1 + number % 8]), None)
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        RerankRequest(QUERY, DOCUMENTS, "Find the animal"),
        RerankRequest(QUERY, DOCUMENTS[:1], None),
        RerankRequest(QUERY, DOCUMENTS, None, windows=3),
        RerankRequest(QUERY * 40, DOCUMENTS, None),
    ],
    ids=["plain", "instruction", "one-document", "windows", "long-query"],
)
def test_scores_equal_those_of_torch(
    request_: RerankRequest, torch_engine: TurnedEngine, vllm_engine: TurnedEngine
) -> None:
    (expected,) = torch_engine.results(request_)
    (found,) = vllm_engine.results(request_)
    assert same(found, expected)
    if request_ is REQUEST:
        assert found.truncated == [TOO_LONG]
    if len(request_.documents) > 1 and len(request_.query) < 100:
        assert max(found.scores) - min(found.scores) > 0.1, "equal scores would prove little"


def test_scores_of_many_requests_at_once_equal_those_of_torch(
    torch_engine: TurnedEngine, vllm_engine: TurnedEngine
) -> None:
    requests = numbered(20)
    expected, found = torch_engine.results(*requests), vllm_engine.results(*requests)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_settings_reach_vllm(llm: Any, folder: Path) -> None:
    config = llm.llm_engine.vllm_config
    scheduler, cache, model = config.scheduler_config, config.cache_config, config.model_config
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (5, 150)
    assert (cache.enable_prefix_caching, cache.block_size) == (True, 32)
    # 512 tokens and a spare block, at 2 layers x 2 heads x 32 x 2 x 4 bytes a token.
    assert cache.kv_cache_memory_bytes == (512 + 32) * 1024 + 256 * 2**20
    assert (model.model, model.max_model_len, model.dtype, model.head_dtype) == (
        str(folder),
        512,
        torch.float32,
        torch.float32,
    )
    assert config.load_config.load_format == "safetensors"


def test_shared_prefixes_are_computed_once(vllm_engine: TurnedEngine) -> None:
    documents = tuple(f"Document number {number}" for number in range(10))
    vllm_engine.heartbeats.clear()
    vllm_engine.results(RerankRequest("A query that nobody asked before", documents, None))
    time.sleep(1.1)
    vllm_engine.turn(2)  # for the heartbeat with the counts
    saved, tokens = count(vllm_engine.heartbeats, PREFIX_TOKENS_SAVED), count(vllm_engine.heartbeats, TOKENS)
    assert saved > 10 * 32
    assert tokens < saved


@pytest.mark.parametrize(
    "request_",
    [RerankRequest("\ud800", ("a",), None), RerankRequest(QUERY, ("a", "\udfff"), None)],
    ids=["query", "document"],
)
def test_text_that_cannot_be_tokenized_gives_the_same_error(
    request_: RerankRequest, torch_engine: TurnedEngine, vllm_engine: TurnedEngine
) -> None:
    (expected,), (found,) = torch_engine.run(request_), vllm_engine.run(request_)
    assert isinstance(expected, RequestError)
    assert (type(found), str(found)) == (type(expected), str(expected))


def test_batch_out_of_memory_is_halved_and_its_largest_document_fails(
    plan: Callable[[Callable[[int], None]], None], torch_engine: TurnedEngine, vllm_engine: TurnedEngine
) -> None:
    sizes: list[int] = []

    def before(tokens: int) -> None:
        sizes.append(tokens)
        if tokens > 100:
            raise torch.OutOfMemoryError("device error")

    plan(before)
    small = [RerankRequest(f"Query {number}", ("no", "yes"), None) for number in range(3)]
    large = RerankRequest(QUERY, ("panda " * 400,), None)
    expected = torch_engine.results(*small)
    *found, refused = vllm_engine.run(*small, large)
    assert max(sizes) > 100
    assert isinstance(refused, OutOfMemory)
    assert str(refused).startswith("DOCUMENTS[0] with 512 tokens does not fit")
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_failed_step_leaves_no_cached_keys_and_values(
    plan: Callable[[Callable[[int], None]], None],
    torch_engine: TurnedEngine,
    vllm_engine: TurnedEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = RerankRequest("One that has not been asked", ("no document", "another document " * 20), None)
    (expected,) = torch_engine.results(request)
    failing = [True]

    def before(tokens: int) -> None:
        if failing[0]:
            raise ValueError("model error")

    plan(before)
    with caplog.at_level(logging.CRITICAL, logger="vllm"):
        (failed,) = vllm_engine.run(request)
    assert isinstance(failed, ServerError)
    assert "ValueError" in str(failed)
    failing[0] = False
    (found,) = vllm_engine.results(request)
    assert same(found, expected)


def test_unrecoverable_engine_ends_the_worker(
    plan: Callable[[Callable[[int], None]], None],
    llm: Any,
    vllm_engine: TurnedEngine,
    torch_engine: TurnedEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def before(tokens: int) -> None:
        raise RuntimeError("model error")

    with monkeypatch.context() as broken:
        plan(before)
        broken.setattr(llm.llm_engine, "reset_prefix_cache", lambda: False)
        job = vllm_engine.submit(REQUEST)
        with pytest.raises(DeviceLost, match="vLLM cannot go on after RuntimeError"):
            vllm_engine.turn_until(lambda: job in vllm_engine.answers)


class Asked:
    """The caller of a request."""

    task_id = "task"

    def __init__(self) -> None:
        self.answer: Any = None

    def is_cancelled(self) -> bool:
        return False

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        pass

    def on_done(self, result: Any) -> None:
        self.answer = result

    def on_failed(self, error: RequestError) -> None:
        self.answer = error

    def wait(self) -> Any:
        deadline = time.monotonic() + 120
        while self.answer is None:
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.05)
        return self.answer


@pytest.fixture
def supervisor(folder: Path) -> Iterator[Supervisor]:
    settings = RerankSettings(model_path=folder, engine="vllm", **LIMITS)
    supervisor = Supervisor(Start("genserve_backend.rerank.build:build", settings, "cpu", "rerank_0"))
    supervisor.start()
    yield supervisor
    supervisor.close()


def test_worker_is_one_process_and_is_replaced_when_killed(
    supervisor: Supervisor, torch_engine: TurnedEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    (expected,) = torch_engine.results(REQUEST)
    for _ in range(2):
        asked = Asked()
        supervisor.submit(asked, REQUEST, deadline=time.monotonic() + 120)
        assert same(asked.wait(), expected)
        (worker,) = psutil.Process().children()
        assert not worker.children(recursive=True)
        assert all(connection.laddr.ip == "127.0.0.1" for connection in worker.net_connections() if connection.laddr)
        worker.kill()
        worker.wait(10)
    lines = capfd.readouterr().err.splitlines()
    assert any("reranker loaded" in line for line in lines)
    assert not [line for line in lines if "logger=vllm" in line]
