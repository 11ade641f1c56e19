"""StepCurve: exact at what was measured, linear between, never falling, and the choices made from it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharp.curves import StepCurve

CURVE = StepCurve.of([(1, 0, 1.0), (4, 0, 1.0), (8, 0, 2.0), (1, 100, 2.0), (4, 100, 3.0), (8, 100, 6.0)])


def test_measured_points_come_back() -> None:
    for tokens, context, seconds in CURVE.points:
        assert CURVE.predict(tokens, context) == pytest.approx(seconds)


def test_between_and_beyond() -> None:
    assert CURVE.predict(6, 0) == pytest.approx(1.5)
    assert CURVE.predict(6, 50) == pytest.approx((1.5 + 4.5) / 2)
    assert CURVE.predict(12, 0) == pytest.approx(3.0)  # 0.25 s a token goes on
    assert CURVE.predict(8, 200) == pytest.approx(10.0)  # 0.04 s a key goes on
    assert CURVE.predict(0, 50) == 0.0


def test_noise_is_lowered_to_what_more_work_took() -> None:
    curve = StepCurve.of([(1, 0, 2.0), (2, 0, 1.0), (1, 10, 1.5)])
    assert curve.predict(1) == curve.predict(2) == 1.0
    assert curve.predict(1, 10) == 1.5


def test_a_line_that_stopped_early_goes_on() -> None:
    curve = StepCurve.of([(1, 0, 1.0), (2, 0, 1.1), (4, 0, 1.2), (1, 10, 2.0), (2, 10, 3.0)])
    assert curve.predict(4, 10) == pytest.approx(5.0)


def test_a_single_point() -> None:
    curve = StepCurve.of([(4, 0, 2.0)])
    assert curve.predict(1, 0) == 2.0
    assert curve.predict(8, 1000) == pytest.approx(4.0)
    assert curve.knee() == 4


def test_the_knee_is_where_throughput_stops_to_grow() -> None:
    # A floor of 1 s up to 64 tokens, then a second for each 64: throughput is flat from 64 on.
    points = [(t, 0, max(1.0, t / 64)) for t in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert StepCurve.of(points).knee() == 64
    assert StepCurve.of(points[:5]).knee() == 16  # still growing: the last


def test_the_knee_takes_what_is_within_a_tenth() -> None:
    assert StepCurve.of([(1, 0, 1 / 89), (2, 0, 2 / 91), (4, 0, 4 / 100)]).knee() == 2


def test_the_largest_step_under_a_target() -> None:
    points = [(t, 0, max(1.0, t / 64)) for t in (1, 64, 128, 256)]
    curve = StepCurve.of(points)
    assert curve.largest_under(2.0) == 128
    assert curve.largest_under(1.5) == 96
    assert curve.largest_under(0.99) == 0
    assert curve.largest_under(1e9) == 256  # nothing is promised beyond what was measured


@pytest.mark.parametrize(
    "points",
    [[], [(0, 0, 1.0)], [(1, -1, 1.0)], [(1, 0, 0.0)], [(1, 0, float("nan"))], [(1, 0, 1.0), (1, 0, 2.0)]],
)
def test_points_that_no_step_can_have(points: list[tuple[int, int, float]]) -> None:
    with pytest.raises(ValueError):
        StepCurve.of(points)


def test_negative_questions() -> None:
    with pytest.raises(ValueError, match="-1"):
        CURVE.predict(-1, 0)
    with pytest.raises(ValueError, match="-2"):
        CURVE.predict(1, -2)


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 300), st.integers(0, 300)), st.floats(1e-6, 1e3), min_size=1, max_size=12
    ),
    st.lists(st.integers(0, 500), min_size=2, max_size=6),
    st.lists(st.integers(0, 500), min_size=2, max_size=6),
)
def test_more_work_never_takes_less_time(
    points: dict[tuple[int, int], float], tokens: list[int], contexts: list[int]
) -> None:
    curve = StepCurve.of([(t, c, s) for (t, c), s in points.items()])
    tokens, contexts = sorted(tokens), sorted(contexts)
    for context in contexts:
        line = [curve.predict(t, context) for t in tokens]
        assert all(b >= a * (1 - 1e-9) for a, b in pairwise(line))
    for count in tokens:
        line = [curve.predict(count, c) for c in contexts]
        assert all(b >= a * (1 - 1e-9) for a, b in pairwise(line))


def test_a_line_that_stops_early_does_not_lower_what_was_measured() -> None:
    """The far context stops at 64 tokens, where steps are flat; 512 tokens at the near one take long."""
    curve = StepCurve.of([(1, 0, 1.0), (64, 0, 1.0), (512, 0, 9.0), (1, 1024, 1.1), (64, 1024, 1.2)])
    assert curve.predict(512, 0) == 9.0
    assert curve.predict(512, 1024) == pytest.approx(9.2)
    assert curve.predict(1024, 1024) >= curve.predict(1024, 0)
