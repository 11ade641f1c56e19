"""The trace of a run: spans nest and follow each other, sums are the step records', files are whole."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config

from sharp import trace as step_trace
from sharp.__main__ import main
from sharp.engine import Engine
from sharp.request import SamplingParams
from sharp.trace_events import COMPUTE, COPIES, HOST, Trace
from sharp.watch import Watch, nvtx_domain

TINY = str(Path(__file__).resolve().parent.parent / "weights" / "tiny")
PARAMS = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
PHASES = {"plan": "plan_s", "launch": "launch_s", "wait": "wait_s", "commit": "commit_s"}


def run(engine: Engine) -> None:
    for length in (9, 70, 3, 30):
        engine.add_request([4 + length] * length, PARAMS)
    while engine.has_unfinished:
        engine.step()


def traced(**options: Any) -> Engine:
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config(**options))
    run(engine)
    return engine


def check_rows(events: list[dict[str, Any]]) -> None:
    """Of each row: by start, and of two spans that meet one is inside the other. What a viewer needs."""
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["tid"]].append(event)
    for row in rows.values():
        open_ends: list[float] = []
        for event in row:
            start, end = round(1000 * event["ts"]), round(1000 * (event["ts"] + event["dur"]))
            assert start >= 0 <= event["dur"]
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], "crosses the end of the span it begins in"
            open_ends.append(end)
        assert [event["ts"] for event in row] == sorted(event["ts"] for event in row)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_file_of_a_run(overlap: bool, tmp_path: Path) -> None:
    engine = traced(overlap=overlap)
    engine.trace.save(tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    events, records = document["traceEvents"], list(engine.stats.history)
    check_rows(events)
    spans = [event for event in events if event["ph"] == "X"]
    assert len(records) > 10
    for phase, name in PHASES.items():
        own = [event for event in spans if event["name"] == phase]
        assert [event["args"]["step"] for event in own] == [record.step for record in records]
        for event, record in zip(own, records, strict=True):  # whole nanoseconds
            assert event["dur"] == pytest.approx(1e6 * getattr(record, name), abs=2e-3)
        total = sum(getattr(record, name) for record in records)
        assert engine.trace.seconds(phase) == pytest.approx(total, rel=1e-9)
    inner = {e["args"]["step"]: e for e in spans if e["name"] == "detokenise"}
    for event in (e for e in spans if e["name"] == "commit"):
        part = inner[event["args"]["step"]]
        assert event["ts"] <= part["ts"] <= part["ts"] + part["dur"] <= event["ts"] + event["dur"] + 1e-6
    order = [(e["name"], e["args"]["step"] - spans[0]["args"]["step"]) for e in spans if e["name"] in PHASES]
    if overlap:  # the next step is launched before this one is waited for
        assert order[:6] == [
            ("plan", 0),
            ("launch", 0),
            ("plan", 1),
            ("launch", 1),
            ("wait", 0),
            ("commit", 0),
        ]
    else:
        assert order[:5] == [("plan", 0), ("launch", 0), ("wait", 0), ("commit", 0), ("plan", 1)]
    names = {e["args"]["name"] for e in events if e["name"] in ("thread_name", "process_name")}
    assert names == {"sharp", HOST}  # no row of a GPU that is not there
    counters = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[event["name"]].append(event)
    assert [e["args"]["per step"] for e in counters["tokens"]] == [r.num_tokens for r in records]
    assert [e["args"]["used"] for e in counters["pages"]] == [r.blocks_used for r in records]
    assert [(e["args"]["running"], e["args"]["waiting"]) for e in counters["requests"]] == [
        (r.running, r.waiting) for r in records
    ]
    times = [e["ts"] for e in counters["requests"]]
    assert times == sorted(times)
    assert document["otherData"] == {"spans": len(spans), "dropped": 0}


def test_memory_is_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_trace, "HISTORY", 4)
    engine = traced()
    spans, most = engine.trace.spans(), 4 * 10
    assert len(spans) == most < engine.trace.added
    assert engine.trace.dropped == engine.trace.added - most
    assert len(engine.trace.samples()) == 4
    assert spans[-1].step == engine.stats.history[-1].step
    check_rows(engine.trace.document()["traceEvents"])
    assert engine.trace.document()["otherData"]["dropped"] == engine.trace.dropped
    engine.trace.clear()
    assert engine.trace.document()["traceEvents"][1:] == []
    assert engine.trace.dropped == 0


@pytest.mark.parametrize("phase", ["stage", "forward", "sample"])
def test_a_step_that_is_given_up_leaves_no_span(phase: str) -> None:
    """After a Ctrl-C in a phase the next step's first span begins with that step."""
    model = FakeModel(fail_in=phase, fail_at=3, error=KeyboardInterrupt())
    engine = Engine(model, FakeTokenizer(), engine_config())
    engine.add_request([5] * 20, PARAMS)
    engine.step()
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine._pipeline.watch.watchdog.in_flight == 0
    model.fail_in = ""
    time.sleep(0.05)
    while engine.has_unfinished:
        engine.step()
    check_rows(engine.trace.document()["traceEvents"])
    assert max(span.end - span.start for span in engine.trace.spans()) < 0.05
    assert len([s for s in engine.trace.spans() if s.name == "commit"]) == engine.stats.steps


