"""The list of `make perf-full`: load tests, comparisons and studies, with their options and expected minutes.

docs/benchmarks.md has the commands and tables of some of them, under the same names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.machine import ROOT
from common.record import command_line

INFINITY, VLLM = "infinity/bin/infinity_emb", "vllm/bin/python"
"""Environments of their own, by perf/README.md."""
PYTHON = ".venv/bin/python"


@dataclass(frozen=True)
class Run:
    """A command.

    Attributes:
        name: Its name for --only, --skip and the markers of docs/benchmarks.md.
        line: Script in perf, and arguments.
        minutes: Expected on two cores. A plan for --budget, not a result; records have the seconds.
        needs: Files in the checkout without which it is left out.
        environment: Variables.
    """

    name: str
    line: str
    minutes: float
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def script(self) -> str:
        """Path in perf."""
        return shlex.split(self.line)[0]

    @property
    def arguments(self) -> list[str]:
        """Words after the script."""
        return shlex.split(self.line)[1:]

    @property
    def key(self) -> tuple[str, ...]:
        """The key of its records."""
        return command_line(self.script, self.arguments, self.environment)

    @property
    def command(self) -> str:
        """The command in the checkout, as documents have it."""
        return " ".join((*(f"{name}={value}" for name, value in self.environment.items()), PYTHON, f"perf/{self.line}"))

    def missing(self, root: Path = ROOT) -> list[str]:
        """Return the files that it needs and that are not there."""
        return [name for name in self.needs if not (root / name).exists()]


RUNS = (
    Run("load", "load/run.py", 3),
    # Comparisons.
    Run("flux", "compare/flux.py --repeats 3", 6),
    Run("flux-engine", "compare/flux.py --only engine --requests 200 --repeats 3", 4),
    Run("rerank", "compare/rerank.py --check", 15),
    Run(
        "rerank-others",
        f"compare/rerank.py --repeats 1 --infinity {INFINITY} --vllm {VLLM}",
        10,
        needs=(INFINITY, VLLM),
    ),
    Run(
        "rerank-int8",
        f"compare/rerank.py --repeats 3 --only int8 --only infinity-int8 --infinity {INFINITY}",
        5,
        needs=(INFINITY,),
    ),
    Run("rerank-prefix", "compare/rerank_prefix.py --check", 5),
    Run("rerank-prefix-others", f"compare/rerank_prefix.py --repeats 1 --vllm {VLLM}", 10, needs=(VLLM,)),
    # FLUX.
    Run("flux-priority", "studies/flux_priority.py --check", 10),
    Run("flux-faults", "studies/flux_faults.py", 3),
    Run("flux-lora", "studies/flux_lora.py --check", 8),
    Run("flux-padding", "studies/flux_padding.py", 10),
    Run("flux-precision", "studies/flux_precision.py --threads 1 --repeats 3", 40),
    Run("flux-step-cache", "studies/flux_step_cache.py", 60, environment={"OMP_NUM_THREADS": "1"}),
    Run("flux-compile", "studies/flux_compile.py --threads 1 --check", 15),
    Run("flux-deterministic", "studies/flux_deterministic.py --check", 15),
    Run("random-faults", "studies/random_faults.py --seconds 300 --seed 0", 8),
    # Rerankers.
    Run("rerank-fairness", "studies/rerank_fairness.py --check", 4),
    Run("rerank-quality", "studies/rerank_quality.py", 15),
    # The client, with simulated servers.
    Run("client-overhead", "studies/client_overhead.py --check", 6),
    Run("client-scaling", "studies/client_scaling.py --check", 4),
    Run("client-faults", "studies/client_faults.py --check --requests 400", 6),
    Run("map-kills", "studies/map_kills.py --check", 5),
    # The gateway.
    Run("gateway-cost", "studies/gateway_cost.py --check", 12),
    Run("gateway-tasks", "studies/gateway_tasks.py --check", 5),
    Run("gateway-hostile", "studies/gateway_hostile.py --check", 5),
    Run("gateway-aiperf", "studies/gateway_aiperf.py --check", 8),
    # Simulated devices.
    Run("goodput", "studies/goodput.py --check", 30),
    Run("short-requests", "studies/short_requests.py --check", 10),
    Run("simulated-scaling", "studies/simulated_scaling.py --check", 8),
    Run("simulated-agreement", "studies/simulated_agreement.py --check", 15),
    Run("tune", "studies/tune.py --check", 8),
    Run("demo-device", "simulated/measure.py", 3),
    Run("goodput-real", "studies/goodput_real.py --check", 30),
)
EXCLUDED = {
    "compare/engine_task.py": "part of the contenders",
    "compare/export_onnx.py": "run by Infinity's python for compare/rerank.py",
    "compare/flux_contenders.py": "run by compare/flux.py, a process for each contender",
    "compare/flux_load.py": "the load of compare/flux.py",
    "compare/rerank_contenders.py": "run by compare/rerank.py, a process for each contender",
    "compare/rerank_load.py": "the load of the reranker's comparisons",
    "compare/rerank_servers.py": "the servers of compare/rerank.py",
    "compare/vllm_pairs.py": "run by vLLM's python for compare/rerank_prefix.py",
}
"""Files of perf/compare and perf/studies that are not in the list, with the reason."""


def find(name: str) -> Run:
    """Return the run of a name.

    Raises:
        ValueError: There is none.
    """
    found = next((run for run in RUNS if run.name == name), None)
    if found is None:
        raise ValueError(f"no run {name!r} in perf/common/runs.py")
    return found
