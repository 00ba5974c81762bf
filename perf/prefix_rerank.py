"""What it is worth to read a query once for all of its documents: a causal reranker with and without, and vLLM.

For a random Qwen3 with eight layers of width 512 in float32, 64 documents of 100 tokens a query. With --check it fails
when a ratio is below what the project promises.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from compare_rerank import SOURCE
from genserve.serve.options import ServeError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import load_scorer
from genserve_backend.settings import RerankSettings
from own_process import TIMEOUT_S, last_line
from rerank_load import Load, Timing, draw_load, write_causal

HERE = Path(__file__).parent
TOKENS = 100
SAME = 1e-3
OURS = "GenServe's engine"
WITHOUT = "GenServe's engine, every prompt from its start"
BLOCKS = (0, 32, 64, 128)
"""Of vLLM's prefix cache; on CPUs it takes multiples of 32."""
PROMISES = {WITHOUT: 1.5, "vLLM": 1.1}
"""Pairs per second of ours, at least so many times the other's; of vLLM's its best."""


def run_ours(name: str, checkpoint: Path, load_file: Path) -> Timing:
    """In a process of its own."""
    return Timing.from_json(last_line(HERE / "rerank_contenders.py", name, str(checkpoint), str(load_file)))


def run_vllm(python: Path, checkpoint: Path, prompts: Path, block: int) -> Timing:
    """By the Python of vLLM's environment."""
    command = [str(python), str(HERE / "vllm_pairs.py"), str(checkpoint), str(prompts), str(block)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise ServeError(f"vLLM failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    return Timing(found["seconds"], [], [found["scores"]])


def write_prompts(checkpoint: Path, load: Load, file: Path) -> tuple[float, float]:
    """The token ids of all prompts, a list for each request; the mean length of a prompt, and of what it shares."""
    scorer = load_scorer(RerankCheckpoint.read(checkpoint), RerankSettings(model_path=checkpoint), "cpu")
    read = [
        [
            sequence
            for part in scorer.read(RerankRequest(each.query, each.documents, None))
            for sequence in part.sequences
        ]
        for each in load.requests
    ]
    # Other ids of the same number first, to warm up.
    warm_up = [[max(token - 1, 0) for token in sequence.ids] for sequence in read[0]]
    file.write_text(json.dumps([warm_up, *([sequence.ids for sequence in each] for each in read)]), encoding="utf-8")
    sequences = [sequence for each in read for sequence in each]
    return (
        statistics.mean(len(sequence.ids) for sequence in sequences),
        statistics.mean(len(sequence.ids) - sequence.length for sequence in sequences),
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--queries", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--documents", type=click.IntRange(min=1), default=64, show_default=True, help="Of each query.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each, in turn.")
@click.option("--vllm", "python", type=click.Path(exists=True, path_type=Path), help="python of vLLM's environment.")
@click.option("--check", is_flag=True, help="Fail when a ratio is below what is promised.")
def main(queries: int, documents: int, repeats: int, python: Path | None, check: bool) -> None:
    """Measure what shared prefixes are worth."""
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-prefix-") as temporary:
            folder = Path(temporary)
            checkpoint, load_file, prompts = folder / "causal", folder / "load.json", folder / "prompts.json"
            write_causal(SOURCE, checkpoint)
            load = draw_load(checkpoint, requests=queries, documents=documents, tokens=(TOKENS, TOKENS))
            load_file.write_text(load.to_json(), encoding="utf-8")
            length, shared = write_prompts(checkpoint, load, prompts)
            runs: dict[str, Callable[[], Timing]] = {
                OURS: partial(run_ours, "engine", checkpoint, load_file),
                WITHOUT: partial(run_ours, "engine-without-prefixes", checkpoint, load_file),
            }
            for block in BLOCKS if python else ():
                title = f"vLLM, blocks of {block} tokens" if block else "vLLM, without its prefix cache"
                runs[title] = partial(run_vllm, python.absolute(), checkpoint, prompts, block)
            timings: dict[str, list[Timing]] = {title: [] for title in runs}
            for repeat in range(repeats):
                for title, run in runs.items():
                    click.echo(f"run {repeat + 1} of {repeats}: {title}", err=True)
                    timings[title].append(run())
    except (ServeError, subprocess.TimeoutExpired) as error:
        click.echo(f"prefix_rerank: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    speeds = {title: statistics.median(each.pairs_per_second for each in runs) for title, runs in timings.items()}
    drawn = Table()
    for heading in ("", "Pairs/s", "Ours is", "Scores differ by"):
        drawn.add_column(heading, justify="right" if heading else "left")
    ours = _flat(timings[OURS][0])
    for title, speed in speeds.items():
        distance = max(abs(one - other) for one, other in zip(ours, _flat(timings[title][0]), strict=True))
        ratio = "" if title == OURS else f"{speeds[OURS] / speed:.2f} x"
        drawn.add_row(title, f"{speed:.1f}", ratio, "" if title == OURS else f"{distance:.0e}")
    console = Console()
    console.width = max(console.width, 110)
    console.print(f"{queries} queries, {documents} documents each, prompts of {length:.0f} tokens, {shared:.0f} shared")
    console.print(drawn)
    broken = []
    for start, least in PROMISES.items():
        best = max((speed for title, speed in speeds.items() if title.startswith(start)), default=None)
        if best and speeds[OURS] < least * best:
            broken.append(f"{speeds[OURS] / best:.2f} times the pairs per second of {start}, promised {least}")
    for line in broken:
        click.echo(line, err=True)
    if check and broken:
        sys.exit(1)


def _flat(timing: Timing) -> list[float]:
    return [score for scores in timing.scores for score in scores]


if __name__ == "__main__":
    main()
