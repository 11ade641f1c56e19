"""How busy something was: by hand, with an idle gap put in, and against counting unit by unit."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharp.busy import busy_share, clipped, covered, idle, steps_busy, union

Intervals = list[tuple[int, int]]
INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1])))


def units(intervals: Intervals) -> set[int]:
    """The whole seconds that intervals between whole seconds cover."""
    return {unit for start, end in intervals for unit in range(start, end)}


@given(INTERVALS, st.integers(0, 70), st.integers(0, 70))
def test_each_second_counts_once(intervals: Intervals, a: int, b: int) -> None:
    start, end = min(a, b), max(a, b)
    merged = union(intervals)
    assert units(merged) == units(intervals)  # type: ignore[arg-type]
    assert all(x[1] < y[0] for x, y in pairwise(merged)), "touching ones are one"
    inside = units(intervals) & set(range(start, end))
    assert covered(intervals, start, end) == len(inside)
    assert units(clipped(intervals, start, end)) == inside  # type: ignore[arg-type]
    gaps = idle(intervals, start, end)
    assert units(gaps) == set(range(start, end)) - inside  # type: ignore[arg-type]
    assert all(x < y for x, y in gaps)


@given(INTERVALS.filter(units), st.randoms())
def test_a_share_knows_no_order(intervals: Intervals, rng: random.Random) -> None:
    shuffled = rng.sample(intervals, len(intervals))
    span = max(b for _, b in intervals) - min(a for a, _ in intervals)
    assert busy_share(shuffled) == busy_share(intervals) == len(units(intervals)) / span


def graphs(steps: int, seconds: float, gap: float, jitter: random.Random) -> list[tuple[float, float]]:
    """Steps of about `seconds`, `gap` of that idle after each but the last; in a clock's large numbers."""
    at, found = 1e5, []
    for _ in range(steps):
        length = seconds * jitter.uniform(0.8, 1.2)
        found.append((at, at + length))
        at += length * (1 + gap)
    return found


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.03])
def test_an_idle_gap_is_found(gap: float) -> None:
    """500 decode steps of 5 ms with a tenth of idle time between them are 1 / 1.1 busy, not 1."""
    found = graphs(501, 5e-3, gap, random.Random(1))
    assert steps_busy(found, 500) == pytest.approx(1 / (1 + gap), abs=3e-4)
    assert (steps_busy(found, 500) >= 0.97) == (gap <= 0.03)


def test_one_long_gap_in_the_middle() -> None:
    """A tenth of all the time in one piece; a step before the asked-for ones does not count."""
    found = [(0.0, 1.0), (50.0, 54.5), (55.5, 60.0)]
    assert steps_busy(found, 2) == pytest.approx(0.9)
    assert idle(found[1:], 50, 60) == [(54.5, 55.5)]
    assert steps_busy(found, 3) == pytest.approx(10 / 60)


def test_overlapping_steps_are_no_more_than_busy() -> None:
    """A copy beside a graph, or two graphs that events say overlap: the sum of lengths would be 1.5."""
    assert busy_share([(0.0, 10.0), (5.0, 10.0)]) == 1.0
    assert busy_share([(0.0, 6.0), (4.0, 10.0)]) == 1.0


def test_what_no_share_can_be_said_of() -> None:
    with pytest.raises(ValueError, match="at least 1 is required"):
        busy_share([])
    with pytest.raises(ValueError, match=r"last 0.0 s; over 0"):
        busy_share([(1.0, 1.0)])
    with pytest.raises(ValueError, match=r"3 steps were asked for; from 1 to the 2 measured"):
        steps_busy([(0.0, 1.0), (1.0, 2.0)], 3)
    with pytest.raises(ValueError, match="0 steps"):
        steps_busy([(0.0, 1.0)], 0)
    for bad in ((2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="before it starts"):
            union([bad])
