"""The GPU measurements: a dry run of each call on the CPU, failing parts, and the report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu import record
from gpu.clock import WAIT, Clock, Watched, _fill, counted_waits
from gpu.plan import STAGES, Choice, Part
from gpu.processes import DONE, FAILED, KILLED, SKIPPED, TIMED_OUT, Call, run_parts
from gpu.report import render
from gpu.variants import Variant

SCRIPT = Path(__file__).parents[2] / "perf" / "gpu" / "run.py"
TABLES = {
    "truth": [
        "### GPU",
        "### The demo's FLUX, same seeds",
        "### Attention chosen by torch",
        "### Memory, MB",
    ],
    "flux": [
        "### FLUX.1-dev's shape: a step",
        "### FLUX.1-dev's shape: whole images",
        "### FLUX: the most expensive kernels",
    ],
    "rerank": ["### Qwen3-Reranker's shapes: a forward", "### Qwen3-Reranker's shapes: documents per second"],
}
PATIENCE_S = 250.0
VARIANTS = {"truth": (), "flux": ("compile",), "rerank": ("compile",)}
"""One per call: most of a dry run is importing packages."""


@dataclass(frozen=True)
class DryRun:
    code: int
    printed: str
    lines: list[record.Line]

    def of(self, kind: str) -> list[record.Line]:
        return [line for line in self.lines if line["kind"] == kind]


def options(stage: str) -> list[str]:
    return ["--variants", ",".join(VARIANTS[stage])] if VARIANTS[stage] else []


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DryRun]:
    """Run all three calls concurrently."""
    folder = tmp_path_factory.mktemp("gpu")
    files = {stage: folder / f"{stage}.jsonl" for stage in STAGES}
    started = {
        stage: subprocess.Popen(
            [sys.executable, str(SCRIPT), stage, "--device", "cpu", "--tiny", "--out", str(file), *options(stage)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for stage, file in files.items()
    }
    ended: dict[str, DryRun] = {}
    for stage, process in started.items():
        printed, _ = process.communicate(timeout=PATIENCE_S)
        ended[stage] = DryRun(process.returncode, printed, record.read([files[stage]]))
    return ended


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_completes_every_planned_part(dry_runs: dict[str, DryRun], stage: str) -> None:
    dry_run = dry_runs[stage]
    planned = [part.name for part in STAGES[stage](Choice(VARIANTS[stage], tiny=True))]
    assert {line["part"]: line["status"] for line in dry_run.of(record.ENDED)} == dict.fromkeys(planned, DONE)
    assert {line["part"] for line in dry_run.of(record.RESULT)} == set(planned)
    assert dry_run.code == 0
    assert all(title in dry_run.printed for title in TABLES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_values_missing_on_a_cpu_have_a_reason(dry_runs: dict[str, DryRun], stage: str) -> None:
    empty = [line for line in dry_runs[stage].of(record.RESULT) if None in line.values()]
    assert empty
    assert all(line["reason"] for line in empty)


def test_dry_run_has_device_independent_results(dry_runs: dict[str, DryRun]) -> None:
    truth = dry_runs["truth"].of(record.RESULT)
    attention = [line for line in truth if line["table"] == "varlen" and line["greatest"] is not None]
    assert len(attention) == 24
    assert max(line["relative"] for line in attention) < 0.01
    assert all(line["identical"] for line in attention)
    again = [line for line in truth if line["table"] == "images" and line["other"] == "itself again"]
    assert [line["greatest"] for line in again] == [0]
    images = [line for line in dry_runs["flux"].of(record.RESULT) if line.get("contender") == "engine, fp8"]
    assert [(line["size"], line["at_once"]) for line in images] == [(64, 1), (64, 2)]
    padded = [line for line in dry_runs["rerank"].of(record.RESULT) if line.get("contender") == "transformers"]
    assert max(line["scores_apart"] for line in padded) < 0.01


FAULTY = """
import os, signal, subprocess, sys, time

def well(run):
    run.result("rates", what="well", tflops=1.5)

def raises(run):
    run.result("rates", what="before", tflops=2.5)
    raise ValueError("a broken part")

