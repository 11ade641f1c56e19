"""The picture of a trace's rows, and the pretended device whose work it shows."""

from __future__ import annotations

import time
from typing import Any

import pytest
from fake_model import FakeTokenizer, engine_config, model_config

from sharp.busy import busy_share, union
from sharp.engine import Engine
from sharp.pretend import PretendDevice
from sharp.request import SamplingParams
from sharp.trace_events import COMPUTE, COPIES, HOST, Trace
from sharp.views.lanes import calmest, draw, lanes, window

PARAMS = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


def made() -> Trace:
    trace = Trace()
    for step in range(4):
        at = 10.0 + step
        trace.add("plan", at, at + 0.2, step)
        trace.add("commit", at + 0.7, at + (0.8 if step == 2 else 0.9), step)
        trace.add_stream(COMPUTE, "graph", at + 0.2, at + 0.7, step)
    trace.add_stream(COPIES, "words", 10.1, 10.2, 0)
    return trace


def test_a_window_is_all_of_its_steps() -> None:
    assert window(made(), 1, 2) == (11.0, 12.8)
    assert calmest(made(), 1, range(4)) == 2
    with pytest.raises(ValueError, match="no step from 4 to 5"):
        window(made(), 4, 2)


def test_rows_are_cut_to_the_window_and_ordered() -> None:
    found = lanes(made(), 10.15, 11.1)
    assert list(found) == [HOST, COMPUTE, COPIES]
    assert [(span.name, span.step) for span in found[HOST]] == [("plan", 0), ("commit", 0), ("plan", 1)]
    assert list(lanes(made(), 12.0, 12.9)) == [HOST, COMPUTE]


def test_bars_are_where_the_spans_are() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    draw(axis, made(), 1, 2, "some steps")
    bars: list[Any] = list(axis.patches)
    inside = [bar for bar in bars if bar.get_x() >= 0]
    assert sorted(round(bar.get_x()) for bar in inside) == [0, 200, 700, 1000, 1200, 1700]  # ms
    assert [label.get_text() for label in axis.get_yticklabels()] == [HOST, COMPUTE]
    assert axis.get_xlim() == pytest.approx((0, 1800))
    assert sorted(text.get_text() for text in axis.texts) == ["1", "1", "2", "2"]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert sorted(labels) == ["commit", "graph", "plan"]  # each once


def pretend(seconds: float, launch_s: float, overlap: bool) -> tuple[Engine, dict[str, tuple[int, ...]]]:
    """Three requests of different lengths through an engine over a pretended device."""
    model = PretendDevice(model_config(), lambda plan: seconds, launch_s=launch_s, block_size=4)
    engine = Engine(model, FakeTokenizer(), engine_config(overlap=overlap))
    for length in (3, 9, 40):
        engine.add_request([4 + length] * length, PARAMS)
    answers = {}
    while engine.has_unfinished:
        for output in engine.step():
            answers[output.request_id] = output.outputs[0].token_ids
    engine.close()
    return engine, answers


def test_a_pretended_device_answers_alike_with_a_step_in_flight() -> None:
    """Ids that only the device knows are looked up by it."""
    assert pretend(0.0, 0.0, True)[1] == pretend(0.0, 0.0, False)[1]


def test_overlap_keeps_a_pretended_device_busy() -> None:
    """Steps of 4 ms that take 3 ms to queue: one after the other 7 ms each, side by side 4."""

    def busy(overlap: bool) -> float:
        start = time.perf_counter()
        engine, _ = pretend(4e-3, 3e-3, overlap)
        work = engine.trace.spans(COMPUTE)
        assert len(work) == engine.stats.steps
        assert start < work[0].start <= work[-1].end <= time.perf_counter()
        assert [span.step for span in work] == [record.step for record in engine.stats.history]
        assert all(record.gpu_s == pytest.approx(4e-3) for record in engine.stats.history)
        spans = [(span.start, span.end) for span in work]
        assert sum(b - a for a, b in union(spans)) == pytest.approx(4e-3 * len(work))
        return busy_share(spans)

    pairs = []
    for _ in range(5):  # another process may have the cores for a while
        pairs.append((busy(False), busy(True)))
        assert pairs[-1][0] < 4 / 7 + 0.01  # by arithmetic; a busy machine makes it less
        if pairs[-1][1] > 0.6:  # which it cannot be without
            return
    raise AssertionError(f"(without, with) overlap: {pairs}")
