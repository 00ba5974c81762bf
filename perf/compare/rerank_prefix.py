"""Gain of shared prefixes: a causal reranker with and without them, and vLLM with its prefix cache.

For a Qwen3 with eight layers of width 512 and random weights in float32, and 64 documents of 100 tokens per query. With
--check it fails if a ratio is below the project's promise.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, RERANK_CHECKPOINT, SETTINGS, fail, judge, new_table, run_in_turn, show
from common.script import run_script
from compare.rerank_load import Load, Timing, draw_load, write_causal
from genserve.serve.options import ServeError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import build_scorer
from genserve_backend.settings import RerankSettings

HERE = Path(__file__).parent
TOKENS = 100
OURS = "GenServe's engine"
WITHOUT = "GenServe's engine, every prompt from its start"
BLOCKS = (0, 32, 64, 128)
"""Block sizes of vLLM's prefix cache; on CPUs multiples of 32."""
PROMISES = {WITHOUT: 1.5, "vLLM": 1.1}
"""Minimum ratio of our pairs per second to the contender's, by the start of its title; the best of vLLM's counts."""


def run_ours(name: str, checkpoint: Path, load_file: Path) -> Timing:
    """Drive our engine in a process of its own."""
    return Timing.from_json(run_script(HERE / "rerank_contenders.py", name, str(checkpoint), str(load_file)))


def run_vllm(python: Path, checkpoint: Path, prompts: Path, block: int) -> Timing:
    """Score the prompts with vLLM, with the Python of its environment."""
    found = json.loads(run_script(HERE / "vllm_pairs.py", str(checkpoint), str(prompts), str(block), python=python))
    return Timing(found["seconds"], [], [found["scores"]])


def write_prompts(checkpoint: Path, load: Load, file: Path) -> tuple[float, float]:
    """Write the token ids of all prompts, a list per request; return the mean length of prompts and prefixes."""
    scorer = build_scorer(RerankCheckpoint.load(checkpoint), RerankSettings(model_path=checkpoint), "cpu")
    tokenized = [
        [
            sequence
            for part in scorer.tokenize(RerankRequest(each.query, each.documents, None))
            for sequence in part.sequences
        ]
        for each in load.requests
    ]
    # First the warm-up: as many other ids.
    warm_up = [[max(token - 1, 0) for token in sequence.ids] for sequence in tokenized[0]]
    file.write_text(
        json.dumps([warm_up, *([sequence.ids for sequence in each] for each in tokenized)]), encoding="utf-8"
    )
    sequences = [sequence for each in tokenized for sequence in each]
    return (
        statistics.mean(len(sequence.ids) for sequence in sequences),
        statistics.mean(len(sequence.ids) - sequence.length for sequence in sequences),
    )


@click.command(context_settings=SETTINGS)
@click.option("--queries", type=COUNT, default=4, show_default=True)
@click.option("--documents", type=COUNT, default=64, show_default=True, help="Documents per query.")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Runs of each contender; medians count.")
@click.option(
    "--vllm", "python", type=click.Path(exists=True, path_type=Path), help="python of an environment with vLLM."
)
@click.option("--check", is_flag=True, help="Fail if a ratio is below its promise.")
def main(queries: int, documents: int, repeats: int, python: Path | None, check: bool) -> None:
    """Measure the gain of shared prefixes."""
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-prefix-") as temporary:
            folder = Path(temporary)
            checkpoint, load_file, prompts = folder / "causal", folder / "load.json", folder / "prompts.json"
            write_causal(RERANK_CHECKPOINT, checkpoint)
            load = draw_load(checkpoint, requests=queries, documents=documents, tokens=(TOKENS, TOKENS))
            load_file.write_text(load.to_json(), encoding="utf-8")
            length, shared = write_prompts(checkpoint, load, prompts)
            runs: dict[str, Callable[[], Timing]] = {
                OURS: partial(run_ours, "engine", checkpoint, load_file),
                WITHOUT: partial(run_ours, "engine-without-prefixes", checkpoint, load_file),
            }
            if python:
                for block in BLOCKS:
                    title = f"vLLM, blocks of {block} tokens" if block else "vLLM, without its prefix cache"
                    runs[title] = partial(run_vllm, python.absolute(), checkpoint, prompts, block)
            timings = run_in_turn(runs, repeats)
    except (ServeError, subprocess.TimeoutExpired) as error:
        fail(error)
    speeds = {title: statistics.median(each.pairs_per_second for each in runs) for title, runs in timings.items()}
    drawn = new_table("", "Pairs/s", "Ours is", "Scores differ by")
    ours = _flat(timings[OURS][0])
    for title, speed in speeds.items():
        distance = max(abs(one - other) for one, other in zip(ours, _flat(timings[title][0]), strict=True))
        ratio = "" if title == OURS else f"{speeds[OURS] / speed:.2f} x"
        drawn.add_row(title, f"{speed:.1f}", ratio, "" if title == OURS else f"{distance:.0e}")
    show(drawn, f"{queries} queries, {documents} documents each, prompts of {length:.0f} tokens, {shared:.0f} shared")
    broken = []
    for start, least in PROMISES.items():
        best = max((speed for title, speed in speeds.items() if title.startswith(start)), default=None)
        if best and speeds[OURS] < least * best:
            broken.append(f"{speeds[OURS] / best:.2f} times the pairs per second of {start}, promised {least}")
    judge(broken, check=check)


def _flat(timing: Timing) -> list[float]:
    return [score for scores in timing.scores for score in scores]


if __name__ == "__main__":
    main()
