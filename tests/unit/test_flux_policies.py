"""Rules that hold for every policy, and the fixed orders."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_run import LinearCosts, PlainImage, limits, simulate

from genserve_backend.flux.policy import POLICIES
from genserve_backend.flux.policy.base import Policy
from genserve_backend.flux.policy.ordered import Ordered, first_come, least_work
from genserve_backend.flux.policy.slack import Slack
from genserve_backend.flux.policy.urgency import Urgency
from genserve_backend.settings import PolicyName

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
COSTS = LinearCosts(start_s=0.1, token_s=0.01, around_s=0.5)


@st.composite
def an_image(draw: st.DrawFn, *, own_deadlines: bool = True) -> PlainImage:
    steps = draw(st.integers(1, 30))
    image = PlainImage(
        steps=steps,
        tokens=draw(st.sampled_from([16, 20, 64, 100, 400])),
        batch_rows=draw(st.integers(1, 2)),
        level=draw(st.integers(1, 3)),
        arrived=draw(st.floats(0, 99)),
        within_s=draw(st.none() | st.floats(0, 300)) if own_deadlines else None,
        waited_s=draw(st.sampled_from([0.0, 9.9, 10.0, 25.0, 100.0])),
        ran_at=draw(st.integers(0, 50)),
    )
    image.has_started = draw(st.booleans())
    image.has_slot = image.has_started and draw(st.booleans())
    image.step = draw(st.integers(0, steps - 1)) if image.has_started else 0
    return image


some_images = st.lists(an_image(), min_size=1, max_size=20)
policies = pytest.mark.parametrize("name", POLICIES)


def test_every_setting_has_a_policy() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))


@policies
@EXAMPLES
@given(images=some_images, max_running=st.integers(1, 8), max_tokens=st.integers(16, 1_000))
def test_slots_and_tokens_are_limited(
    name: PolicyName, images: list[PlainImage], max_running: int, max_tokens: int
) -> None:
    policy = POLICIES[name](limits(max_running, max_tokens), COSTS)
    with_slot = [image for image in images if image.has_slot]
    while len(with_slot) > max_running or (len(with_slot) > 1 and sum(image.cost for image in with_slot) > max_tokens):
        with_slot.pop().has_slot = False
    running, waiting = policy.assign(images, 100.0)
    assert sorted(map(id, running + waiting)) == sorted(map(id, images))
    assert 1 <= len(running) <= max_running
    assert sum(image.cost for image in running) <= max_tokens or len(running) == 1


@policies
@EXAMPLES
@given(images=some_images, max_tokens=st.integers(0, 1_000), max_padding=st.sampled_from([0.0, 0.25, 2.0]))
def test_forwards_are_limited(name: PolicyName, images: list[PlainImage], max_tokens: int, max_padding: float) -> None:
    policy = POLICIES[name](limits(max_padding=max_padding), COSTS)
    running, waiting = images[: len(images) // 2 + 1], images[len(images) // 2 + 1 :]
    batch = policy.choose(running, waiting, tick=50, now=100.0, max_tokens=max_tokens)
    assert batch
    assert batch == [image for image in running if image in batch]
    longest, shortest = (end(image.tokens for image in batch) for end in (max, min))
    assert longest * sum(image.batch_rows for image in batch) <= max_tokens or len(batch) == 1
    assert longest <= shortest * (1 + max_padding)


@policies
@EXAMPLES
@given(images=st.lists(an_image(own_deadlines=False), min_size=1, max_size=12))
def test_every_image_ends(name: PolicyName, images: list[PlainImage]) -> None:
    for image in images:
        image.has_started = image.has_slot = False
        image.waited_s = image.step = 0
    simulate(POLICIES[name](limits(4, 500), COSTS), images, costs=COSTS)
    assert all(image.done_at for image in images)


@EXAMPLES
@given(
    images=st.lists(an_image(own_deadlines=False), min_size=1, max_size=20),
    max_running=st.integers(1, 8),
    max_tokens=st.integers(16, 1_000),
)
def test_slack_is_urgency_where_nobody_asks_for_a_deadline(
    images: list[PlainImage], max_running: int, max_tokens: int
) -> None:
    both: list[Policy] = [Slack(limits(max_running, max_tokens), COSTS), Urgency(limits(max_running, max_tokens))]
    slack, urgency = (policy.assign(images, 100.0) for policy in both)
    assert slack == urgency
    slack_batch, urgency_batch = (policy.choose(*urgency, tick=50, now=100.0, max_tokens=max_tokens) for policy in both)
    assert slack_batch == urgency_batch


def test_fifo_serves_the_oldest_first() -> None:
    images = [PlainImage("a", steps=3), PlainImage("b", steps=2, tokens=64), PlainImage("c", steps=3, level=1)]
    for second, image in enumerate(images):
        image.arrived = second
    batches = simulate(Ordered(limits(), first_come), images, costs=LinearCosts())
    assert batches == ["a", "a", "ac", "b", "b", "c", "c"]


def test_shortest_serves_the_least_work_first() -> None:
    long, short = PlainImage("l", steps=9), PlainImage("s", steps=3, tokens=64, arrived=2.0)
    batches = simulate(Ordered(limits(max_running=1), least_work), [long, short], costs=LinearCosts())
    assert batches == ["l"] * 2 + ["s"] * 3 + ["l"] * 7
