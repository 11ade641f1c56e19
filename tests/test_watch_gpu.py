"""What a real GPU says of its steps, run by test_gpu.py in a child with a time limit and with the GPU to
itself.

Steps of a small model are hardly longer than what the host does between them, and a GPU that mostly waits
shows little. So a kernel that takes its time is put in front of each step's launches: the GPU is busy nearly
always.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_kernels
from engine_checks import load
from test_trace import check_rows

from sharp import driver
from sharp.busy import busy_share
from sharp.engine import Engine
from sharp.random_model import IdTokenizer, RandomCheckpoint
from sharp.request import SamplingParams
from sharp.stall import Borrowed
from sharp.trace_events import COMPUTE, COPIES

pytestmark = pytest.mark.gpu
SEQS, NEW = 64, 60
STEP_MS = 50.0  # and what the model itself takes


@pytest.fixture(autouse=True)
def only_in_the_child(on_gpu: bool) -> None:
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")


@pytest.fixture(scope="module")
def opened() -> Any:
    model, config = load(
        RandomCheckpoint("smollm2-135m"), "cuda", "bfloat16", max_num_seqs=SEQS, max_num_batched_tokens=2048,
        max_model_len=1024, prefix_caching=False,
    )  # fmt: skip
    lengthen(model)
    decode((model, config))  # kernels, graphs
    yield model, config
    model.close()


def lengthen(model: Any) -> None:
    """Every step takes STEP_MS more, in graphs too."""
    device, rounds, took = model.device, 10_000_000, []
    out, kernel = device.empty((1,), np.int32), toy_kernels.spin_kernel()
    for _ in range(3):  # the first loads it
        ends = [driver.Event(timing=True) for _ in range(2)]
        device.compute_stream.record(ends[0])
        kernel.prepare(1, (out.address, rounds))(device.stream)
        device.compute_stream.record(ends[1])
        device.synchronize()
        took.append(ends[0].elapsed_ms(ends[1]))
    rounds, forward = int(rounds * STEP_MS / min(took)), model.runtime._forward

    def longer(arrays: Any, ops: Any, stream: Any) -> Any:
        kernel.prepare(1, (out.address, rounds))(stream)
        return forward(arrays, ops, stream)

    model.runtime._forward = longer


def decode(opened: Any, pause: float = 0.0, **options: Any) -> Engine:
    """64 sequences to their ends, with a pause of the host after each step."""
    model, config = opened
    engine = Engine(Borrowed(model), IdTokenizer(), replace(config, **options))
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    for _ in range(SEQS):
        engine.add_request(rng.integers(1, 40_000, 32).tolist(), params)
    while engine.has_unfinished:
        engine.step()
        time.sleep(pause)
    engine.close()
    return engine


def intervals(engine: Engine, row: str) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in engine.trace.spans(row)]


def test_a_devices_intervals_are_where_the_host_saw_them(opened: Any, tmp_path: Path) -> None:
    """Each step ran after its launch began and before its wait ended; the words before the step."""
    engine = decode(opened)
    engine.trace.save(tmp_path / "run.json")
    check_rows(json.loads((tmp_path / "run.json").read_text())["traceEvents"])
    spans = {(s.name, s.step): s for s in engine.trace.spans()}
    records = list(engine.stats.history)
    assert len(intervals(engine, COMPUTE)) == len(intervals(engine, COPIES)) == len(records)
    for record in records:
        launch, wait, step = (spans[name, record.step] for name in ("launch", "wait", "step"))
        slack = 50e-6
        assert launch.start - slack <= spans["words", record.step].start
        assert spans["words", record.step].end <= step.start + slack
        assert launch.start - slack <= step.start < step.end <= wait.end + slack
        assert record.gpu_s == pytest.approx(step.end - step.start, abs=slack)


def beside(engine: Engine) -> float:
    """The share of copies of a step's words in whose middle a step was computed."""
    compute, copies = intervals(engine, COMPUTE), intervals(engine, COPIES)
    middles = [(start + end) / 2 for start, end in copies]
    return sum(any(start < at < end for start, end in compute) for at in middles) / len(copies)


def test_copies_run_beside_the_computation(opened: Any) -> None:
    """With a step in flight, the next one's words cross while it computes; without, never."""
    together, apart = decode(opened, overlap=True), decode(opened, overlap=False)
    shares, busy = [beside(e) for e in (together, apart)], busy_share(intervals(together, COMPUTE)[5:])
    print(f"copies beside a step: {shares[0]:.1%}, one after another {shares[1]:.1%}; busy {busy:.1%}")
    assert busy > 0.98
    assert shares[0] > 0.95  # the first has no step to be beside
    assert shares[1] < 0.05


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_an_idle_gap_on_the_gpu_is_found(opened: Any, share: float) -> None:
    """A pause of the host after each step is so much less of busy time, by either clock."""
    calm = decode(opened, overlap=False)
    step = statistics.median(end - start for start, end in intervals(calm, COMPUTE))
    paused = decode(opened, overlap=False, pause=share * step)
    found = []
    for engine in (calm, paused):
        work = intervals(engine, COMPUTE)[20:]
        launches = [span for span in engine.trace.spans() if span.name == "launch"][20:]
        waits = [span for span in engine.trace.spans() if span.name == "wait"][20:]
        by_host = sum(end - start for start, end in work) / (waits[-1].end - launches[0].start)
        assert busy_share(work) == pytest.approx(by_host, rel=0.02)
        found.append(busy_share(work))
    print(f"busy {found[0]:.1%}, with pauses of {share:.0%} of a step {found[1]:.1%}")
    assert found[0] > 0.95
    gap = 1 / found[1] - 1 / found[0]  # in steps; a sleep is never shorter than asked for, and little longer
    assert 0.9 * share < gap < 1.1 * share + 0.03
