"""Search for faster settings: one change after another, each compared with the best so far in pairs of blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from genserve.tune.gain import FEWEST_PAIRS, Gain, gain_of
from genserve.tune.load import Objective, Sample, TrialFailed

Values = Mapping[str, str]
"""Tuned variables that are set. One that is missing has its default."""
Verdict = Literal["adopted", "no gain beyond noise", "worse", "failed", "not tried", "no time left"]

LOOKS = (FEWEST_PAIRS, 8)
"""Numbers of pairs after which a change may be adopted. The second one is for gains that are small or noisy."""
CONFIRMING_ROUNDS = 6
CLEARLY_WORSE = -0.25
"""Gain below which a change is dropped at once, also after its first pair."""
SLOW = 3.0
"""A block that takes so many times as long as the best one's is ended: no measurement is needed to drop its change."""
SLOW_S = 5.0
"""Seconds that such a block has at least."""
START_SHARE = 0.5
"""Share of the time left that the start of a changed server may take: compiling takes long, and may not be worth it."""


class TuneError(Exception):
    """Reason for which nothing can be tuned, in one line."""


class OutOfTime(Exception):
    """End of the budget."""


@dataclass(frozen=True)
class Change:
    """Change of one setting, or of several that belong together.

    Attributes:
        variables: New values by variable; None selects the default.
        refused: Reason not to try it; None if there is none.
    """

    variables: Mapping[str, str | None]
    refused: str | None = None

    def apply(self, values: Values) -> dict[str, str]:
        """Return the values with the change."""
        changed = {**values, **self.variables}
        return {name: value for name, value in changed.items() if value is not None}


@dataclass(frozen=True)
class Trial:
    """Change that was tried, or refused.

    Attributes:
        change: The change.
        verdict: The outcome.
        gain: Gain over the best settings until then; None if there is no measurement.
        sample: All its blocks together.
        reason: Reason of a failure or a refusal, else empty.
    """

    change: Change
    verdict: Verdict
    gain: Gain | None = None
    sample: Sample | None = None
    reason: str = ""


@dataclass(frozen=True)
class Check:
    """Comparison of the settings that were found with others, on servers that were started for it.

    Attributes:
        values: The settings that were found, or those before if an earlier comparison has ruled out the former.
        against: The others: ``before``, the configuration in force, or ``defaults``.
        gain: Gain of the settings that were found.
        holds: True if it shows a gain over those before, or against the defaults no loss beyond the margin.
        found: All blocks of the settings that were found.
        other: All blocks of the others.
    """

    values: Values
    against: Literal["before", "defaults"]
    gain: Gain
    holds: bool
    found: Sample
    other: Sample


@dataclass
class Outcome:
    """Result of a search.

    Attributes:
        before: Values in force at the start.
        best: Values to write: those that were found if the checks hold, else those before, else the defaults.
        found: The best values of the search.
        base: The first measurement of the values before.
        trials: All trials, in order.
        checks: Comparisons of `found`, in order; the last one decides.
        ended: Reason why the search ended early, else empty.
    """

    before: Values
    best: Values
    found: Values
    base: Sample | None = None
    trials: list[Trial] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    ended: str = ""

    @property
    def confirmed(self) -> bool:
        """True if fresh runs have shown that the best values are as good as they have to be."""
        return self.best == self.found and bool(self.checks) and all(check.holds for check in self.checks)


class Bench(Protocol):
    """Servers to measure."""

    def block(self, values: Values, number: int, *, start_s: float, block_s: float) -> Sample:
        """Run a block on a server with these values, which starts if it does not run.

        Args:
            values: Tuned variables.
            number: Number of the block, which selects its requests.
            start_s: Time limit for the start.
            block_s: Time limit for the block.

        Raises:
            TrialFailed: The server does not start, or does not answer.
        """

    def drop(self, values: Values) -> None:
        """Stop the server with these values."""

    def seconds(self, blocks: int, *, starts: int) -> float:
        """Return the time that so many blocks, of servers in turn and with so many new ones, are expected to take."""


