"""Measurements of GenServe on a GPU, in three calls of at most nine minutes each.

    python perf/gpu/run.py truth      # what is right: kernels, errors, waits, memory
    python perf/gpu/run.py flux       # FLUX.1-dev's true shape with random weights
    python perf/gpu/run.py rerank     # Qwen3-Reranker's true shapes with random weights
    python perf/gpu/run.py report perf/results/gpu-*.jsonl

Each part of a call is a process of its own with a time limit, and each result is a line of JSON in a file as soon as it
is known. `--device cpu --tiny` is a dry run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "backend"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import record
from gpu.plan import MODELS, STAGES, VARIANTS, Choice, Part
from gpu.processes import Call, run_parts
from gpu.report import render
from gpu.variants import USUAL

RESULTS = Path(__file__).resolve().parents[1] / "results"
SECONDS = 520.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage or print a report; return the exit status, 1 where a part has not ended well."""
    options = _parser().parse_args(arguments)
    if options.verb == "report":
        print(render(record.read(options.files)))
        return 0
    choice = Choice(options.variants, options.models, options.tiny)
    try:
        parts = _chosen(STAGES[options.verb](choice), options.parts)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    if options.plan:
        for part in parts:
            print(f"{part.name}: at most {part.limit_s:g} s")
        return 0
    out: Path = options.out or RESULTS / f"gpu-{options.verb}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    call = Call(options.verb, options.device, options.tiny, out, options.seconds)
    try:
        well = run_parts(parts, call, tell=lambda text: print(text, flush=True))
    finally:
        lines = [line for line in record.read([out]) if line["stage"] == options.verb]
        print(f"\n{render(lines)}", flush=True)
    return 0 if well else 1


def _stop(*_: Any) -> None:
    """End like an interrupt: the running part is ended too, and the tables are printed."""
    raise KeyboardInterrupt


def _chosen(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    if unknown := set(names) - {part.name for part in parts}:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    return [part for part in parts if not names or part.name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="run.py"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="truth|flux|rerank|report")
    for stage, variants in VARIANTS.items():
        verb = verbs.add_parser(stage)
        verb.add_argument("--device", default="cuda:0", help="as torch names it (default: cuda:0)")
        verb.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
        verb.add_argument("--seconds", type=float, default=SECONDS, help="for all parts (default: 520)")
        verb.add_argument("--out", type=Path, help="the file that lines are added to (default: in perf/results)")
        verb.add_argument("--parts", type=_names(None), default=(), help="only these, by comma")
        verb.add_argument("--plan", action="store_true", help="print the parts and run none")
        usual = tuple(name for name in USUAL if name in variants)
        known = f" of {','.join(variants)} (default: {','.join(usual)})" if variants else ""
        hidden = argparse.SUPPRESS
        verb.add_argument(
            "--variants", type=_names(variants), default=usual, help=f"by comma{known}" if variants else hidden
        )
        sizes = f"of Qwen3-Reranker, by comma (default: {','.join(MODELS)})"
        verb.add_argument(
            "--models",
            type=_names((*MODELS, "8B")),
            default=MODELS,
            help=sizes if stage == "rerank" else hidden,
        )
    report = verbs.add_parser("report")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    return parser


def _names(known: Sequence[str] | None) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if known is not None and (unknown := [name for name in names if name not in known]):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
