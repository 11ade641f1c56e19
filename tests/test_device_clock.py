"""Events of a made-up device whose clock drifts: its steps are found on the host's clock."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp.device_clock import REBASE_S, DeviceClock


class Device:
    """A stream in which work happens at set host times; its own clock began elsewhere and runs `rate` as
    fast. Time between events is float32 milliseconds in steps of half a microsecond, as the driver has it."""

    def __init__(self, rate: float) -> None:
        self.host, self.rate, self.free_at = 1000.0, rate, 1000.0  # free_at: the stream's work so far ends

    def clock(self) -> float:
        return self.host

    def event(self) -> Event:
        return Event(self)

    def record(self, event: Event) -> None:
        event.at = max(self.host, self.free_at)

    def work(self, seconds: float) -> None:
        self.free_at = max(self.host, self.free_at) + seconds


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, float("nan")

    @property
    def done(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at) + 20e-6  # a thread wakes up

    def elapsed_ms(self, end: Event) -> float:
        assert self.done
        assert end.done, "the driver refuses events that have not happened"
        own = (end.at - self.at) * self.device.rate
        return float(np.float32(1e3 * round(own / 5e-7) * 5e-7))


def errors(device: Device, steps: list[tuple[float, float]], lead: float = 0.0) -> list[float]:
    """The largest error of each step's two times. steps: (seconds of host before it, of work); lead: how
    much earlier than it runs a step is queued."""
    clock, found = DeviceClock(device.event, device.record, device.clock), []
    previous = 0.0
    for pause, seconds in steps:
        device.host += pause
        queued = device.host
        start, end = device.event(), device.event()
        device.work(lead)
        device.record(start)
        device.work(seconds)
        device.record(end)
        end.synchronize()
        begin, finish = clock.interval(start, end, queued)
        assert begin <= finish <= device.host
        apart = abs(device.rate - 1) * seconds + 1e-6  # a long step may be measured longer than it was
        assert begin >= max(queued, previous) - apart
        assert finish - begin == pytest.approx(seconds * device.rate, abs=2e-6)
        previous = finish
        found.append(max(abs(begin - start.at), abs(finish - end.at)))
    return found


def test_steps_are_where_they_were() -> None:
    """Off by a thread's waking at most, however long the run is."""
    found = errors(Device(1.0), [(1e-4, 5e-3)] * 10_000)  # 50 seconds: several bases
    assert max(found) < 25e-6
    assert 5 * REBASE_S < 10_000 * 5.1e-3


@pytest.mark.parametrize("rate", [1 + 5e-5, 1 - 5e-5])
def test_a_clock_that_drifts_is_held(rate: float) -> None:
    """50 us a second would be 15 ms after 5 minutes; the ends of steps, and their beginnings, hold it."""
    found = errors(Device(rate), [(1e-4, 2e-2)] * 15_000)
    assert max(found) < 60e-6


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1 - 1e-4, 1 + 1e-4),
    st.lists(st.tuples(st.floats(0, 3), st.floats(1e-5, 3)), min_size=1, max_size=60),
    st.floats(0, 0.01),
)
def test_whatever_the_steps(rate: float, steps: list[tuple[float, float]], lead: float) -> None:
    total = sum(pause + seconds + lead for pause, seconds in steps)
    assert max(errors(Device(rate), steps, lead)) < 60e-6 + abs(rate - 1) * total
