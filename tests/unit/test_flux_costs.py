"""Estimates of the time of work, from what was measured."""

from __future__ import annotations

import pytest

from genserve_backend.flux.policy.costs import KNOWN_AFTER, MAX_RATIO, MAX_SHAPES, SETTLED_AFTER, MeasuredCosts


def costs(*forwards: tuple[int, int, float], text_tokens: int = 0) -> MeasuredCosts:
    measured = MeasuredCosts(text_tokens=text_tokens)
    for forward in forwards:
        measured.observe_step(*forward)
    return measured


def test_nothing_is_known_at_first() -> None:
    new = costs()
    assert (new.step_s(1, 100), new.decode_s(100), new.encode_s()) == (0.0, 0.0, 0.0)
    assert not new.are_known
    assert not new.has_measured(1, 100)


def test_a_measured_shape_has_its_own_time() -> None:
    measured = costs((1, 100, 1.0), (2, 100, 1.5), (1, 200, 7.0))
    assert [measured.step_s(*shape) for shape in ((1, 100), (2, 100), (1, 200))] == [1.0, 1.5, 7.0]
    assert measured.has_measured(2, 100)
    assert not measured.has_measured(3, 100)


@pytest.mark.parametrize("text_tokens", [0, 512])
def test_other_shapes_follow_from_a_line(text_tokens: int) -> None:
    shapes = ((1, 100), (2, 100), (1, 400), (4, 400))
    measured = costs(*((r, t, 0.5 + 0.01 * r * (t + text_tokens)) for r, t in shapes), text_tokens=text_tokens)
    assert measured.step_s(3, 64) == pytest.approx(0.5 + 0.03 * (64 + text_tokens))


def test_one_size_predicts_others_in_proportion() -> None:
    assert costs((2, 100, 1.0)).step_s(1, 400) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "forwards", [((1, 100, 2.0), (4, 100, 1.0)), ((1, 100, 0.1), (4, 100, 9.0))], ids=["falling", "steep"]
)
def test_no_estimate_is_negative(forwards: tuple[tuple[int, int, float], ...]) -> None:
    assert min(costs(*forwards).step_s(rows, 16) for rows in range(1, 99)) >= 0


def test_first_forwards_of_a_shape_may_be_slow() -> None:
    assert costs((1, 100, 30.0), (1, 100, 1.1), (1, 100, 1.0)).step_s(1, 100) == 1.0


def test_estimates_follow_a_change() -> None:
    slower = costs(*[(1, 100, 1.0)] * SETTLED_AFTER, *[(1, 100, 2.0)] * 50)
    assert slower.step_s(1, 100) == pytest.approx(2.0, rel=0.01)


def test_a_stall_hardly_counts() -> None:
    stalled = costs(*[(1, 100, 1.0)] * SETTLED_AFTER, (1, 100, 60.0))
    assert 1.0 < stalled.step_s(1, 100) < MAX_RATIO


def test_estimates_are_known_after_some_forwards() -> None:
    known = costs(*[(1, 100, 1.0)] * (KNOWN_AFTER - 1))
    assert not known.are_known
    known.observe_step(1, 100, 1.0)
    assert known.are_known


def test_the_latest_shapes_are_remembered() -> None:
    measured = costs(*((1, tokens, 1.0) for tokens in range(MAX_SHAPES)))
    measured.observe_step(1, 0, 1.0)
    measured.observe_step(1, MAX_SHAPES, 1.0)
    assert [measured.has_measured(1, tokens) for tokens in (0, 1, 2, MAX_SHAPES)] == [True, False, True, True]


def test_decodings_and_encodings_have_estimates() -> None:
    measured = costs()
    measured.observe_encode(0.25)
    for tokens in (100, 200):
        measured.observe_decode(tokens, tokens / 100)
    assert measured.encode_s() == 0.25
    assert measured.decode_s(100) == 1.0
    assert measured.decode_s(400) == pytest.approx(4.0)