def test_nothing_to_do_is_no_span() -> None:
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config())
    assert engine.step() == []
    assert engine.trace.spans() == []


def test_streams_of_a_gpu() -> None:
    """Events are rounded: what seems to overlap in one stream is put in order, two streams may overlap."""
    trace = Trace()
    trace.add_stream(COMPUTE, "graph", 1.0, 2.0, 1)
    trace.add_stream(COMPUTE, "graph", 1.9999995, 3.0, 2)
    trace.add_stream(COPIES, "upload", 1.5, 1.6, 2)
    trace.add_stream(COMPUTE, "graph", 2.5, 2.9, 3)  # nonsense, but a file that can be opened
    trace.add("plan", 0.5, 0.9, 1)
    events = trace.document()["traceEvents"]
    check_rows(events)
    assert [(s.start, s.end) for s in trace.spans(COMPUTE)] == [(1.0, 2.0), (2.0, 3.0), (3.0, 3.0)]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == [HOST, COMPUTE, COPIES]  # from the top
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        traced().trace.save(tmp_path / "absent" / "run.json")
    assert list(tmp_path.iterdir()) == []


class Ranges:
    """What an NVTX domain is to Watch."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[str] = []

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, attributes: str) -> None:
        self.open.append(attributes)
        self.seen.append("/".join(self.open))

    def pop_range(self) -> None:
        self.open.pop()


def test_nvtx_ranges_open_and_close_with_the_phases() -> None:
    """A profiler sees the phases of a run, of a step that fails and of one with nothing to do."""
    model = FakeModel()
    engine, ranges = Engine(model, FakeTokenizer(), engine_config()), Ranges()
    engine._pipeline.watch._domain = ranges
    engine.step()
    assert (ranges.seen, ranges.open) == (["plan"], [])
    engine.add_request([5] * 3, PARAMS)
    ranges.seen.clear()
    engine.step()
    assert ranges.seen == ["plan", "launch", "wait", "commit", "commit/detokenise"]
    assert ranges.open == []
    model.fail_in, model.error = "forward", OSError("gone")
    with pytest.raises(OSError, match="gone"):
        engine.step()
    assert ranges.open == []


def test_nvtx_is_off_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class DummyDomain:
        pass

    class Domain:
        pass

    for made, wanted in ((DummyDomain(), None), (domain := Domain(), domain)):
        package = type("nvtx", (), {"get_domain": staticmethod(lambda name, made=made: made)})
        monkeypatch.setitem(sys.modules, "nvtx", package)
        assert nvtx_domain() is wanted
    monkeypatch.setitem(sys.modules, "nvtx", None)  # what an import of an absent one finds
    assert nvtx_domain() is None
    assert Watch(lambda plan: None)._domain is None


def test_the_real_package_without_a_profiler() -> None:
    pytest.importorskip("nvtx")
    assert nvtx_domain() is None


def test_watching_a_step_costs_microseconds() -> None:
    """Seven borders, a part and the counters of a step: the least of many, on whatever machine this is."""
    engine = traced()
    watch, record, plan = engine._pipeline.watch, engine.stats.history[-1], engine.last_plan
    assert plan is not None

    def step() -> None:
        watch.lap("plan")
        watch.planned(plan)
        for phase in ("launch", None, "wait", None, "commit"):
            watch.lap(phase, 1)
        watch.enter("detokenise")
        watch.leave()
        watch.lap(None)
        watch.committed(record)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(200):
            step()
        return (time.perf_counter() - start) / 200

    best = min(seconds() for _ in range(20))
    print(f"{1e6 * best:.2f} us a step")
    assert best < 50e-6


def test_a_command_writes_its_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    words = ["generate", "--model", TINY, "--device", "cpu", "--prompt", "abc", "--max-tokens", "5"]
    assert main([*words, "--temperature", "0", "--trace-out", str(out)]) == 0
    assert f"sharp: trace in {out}\n" in capsys.readouterr().err
    events = json.loads(out.read_text())["traceEvents"]
    check_rows(events)
    commits = [event for event in events if event["name"] == "commit"]
    assert 1 <= len(commits) <= 6
    out.unlink()
    assert main([*words, "--prompt", "\ud800", "--trace-out", str(out)]) == 2  # refused before it ran
    assert not out.exists()


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_a_trace_that_cannot_be_written_is_told_at_the_door(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "--model", "no such model", *(["--prompt", "a"] if command == "generate" else [])]
    paths = (
        (tmp_path, "a folder"),
        (tmp_path / "no" / "x.json", "there is no folder"),
        (Path("/dev/null"), "not a regular file"),
    )
    for path, why in paths:
        assert main([*words, "--trace-out", str(path)]) == 2
        assert why in capsys.readouterr().err
