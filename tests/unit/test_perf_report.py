"""perf_analyzer's reports and error output."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from load.report import Failure, Level, Load, csv_path, first_error, merge, parse_all, parse_csv, summary
from load.run import poisson_loads

HEADER = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,"
    "Avg latency,request/response,response wait,Avg GPU Utilization,Avg GPU Power Usage,Max GPU Memory Usage,"
    "Total GPU Memory"
)
ONE = "1,6.30338,10,1259,77,37,156283,36,7,107120,248800,438854,475001,157713,17,157654,,,,"
TWO = "2,5.65585,10,4056,164331,47,171581,15,5,351851,555071,612257,623308,340048,15,339994,,,,"
ON_GPU = (
    "4,39.9361,10,26850,1102,46,1028,4,6,27930,35089,41706,50198,29049,16,29003,"
    "GPU-a1:0.97;GPU-b2:0.4;,GPU-a1:301.5;,GPU-a1:70000000000;,GPU-a1:150000000000;,"
)


def recorded(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([HEADER, *rows, ""]))
    return path


def rendered(levels: list[Level], failed: Failure | None = None) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(summary(levels, failed))
    return capture.get().splitlines()


def test_levels_are_sorted_by_concurrency(tmp_path: Path) -> None:
    levels = parse_csv(recorded(tmp_path / "a.csv", TWO, ONE), model="flux", protocol="grpc")
    assert levels == [
        Level("flux", "grpc", Load(False, 1), 6.30338, p50_ms=107.12, p95_ms=438.854, p99_ms=475.001, queue_ms=0.077),
        Level(
            "flux", "grpc", Load(False, 2), 5.65585, p50_ms=351.851, p95_ms=612.257, p99_ms=623.308, queue_ms=164.331
        ),
    ]


def test_report_with_gpu_columns_is_parsed(tmp_path: Path) -> None:
    (level,) = parse_csv(recorded(tmp_path / "a.csv", ON_GPU), model="rerank", protocol="http")
    assert (level.load, level.throughput, level.p50_ms) == (Load(False, 4), 39.9361, 27.93)


@pytest.mark.parametrize("text", ["", f"{HEADER}\n", "Concurrency,p50 latency\n1,5\n", f"{HEADER}\n1,2\n"])
def test_other_files_are_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.csv (has no measurement|is not a report)"):
        parse_csv(path, model="flux", protocol="grpc")


def test_merge_keeps_one_header(tmp_path: Path) -> None:
    parts = [recorded(tmp_path / "1.csv", ONE), recorded(tmp_path / "2.csv", TWO)]
    target = csv_path(tmp_path, "flux", "grpc")
    merge(parts, target)
    assert target.name == "flux-grpc.csv"
    assert target.read_text() == f"{HEADER}\n{ONE}\n{TWO}\n"
    assert [level.load.amount for level in parse_all(tmp_path, ["flux", "rerank"])] == [1, 2]


def test_poisson_loads_have_a_file_of_their_own(tmp_path: Path) -> None:
    recorded(csv_path(tmp_path, "flux", "grpc"), TWO, ONE)
    rates = recorded(csv_path(tmp_path, "flux", "grpc", is_poisson=True), ONE.replace("1,", "2.5,", 1))
    rates.write_text(rates.read_text().replace("Concurrency", "Request Rate"))
    levels = parse_all(tmp_path, ["flux"])
    assert [level.load for level in levels] == [Load(False, 1), Load(False, 2), Load(True, 2.5)]
    assert poisson_loads(levels, (0.5, 0.8)) == [Load(True, 3.15), Load(True, 5.04)]
    assert Load(True, 3.15).flags == ["--request-rate-range", "3.15", "--request-distribution", "poisson"]


def test_summary_has_a_line_per_level_and_one_for_the_failure(tmp_path: Path) -> None:
    levels = parse_csv(recorded(tmp_path / "a.csv", ONE, TWO), model="flux", protocol="grpc")
    lines = rendered(levels, Failure("rerank", "http", Load(False, 1), "refused"))
    words = [line.replace("│", " ").split() for line in lines if "│" in line]
    assert words == [
        ["flux", "grpc", "1", "in", "flight", "6.30", "107.1", "438.9", "475.0", "0.1", "0"],
        ["flux", "grpc", "2", "in", "flight", "5.66", "351.9", "612.3", "623.3", "164.3", "0"],
        ["rerank", "http", "1", "in", "flight", "-", "-", "-", "-", "-", "failed"],
    ]


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        (
            "Failed to maintain requested inference load. Worker thread(s) failed to generate concurrent requests.\n"
            "Thread [0] had error: InvalidInput: STEPS is 200; allowed: 1 to 100\n\n",
            "InvalidInput: STEPS is 200; allowed: 1 to 100",
        ),
        (
            "error: failed to get model metadata: Request for unknown model: 'x' is not found\n\n",
            "failed to get model metadata: Request for unknown model: 'x' is not found",
        ),
        (
            "WARNING: Unable to parse 'nv_gpu_utilization' metric.\nUnable to connect to Metrics endpoint h:1\n",
            "Unable to connect to Metrics endpoint h:1",
        ),
        ("", ""),
    ],
)
def test_first_error_is_the_cause(errors: str, reason: str) -> None:
    assert first_error(errors) == reason
