"""Who has a place to run in the FLUX engine, and how many requests it asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from genserve_backend.flux.admission import AGING_S, Intake, arrange, level_now


@dataclass(eq=False)
class Candidate:
    name: str = ""
    level: int = 2
    waited_s: float = 0.0
    has_started: bool = False
    arrived: float = 0.0
    cost: int = 1
    steps_left: int = 10
    has_place: bool = False


def started(name: str, *, level: int = 2, arrived: float = 0.0, waited_s: float = 0.0, cost: int = 1) -> Candidate:
    return Candidate(name, level, waited_s, True, arrived, cost, has_place=True)


def paused(name: str, *, level: int = 2, arrived: float = 0.0, waited_s: float = 0.0, cost: int = 1) -> Candidate:
    return Candidate(name, level, waited_s, True, arrived, cost)


def newcomer(name: str, *, level: int = 2, arrived: float = 0.0, waited_s: float = 0.0, cost: int = 1) -> Candidate:
    return Candidate(name, level, waited_s, False, arrived, cost)


def names(images: Sequence[Candidate]) -> str:
    return "".join(image.name for image in images)


def arranged(*images: Candidate, max_running: int = 100, max_tokens: int = 100) -> tuple[str, str]:
    running, waiting = arrange(images, max_running=max_running, max_tokens=max_tokens)
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
def test_waiting_makes_an_image_more_urgent(level: int, waited_s: float, expected: int) -> None:
    assert level_now(Candidate(level=level, waited_s=waited_s)) == expected


def test_nobody_is_there() -> None:
    assert arranged() == ("", "")


def test_the_order_is_by_level_then_started_then_arrival() -> None:
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
    assert arranged(*images) == ("abcdefgh", "")
    assert arranged(*images, max_running=4) == ("abcd", "efgh")


@pytest.mark.parametrize(("max_running", "expected"), [(1, ("a", "bc")), (2, ("ab", "c")), (3, ("abc", ""))])
def test_the_places_are_limited(max_running: int, expected: tuple[str, str]) -> None:
    images = [newcomer(name, arrived=index) for index, name in enumerate("abc")]
    assert arranged(*images, max_running=max_running) == expected


@pytest.mark.parametrize(("max_tokens", "expected"), [(9, ("a", "bc")), (10, ("ab", "c")), (14, ("ab", "c"))])
def test_the_tokens_are_limited(max_tokens: int, expected: tuple[str, str]) -> None:
    images = [newcomer(name, arrived=index, cost=5) for index, name in enumerate("abc")]
    assert arranged(*images, max_tokens=max_tokens) == expected


def test_an_image_that_is_too_large_runs_alone() -> None:
    large, small = newcomer("L", cost=101), newcomer("s", arrived=1)
    assert arranged(large, small) == ("L", "s")
    assert arranged(started("L", cost=101), small) == ("L", "s")
    assert arranged(newcomer("L", cost=101, arrived=2), small) == ("s", "L")


def test_a_newcomer_that_does_not_fit_is_not_overtaken_by_later_ones() -> None:
    running, large, small = started("r", cost=60), newcomer("L", arrived=1, cost=50), newcomer("s", arrived=2)
    assert arranged(running, large, small) == ("r", "Ls")


def test_a_paused_image_that_does_not_fit_is_overtaken_by_urgent_ones_only() -> None:
    images = [started("u", level=1, cost=60), paused("P", cost=50)]
    assert arranged(*images, newcomer("s", arrived=2)) == ("u", "Ps")
    assert arranged(*images, newcomer("s", level=1, arrived=2)) == ("us", "P")


def test_a_newcomer_that_does_not_fit_keeps_no_started_one_from_running() -> None:
    urgent, large = started("u", level=1, cost=60), newcomer("L", level=1, arrived=1, cost=50)
    assert arranged(urgent, large, started("s", level=2, cost=40)) == ("us", "L")


def test_an_urgent_newcomer_takes_the_place_of_the_least_urgent() -> None:
    images = [started("a", level=2, arrived=0), started("b", level=3, arrived=1), started("c", level=2, arrived=2)]
    assert arranged(*images, newcomer("n", level=1, arrived=3), max_running=3) == ("nac", "b")


def test_of_the_least_urgent_the_last_to_come_loses_its_place() -> None:
    images = [started("a", arrived=0), started("c", arrived=2), started("b", arrived=1)]
    assert arranged(*images, newcomer("n", level=1, arrived=3), max_running=3) == ("nab", "c")


def test_an_urgent_newcomer_takes_as_many_places_as_it_needs() -> None:
    images = [started(name, arrived=index, cost=30) for index, name in enumerate("abc")]
    assert arranged(*images, newcomer("n", level=1, cost=60)) == ("na", "bc")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_equal_urgency_takes_nobodys_place(level: int) -> None:
    running = [started(name, level=level, arrived=5) for name in "ab"]
    assert arranged(newcomer("n", level=level, arrived=0), *running, max_running=2) == ("ab", "n")


@pytest.mark.parametrize("has_started", [True, False], ids=["paused", "newcomer"])
def test_waiting_alone_takes_nobodys_place(has_started: bool) -> None:
    running = started("r", level=2, arrived=1)
    patient = Candidate("p", 2, 5 * AGING_S, has_started)
    assert arranged(running, patient, max_running=1) == ("r", "p")
    running.has_place = running.has_started = False
    assert arranged(running, patient, max_running=1) == ("p", "r")


def test_an_aged_newcomer_counts_as_urgent() -> None:
    patient, urgent = newcomer("p", level=3, waited_s=2 * AGING_S, arrived=0), newcomer("u", level=1, arrived=30)
    assert arranged(urgent, patient, max_running=1) == ("p", "u")


def test_a_paused_image_gets_its_place_back_and_keeps_it() -> None:
    patient = paused("p", level=3, arrived=0, waited_s=2 * AGING_S - 0.1)
    urgent = [newcomer("u", level=1, arrived=20), newcomer("v", level=1, arrived=21)]
    assert arranged(patient, *urgent, max_running=1) == ("u", "vp")
    patient.waited_s += 0.2
    assert arranged(patient, *urgent, max_running=1) == ("p", "uv")
    patient.has_place = True
    later = newcomer("w", level=1, arrived=99, waited_s=99.0)
    assert arranged(patient, *urgent, later, max_running=1)[0] == "p"


@pytest.mark.parametrize("seed", range(8))
def test_the_limits_hold_and_nobody_starves(seed: int) -> None:
    draw = random.Random(seed)
    max_running, max_tokens, held, most_steps = draw.randint(1, 5), draw.randint(4, 12), draw.randint(6, 12), 8
    # Until it counts as urgent, while all others are finished one by one, and some more.
    patience = int(2 * AGING_S) + held * most_steps * 2
    images: list[Candidate] = []
    for second in range(1_500):
        while len(images) < held and draw.random() < 0.7:
            level = draw.choice([1, 1, 1, 1, 2, 3])
            cost, steps = draw.randint(1, max_tokens + 2), draw.randint(1, most_steps)
            images.append(Candidate(level=level, arrived=second + draw.random(), cost=cost, steps_left=steps))
        draw.shuffle(images)
        running, waiting = arrange(images, max_running=max_running, max_tokens=max_tokens)
        assert sorted(map(id, running + waiting)) == sorted(map(id, images))
        assert (len(running) > 0) == (len(images) > 0)
        assert len(running) <= max_running
        assert sum(image.cost for image in running) <= max_tokens or len(running) == 1
        for image in running:
            image.has_started = image.has_place = True
            image.steps_left -= 1
        for image in waiting:
            image.has_place = False
            image.waited_s += 1
        images = [image for image in images if image.steps_left]
        assert all(second - image.arrived < patience for image in images)


def intake(*, max_running: int = 4, max_tokens: int = 1_000, max_waiting: int = 0, usual_cost: int = 10) -> Intake:
    return Intake(max_running=max_running, max_tokens=max_tokens, max_waiting=max_waiting, usual_cost=usual_cost)


def running(count: int, *, cost: int = 10, steps_left: int = 20) -> list[Candidate]:
    return [Candidate(has_started=True, cost=cost, steps_left=steps_left) for _ in range(count)]


def come(entry: Intake, count: int) -> None:
    for _ in range(count):
        entry.came()


@pytest.mark.parametrize(
    ("max_running", "max_tokens", "expected"),
    [(4, 1_000, 4), (4, 40, 4), (4, 39, 3), (4, 10, 1), (4, 9, 1), (1, 1_000, 1)],
    ids=["places", "tokens-for-all", "fewer-tokens", "tokens-for-one", "tokens-for-none", "one-place"],
)
def test_an_idle_engine_asks_once_for_all_its_places(max_running: int, max_tokens: int, expected: int) -> None:
    entry = intake(max_running=max_running, max_tokens=max_tokens, max_waiting=4)
    assert entry.ask([], [], tick=0) == expected
    assert [entry.ask([], [], tick=0) for _ in range(5)] == [0] * 5


def test_requests_on_their_way_are_counted() -> None:
    entry = intake()
    assert entry.ask([], [], tick=0) == 4
    come(entry, 2)
    assert entry.ask(running(2), [], tick=1) == 0
    come(entry, 2)
    assert entry.ask(running(4), [], tick=2) == 0
    assert entry.ask(running(1), [], tick=3) == 3


def test_an_image_without_a_place_is_counted() -> None:
    entry = intake()
    assert entry.ask(running(2), running(1), tick=0) == 1
    assert intake().ask(running(2), running(2), tick=0) == 0


@pytest.mark.parametrize(("cost", "expected"), [(10, 6), (33, 1), (34, 0), (12, 6), (13, 5)])
def test_what_runs_tells_how_large_the_next_will_be(cost: int, expected: int) -> None:
    assert intake(max_running=8, max_tokens=100, usual_cost=1).ask(running(2, cost=cost), [], tick=0) == expected


def test_without_a_waiting_room_a_full_engine_asks_for_nothing() -> None:
    entry = intake()
    come(entry, entry.ask([], [], tick=0))
    assert not any(entry.ask(running(4, steps_left=1), [], tick=tick) for tick in range(100))


@pytest.mark.parametrize("they_come", [True, False], ids=["they-come", "they-do-not-come"])
@pytest.mark.parametrize("max_waiting", [1, 4, 9])
def test_a_full_engine_asks_for_more_one_by_one_until_the_next_is_finished(max_waiting: int, they_come: bool) -> None:
    entry = intake(max_waiting=max_waiting)
    come(entry, entry.ask([], [], tick=0))
    steps, waiting, asked_at = 20, 0, [0]
    for tick in range(1, steps):
        count = entry.ask(running(4, steps_left=steps - tick), running(waiting), tick=tick)
        assert count <= 1
        if count:
            asked_at.append(tick)
        if count and they_come:
            entry.came()
            waiting += 1
    assert len(asked_at) == 1 + max_waiting
    gaps = [later - sooner for sooner, later in zip(asked_at, [*asked_at[1:], steps], strict=True)]
    even = steps / (max_waiting + 1)
    assert even / 2 <= min(gaps) <= max(gaps) <= even * 2


def test_the_waiting_room_is_never_overfilled() -> None:
    entry = intake(max_waiting=4)
    come(entry, entry.ask([], [], tick=0))
    assert sum(entry.ask(running(4, steps_left=1), [], tick=tick) for tick in range(100)) == 4
    come(entry, 4)
    assert not any(entry.ask(running(4, steps_left=1), running(4), tick=tick) for tick in range(100, 200))


@pytest.mark.parametrize(("unasked", "free"), [(1, 3), (3, 1), (4, 0), (6, 0)])
def test_requests_that_come_unasked_take_places_and_are_owed(unasked: int, free: int) -> None:
    entry = intake()
    come(entry, unasked)
    balance = -unasked + entry.ask(running(min(unasked, 4)), running(max(0, unasked - 4)), tick=0)
    assert max(0, balance) == free
    come(entry, free)
    balance += entry.ask(running(4), [], tick=1) - free
    balance += entry.ask(running(3), [], tick=2)
    assert balance == 1
    assert entry.ask(running(3), [], tick=3) == 0


@pytest.mark.parametrize("seed", range(8))
def test_places_stay_taken_and_nobody_is_asked_for_in_vain(seed: int) -> None:
    draw = random.Random(seed)
    max_running, max_waiting = draw.randint(1, 6), draw.randint(0, 4)
    entry = intake(max_running=max_running, max_waiting=max_waiting)
    images: list[Candidate] = []
    places: list[Candidate] = []
    waiting: list[Candidate] = []
    coming = 0
    for tick in range(500):
        coming += entry.ask(places, waiting, tick=tick)
        assert len(images) + coming <= max_running + max_waiting
        assert len(images) + coming >= max_running
        arrivals = coming if draw.random() < 0.3 else draw.randint(0, coming)
        coming -= arrivals
        for _ in range(arrivals):
            entry.came()
            images.append(Candidate(level=draw.randint(1, 3), arrived=tick, steps_left=draw.randint(1, 9)))
        places, waiting = arrange(images, max_running=max_running, max_tokens=1_000)
        for image in images:
            image.has_place = image in places
        for image in places:
            image.has_started = True
            image.steps_left -= 1
        images, places = ([image for image in group if image.steps_left] for group in (images, places))
