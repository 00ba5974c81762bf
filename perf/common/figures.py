"""Figures of a load: percentiles, goodput, load balance, concurrency efficiency, failures and confidence intervals.

The one place for their definitions. Load balance and concurrency efficiency are ratios to the ideal, 1.0.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
TOLERANCE = 1e-9
"""Of a deadline: sums of floats differ in their last bits."""


@dataclass(frozen=True)
class Outcome:
    """The end of a request.

    Attributes:
        arrived: Time of its arrival, in seconds from the start of the load.
        latency_s: Seconds from the arrival to the answer, or to the error.
        own_s: Its own time: alone on the device.
        deadline_s: Seconds in which it was wanted, if it had a deadline.
        steps: Its denoising steps.
        error: Kind of its error; empty if there was none.
        instance: Instance that answered.
    """

    arrived: float
    latency_s: float
    own_s: float
    deadline_s: float | None
    steps: int
    error: str = ""
    instance: str = ""

    @property
    def is_in_time(self) -> bool:
        """True if it was answered with a result, by its deadline if it had one."""
        limit = math.inf if self.deadline_s is None else self.deadline_s * (1 + TOLERANCE)
        return not self.error and self.latency_s <= limit

    @property
    def slowdown(self) -> float:
        """Latency over the own time."""
        return self.latency_s / self.own_s


@dataclass(frozen=True)
class Interval:
    """A mean over seeds or repeats, and half the width of its confidence interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def __format__(self, spec: str) -> str:
        """Return mean and half width, as in ``95.2 ± 0.4``; the spec is that of a float. One run has no width."""
        unit = " %" if spec.endswith("%") else ""
        mean, half = (format(value, spec).rstrip("%") for value in (self.mean, self.half))
        return f"{mean}{unit}" if math.isnan(self.half) else f"{mean} ± {half}{unit}"


def t_quantile(freedom: int) -> float:
    """Return Student's two-sided 95 % quantile for 1 degree of freedom and more."""
    from scipy import stats  # takes a second

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values from independent runs, with its 95 % confidence interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan)
    return Interval(mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed; NaN without values."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


def goodput(outcomes: Sequence[Outcome]) -> float:
    """Return the share of requests that were answered in time; errors are not."""
    return sum(outcome.is_in_time for outcome in outcomes) / len(outcomes)


def load_balance(shares: Mapping[str, float] | Sequence[float]) -> float:
    """Return the worst instance's share of the work over the mean share: 1 if all are equal, 0 if one had none."""
    values = list(shares.values() if isinstance(shares, Mapping) else shares)
    total = sum(values)
    return min(values) * len(values) / total if total else 1.0


def concurrency_efficiency(work_s: float, devices: int, seconds: float) -> float:
    """Return the work over what the devices could have done: 1 if all worked all the time.

    Args:
        work_s: Device seconds that the requests needed.
        devices: Number of devices.
        seconds: From the first arrival to the last answer.
    """
    return work_s / (devices * seconds)


def failures(errors: Iterable[str]) -> Counter[str]:
    """Return the number of failures by kind, from the kind of each request's error, empty if it had none."""
    return Counter(error for error in errors if error)