class Search:
    """Search of one model's settings.

    Args:
        bench: The servers.
        changes: Returns the changes to try from some values, the most promising first.
        objective: ``throughput``, or ``latency`` for a percentile.
        percent: The percentile.
        deadline: Time of `clock` at which everything has to have ended.
        margin: Gain below which a change is not worth it.
        say: Called with a line of progress.
        clock: Time in seconds.
    """

    def __init__(
        self,
        bench: Bench,
        changes: Callable[[Values], Sequence[Change]],
        *,
        objective: Objective,
        percent: float,
        deadline: float,
        margin: float,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bench = bench
        self._changes = changes
        self._objective = objective
        self._percent = percent
        self._deadline = deadline
        self._margin = margin
        self._say = say
        self._clock = clock
        self._blocks = 0
        self._base_s = 0.0
        """Seconds of the latest block of the best settings."""

    def run(self, before: Values) -> Outcome:
        """Search from the values in force. Ctrl-C, as KeyboardInterrupt, ends it with what it has found so far.

        Raises:
            TuneError: The values in force cannot be measured.
        """
        outcome = Outcome(before, before, before)
        try:
            outcome.base = self._measure_base(before)
            self._climb(outcome)
            self._confirm(outcome)
        except KeyboardInterrupt:
            outcome.ended = "interrupted"
            if not outcome.checks:
                outcome.best = outcome.found  # unconfirmed, as the report says
        except OutOfTime:
            outcome.ended = "the budget ended"
        except TuneError as error:
            if outcome.base is None:
                raise
            outcome.ended = str(error)
        return outcome

    def _measure_base(self, values: Values) -> Sample:
        left = self._left()
        try:
            sample = self._bench.block(values, self._next_number(), start_s=left, block_s=left)
        except TrialFailed as error:
            raise TuneError(f"the settings in force cannot be measured: {error}") from None
        self._base_s = sample.seconds
        return sample

    def _climb(self, outcome: Outcome) -> None:
        """Try the changes until none is left, or the time that is left is needed to confirm what was found."""
        tried: list[Change] = []
        results = [outcome.before]
        while change := self._next(outcome.found, tried, results):
            tried.append(change)
            if change.refused:
                outcome.trials.append(Trial(change, "not tried", reason=change.refused))
                continue
            values = change.apply(outcome.found)
            results.append(values)
            if self._left() < self._bench.seconds(2 * LOOKS[0], starts=1) + self._confirming_s(outcome.before, values):
                outcome.ended = "the budget had no room for further changes"
                return
            trial = self._try(outcome, change)
            outcome.trials.append(trial)
            if trial.verdict == "adopted":
                self._bench.drop(outcome.found)
                outcome.found = values
            else:
                self._bench.drop(values)

    def _next(self, values: Values, tried: Sequence[Change], results: Sequence[Values]) -> Change | None:
        """Return the first change that was not tried, from whatever values, and leads to values that were not."""
        for change in self._changes(values):
            if change not in tried and (change.refused or change.apply(values) not in results):
                return change
        return None

    def _try(self, outcome: Outcome, change: Change) -> Trial:
        best, values = outcome.found, change.apply(outcome.found)
        speeds: list[tuple[float, float]] = []
        samples: list[Sample] = []
        self._say(f"trying {describe(change)}")
        confirming_s = self._confirming_s(outcome.before, values)
        verdict: Verdict | None = None
        while verdict is None:
            left = self._left() - confirming_s
            if left < self._bench.seconds(2, starts=0 if samples else 1):
                verdict = "no time left"
                break
            try:
                old, new = self._pair(best, values, len(speeds), start_s=START_SHARE * left)
            except TrialFailed as error:
                return Trial(change, "failed", reason=str(error))
            samples.append(new)
            speeds.append((self._speed(old), self._speed(new)))
            verdict = self._judge(speeds)
        gain = gain_of(speeds) if speeds else None
        trial = Trial(change, verdict, gain, together(samples) if samples else None)
        self._say(f"{describe(change)}: {verdict}" + (f", {show_gain(gain)}" if gain else ""))
        return trial

    def _judge(self, speeds: Sequence[tuple[float, float]]) -> Verdict | None:
        """Return the verdict on a change after some pairs, None if more are needed."""
        gain = gain_of(speeds)
        if gain.mean < CLEARLY_WORSE:
            return "worse"
        if (gain.pairs > 1 and gain.mean <= 0) or (gain.pairs > 2 and gain.mean < self._margin):
            return "no gain beyond noise"
        if gain.pairs not in LOOKS:
            return None
        if gain.low is not None and gain.low > self._margin:
            return "adopted"
        return "no gain beyond noise" if gain.pairs == LOOKS[-1] else None

    def _confirm(self, outcome: Outcome) -> None:
        """Compare what was found with the values before, and with the defaults, on fresh servers."""
        found, before = outcome.found, outcome.before
        self._bench.drop(found)
        sides = _distinct(before, found, {})
        if len(sides) == 1:
            return
        self._say("comparing what was found with what was before and with the defaults, on fresh servers")
        rounds = self._measure_in_turn(sides)

        def check(values: Values, against: Literal["before", "defaults"], other: Values, least: float) -> bool:
            news, olds = ([each[sides.index(side)] for each in rounds] for side in (values, other))
            gain = gain_of([(self._speed(old), self._speed(new)) for old, new in zip(olds, news, strict=True)])
            holds = gain.low is not None and gain.low > least
            outcome.checks.append(Check(values, against, gain, holds, together(news), together(olds)))
            return holds

        # The defaults need no reason to be written.
        if found != before and (check(found, "before", before, 0.0) or not found):
            outcome.best = found
        if outcome.best and before and not check(outcome.best, "defaults", {}, -self._margin):
            outcome.best = {}

    def _measure_in_turn(self, sides: Sequence[Values]) -> list[list[Sample]]:
        """Measure several values with the same requests, in the other order each time; return rounds of their samples.

        Raises:
            OutOfTime: There is no time for enough rounds.
            TuneError: A server fails.
        """
        rounds: list[list[Sample]] = []
        for count in range(CONFIRMING_ROUNDS):
            if self._left() < self._bench.seconds(len(sides), starts=0 if count else len(sides)):
                if count >= FEWEST_PAIRS:
                    break
                raise OutOfTime
            number = self._next_number()
            order = range(len(sides)) if count % 2 == 0 else reversed(range(len(sides)))
            try:
                samples = {
                    index: self._bench.block(sides[index], number, start_s=self._left(), block_s=self._left())
                    for index in order
                }
            except TrialFailed as error:
                raise TuneError(f"a server of the fresh run failed: {error}") from None
            rounds.append([samples[index] for index in range(len(sides))])
        for side in sides:
            self._bench.drop(side)
        return rounds

    def _confirming_s(self, before: Values, found: Values) -> float:
        sides = len(_distinct(before, found, {}))
        return self._bench.seconds(FEWEST_PAIRS * sides, starts=sides)

    def _pair(self, best: Values, values: Values, count: int, *, start_s: float) -> tuple[Sample, Sample]:
        """Measure both with the same requests, in the other order each time, so that a drift of the machine cancels."""
        number = self._next_number()

        def base() -> Sample:
            left = self._left()
            try:
                sample = self._bench.block(best, number, start_s=left, block_s=left)
            except TrialFailed as error:
                raise TuneError(f"the best settings so far failed: {error}") from None
            self._base_s = sample.seconds
            return sample

        def other() -> Sample:
            limit = min(max(SLOW * self._base_s, SLOW_S), self._left())
            return self._bench.block(values, number, start_s=min(start_s, self._left()), block_s=limit)

        if count % 2:
            old = base()
            return old, other()
        new = other()  # first in the first pair: no start comes between its blocks
        return base(), new

    def _next_number(self) -> int:
        number, self._blocks = self._blocks, self._blocks + 1
        return number

    def _speed(self, sample: Sample) -> float:
        return sample.rate if self._objective == "throughput" else 1 / sample.percentile(self._percent)

    def _left(self) -> float:
        left = self._deadline - self._clock()
        if left <= 0:
            raise OutOfTime
        return left


def _distinct(*values: Values) -> list[Values]:
    found: list[Values] = []
    for each in values:
        if each not in found:
            found.append(each)
    return found


NAMES = {"before": "those before", "defaults": "the defaults"}


def together(samples: Sequence[Sample]) -> Sample:
    """Return several blocks as one measurement."""
    latencies = tuple(latency for sample in samples for latency in sample.latencies)
    return Sample(sum(sample.seconds for sample in samples), sum(sample.units for sample in samples), latencies)


def describe(change: Change) -> str:
    """Return a change in one line, as ``WORKERS=2 RERANK_THREADS=default``."""
    return " ".join(f"{name}={'default' if value is None else value}" for name, value in change.variables.items())


def show_gain(gain: Gain) -> str:
    """Return a gain in percent with its interval, as ``+25.3 % (18.0 to 31.2)``."""
    text = f"{gain.mean:+.1%}".replace("%", " %")
    return text if gain.low is None or gain.high is None else f"{text} ({100 * gain.low:.1f} to {100 * gain.high:.1f})"
