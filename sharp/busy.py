"""Busy: how much of a stretch of time is covered by intervals, and where nothing was.

Knows pairs of (start, end) in seconds of one clock, in any order, overlapping or not. Refuses to know what
they are: graphs on a stream, copies, phases of a host.

GPU busy, as this project reports it: the time that at least one of the steps' graphs was between its start
and its end event, over the time from the first start to the last end. What overlaps counts once, so the share
is at most 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, ascending; those that touch become one, empty ones vanish.

    ValueError for an interval that ends before it starts, or that is not of numbers (NaN)."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if not start <= end:  # NaN fails, too
            raise ValueError(f"an interval must not end before it starts, as from {start} to {end}")
        if start == end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def clipped(intervals: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """The union's part between start and end."""
    inside = ((max(a, start), min(b, end)) for a, b in union(intervals))
    return [(a, b) for a, b in inside if a < b]


def idle(intervals: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """The gaps: what of start to end no interval covers, ascending."""
    gaps, at = [], start
    for a, b in clipped(intervals, start, end):
        if at < a:
            gaps.append((at, a))
        at = b
    if at < end:
        gaps.append((at, end))
    return gaps


def covered(intervals: Iterable[Interval], start: float, end: float) -> float:
    """Seconds of start to end that at least one interval covers."""
    return sum(b - a for a, b in clipped(intervals, start, end))


def busy_share(intervals: Sequence[Interval]) -> float:
    """The part, 0 to 1, of the time from the first start to the last end that is covered.

    ValueError where that time is nothing: no share can be said of it."""
    if not intervals:
        raise ValueError("no intervals: at least 1 is required to say how busy something was")
    start, end = min(a for a, _ in intervals), max(b for _, b in intervals)
    if not end > start:
        raise ValueError(f"all {len(intervals)} intervals together last {end - start} s; over 0 is required")
    return covered(intervals, start, end) / (end - start)


def steps_busy(intervals: Sequence[Interval], steps: int) -> float:
    """busy_share of the latest `steps` intervals, one a step. ValueError if there are fewer."""
    if steps < 1 or len(intervals) < steps:
        raise ValueError(f"{steps} steps were asked for; from 1 to the {len(intervals)} measured are there")
    return busy_share(list(intervals)[-steps:])
