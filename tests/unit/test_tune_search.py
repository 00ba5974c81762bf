"""The search of `genserve tune`: finds bad settings, adopts no noise, keeps its budget. The servers are simulated."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from genserve.tune.gain import FEWEST_PAIRS, TAIL, gain_of
from genserve.tune.load import Sample, TrialFailed
from genserve.tune.search import CONFIRMING_ROUNDS, Change, Outcome, Search, TuneError, Values

START_S = 8.0
BLOCK_S = 5.0
UNITS = 100


class SimulatedBench:
    """Servers whose blocks take simulated time.

    Args:
        speed: Units per second with some values. Raises TrialFailed for those that do not work.
        noise: Standard deviation of a block's speed, relative.
        drift: Relative change of the machine's speed per block.
    """

    def __init__(
        self, speed: Callable[[Values], float], *, noise: float = 0.0, drift: float = 0.0, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.alive: list[Values] = []
        self.starts: list[Values] = []
        self.most_alive = 0
        self._speed = speed
        self._noise = noise
        self._drift = drift
        self._machine = 1.0
        self._rng = random.Random(seed)

    def block(self, values: Values, number: int, *, start_s: float, block_s: float) -> Sample:
        if values not in self.alive:
            self._start(values, start_s)
        self._machine *= 1 + self._drift
        speed = self._speed(values) * self._machine * math.exp(self._rng.gauss(0, self._noise))
        seconds = min(UNITS / speed, block_s)
        self.now += seconds
        return Sample(seconds, max(1, round(seconds * speed)), (1 / speed,) * 20)

    def _start(self, values: Values, limit_s: float) -> None:
        self.starts.append(dict(values))
        self.now += min(START_S, limit_s)
        if limit_s < START_S:
            raise TrialFailed("not ready in time")
        self._speed(values)
        self.alive.append(dict(values))
        self.most_alive = max(self.most_alive, len(self.alive))

    def drop(self, values: Values) -> None:
        self.alive = [each for each in self.alive if each != values]

    def seconds(self, blocks: int, *, starts: int) -> float:
        return starts * START_S + blocks * BLOCK_S


def search(
    bench: SimulatedBench,
    changes: Callable[[Values], Sequence[Change]],
    *,
    before: Mapping[str, str] | None = None,
    budget: float = 1200.0,
    objective: str = "throughput",
) -> Outcome:
    run = Search(
        bench,
        changes,
        objective="latency" if objective == "latency" else "throughput",
        percent=95,
        deadline=budget,
        margin=0.02,
        clock=lambda: bench.now,
    )
    return run.run(before or {})


def offered(*changes: Mapping[str, str | None]) -> Callable[[Values], list[Change]]:
    """Return a function that offers always the same changes, and the default of every variable that is set."""
    return lambda values: [*(Change({name: None}) for name in values), *(Change(each) for each in changes)]


def verdicts(outcome: Outcome) -> list[tuple[dict[str, str | None], str]]:
    return [(dict(trial.change.variables), trial.verdict) for trial in outcome.trials]


# The interval.


def test_interval_of_few_pairs_is_exact() -> None:
    """By hand: of five differences, one of 32 sign patterns is extreme, so the interval ends at the extremes."""
    gain = gain_of([(1.0, math.exp(each)) for each in (0.1, 0.2, 0.3, 0.4, 0.5)])
    assert gain.low == pytest.approx(math.expm1(0.1))
    assert gain.high == pytest.approx(math.expm1(0.5))
    assert gain.mean == pytest.approx(math.expm1(0.3))


def test_fewer_pairs_have_no_interval() -> None:
    gain = gain_of([(1.0, 2.0)] * (FEWEST_PAIRS - 1))
    assert (gain.mean, gain.low, gain.high) == (pytest.approx(1.0), None, None)


@pytest.mark.parametrize("pairs", [5, 6, 8])
def test_interval_misses_the_true_gain_as_often_as_promised(pairs: int) -> None:
    rng = random.Random(pairs)
    runs = 2000
    below = sum(
        (gain_of([(1.0, 1.1 * math.exp(rng.gauss(0, 0.05))) for _ in range(pairs)]).low or 0.0) > 0.1
        for _ in range(runs)
    )
    # Binomial: 2,000 runs at 1 in 32 have 62.5 on average, with a deviation of 7.8.
    assert below == pytest.approx(runs * TAIL, abs=4 * 7.8)


# The search.


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("planted", "loss"),
    [({"RERANK_THREADS": "1"}, 0.55), ({"MAX_NUM_BATCHED_TOKENS": "64"}, 0.7), ({"FLUX_MAX_RUNNING": "1"}, 0.4)],
    ids=["threads", "tokens", "slots"],
)
def test_planted_bad_setting_is_found_in_noise(planted: dict[str, str], loss: float, seed: int) -> None:
    ((name, value),) = planted.items()
    bench = SimulatedBench(lambda values: 20 * (loss if values.get(name) == value else 1), noise=0.05, seed=seed)
    outcome = search(bench, offered({"OTHER": "1"}, {"OTHER": "2"}), before=planted)
    assert ({name: None}, "adopted") in verdicts(outcome)
    assert name not in outcome.best
    assert outcome.checks[0].holds


def test_better_setting_is_found_and_confirmed_on_fresh_servers() -> None:
    bench = SimulatedBench(lambda values: 30 if values.get("WORKERS") == "2" else 20, noise=0.03)
    outcome = search(bench, offered({"WORKERS": "4"}, {"WORKERS": "2"}))
    assert verdicts(outcome) == [({"WORKERS": "4"}, "no gain beyond noise"), ({"WORKERS": "2"}, "adopted")]
    assert outcome.best == {"WORKERS": "2"}
    assert outcome.confirmed
    (check,) = outcome.checks
    assert check.gain.pairs == CONFIRMING_ROUNDS
    assert check.gain.mean == pytest.approx(0.5, abs=0.05)
    assert bench.starts[-2:] == [{}, {"WORKERS": "2"}]
    assert bench.alive == []
    assert bench.most_alive == 2


def test_noise_is_adopted_no_more_often_than_promised() -> None:
    """Six changes without effect, 10 % of noise a block and a drift: a fresh run confirms one in at most 1 of 32 runs.

    At that rate, 200 runs confirm 6.25 on average, with a deviation of 2.5.
    """
    changes = offered(*({f"SETTING_{index}": "1"} for index in range(6)))
    outcomes = [
        search(SimulatedBench(lambda _: 20, noise=0.1, drift=0.002, seed=seed), changes, budget=3600.0)
        for seed in range(200)
    ]
    trials = [trial for outcome in outcomes for trial in outcome.trials]
    assert len(trials) >= 200 * 6
    adopted = sum(trial.verdict == "adopted" for trial in trials)
    written = sum(bool(outcome.best) for outcome in outcomes)
    assert adopted <= 2 * TAIL * len(trials)
    assert written <= 200 * TAIL + 2 * 2.5


def test_clearly_worse_change_is_dropped_after_one_pair() -> None:
    bench = SimulatedBench(lambda values: 10 if values else 20)
    (trial,) = search(bench, offered({"THREADS": "1"})).trials
    assert trial.verdict == "worse"
    assert trial.gain is not None
    assert trial.gain.pairs == 1
    assert bench.starts == [{}, {"THREADS": "1"}]


def test_very_slow_block_is_ended() -> None:
    bench = SimulatedBench(lambda values: 0.01 if values else 20)
    (trial,) = search(bench, offered({"THREADS": "1"})).trials
    assert trial.verdict == "worse"
    assert bench.now < 60


def test_failed_and_refused_changes_are_verdicts() -> None:
    def speed(values: Values) -> float:
        if values.get("DTYPE") == "int8":
            raise TrialFailed("the worker died")
        return 30 if values.get("WORKERS") == "2" else 20

    def changes(_: Values) -> list[Change]:
        return [Change({"DTYPE": "int8"}), Change({"DTYPE": "fp8"}, refused="no GPU"), Change({"WORKERS": "2"})]

    outcome = search(SimulatedBench(speed), changes)
    assert [(trial.verdict, trial.reason) for trial in outcome.trials] == [
        ("failed", "the worker died"),
        ("not tried", "no GPU"),
        ("adopted", ""),
    ]
    assert outcome.best == {"WORKERS": "2"}


def test_gain_that_fresh_servers_do_not_show_is_not_written() -> None:
    bench = SimulatedBench(lambda values: 30 if values and len(bench.starts) < 3 else 20)
    outcome = search(bench, offered({"WORKERS": "2"}))
    assert verdicts(outcome) == [({"WORKERS": "2"}, "adopted")]
    assert [(check.against, check.holds) for check in outcome.checks] == [("before", False)]
    assert outcome.best == {}
    assert not outcome.confirmed


def test_settings_before_that_are_slower_than_the_defaults_together_are_replaced_by_them() -> None:
    """Each default alone gains nothing; both together do."""
    before = {"A": "1", "B": "1"}
    bench = SimulatedBench(lambda values: 20 if values else 30)
    outcome = search(bench, offered(), before=before)
    assert [verdict for _, verdict in verdicts(outcome)] == ["no gain beyond noise"] * 2
    assert [(check.against, check.holds) for check in outcome.checks] == [("defaults", False)]
    assert outcome.best == {}


def test_settings_before_that_beat_the_defaults_stay() -> None:
    bench = SimulatedBench(lambda values: 30 if values.get("A") == "1" else 20)
    outcome = search(bench, offered({"B": "1"}), before={"A": "1"})
    assert outcome.best == {"A": "1"}
    assert outcome.confirmed


def test_latency_is_an_objective() -> None:
    bench = SimulatedBench(lambda values: 30 if values else 20)
    outcome = search(bench, offered({"WORKERS": "2"}), objective="latency")
    assert outcome.best == {"WORKERS": "2"}
    assert outcome.checks[0].gain.mean == pytest.approx(0.5)


# Its end.


@pytest.mark.parametrize("budget", [30.0, 60.0, 90.0, 150.0, 200.0, 400.0, 1200.0])
@pytest.mark.parametrize("seed", range(5))
def test_budget_is_kept(budget: float, seed: int) -> None:
    def speed(values: Values) -> float:
        return 20 * (1 + 0.2 * len(values)) if "SLOW" not in values else 2

    bench = SimulatedBench(speed, noise=0.1, seed=seed)
    changes = offered({"SLOW": "1"}, *({f"SETTING_{index}": "1"} for index in range(20)))
    outcome = search(bench, changes, budget=budget)
    assert bench.now <= budget
    assert outcome.best == {} or all(check.holds for check in outcome.checks)


def test_time_for_the_fresh_run_is_kept() -> None:
    """Something is adopted, then the budget has no room for further changes: it is confirmed nevertheless."""
    bench = SimulatedBench(lambda values: 30 if "SETTING_0" in values else 20)
    outcome = search(bench, offered(*({f"SETTING_{index}": "1"} for index in range(20))), budget=250.0)
    assert outcome.ended == "the budget had no room for further changes"
    assert outcome.best == {"SETTING_0": "1"}
    assert outcome.confirmed
    assert bench.now <= 250.0


@pytest.mark.parametrize("moment", [20.0, 40.0, 120.0, 200.0])
def test_interruption_keeps_what_was_found(moment: float) -> None:
    class Interrupted(SimulatedBench):
        def block(self, values: Values, number: int, *, start_s: float, block_s: float) -> Sample:
            if self.now > moment:
                raise KeyboardInterrupt
            return super().block(values, number, start_s=start_s, block_s=block_s)

    bench = Interrupted(lambda values: 30 if "A" in values else 20)
    outcome = search(bench, offered({"A": "1"}, *({f"SETTING_{index}": "1"} for index in range(20))))
    assert outcome.ended == "interrupted"
    assert outcome.best == ({"A": "1"} if ({"A": "1"}, "adopted") in verdicts(outcome) else {})
    assert not outcome.confirmed
    assert bool(outcome.best) == (moment > 100)


def test_settings_in_force_that_fail_are_an_error() -> None:
    def speed(_: Values) -> float:
        raise TrialFailed("no checkpoint")

    with pytest.raises(TuneError, match="the settings in force cannot be measured: no checkpoint"):
        search(SimulatedBench(speed), offered({"A": "1"}))


def test_best_settings_that_fail_later_end_the_search_with_the_settings_before() -> None:
    def speed(values: Values) -> float:
        if values and bench.now > 100:
            raise TrialFailed("the worker died")
        return 30 if values else 20

    bench = SimulatedBench(speed)
    outcome = search(bench, offered({"A": "1"}, {"B": "1"}))
    assert "the worker died" in outcome.ended
    assert outcome.best == {}
