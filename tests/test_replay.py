"""Logs: a run's plans come out again, whatever happened in it; damaged logs are told in one line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_latency_target import curves_of, gpu_like

from sharp import event_log
from sharp.blocks import BlockAllocator
from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.failures import StepFailed
from sharp.latency_target import LatencyTarget
from sharp.policies import POLICIES, SchedulingPolicy, ShortestPromptFirst
from sharp.predictor import HostTime, StepPredictor
from sharp.replay import ReplayError, read_log, replay
from sharp.request import QueueFull, RequestTooLarge, SamplingParams


class Interrupted(FakeModel):
    """Some steps end in Ctrl-C, some fail; from then on nothing of them has happened."""

    interrupt: frozenset[int] = frozenset()
    fails: frozenset[int] = frozenset()
    calls = 0

    def forward(self, plan: Any) -> Any:
        self.calls += 1
        if self.calls in self.interrupt:
            raise KeyboardInterrupt
        if self.calls in self.fails:
            raise MemoryError
        return super().forward(plan)


def run(engine: Engine, moves: list[Any]) -> None:
    """Let moves happen between steps: (what, a number)."""
    count = 0
    for what, number in moves:
        if what == "add":
            length, tokens, kind = number % 40 + 1, number % 23 + 1, number % 7
            params = SamplingParams(
                max_tokens=tokens, temperature=float(number % 2), ignore_eos=kind == 0, seed=number,
                stop_token_ids=(270, 280) if kind == 1 else (), stop=["a", "stop"] if kind == 2 else None,
                n=2 if kind == 3 else 1, logprobs=2 if kind == 4 else None,
                top_k=(None, 0, 7)[number % 3], top_p=(1.0, 0.8)[number // 3 % 2],
                timeout_s=1e-9 if kind == 5 and number % 3 == 0 else None,
            )  # fmt: skip
            prompt = [4 + number % 2] * min(length, 10) + [4 + number % 250] * max(0, length - 10)
            try:
                engine.add_request(prompt, params, f"r{count}", priority=number % 3)
            except (QueueFull, RequestTooLarge):
                continue
            count += 1
        elif what == "abort" and count:
            engine.abort(f"r{number % count}")
        else:
            with suppress(KeyboardInterrupt, StepFailed):
                engine.step()
    while engine.has_unfinished:
        with suppress(KeyboardInterrupt, StepFailed):
            engine.step()


def latency() -> LatencyTarget:
    return LatencyTarget(20.0, StepPredictor(*curves_of(gpu_like), host_s=HostTime(1e-4, 1e-5)))


MOVES = st.lists(
    st.tuples(st.sampled_from(["add", "add", "step", "step", "abort"]), st.integers(0, 10_000)),
    min_size=15,
    max_size=60,
)
PREEMPTIONS: list[int] = []


@settings(max_examples=120, deadline=None)
@given(
    MOVES,
    st.sampled_from([*sorted(POLICIES), "latency with curves", "shortest, 3"]),
    st.sampled_from(["reserve", "optimistic"]),
    st.booleans(),
    st.sampled_from([9, 12, 60]),
    st.frozensets(st.integers(1, 60), max_size=4),
    st.frozensets(st.integers(1, 60), max_size=2),
    st.booleans(),
)
def test_the_plans_come_out_again(
    tmp_path_factory: pytest.TempPathFactory, moves: list[Any], name: str, admission: str, caching: bool,
    pages: int, interrupt: frozenset[int], fails: frozenset[int], overlap: bool,
) -> None:  # fmt: skip
    policy: Any = {"latency with curves": latency(), "shortest, 3": ShortestPromptFirst(3)}.get(name, name)
    config = engine_config(
        scheduling_policy=policy, admission=admission, prefix_caching=caching, max_queue_len=6,
        overlap=overlap,
    )  # fmt: skip
    model = Interrupted(num_blocks=pages)
    model.interrupt, model.fails = interrupt, fails
    engine = Engine(model, FakeTokenizer(), config)
    run(engine, moves)
    path = tmp_path_factory.getbasetemp() / "run.jsonl"
    engine.log.save(path)
    found = replay(path)
    PREEMPTIONS.append(found.preemptions)
    assert found.steps == model.calls
    assert found.preemptions == engine.scheduler.preemptions
    assert found.arrivals == engine.scheduler.arrivals
    assert found.scheduler.step == engine.scheduler.step
    assert not found.scheduler.requests()
    if isinstance(policy, LatencyTarget):
        assert isinstance(found.scheduler.policy, LatencyTarget)
        assert found.scheduler.policy.factor == policy.factor
        assert found.scheduler.policy._ratios == policy._ratios


def test_a_plan_of_nothing_that_preempted(tmp_path: Path) -> None:
    """The only request that could go on lacks a page while the last token of another is in flight: it gives
    way in a plan of nothing, which the log must hold, too."""
    adds = (0, 0, 17, 395, 430, 462, 13, 224, 0, 0)
    moves = [*(("add", n) for n in adds), ("step", 0), *(("add", n) for n in (0, 1222, 0, 0))]
    config = engine_config(
        scheduling_policy="shortest-prompt-first", admission="optimistic", max_queue_len=6, overlap=True
    )
    engine = Engine(Interrupted(num_blocks=12), FakeTokenizer(), config)
    run(engine, moves)
    engine.log.save(tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert text.count('"event":"nothing"') == 1
    assert replay(tmp_path / "log").preemptions == engine.scheduler.preemptions == 1
    wrong = text.splitlines()
    first = next(i for i, line in enumerate(wrong) if '"event":"plan"' in line)
    (tmp_path / "log").write_text("\n".join([*wrong[:first], '{"event":"nothing"}', *wrong[first:]]))
    with pytest.raises(ReplayError, match="the log has nothing to compute, the scheduler plans step 1"):
        replay(tmp_path / "log")


def test_those_runs_met_preemption() -> None:
    """Runs after the one above, in file order: its workloads do reach page pressure."""
    assert not PREEMPTIONS or sum(1 for count in PREEMPTIONS if count) >= 3


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    """A log of two requests, one cancelled, one that waits for pages."""
    engine = Engine(FakeModel(num_blocks=12), FakeTokenizer(), engine_config(seed=7))
    run(engine, [("add", 14), ("step", 0), ("add", 28), ("step", 0), ("abort", 0), ("step", 0), ("step", 0)])
    engine.log.save(tmp_path / "log")
    return (tmp_path / "log").read_text().splitlines()


def told(tmp_path: Path, lines: list[str], **options: Any) -> str:
    path = tmp_path / "changed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ReplayError) as caught:
        replay(path, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_what_a_log_says(lines: list[str]) -> None:
    header, *events = [json.loads(line) for line in lines]
    assert header["sharp_log"] == 2
    assert header["config"]["seed"] == 7
    assert header["policy"] == {"name": "fcfs", "options": {}}
    assert [event["event"] for event in events[:4]] == ["arrive", "plan", "commit", "arrive"]
    commit = events[2]
    assert set(commit["times"]) == {"plan_s", "launch_s", "wait_s", "commit_s", "gpu_s", "seconds"}
    assert {"running", "waiting", "free_blocks", "not_scheduled", "waiting_for"} <= set(commit)
    assert {"event": "end", "id": "r0", "reason": "abort"} in events


def test_damage_is_named_with_its_line(tmp_path: Path, lines: list[str]) -> None:
    assert "changed.jsonl:3: damaged: " in told(tmp_path, [*lines[:2], lines[2][:-9], *lines[3:]])
    assert "changed.jsonl:2: damaged: " in told(tmp_path, [lines[0], '{"event": "nap"}', *lines[1:]])
    assert "changed.jsonl:1: damaged: " in told(tmp_path, lines[1:])
    assert ":1: a log of version 99; this reads version 2" in told(
        tmp_path, [lines[0].replace('"sharp_log":2', '"sharp_log":99'), *lines[1:]]
    )
    assert ":1: num_blocks must be at least 1" in told(
        tmp_path,
        [
            lines[0].replace('"num_blocks":12,"max_model_len":4096', '"num_blocks":0,"max_model_len":4096'),
            *lines[1:],
        ],
    )
    assert ":1: max_num_seqs must be" in told(
        tmp_path, [lines[0].replace('"max_num_seqs":8', '"max_num_seqs":"8"'), *lines[1:]]
    )
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(ReplayError, match="empty is empty"):
        replay(empty)
    with pytest.raises(ReplayError, match="cannot read /nowhere: No such file"):
        replay("/nowhere")


def test_another_plan_is_named(tmp_path: Path, lines: list[str]) -> None:
    plan = next(i for i, line in enumerate(lines) if '"event":"plan"' in line)
    event = json.loads(lines[plan])
    event["scheduled"][1][0] -= 1
    changed = [*lines[:plan], json.dumps(event), *lines[plan + 1 :]]
    assert f":{plan + 1}: step 1: the log has r0: 14, the scheduler plans step 1: r0: 15" in told(
        tmp_path, changed
    )
    event = json.loads(lines[plan]) | {"checksum": 1}
    changed = [*lines[:plan], json.dumps(event), *lines[plan + 1 :]]
    assert "step 1: the same tokens, but other ids, pages, rows or copies" in told(tmp_path, changed)
    smaller = lines[0].replace('"max_num_batched_tokens":32', '"max_num_batched_tokens":8')
    assert "the scheduler plans step 1: r0: 8" in told(tmp_path, [smaller, *lines[1:]])


def test_other_pages_are_another_plan(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocator that hands out the same number of pages in another order is noticed."""
    original = BlockAllocator.allocate
    monkeypatch.setattr(BlockAllocator, "allocate", lambda self, count: original(self, count)[::-1])
    assert "step 1: the same tokens, but other ids, pages" in told(tmp_path, lines)


