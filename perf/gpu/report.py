"""Markdown tables of the JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from common.plain import markdown
from gpu.record import ENDED, RESULT, STARTED, Line
from gpu.tables import PLAIN, SHARES, TABLES, Table

STDERR_LINES = 12
WIDEST = 110
"""Maximum characters of a cell: kernel names have hundreds."""


def render(lines: Sequence[Line]) -> str:
    """Return Markdown: per stage the parts' statuses, then each table with lines."""
    blocks: list[str] = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        blocks += _parts(stage, own)
        results = _completed([line for line in own if line.get("kind") == RESULT])
        for table in TABLES:
            if rows := [line for line in results if line.get("table") == table.name]:
                blocks += [f"### {table.title}", _table(table, rows)]
    return "\n\n".join(blocks) + "\n"


def _parts(stage: str, lines: Sequence[Line]) -> list[str]:
    started = next((line for line in lines if line.get("kind") == STARTED), {})
    ended = {line["part"]: line for line in lines if line.get("kind") == ENDED}
    rows = [
        (name, *(_show(ended.get(name, {"status": "no line"}).get(key)) for key in ("status", "seconds", "reason")))
        for name in started.get("parts", ended)
    ]
    blocks = [
        f"## {stage} on {started.get('device', '?')}, {started.get('began', '?')}",
        markdown(("part", "status", "s", "reason"), rows),
    ]
    for name, line in ended.items():
        if text := line.get("stderr"):
            tail = "\n".join(str(text).splitlines()[-STDERR_LINES:])
            blocks.append(f"{name}:\n\n```\n{tail}\n```")
    return blocks


def _completed(results: Iterable[Line]) -> list[Line]:
    """Return the lines with derived values: shares of the matrix rate, and ratios."""
    lines = [dict(line) for line in results]
    rate = next((line.get("tflops") for line in lines if line["table"] == "rates" and line["what"] == "bfloat16"), None)
    for line in lines:
        if rate and line.get("tflops") is not None:
            line["rate_share"] = line["tflops"] / rate
    _ratios(
        lines, "flux-images", "diffusers", ("size", "at_once"), lambda line, base: base["seconds"] / line["seconds"]
    )
    _ratios(
        lines,
        "rerank-engine",
        "transformers",
        ("model", "load"),
        lambda line, base: line["pairs_per_s"] / base["pairs_per_s"],
    )
    return lines


def _ratios(
    lines: Sequence[Line], table: str, base: str, keys: Sequence[str], ratio: Callable[[Line, Line], float]
) -> None:
    """Set each contender's speed relative to `base` under the same load."""
    own = [line for line in lines if line["table"] == table and line.get("seconds")]
    bases = {tuple(line[key] for key in keys): line for line in own if line["contender"] == base}
    for line in own:
        other = bases.get(tuple(line[key] for key in keys))
        if other is not None and other is not line:
            line["ratio"] = f"{ratio(line, other):.2f} x"


def _table(table: Table, rows: Sequence[Line]) -> str:
    # Columns without values are left out.
    columns = {header: key for header, key in table.columns.items() if any(key in row for row in rows)}
    reasons = list(dict.fromkeys(str(row["reason"]) for row in rows if row.get("reason")))
    marks = {reason: mark for mark, reason in enumerate(reasons, 1)}
    cells = []
    for row in rows:
        mark = f" ({marks[str(row['reason'])]})" if row.get("reason") else ""
        shown = [_cell(table.name, key, row.get(key)) for key in columns.values()]
        cells.append([*shown[:-1], shown[-1] + mark])
    text = markdown(tuple(columns), cells)
    notes = "\n".join(f"({mark}) {reason}" for reason, mark in marks.items())
    return f"{text}\n\n{notes}" if notes else text


def _cell(table: str, key: str, value: Any) -> str:
    is_share = key in SHARES and (table, key) not in PLAIN
    if is_share and isinstance(value, float):
        return f"{value:.1%}"
    return _show(value)[:WIDEST]


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