def hangs(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run.result("rates", what="child", pid=child.pid)
    time.sleep(600)

def tries(run):
    with run.isolate("rates", what="broken"):
        raise RuntimeError("too large")
    run.result("rates", what="after", tflops=3.5)

def dies(run):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[record.Line]]:
    """Return a function that runs failing parts and returns their lines."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out.jsonl"

    def run(*names: str, limit_s: float = 60.0, seconds: float = 120.0) -> list[record.Line]:
        parts = [Part(name, f"faulty:{name}", limit_s) for name in names]
        reported: list[str] = []
        succeeded = run_parts(parts, Call("truth", "cpu", True, out, seconds), report=reported.append)
        lines = record.read([out])
        assert len(reported) == len(parts)
        assert succeeded == all(line["status"] == DONE for line in lines if line["kind"] == record.ENDED)
        return lines

    return run


def ends(lines: list[record.Line]) -> dict[str, record.Line]:
    return {line["part"]: line for line in lines if line["kind"] == record.ENDED}


def test_failing_part_does_not_affect_the_others(faulty: Callable[..., list[record.Line]]) -> None:
    lines = faulty("raises", "dies", "well")
    ended = ends(lines)
    assert {name: line["status"] for name, line in ended.items()} == {"raises": FAILED, "dies": KILLED, "well": DONE}
    assert "ValueError: a broken part" in ended["raises"]["stderr"]
    assert ended["dies"]["reason"] == signal.Signals.SIGKILL.name
    assert [line["what"] for line in lines if line["kind"] == record.RESULT] == ["before", "well"]


def test_hanging_part_leaves_its_stack_and_is_killed_with_its_children(
    faulty: Callable[..., list[record.Line]],
) -> None:
    lines = faulty("hangs", "well", limit_s=4.0)
    ended = ends(lines)
    assert {name: line["status"] for name, line in ended.items()} == {"hangs": TIMED_OUT, "well": DONE}
    assert "in hangs" in ended["hangs"]["stderr"]
    child = next(line["pid"] for line in lines if line.get("what") == "child")
    give_up = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_failed_measurement_is_a_line_with_a_reason(faulty: Callable[..., list[record.Line]]) -> None:
    lines = faulty("tries")
    broken, after = [line for line in lines if line["kind"] == record.RESULT]
    assert (broken["what"], broken["reason"]) == ("broken", "RuntimeError: too large")
    assert after["what"] == "after"
    ended = ends(lines)["tries"]
    assert ended["status"] == FAILED
    assert "too large" in ended["stderr"]


def test_parts_without_time_are_skipped(faulty: Callable[..., list[record.Line]]) -> None:
    ended = ends(faulty("well", "raises", seconds=1.0))
    assert [line["status"] for line in ended.values()] == [SKIPPED, SKIPPED]
    assert all("left of the call" in line["reason"] for line in ended.values())


def test_report_has_the_last_call_of_each_stage_with_shares_and_ratios(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rate = {"kind": record.RESULT, "stage": "flux", "part": "card", "table": "rates", "what": "bfloat16"}
    image = {
        "kind": record.RESULT,
        "stage": "flux",
        "part": "images",
        "table": "flux-images",
        "size": 512,
        "at_once": 1,
    }
    step = {"kind": record.RESULT, "stage": "flux", "part": "steps", "table": "flux-steps", "variant": "eager"}
    for device, seconds in (("old", 9.0), ("new", 2.0)):
        parts = ["card", "images", "lost"]
        record.append(
            out, {"kind": record.STARTED, "stage": "flux", "device": device, "parts": parts, "began": "today"}
        )
        record.append(out, {**rate, "tflops": 800.0})
        record.append(out, {**step, "tflops": 400.0, "device_ms": None, "reason": "no events"})
        record.append(out, {**image, "contender": "diffusers", "seconds": seconds})
        record.append(out, {**image, "contender": "engine, eager", "seconds": 1.0})
        record.append(out, {"kind": record.ENDED, "stage": "flux", "part": "card", "status": DONE, "seconds": 1.0})
        failed = {"status": FAILED, "stderr": "Traceback\nValueError: torn"}
        record.append(out, {"kind": record.ENDED, "stage": "flux", "part": "images", "seconds": 2.0, **failed})
    with out.open("a") as file:
        file.write('{"stage": "flux", "kind": "res')
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "report", str(out)], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.count("## flux on new, today") == 1
    assert "old" not in ended.stdout
    assert "| engine, eager | 512 | 1 | 1 | 2.00 x |" in ended.stdout
    assert "| eager | - | 400 | 50.0% (1) |" in ended.stdout
    assert "(1) no events" in ended.stdout
    assert "| lost | no line | - | - |" in ended.stdout
    assert "ValueError: torn" in ended.stdout
    # A line after an incomplete line is kept.
    record.append(out, {**image, "contender": "engine, other", "seconds": 4.0})
    assert "0.50 x" in render(record.read([out]))


def test_non_finite_numbers_become_text(tmp_path: Path) -> None:
    record.append(tmp_path / "out", {"stage": "truth", "worst": float("nan"), "kept": [1, 2.5, True, None]})
    (line,) = record.read([tmp_path / "out"])
    assert line == {"stage": "truth", "worst": "nan", "kept": [1, 2.5, True, None]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["flux", "--parts", "nothing"], "no part nothing"),
        (["flux", "--variants", "magic"], "unknown: magic"),
        (["rerank", "--models", "70B"], "unknown: 70B"),
        (["elsewhere"], "invalid choice"),
    ],
)
def test_invalid_choice_is_named(arguments: list[str], said: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert said in ended.stderr


def test_plan_follows_the_choice() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "rerank", "--plan", "--models", "4B", "--variants", "compile"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    names = [line.partition(":")[0] for line in ended.stdout.splitlines()]
    assert names == ["card", "forwards-4B-compile", "engine-4B-compile", "padded-4B"]


def test_variant_uses_settings_or_its_fallback() -> None:
    done: list[Any] = []
    variant = Variant({"compiled": True}, instead=done.append)
    assert variant.prepare({"compiled", "dtype"}, "pipeline") == {"compiled": True}
    assert done == []
    assert variant.prepare({"dtype"}, "pipeline") == {}
    assert done == ["pipeline"]
    both = Variant({"dtype": "fp8", "compiled": True}, instead=done.append)
    assert both.prepare({"dtype"}, "pipeline") == {"dtype": "fp8"}
    with pytest.raises(ValueError, match="no setting compiled"):
        Variant({"compiled": True}).prepare({"dtype"})


class FakeCuda:
    """Fake torch.cuda for the clock, with a device as fast as the host."""

    def __init__(self) -> None:
        self.modes: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = time.perf_counter()

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at) * 1000

        fakes: dict[str, Any] = {
            "Event": Event,
            "set_device": lambda _: None,
            "synchronize": lambda _: None,
            "set_sync_debug_mode": self.modes.append,
            "memory_allocated": lambda _: 2**20,
            "max_memory_allocated": lambda _: 3 * 2**20,
            "memory_reserved": lambda _: 4 * 2**20,
            "reset_peak_memory_stats": lambda _: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_clock_measures_a_gpu_by_events_and_counts_waits_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    clock = Clock("cuda:0")
    timing = clock.run(lambda: time.sleep(0.002), seconds=0.02)
    assert timing.device_ms is not None
    assert timing.ms == timing.device_ms >= 2
    assert clock.memory() == {"used_mb": 1, "peak_mb": 3, "reserved_mb": 4}
    clock.forget_peak()

    def wait() -> None:
        warnings.warn(f"{WAIT} (Triggered internally)", UserWarning, stacklevel=1)

    def call() -> None:
        wait()
        wait()
        warnings.warn("something else", UserWarning, stacklevel=1)

    assert cuda.modes == []
    seen = clock.waits(call)
    assert cuda.modes == ["warn", "default"]
    assert seen is not None
    ((_, line),) = seen
    assert "test_perf_gpu.py" in line
    assert "warnings.warn(" in line
    assert list(seen.values()) == [2]
    with counted_waits() as none:
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert not none


def test_concurrent_kernels_count_once_as_busy_time() -> None:
    def event(name: str, device: str, start: float, end: float) -> Any:
        kind = SimpleNamespace(name=device)
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=False)

    watched = Watched()
    events = [
        event("gemm", "CUDA", 0, 1000),
        event("copy", "CUDA", 500, 2000),
        event("gemm", "CUDA", 4000, 5000),
        event("aten::mm", "CPU", 0, 9000),
    ]
    _fill(watched, events, on_gpu=True)
    assert (watched.busy_ms, watched.span_ms) == (3.0, 5.0)
    assert watched.kernels == {"gemm": 2000, "copy": 1500}
    assert watched.counts == {"gemm": 2, "copy": 1}
    assert watched.operators == ["aten::mm"]


def test_flops_of_a_step_match_torchs_count() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from gpu.flux_models import step_flops
    from random_flux import flux_transformer

    transformer = flux_transformer(guidance_embeds=True)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode(), sdpa_kernel([SDPBackend.MATH]):  # the only one that torch counts on a CPU
        transformer(
            hidden_states=torch.randn(2, 300, 64),
            encoder_hidden_states=torch.randn(2, 64, 64),
            pooled_projections=torch.randn(2, 64),
            timestep=torch.ones(2),
            guidance=torch.ones(2),
            img_ids=torch.zeros(300, 3),
            txt_ids=torch.zeros(64, 3),
        )
    expected = step_flops(transformer, rows=2, image_tokens=300, text_tokens=64)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_flops_of_a_forward_match_torchs_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3Model

    from gpu.rerank_models import HEAD, SHAPES, Arithmetic

    sizes = SHAPES["tiny"]
    config = Qwen3Config(**sizes, vocab_size=50, num_key_value_heads=2, head_dim=HEAD, attn_implementation="eager")
    model = Qwen3Model(config).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(input_ids=torch.ones(1, 100, dtype=torch.long), use_cache=False)
    last = dict(counter.get_flop_counts())["Qwen3Model.layers.1"]
    arithmetic = Arithmetic.of("tiny")
    # torch also counts masked pairs, and the complete last layer.
    hidden = 4 * (100 * 99 / 2) * 2 * HEAD * arithmetic.layers
    keys_values = 2 * 100 * arithmetic.last
    counted = counter.get_total_flops() - sum(last.values()) + keys_values
    assert counted == pytest.approx(arithmetic.flops([100], [100]) + hidden, rel=0.01)


def test_files_are_strict_json(dry_runs: dict[str, DryRun]) -> None:
    for dry_run in dry_runs.values():
        assert all(json.loads(json.dumps(line, allow_nan=False)) == line for line in dry_run.lines)
