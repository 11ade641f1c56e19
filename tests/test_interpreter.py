"""What the collector looks at while an engine runs, that all of it is looked at in the end, and whose turn it
is."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config

from sharp import interpreter
from sharp.engine import Engine
from sharp.live import Sink
from sharp.request import SamplingParams


class Knot:
    """Refers to itself: only the collector finds out that nobody else does."""

    def __init__(self) -> None:
        self.me = self


def lost_knot() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


def engine(model: FakeModel | None = None) -> Engine:
    model = model or FakeModel()
    return Engine(model, FakeTokenizer(), engine_config(block_size=model.block_size))


def run_one(made: Engine) -> object:
    """The last output of a request, or the engine's error."""
    sink = Sink()
    made.submit(made.make_request([2, 3, 4], SamplingParams(max_tokens=6, ignore_eos=True)), sink)
    while not getattr(found := sink.get(timeout=30), "finished", True):
        pass
    return found


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not happen within 30 s"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def nobody_holds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process without engines, whatever other tests have left running."""
    holders, switch = interpreter._holders, sys.getswitchinterval()
    monkeypatch.setattr(interpreter, "_holders", 0)
    gc.unfreeze()
    sys.setswitchinterval(0.005)
    yield
    assert interpreter._holders == 0
    sys.setswitchinterval(switch)
    if holders:
        gc.freeze()


def test_collections_leave_out_what_was_there() -> None:
    before = gc.get_freeze_count()
    interpreter.hold()
    interpreter.hold()
    old, new = lost_knot(), None
    try:
        assert gc.get_freeze_count() > before + 1000
        interpreter.hold()  # now old is left out
        new = lost_knot()
        gc.collect()
        assert old() is not None
        assert new() is None
        interpreter.collect()
        assert old() is None
        assert gc.get_freeze_count() > before + 1000
    finally:
        for _ in range(3):
            interpreter.release()
    assert gc.get_freeze_count() <= before
    with pytest.raises(RuntimeError, match="without a hold"):
        interpreter.release()


def test_turns_are_short_meanwhile() -> None:
    before = sys.getswitchinterval()
    interpreter.hold()
    interpreter.hold()
    assert sys.getswitchinterval() == pytest.approx(interpreter.SWITCH_S)
    interpreter.release()
    assert sys.getswitchinterval() == pytest.approx(interpreter.SWITCH_S)
    interpreter.release()
    assert sys.getswitchinterval() == before
    interpreter.hold()
    sys.setswitchinterval(0.01)  # the user's own choice stays
    interpreter.release()
    assert sys.getswitchinterval() == pytest.approx(0.01)
    sys.setswitchinterval(before)


def test_an_engine_holds_from_start_to_close() -> None:
    before = gc.get_freeze_count()
    first, second = engine(), engine()
    first.start()
    first.start()
    second.start()
    run_one(first)
    assert gc.get_freeze_count() > before + 1000
    first.close()
    until(lambda: interpreter._holders == 1)
    run_one(second)
    second.close()
    second.close()
    until(lambda: interpreter._holders == 0)
    assert gc.get_freeze_count() <= before


def test_an_engine_that_dies_lets_go() -> None:
    error = AssertionError("the engine's end")
    made = engine(FakeModel(fail_in="forward", error=error))
    made.start()
    assert run_one(made) is error
    until(lambda: interpreter._holders == 0)


def test_garbage_is_collected_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "IDLE_S", 0.02)
    monkeypatch.setattr(interpreter, "STEPS", 3)
    times = []
    collect = interpreter.collect
    monkeypatch.setattr(interpreter, "collect", lambda: times.append(1) or collect())
    made, old = engine(), lost_knot()
    made.start()
    gc.collect()
    assert old() is not None
    run_one(made)
    until(lambda: old() is None)
    time.sleep(0.1)
    assert len(times) == 1, "once a pause"
    made.close()
    until(lambda: interpreter._holders == 0)