def test_what_does_not_follow_is_named(tmp_path: Path, lines: list[str]) -> None:
    kinds = [json.loads(line).get("event") for line in lines]
    arrive, plan, commit = kinds.index("arrive"), kinds.index("plan"), kinds.index("commit")
    assert "the scheduler plans nothing" in told(tmp_path, [lines[0], lines[plan]])
    assert "request id 'r0' is in use" in told(tmp_path, [lines[0], lines[arrive], lines[arrive]])
    assert "no plan is in flight" in told(tmp_path, [lines[0], lines[arrive], lines[commit]])
    assert "no plan is in flight" in told(tmp_path, [lines[0], '{"event":"rollback"}'])
    assert "no unfinished request 'r9'" in told(
        tmp_path, [lines[0], '{"event":"end","id":"r9","reason":"abort"}']
    )
    again = told(tmp_path, [*lines[: plan + 1], *lines[plan : plan + 1]])  # behind the first, so another
    assert "the scheduler plans step 2: r0: 1" in again
    twice = json.loads(lines[commit]) | {"sampled": [1, 2, 3]}
    assert "does not fit what came before: 3 tokens sampled for 1 logits rows" in told(
        tmp_path, [*lines[:commit], json.dumps(twice)]
    )
    late = json.loads(lines[commit]) | {"step": 8}
    assert "step 8 is committed, but step 1 is in flight" in told(
        tmp_path, [*lines[:commit], json.dumps(late)]
    )
    bare = json.loads(lines[commit]) | {"times": {"plan_s": 1.0}}
    assert "times lack launch_s" in told(tmp_path, [*lines[:commit], json.dumps(bare)])


