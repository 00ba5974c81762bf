"""Report of `genserve tune`: a table for people, JSON for programs, remarks for the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genserve.tune.load import UNITS, Sample
from genserve.tune.run import Goal, Result
from genserve.tune.search import NAMES, Check, Outcome, describe, show_gain
from genserve.tune.space import tuned

WIDTH = 120
"""Characters of a table, at least: a pipe or a narrow terminal would cut the headings."""


def print_table(result: Result, goal: Goal) -> None:
    """Print all trials of a model, and the summary."""
    table = Table()
    percentile = f"p{goal.percent:g}, s"
    for heading in ("Setting", "Value", "Rate", percentile, "Gain", "Verdict"):
        table.add_column(heading, justify="right" if heading in {"Rate", percentile} else "left", overflow="fold")
    for row in _rows(result, goal):
        table.add_row(*map(Text, row))  # Text: a reason may have brackets, which are no markup
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(table)
    for line in summary(result, goal):
        console.print(line, markup=False, highlight=False)


def _rows(result: Result, goal: Goal) -> Iterator[tuple[str, ...]]:
    outcome, unit = result.outcome, UNITS[result.load.model]

    def figures(sample: Sample | None) -> tuple[str, str]:
        return (f"{sample.rate:.2f} {unit}/s", f"{sample.percentile(goal.percent):.3f}") if sample else ("", "")

    if outcome.base:
        yield "in force", _shown(outcome.before), *figures(outcome.base), "", ""
    for trial in outcome.trials:
        names = "\n".join(trial.change.variables)
        values = "\n".join("default" if value is None else value for value in trial.change.variables.values())
        gain = show_gain(trial.gain) if trial.gain else ""
        yield (
            names,
            values,
            *figures(trial.sample),
            gain,
            f"{trial.verdict}: {trial.reason}" if trial.reason else trial.verdict,
        )
    for check in outcome.checks:
        against = f"found, against {NAMES[check.against]}"
        yield against, "fresh run", *figures(check.found), show_gain(check.gain), _judged(check)


def _shown(values: Mapping[str, str]) -> str:
    return "\n".join(f"{name}={value}" for name, value in values.items()) or "the defaults"


def _judged(check: Check) -> str:
    if check.against == "before":
        return "confirmed" if check.holds else "not confirmed"
    return "at least as fast" if check.holds else "not shown to be as fast"


def summary(result: Result, goal: Goal) -> list[str]:
    """Return the result of a model in a few lines."""
    outcome, model = result.outcome, result.load.model
    measure = "throughput" if goal.objective == "throughput" else f"p{goal.percent:g} latency"
    lines = [f"{model}: {measure} of {result.load.description}"]
    lines += [
        f"{model}: {_shown_in_line(check.values)} against {NAMES[check.against]}: {show_gain(check.gain)}"
        f" in {check.gain.pairs} pairs on fresh servers, {_judged(check)}"
        for check in outcome.checks
    ]
    if outcome.ended:
        lines.append(f"{model}: the search ended early: {outcome.ended}")
    lines.append(f"{model}: {_result(outcome)}")
    return lines


def _result(outcome: Outcome) -> str:
    best = _shown_in_line(outcome.best)
    if outcome.best != outcome.found:
        kept = "the defaults are written" if not outcome.best else f"{best} stay"
        return f"{_shown_in_line(outcome.found)} was not confirmed by a fresh run; {kept}"
    if outcome.best == outcome.before:
        measured = sum(trial.gain is not None for trial in outcome.trials)
        found = (
            f"no change gained beyond noise, of {measured} that were measured" if measured else "no change was measured"
        )
        return f"{found}; {best} stay"
    return f"{best} are written" if outcome.confirmed else f"{best} are written, not confirmed by a fresh run"


def _shown_in_line(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items()) or "the defaults"


def tuned_variables(result: Result, goal: Goal) -> dict[str, str]:
    """Return the lines of a model for the environment file; an empty value selects the default."""
    outcome = result.outcome
    names = tuned(result.load.model, lossy=goal.lossy)
    return {name: outcome.best.get(name, "") for name in names if name in outcome.best or name in outcome.before}


def as_json(result: Result, goal: Goal) -> dict[str, Any]:
    """Return the result of a model for JSON."""
    outcome = result.outcome
    return {
        "model": result.load.model,
        "load": result.load.description,
        "objective": goal.objective,
        "before": dict(outcome.before),
        "best": dict(outcome.best),
        "confirmed": outcome.confirmed,
        "ended": outcome.ended,
        "base": _sample_json(outcome.base),
        "trials": [
            {
                "change": dict(trial.change.variables),
                "title": describe(trial.change),
                "verdict": trial.verdict,
                "reason": trial.reason,
                "gain": asdict(trial.gain) if trial.gain else None,
                **_sample_json(trial.sample),
            }
            for trial in outcome.trials
        ],
        "checks": [
            {
                "against": check.against,
                "gain": asdict(check.gain),
                "holds": check.holds,
                "found": _sample_json(check.found),
                "other": _sample_json(check.other),
            }
            for check in outcome.checks
        ],
        "summary": summary(result, goal),
    }


def _sample_json(sample: Sample | None) -> dict[str, Any]:
    if sample is None:
        return {"per_second": None, "p50_s": None, "p95_s": None, "p99_s": None}
    return {"per_second": sample.rate} | {f"p{percent}_s": sample.percentile(percent) for percent in (50, 95, 99)}
