"""Columns of the scripts' tables: whether higher or lower is better, and what can be compared between machines.

The one place for it. The first rule that matches a script and a heading counts. A table's first column names its rows
and has no rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

USUAL = 0.1
"""Share by which absolute times of one machine differ between runs, as docs/benchmarks.md says."""


@dataclass(frozen=True)
class Rule:
    """A kind of column.

    Attributes:
        headings: Pattern of the whole heading.
        better: Sign of an improvement: 1 if higher is better, -1 if lower is, 0 if neither.
        relative: Whether it is a ratio, share or count within a run, so that machines can be compared.
        tolerance: Share of the value that is not worth naming.
        floor: Difference that is not worth naming, in the cells' unit.
        scripts: Pattern of the script.
    """

    headings: str
    better: int
    relative: bool = True
    tolerance: float = USUAL
    floor: float = 0.0
    scripts: str = ".*"

    def matches(self, script: str, heading: str) -> bool:
        """Tell whether the rule is for this column."""
        return bool(re.fullmatch(self.scripts, script) and re.fullmatch(self.headings, heading))


def higher(headings: str, tolerance: float = USUAL, *, floor: float = 0.0, scripts: str = ".*") -> Rule:
    """Return a rule for ratios and shares of which more is better."""
    return Rule(headings, 1, tolerance=tolerance, floor=floor, scripts=scripts)


def lower(headings: str, tolerance: float = USUAL, *, floor: float = 0.0, scripts: str = ".*") -> Rule:
    """Return a rule for ratios and shares of which less is better."""
    return Rule(headings, -1, tolerance=tolerance, floor=floor, scripts=scripts)


def neutral(headings: str, *, scripts: str = ".*") -> Rule:
    """Return a rule for settings and for figures that are neither good nor bad."""
    return Rule(headings, 0, scripts=scripts)


RULES = (
    # Headings that mean something else elsewhere.
    neutral("Server|Virtual clock|Difference", scripts=r".*/simulated_agreement\.py"),  # --check has a limit
    higher("Server|Simulated", 0, floor=3.0, scripts=r".*/goodput_real\.py"),
    lower("worst", scripts=r".*/(goodput|flux_priority)\.py"),
    higher("worst", 0, floor=1.0, scripts=r".*/flux_precision\.py"),
    higher(".* of .*|background|everything", 0, floor=2.0, scripts=r".*/flux_precision\.py"),
    # Seconds of the virtual clock do not depend on the machine.
    higher("Saturation, 1/s", scripts=r".*/short_requests\.py"),
    lower(".*, s", scripts=r".*/short_requests\.py"),
    neutral("Gain|Verdict", scripts=r".*/tune\.py"),  # --check has a limit
    # Settings and shares without a better end.
    neutral("Requests|Devices|Images|Load|Policy|Protocol|CACHE|Figure|Endpoint type|sent"),
    neutral("By server|Mean batch|Steps skipped|Killed|Killed after lines|Started more than once|2xx|4xx|503"),
    # Counts that are right or wrong.
    higher("Right|Answers", 0),
    lower("Errors|Wrong|With other bytes|other 5xx|no answer", 0),
    # Ratios and shares.
    higher("Ours is|Times the loop|Of the ideal|Load balance|Efficiency|Throughput|Faster|of none|Share", 0.05),
    higher(r"Padding up to [\d.]+|bfloat16|int8|int8wo|fp8"),
    higher(r"[\d.]+ x", 0, floor=2.0),
    higher("Adherence|Same top .*", 0, floor=2.0),
    higher("Rank correlation|Worst", 0, floor=0.005),
    higher("PSNR, .*", 0, floor=2.0),
    lower("Ours takes|Ratio|Ratio, mean|Slower|Slowdown, p99"),
    lower("Lost before the end|At the end", 0, floor=0.02),
    lower("Added", 0, floor=3.0),
    lower("Scores differ by|Largest difference", floor=0.005),
    lower("Largest difference, levels", 0, floor=1.0),
    # Times and rates of this machine.
    Rule("Low, completed", 1, relative=False),
    Rule(r".*[ (]?1/s|.*/s", 1, relative=False),
    Rule(r".*, m?s|.* m?s|Seconds|.*, s/image|longest", -1, relative=False),
)


def rule(script: str, heading: str) -> Rule | None:
    """Return the rule for a script's column, if it has one."""
    return next((each for each in RULES if each.matches(script, heading)), None)