def test_any_byte_may_be_wrong(tmp_path: Path, lines: list[str]) -> None:
    """A changed byte is a ReplayError or changes nothing that plans depend on; never another error."""
    data = ("\n".join(lines) + "\n").encode()
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    failed = 0
    for _ in range(300):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(broken)
        told = ""
        try:
            replay(path)
        except ReplayError as error:
            told = str(error)
        failed += bool(told)
        assert len(told.splitlines()) <= 1, told
    assert failed > 100


class Mine(SchedulingPolicy):
    name = "mine"

    def rank(self, request: Any) -> int:
        return -request.arrival


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    engine = Engine(FakeModel(num_blocks=9), FakeTokenizer(), engine_config(scheduling_policy=Mine()))
    run(engine, [("add", n) for n in (4, 11, 9, 13, 4)])
    engine.log.save(tmp_path / "log")
    assert replay(tmp_path / "log", Mine()).arrivals == 5
    assert "policy 'mine' does not ship" in told(tmp_path, (tmp_path / "log").read_text().splitlines())
    with pytest.raises(ReplayError, match="the log has"):
        replay(tmp_path / "log", SchedulingPolicy())


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "LOG_BYTES", 20_000)
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config())
    run(engine, [("add", n) for n in range(5)] + [("step", 0)] * 10 + [("add", n) for n in range(6)])
    assert 10 < len(engine.log) < 40
    assert engine.log.dropped > 0
    engine.log.save(tmp_path / "log")
    assert read_log(tmp_path / "log")[0].dropped == engine.log.dropped
    with pytest.raises(ReplayError, match=r"its first \d+ events were dropped"):
        replay(tmp_path / "log")


def test_a_log_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config())
    with pytest.raises(OSError):
        engine.log.save(tmp_path / "no" / "where")

    def full(self: Any) -> list[bytes]:
        raise OSError("disk full")

    monkeypatch.setattr(event_log.EventLog, "lines", full)
    with pytest.raises(OSError, match="disk full"):
        engine.log.save(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_every_option_survives_the_header(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_model_len": 200, "long_prefill_token_threshold": 5, "max_bypass": 2, "admission": "optimistic",
        "rungs": {"gemm": "reference"}, "seed": 2**64 - 1, "prefix_caching": False,
    }  # fmt: skip
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config(**options))
    run(engine, [("add", n) for n in range(12)])
    engine.log.save(tmp_path / "log")
    config = replay(tmp_path / "log").scheduler.config
    assert isinstance(config, EngineConfig)
    for name, value in options.items():
        assert getattr(config, name) == value
