"""Batching of FLUX images: which share a forward, and which take turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from genserve_backend.flux.policy.base import Limits
from genserve_backend.flux.policy.batches import TURNS
from genserve_backend.flux.policy.urgency import Urgency


@dataclass(eq=False)
class Runner:
    name: str
    tokens: int
    level: int = 2
    batch_rows: int = 1
    ran_at: int = 0
    ran: list[int] = field(default_factory=list)


def choose(running: Sequence[Runner], *, tick: int, max_tokens: int, max_padding: float) -> list[Runner]:
    policy = Urgency(Limits(max_running=100, max_tokens=max_tokens, max_padding=max_padding))
    return policy.choose(running, [], tick=tick, now=0.0, max_tokens=max_tokens)


def chosen(*running: Runner, tick: int = 1, max_tokens: int = 1_000, max_padding: float = 0.0) -> str:
    return "".join(r.name for r in choose(running, tick=tick, max_tokens=max_tokens, max_padding=max_padding))


def run(
    *running: Runner, ticks: int, max_tokens: int = 1_000, max_padding: float = 0.0, first_tick: int = 0
) -> list[str]:
    """Return the names of the images of each tick, with ticks counted like in the engine."""
    batches = []
    for tick in range(first_tick, first_tick + ticks):
        batch = choose(running, tick=tick, max_tokens=max_tokens, max_padding=max_padding)
        batches.append("".join(runner.name for runner in batch))
        for runner in batch:
            runner.ran_at = tick + 1
            runner.ran.append(tick)
    return batches


def longest_wait(runner: Runner, ticks: int) -> int:
    marks = [-1, *runner.ran, ticks]
    return max(later - sooner for sooner, later in pairwise(marks))


def test_images_of_one_size_share_a_forward() -> None:
    assert chosen(*(Runner(name, 64) for name in "abcd")) == "abcd"


def test_levels_and_turns_do_not_split_images_of_one_size() -> None:
    images = [Runner("a", 64, level=3, ran_at=5), Runner("b", 64, level=1), Runner("c", 64, ran_at=9)]
    assert chosen(*images, tick=9) == "abc"


def test_batch_keeps_the_order_of_the_slots() -> None:
    images = [Runner("a", 80, ran_at=3), Runner("b", 64, ran_at=1), Runner("c", 96, ran_at=4), Runner("d", 64)]
    for slots in (images, images[::-1], images[2:] + images[:2]):
        expected = "".join(image.name for image in slots)
        assert chosen(*slots, tick=5, max_padding=1.0) == expected


def test_without_padding_sizes_take_turns() -> None:
    images = [Runner("a", 64), Runner("b", 128), Runner("c", 64), Runner("d", 32)]
    batches = run(*images, ticks=9)
    assert all(sorted(batches[first : first + 3]) == ["ac", "b", "d"] for first in (0, 3, 6))


@pytest.mark.parametrize("seed", range(8))
def test_no_size_starves(seed: int) -> None:
    draw = random.Random(seed)
    images = [Runner("x", draw.randint(1, 50), level=draw.randint(1, 3)) for _ in range(draw.randint(2, 30))]
    run(*images, ticks=1_000, max_tokens=60, max_padding=draw.choice([0.0, 0.1]))
    for image in images:
        turns_of_others = len(images) * TURNS[1] // TURNS[image.level]
        assert longest_wait(image, 1_000) <= turns_of_others + len(images)


def test_late_image_gets_a_turn_soon() -> None:
    old = [Runner("a", 64), Runner("b", 128)]
    run(*old, ticks=100)
    late = Runner("n", 32, ran_at=100)
    assert any("n" in batch for batch in run(*old, late, ticks=3, first_tick=100))


def test_levels_share_the_turns() -> None:
    images = [Runner(str(level), 10 * level + number, level=level) for level in TURNS for number in range(6)]
    batches = run(*images, ticks=4_200)
    shares = {level: batches.count(str(level)) for level in TURNS}
    assert {level: shares[level] / shares[3] for level in TURNS} == pytest.approx(TURNS, rel=0.1)


@pytest.mark.parametrize("levels", [(1, 2), (1, 3), (2, 3), (1, 3, 3), (1, 1, 3), (1, 2, 3), (2, 2, 3, 3)], ids=str)
def test_urgent_images_never_get_fewer_turns(levels: tuple[int, ...]) -> None:
    images = [Runner(str(level), size, level=level) for size, level in enumerate(levels, start=1)]
    run(*images, ticks=700)
    turns = [len(image.ran) for image in images]
    assert turns == pytest.approx(sorted(turns, reverse=True), abs=1)


@pytest.mark.parametrize(
    ("max_padding", "expected"),
    [(0.0, "a"), (0.25, "a"), (0.66, "a"), (0.67, "ab"), (5.6, "ab"), (5.7, "abc")],
)
def test_padding_is_limited(max_padding: float, expected: str) -> None:
    # 40 tokens of padding for the 60 of b, 85 for the 15 of c.
    images = [Runner("a", 100), Runner("b", 60), Runner("c", 15)]
    assert chosen(*images, max_padding=max_padding) == expected


def test_closest_sizes_are_padded_first() -> None:
    images = [Runner("a", 100), Runner("b", 60), Runner("c", 90), Runner("d", 70)]
    assert chosen(*images, max_tokens=200, max_padding=1.0) == "ac"
    assert chosen(*images, max_tokens=300, max_padding=1.0) == "acd"


def test_the_lead_may_be_the_smaller_one() -> None:
    images = [Runner("a", 100, ran_at=1), Runner("b", 90, ran_at=0)]
    assert chosen(*images, tick=1, max_padding=0.12) == "ab"
    assert chosen(*images, tick=1, max_padding=0.11) == "b"


def test_padding_limit_applies_to_every_pair() -> None:
    images = [Runner("a", 100, ran_at=0), Runner("b", 80, ran_at=1), Runner("c", 125, ran_at=1)]
    assert chosen(*images, tick=1, max_padding=0.25) == "ab"


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(1, "a"), (127, "a"), (128, "ab"), (191, "ab"), (192, "abc"), (256, "abcd")]
)
def test_tokens_are_limited(max_tokens: int, expected: str) -> None:
    assert chosen(*(Runner(name, 64) for name in "abcd"), max_tokens=max_tokens) == expected


def test_images_that_did_not_fit_are_next() -> None:
    batches = run(*(Runner(name, 64) for name in "abcde"), ticks=5, max_tokens=128)
    assert all(len(batch) == 2 for batch in batches)
    assert set("".join(batches[:3])) == set("abcde")


def test_padding_counts_as_tokens() -> None:
    images = [Runner("a", 100), Runner("b", 60)]
    assert chosen(*images, max_tokens=199, max_padding=1.0) == "a"
    assert chosen(*images, max_tokens=200, max_padding=1.0) == "ab"


def test_oversized_image_runs_alone_in_its_turn() -> None:
    batches = run(Runner("L", 500), Runner("a", 64), Runner("b", 64), ticks=6, max_tokens=128, max_padding=9.0)
    assert sorted(batches) == ["L"] * 3 + ["ab"] * 3


@pytest.mark.parametrize(("max_tokens", "expected"), [(2, "g"), (29, "g"), (30, "gp"), (49, "gp"), (50, "gph")])
def test_guided_image_counts_as_two_batch_rows(max_tokens: int, expected: str) -> None:
    images = [Runner("g", 10, batch_rows=2), Runner("p", 10), Runner("h", 10, batch_rows=2)]
    assert chosen(*images, max_tokens=max_tokens) == expected


def test_both_batch_rows_of_a_guided_image_are_padded() -> None:
    images = [Runner("a", 100), Runner("g", 90, batch_rows=2)]
    assert chosen(*images, max_tokens=299, max_padding=0.25) == "a"
    assert chosen(*images, max_tokens=300, max_padding=0.25) == "ag"


@pytest.mark.parametrize("seed", range(8))
def test_limits_hold_for_random_images(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        running = [
            Runner("x", draw.choice([16, 20, 25, 64, 100]), draw.randint(1, 3), draw.randint(1, 2), draw.randint(0, 20))
            for _ in range(draw.randint(1, 12))
        ]
        max_tokens, max_padding = draw.randint(10, 600), draw.choice([0.0, 0.1, 0.25, 2.0])
        batch = choose(running, tick=20, max_tokens=max_tokens, max_padding=max_padding)
        assert batch == [runner for runner in running if runner in batch]
        padded = max(runner.tokens for runner in batch) * sum(runner.batch_rows for runner in batch)
        shortest = min(runner.tokens for runner in batch)
        assert padded <= max_tokens or len(batch) == 1
        assert max(runner.tokens for runner in batch) <= shortest * (1 + max_padding)
