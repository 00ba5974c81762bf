"""Admission in the FLUX engine: slots, preemption and grants."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from genserve_backend.flux.admission import Intake
from genserve_backend.flux.policy.base import Limits
from genserve_backend.flux.policy.slots import current_level
from genserve_backend.flux.policy.urgency import Urgency
from genserve_backend.worker.scheduling import AGING_S


@dataclass(eq=False)
class Candidate:
    name: str = ""
    level: int = 2
    waited_s: float = 0.0
    has_started: bool = False
    arrived: float = 0.0
    cost: int = 1
    steps_left: int = 10
    has_slot: bool = False


def started(name: str, *, level: int = 2, arrived: float = 0.0, waited_s: float = 0.0, cost: int = 1) -> Candidate:
    return Candidate(name, level, waited_s, True, arrived, cost, has_slot=True)


def preempted(name: str, *, level: int = 2, arrived: float = 0.0, waited_s: float = 0.0, cost: int = 1) -> Candidate:
    return Candidate(name, level, waited_s, True, arrived, cost)


def newcomer(name: str, *, level: int = 2, arrived: float = 0.0, waited_s: float = 0.0, cost: int = 1) -> Candidate:
    return Candidate(name, level, waited_s, False, arrived, cost)


def names(images: Sequence[Candidate]) -> str:
    return "".join(image.name for image in images)


def assign_slots(
    images: Sequence[Candidate], *, max_running: int, max_tokens: int
) -> tuple[list[Candidate], list[Candidate]]:
    limits = Limits(max_running=max_running, max_tokens=max_tokens, max_padding=0.0)
    return Urgency(limits).assign(images, now=0.0)


def assigned(*images: Candidate, max_running: int = 100, max_tokens: int = 100) -> tuple[str, str]:
    running, waiting = assign_slots(images, max_running=max_running, max_tokens=max_tokens)
    return names(running), names(waiting)


@pytest.mark.parametrize(
    ("level", "waited_s", "expected"),
    [
        (3, 0.0, 3),
        (3, AGING_S - 0.01, 3),
        (3, AGING_S, 2),
        (3, 2 * AGING_S, 1),
        (2, AGING_S, 1),
        (3, 100 * AGING_S, 1),
        (1, 0.0, 1),
        (1, 100 * AGING_S, 1),
    ],
)
def test_waiting_raises_the_level(level: int, waited_s: float, expected: int) -> None:
    assert current_level(Candidate(level=level, waited_s=waited_s)) == expected


def test_no_images_need_no_slots() -> None:
    assert assigned() == ("", "")


def test_order_is_level_then_started_then_arrival() -> None:
    images = [
        newcomer("h", level=3, arrived=0),
        started("g", level=3, arrived=9),
        newcomer("f", arrived=4),
        newcomer("e", arrived=3),
        started("d", arrived=8),
        started("c", arrived=7),
        newcomer("b", level=1, arrived=10),
        started("a", level=1, arrived=11),
    ]
    assert assigned(*images) == ("abcdefgh", "")
    assert assigned(*images, max_running=4) == ("abcd", "efgh")


@pytest.mark.parametrize(("max_running", "expected"), [(1, ("a", "bc")), (2, ("ab", "c")), (3, ("abc", ""))])
def test_slots_are_limited(max_running: int, expected: tuple[str, str]) -> None:
    images = [newcomer(name, arrived=index) for index, name in enumerate("abc")]
    assert assigned(*images, max_running=max_running) == expected


@pytest.mark.parametrize(("max_tokens", "expected"), [(9, ("a", "bc")), (10, ("ab", "c")), (14, ("ab", "c"))])
def test_tokens_are_limited(max_tokens: int, expected: tuple[str, str]) -> None:
    images = [newcomer(name, arrived=index, cost=5) for index, name in enumerate("abc")]
    assert assigned(*images, max_tokens=max_tokens) == expected


def test_oversized_image_runs_alone() -> None:
    large, small = newcomer("L", cost=101), newcomer("s", arrived=1)
    assert assigned(large, small) == ("L", "s")
    assert assigned(started("L", cost=101), small) == ("L", "s")
    assert assigned(newcomer("L", cost=101, arrived=2), small) == ("s", "L")


def test_newcomer_that_does_not_fit_blocks_later_ones() -> None:
    running, large, small = started("r", cost=60), newcomer("L", arrived=1, cost=50), newcomer("s", arrived=2)
    assert assigned(running, large, small) == ("r", "Ls")


def test_only_urgent_images_overtake_a_preempted_one_that_does_not_fit() -> None:
    images = [started("u", level=1, cost=60), preempted("P", cost=50)]
    assert assigned(*images, newcomer("s", arrived=2)) == ("u", "Ps")
    assert assigned(*images, newcomer("s", level=1, arrived=2)) == ("us", "P")


def test_newcomer_that_does_not_fit_does_not_stop_running_images() -> None:
    urgent, large = started("u", level=1, cost=60), newcomer("L", level=1, arrived=1, cost=50)
    assert assigned(urgent, large, started("s", level=2, cost=40)) == ("us", "L")


def test_urgent_newcomer_preempts_the_least_urgent_image() -> None:
    images = [started("a", level=2, arrived=0), started("b", level=3, arrived=1), started("c", level=2, arrived=2)]
    assert assigned(*images, newcomer("n", level=1, arrived=3), max_running=3) == ("nac", "b")


def test_latest_of_the_least_urgent_images_is_preempted() -> None:
    images = [started("a", arrived=0), started("c", arrived=2), started("b", arrived=1)]
    assert assigned(*images, newcomer("n", level=1, arrived=3), max_running=3) == ("nab", "c")


def test_urgent_newcomer_preempts_as_many_images_as_it_needs() -> None:
    images = [started(name, arrived=index, cost=30) for index, name in enumerate("abc")]
    assert assigned(*images, newcomer("n", level=1, cost=60)) == ("na", "bc")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_equal_level_does_not_preempt(level: int) -> None:
    running = [started(name, level=level, arrived=5) for name in "ab"]
    assert assigned(newcomer("n", level=level, arrived=0), *running, max_running=2) == ("ab", "n")


@pytest.mark.parametrize("has_started", [True, False], ids=["preempted", "newcomer"])
def test_aging_does_not_preempt(has_started: bool) -> None:
    running = started("r", level=2, arrived=1)
    patient = Candidate("p", 2, 5 * AGING_S, has_started)
    assert assigned(running, patient, max_running=1) == ("r", "p")
    running.has_slot = running.has_started = False
    assert assigned(running, patient, max_running=1) == ("p", "r")


def test_aged_newcomer_counts_as_urgent() -> None:
    patient, urgent = newcomer("p", level=3, waited_s=2 * AGING_S, arrived=0), newcomer("u", level=1, arrived=30)
    assert assigned(urgent, patient, max_running=1) == ("p", "u")


def test_preempted_image_gets_its_slot_back_and_keeps_it() -> None:
    patient = preempted("p", level=3, arrived=0, waited_s=2 * AGING_S - 0.1)
    urgent = [newcomer("u", level=1, arrived=20), newcomer("v", level=1, arrived=21)]
    assert assigned(patient, *urgent, max_running=1) == ("u", "vp")
    patient.waited_s += 0.2
    assert assigned(patient, *urgent, max_running=1) == ("p", "uv")
    patient.has_slot = True
    later = newcomer("w", level=1, arrived=99, waited_s=99.0)
    assert assigned(patient, *urgent, later, max_running=1)[0] == "p"


@pytest.mark.parametrize("seed", range(8))
def test_limits_hold_and_no_image_starves(seed: int) -> None:
    draw = random.Random(seed)
    max_running, max_tokens, held, most_steps = draw.randint(1, 5), draw.randint(4, 12), draw.randint(6, 12), 8
    # Aging to the most urgent level, then the completion of all other images one by one, with a margin.
    patience = int(2 * AGING_S) + held * most_steps * 2
    images: list[Candidate] = []
    for second in range(1_500):
        while len(images) < held and draw.random() < 0.7:
            level = draw.choice([1, 1, 1, 1, 2, 3])
            cost, steps = draw.randint(1, max_tokens + 2), draw.randint(1, most_steps)
            images.append(Candidate(level=level, arrived=second + draw.random(), cost=cost, steps_left=steps))
        draw.shuffle(images)
        running, waiting = assign_slots(images, max_running=max_running, max_tokens=max_tokens)
        assert sorted(map(id, running + waiting)) == sorted(map(id, images))
        assert (len(running) > 0) == (len(images) > 0)
        assert len(running) <= max_running
        assert sum(image.cost for image in running) <= max_tokens or len(running) == 1
        for image in running:
            image.has_started = image.has_slot = True
            image.steps_left -= 1
        for image in waiting:
            image.has_slot = False
            image.waited_s += 1
        images = [image for image in images if image.steps_left]
        assert all(second - image.arrived < patience for image in images)


def intake(*, max_running: int = 4, max_tokens: int = 1_000, max_waiting: int = 0, usual_cost: int = 10) -> Intake:
    return Intake(max_running=max_running, max_tokens=max_tokens, max_waiting=max_waiting, usual_cost=usual_cost)


def running(count: int, *, cost: int = 10, steps_left: int = 20) -> list[Candidate]:
    return [Candidate(has_started=True, cost=cost, steps_left=steps_left) for _ in range(count)]


def arrive(entry: Intake, count: int) -> None:
    for _ in range(count):
        entry.arrived()


@pytest.mark.parametrize(
    ("max_running", "max_tokens", "expected"),
    [(4, 1_000, 4), (4, 40, 4), (4, 39, 3), (4, 10, 1), (4, 9, 1), (1, 1_000, 1)],
    ids=["slots", "tokens-for-all", "fewer-tokens", "tokens-for-one", "tokens-for-none", "one-slot"],
)
def test_idle_engine_grants_all_its_slots_once(max_running: int, max_tokens: int, expected: int) -> None:
    entry = intake(max_running=max_running, max_tokens=max_tokens, max_waiting=4)
    assert entry.grant([], [], tick=0) == expected
    assert [entry.grant([], [], tick=0) for _ in range(5)] == [0] * 5


def test_outstanding_grants_are_counted() -> None:
    entry = intake()
    assert entry.grant([], [], tick=0) == 4
    arrive(entry, 2)
    assert entry.grant(running(2), [], tick=1) == 0
    arrive(entry, 2)
    assert entry.grant(running(4), [], tick=2) == 0
    assert entry.grant(running(1), [], tick=3) == 3


def test_waiting_images_are_counted() -> None:
    entry = intake()
    assert entry.grant(running(2), running(1), tick=0) == 1
    assert intake().grant(running(2), running(2), tick=0) == 0


@pytest.mark.parametrize(("cost", "expected"), [(10, 6), (33, 1), (34, 0), (12, 6), (13, 5)])
def test_running_images_predict_the_size_of_the_next(cost: int, expected: int) -> None:
    assert intake(max_running=8, max_tokens=100, usual_cost=1).grant(running(2, cost=cost), [], tick=0) == expected


def test_full_engine_without_backlog_grants_nothing() -> None:
    entry = intake()
    arrive(entry, entry.grant([], [], tick=0))
    assert not any(entry.grant(running(4, steps_left=1), [], tick=tick) for tick in range(100))


@pytest.mark.parametrize("they_arrive", [True, False], ids=["they-arrive", "they-do-not-arrive"])
@pytest.mark.parametrize("max_waiting", [1, 4, 9])
def test_full_engine_spreads_its_grants_until_the_next_image_is_finished(max_waiting: int, they_arrive: bool) -> None:
    entry = intake(max_waiting=max_waiting)
    arrive(entry, entry.grant([], [], tick=0))
    steps, waiting, granted_at = 20, 0, [0]
    for tick in range(1, steps):
        count = entry.grant(running(4, steps_left=steps - tick), running(waiting), tick=tick)
        assert count <= 1
        if count:
            granted_at.append(tick)
        if count and they_arrive:
            entry.arrived()
            waiting += 1
    assert len(granted_at) == 1 + max_waiting
    gaps = [later - sooner for sooner, later in zip(granted_at, [*granted_at[1:], steps], strict=True)]
    even = steps / (max_waiting + 1)
    assert even / 2 <= min(gaps) <= max(gaps) <= even * 2


def test_backlog_is_limited() -> None:
    entry = intake(max_waiting=4)
    arrive(entry, entry.grant([], [], tick=0))
    assert sum(entry.grant(running(4, steps_left=1), [], tick=tick) for tick in range(100)) == 4
    arrive(entry, 4)
    assert not any(entry.grant(running(4, steps_left=1), running(4), tick=tick) for tick in range(100, 200))


@pytest.mark.parametrize(("ungranted", "free"), [(1, 3), (3, 1), (4, 0), (6, 0)])
def test_arrivals_without_a_grant_use_up_later_grants(ungranted: int, free: int) -> None:
    entry = intake()
    arrive(entry, ungranted)
    balance = -ungranted + entry.grant(running(min(ungranted, 4)), running(max(0, ungranted - 4)), tick=0)
    assert max(0, balance) == free
    arrive(entry, free)
    balance += entry.grant(running(4), [], tick=1) - free
    balance += entry.grant(running(3), [], tick=2)
    assert balance == 1
    assert entry.grant(running(3), [], tick=3) == 0


@pytest.mark.parametrize("seed", range(8))
def test_slots_stay_filled_and_grants_stay_limited(seed: int) -> None:
    draw = random.Random(seed)
    max_running, max_waiting = draw.randint(1, 6), draw.randint(0, 4)
    entry = intake(max_running=max_running, max_waiting=max_waiting)
    images: list[Candidate] = []
    slots: list[Candidate] = []
    waiting: list[Candidate] = []
    coming = 0
    for tick in range(500):
        coming += entry.grant(slots, waiting, tick=tick)
        assert len(images) + coming <= max_running + max_waiting
        assert len(images) + coming >= max_running
        arrivals = coming if draw.random() < 0.3 else draw.randint(0, coming)
        coming -= arrivals
        for _ in range(arrivals):
            entry.arrived()
            images.append(Candidate(level=draw.randint(1, 3), arrived=tick, steps_left=draw.randint(1, 9)))
        slots, waiting = assign_slots(images, max_running=max_running, max_tokens=1_000)
        for image in images:
            image.has_slot = image in slots
        for image in slots:
            image.has_started = True
            image.steps_left -= 1
        images, slots = ([image for image in group if image.steps_left] for group in (images, slots))
