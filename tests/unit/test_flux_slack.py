"""The policy `slack`: plans, deadlines, refusals and shares."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_run import LinearCosts, PlainImage, limits, simulate

from genserve_backend.flux.policy.plan import OPTIMISM, RESERVE, Plan
from genserve_backend.flux.policy.slack import PATIENCE, SURE, Slack
from genserve_backend.worker.scheduling import AGING_S

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
SATURATED = LinearCosts()
"""1 s per 100 tokens: images gain nothing by sharing a forward."""
SHARED = LinearCosts(start_s=0.9, token_s=0.001)
"""1 s alone, 0.1 s for each other image of 100 tokens."""


def run(
    *images: PlainImage, costs: LinearCosts = SATURATED, max_running: int = 16, max_tokens: int = 10_000
) -> list[str]:
    policy = Slack(limits(max_running, max_tokens), costs)
    return simulate(policy, images, costs=costs, max_tokens=max_tokens)


def met(*images: PlainImage) -> str:
    return "".join(image.name for image in images if image.is_met)


def planned(*images: PlainImage, costs: LinearCosts = SATURATED) -> str:
    return "".join(image.name for image in Plan(images, costs, 0.0, max_tokens=10_000).order)


def on_time(images: tuple[PlainImage, ...]) -> int:
    """Return the number of images that end on time, one after the other in the given order; late ones are left out."""
    now, count = 0.0, 0
    for image in images:
        seconds = SATURATED.step_s(image.batch_rows, image.tokens) * image.steps_left * OPTIMISM
        if now + seconds <= image.deadline:
            now += seconds
            count += 1
    return count


@EXAMPLES
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 25)), min_size=1, max_size=5))
def test_no_order_meets_more_deadlines_than_the_plan(jobs: list[tuple[int, int]]) -> None:
    images = [PlainImage(str(number), steps=steps, within_s=s) for number, (steps, s) in enumerate(jobs)]
    assert len(planned(*images)) == max(on_time(order) for order in permutations(images))


def test_urgent_levels_never_give_up_a_deadline_for_others() -> None:
    long = PlainImage("L", steps=10, within_s=12.0, level=1)
    short = [PlainImage(name, steps=3, within_s=12.0) for name in "abc"]
    assert planned(long, *short) == "L"
    long.level = 3
    assert planned(long, *short) == "abc"


def test_images_without_a_deadline_of_their_own_are_not_planned() -> None:
    assert planned(PlainImage("a"), PlainImage("b", within_s=99.0)) == "b"


def test_decoding_and_encoding_need_time() -> None:
    image = PlainImage("a", steps=8, within_s=10.0)
    assert planned(image, costs=LinearCosts(around_s=1.0)) == "a"
    assert planned(image, costs=LinearCosts(around_s=2.0)) == ""
    image.has_started = True
    assert planned(image, costs=LinearCosts(around_s=2.0)) == "a"


def test_spare_time_counts_the_work_before_it() -> None:
    first, second = PlainImage("a", steps=5, within_s=10.0), PlainImage("b", steps=5, within_s=20.0)
    plan = Plan([second, first], SATURATED, 0.0, max_tokens=10_000)
    assert [entry.spare_s for entry in plan.entries] == pytest.approx([10 - 5 * (1 + RESERVE), 20 - 10 * (1 + RESERVE)])
    assert plan.free_s == pytest.approx(4.0)


def test_one_after_the_other_meets_what_sharing_would_miss() -> None:
    images = [PlainImage(str(number), steps=10, within_s=12.0 * number) for number in (1, 2, 3, 4)]
    run(*images)
    assert met(*images) == "1234"


def test_images_share_a_forward_where_they_gain_by_it() -> None:
    images = [PlainImage(name, steps=10, within_s=20.0) for name in "abcd"]
    assert run(*images, costs=SHARED) == ["abcd"] * 10
    assert met(*images) == "abcd"


def test_an_image_in_danger_runs_alone() -> None:
    tight, loose = PlainImage("t", steps=10, within_s=10.2), PlainImage("l", steps=10, within_s=90.0)
    assert run(tight, loose, costs=SHARED)[:10] == ["t"] * 10
    assert met(tight, loose) == "tl"


def test_an_image_in_danger_slows_images_without_a_deadline() -> None:
    tight, patient = PlainImage("t", steps=10, within_s=10.5), PlainImage("p", steps=10)
    assert run(tight, patient) == ["t"] * 10 + ["p"] * 10


def test_time_to_spare_is_shared_in_turns() -> None:
    loose, patient = PlainImage("l", steps=5, within_s=1_000.0), PlainImage("p", steps=5, tokens=64)
    batches = run(loose, patient)
    assert sorted(batches[:2]) == sorted(batches[2:4]) == ["l", "p"]


def test_no_step_is_spent_on_a_lost_deadline_while_others_can_be_met() -> None:
    lost, good = PlainImage("x", steps=20, within_s=15.0), PlainImage("g", steps=10, within_s=13.0)
    patient = PlainImage("p", steps=4)
    run(lost, good, patient)
    assert met(good, patient) == "gp"
    assert lost.ran == []


def test_a_lost_deadline_runs_where_nothing_else_does() -> None:
    lost = PlainImage("x", steps=20, within_s=14.5)
    # Refusals are for images that have not started.
    lost.has_started = True
    assert run(lost) == ["x"] * 15


def test_fewest_deadlines_are_lost_under_overload() -> None:
    long = PlainImage("L", steps=30, within_s=32.0)
    short = [PlainImage(str(number), steps=6, within_s=35.0) for number in range(5)]
    run(long, *short)
    assert met(long, *short) == "01234"


def test_an_image_in_danger_gets_a_slot() -> None:
    patient = PlainImage("p", steps=50)
    tight = PlainImage("t", steps=5, arrived=10.0, within_s=6.0)
    run(patient, tight, max_running=1)
    assert met(tight) == "t"
    assert patient.done_at == 55.0


def test_an_image_with_time_to_spare_takes_no_slot() -> None:
    patient, loose = PlainImage("p", steps=20), PlainImage("l", steps=5, arrived=1.0, within_s=100.0)
    assert run(patient, loose, max_running=1) == ["p"] * 20 + ["l"] * 5


def test_a_less_urgent_deadline_takes_no_slot_from_a_more_urgent_level() -> None:
    urgent, tight = PlainImage("u", steps=20, level=1), PlainImage("t", steps=5, arrived=1.0, within_s=6.0)
    run(urgent, tight, max_running=1)
    assert urgent.done_at == 20.0
    assert not tight.is_met


@pytest.mark.parametrize("max_running", [1, 2])
def test_levels_come_first_while_no_deadline_is_in_danger(max_running: int) -> None:
    low = PlainImage("l", steps=20, level=3, within_s=100.0)
    high = PlainImage("h", steps=5, level=1, arrived=3.0, within_s=200.0)
    assert run(low, high, max_running=max_running) == ["l"] * 3 + ["h"] * 5 + ["l"] * 17


def test_a_deadline_in_danger_comes_before_a_level_that_can_wait() -> None:
    low = PlainImage("l", steps=5, level=3, within_s=6.0)
    high = PlainImage("h", steps=5, level=1, within_s=100.0)
    assert run(low, high, max_running=1) == ["l"] * 5 + ["h"] * 5


def test_the_earlier_deadline_gets_the_slot() -> None:
    later, sooner = PlainImage("l", steps=10, within_s=18.0), PlainImage("s", steps=5, arrived=2.0, within_s=6.0)
    run(later, sooner, max_running=1)
    assert met(later, sooner) == "ls"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_tight_deadlines_leave_the_other_images_a_share(level: int) -> None:
    patient = PlainImage("p", steps=10, level=level)
    endless = [PlainImage("t", steps=5, tokens=64, arrived=3.2 * number, within_s=3.9) for number in range(400)]
    run(*endless, patient)
    share = {1: 4, 2: 2, 3: 1}[level]
    assert patient.done_at is not None
    gaps = [later - sooner for sooner, later in pairwise(patient.ran)]
    assert patient.ran[0] <= AGING_S + PATIENCE // share
    assert max(gaps) <= PATIENCE // share


@pytest.mark.parametrize("level", [1, 2, 3])
def test_tight_deadlines_do_not_keep_all_slots(level: int) -> None:
    patient = PlainImage("p", steps=10, level=level)
    endless = [PlainImage("t", steps=5, level=level, arrived=0.1 * number, within_s=5.9) for number in range(2_000)]
    run(patient, *endless, max_running=1)
    assert patient.done_at is not None
    assert patient.done_at < 2 * AGING_S + patient.steps + 5


def test_refused_is_what_an_idle_device_could_not_finish() -> None:
    policy = Slack(limits(), LinearCosts(around_s=1.0))
    needs_s = 10 + 2 * 1.0
    images = [PlainImage(within_s=SURE * needs_s + margin) for margin in (-0.1, 0.1)]
    assert policy.refused(images, 0.0) == {images[0]: needs_s}
    assert policy.refused(images, 0.2) == dict.fromkeys(images, needs_s)


def test_nothing_is_refused_without_knowledge_or_without_a_deadline() -> None:
    hopeless = PlainImage(steps=1_000, within_s=1.0)
    assert Slack(limits(), LinearCosts(are_known=False)).refused([hopeless], 0.0) == {}
    assert Slack(limits(), SATURATED).refused([PlainImage(steps=1_000)], 0.0) == {}


def test_deadlines_are_kept_in_order_before_anything_is_known() -> None:
    unknown = LinearCosts(token_s=0.0)
    images = [PlainImage("b", steps=2, within_s=9.0), PlainImage("a", steps=2, tokens=64, within_s=5.0)]
    batches = simulate(Slack(limits(), unknown), images, costs=SATURATED)
    assert batches == ["a", "a", "b", "b"]
