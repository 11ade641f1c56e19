"""Workload files, the simulator against hand-made arithmetic and the command's words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import model_config
from test_latency_target import Device, curves_of, gpu_like
from test_probe import probe

from sharp.__main__ import main
from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.host_time import NoModel
from sharp.latencies import Spread, TokenClock
from sharp.plan import BatchPlan, SampleOutput
from sharp.policies import SchedulingPolicy
from sharp.predictor import HostTime, StepPredictor, StepWork
from sharp.quiet import quiet_steps, skip
from sharp.random_model import IdTokenizer
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler
from sharp.simulate import Noisy, Simulated, simulate
from sharp.workloads import Arrival, WorkloadError, random_traffic, read_workload, write_workload


class Fixed:
    """A step takes a second, whatever it holds."""

    def seconds(self, work: StepWork) -> float:
        return 1.0


def run(workload: list[Arrival], device: Any = None, **options: Any) -> Simulated:
    settings: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 4096}
    config = EngineConfig(**{**settings, **options})
    return simulate(
        workload, device or Fixed(), config, num_blocks=options.get("num_blocks", 500), max_model_len=4096
    )


def test_two_requests_by_hand() -> None:
    """0-1 s: a's prompt; then b's 100 tokens beside a's decodes: 63 and 37; each has its own ITL of 1 s."""
    found = run([Arrival(0.0, 64, 4), Arrival(0.5, 100, 2)])
    assert found.ttft == Spread.of([1.0, 2.5])  # b: read in steps 2 and 3, which ends at 3 s
    assert found.itl == Spread(4, 1.0, 1.0, 1.0, 1.0)
    assert (found.steps, found.seconds, found.output_tokens, found.prompt_tokens) == (4, 4.0, 6, 164)
    assert found.tokens_per_s == 1.5


def test_steps_vary_as_they_were_seen_to() -> None:
    """Half of the steps take a second, half two: percentiles and the whole say so; a seed repeats them."""
    traffic = [Arrival(0.0, 8, 400)] * 2

    def noisy(seed: int) -> Simulated:
        return run(traffic, Noisy(Fixed(), (1.0, 2.0), seed))

    found = noisy(0)
    assert found.itl.p95 == found.itl.max == 2.0
    assert 560 < found.seconds < 640
    assert noisy(0).seconds == found.seconds != noisy(1).seconds
    assert run(traffic, Noisy(Fixed(), ())).seconds == 400


def test_idle_time_is_jumped_over() -> None:
    found = run([Arrival(5.0, 10, 1), Arrival(1000.0, 10, 1)])
    assert (found.steps, found.seconds) == (2, 996.0)
    assert found.ttft.max == 1.0


def test_the_queue_and_refusals() -> None:
    crowd = [Arrival(0.0, 8, 3) for _ in range(10)]
    found = run([*crowd, Arrival(0.0, 5000, 1)], max_queue_len=6)
    assert found.refused == {"QueueFull": 4, "RequestTooLarge": 1}
    assert found.completed == 6
    assert found.queue_max == 2
    assert found.queue_mean == pytest.approx(2 * 3 / 6)
    assert found.running_max == 4


def test_preemptions_are_counted() -> None:
    found = run([Arrival(0.0, 60, 80)] * 3, num_blocks=5, admission="optimistic", max_bypass=0)
    assert found.preemptions > 0
    assert found.completed == 3


def test_policies_differ_as_they_should() -> None:
    traffic = random_traffic(300, 20, prompt=(16, 2000), output=(4, 100), seed=3)
    options = {"max_num_batched_tokens": 1024, "max_num_seqs": 64}
    by = {name: run(traffic, Device(), scheduling_policy=name, **options) for name in ("fcfs", "blocking")}
    assert all(found.completed == 300 for found in by.values())
    assert by["blocking"].itl.p99 > 1.2 * by["fcfs"].itl.p99
    assert by["blocking"].itl.max > 3 * by["fcfs"].itl.max


def test_priorities_are_the_files() -> None:
    crowd = [Arrival(0.0, 64, 1, priority=5), Arrival(0.0, 64, 1, priority=5), Arrival(0.0, 64, 1, -5)]
    seen: list[str] = []
    simulate(
        crowd, Fixed(), EngineConfig(scheduling_policy="priority", max_num_seqs=1), num_blocks=9,
        max_model_len=100, look=lambda scheduler, now: seen.extend(r.request_id for r in scheduler.running),
    )  # fmt: skip
    assert seen == ["2", "0", "1"]


@pytest.mark.parametrize("overlap", [False, True])
def test_decodes_in_one_go_change_nothing(overlap: bool) -> None:
    """Runs of decodes are computed at once where nothing can happen in between; every number stays."""
    host = HostTime(4e-4, 1e-5, 3e-4, 2e-5)
    predictor = StepPredictor(*curves_of(gpu_like), host, overlap=overlap)
    traffic = random_traffic(200, 30, prompt=(1, 600), output=(1, 300), seed=5)

    options: dict[str, Any] = {"max_num_batched_tokens": 512, "max_num_seqs": 2, "overlap": overlap}
    watched = Watched()
    slowly, quickly = (run(traffic, predictor, scheduling_policy=p, **options) for p in (watched, "fcfs"))
    assert quickly.queue_mean > 0.1
    assert len(watched.steps) == slowly.steps == quickly.steps
    for name in ("completed", "output_tokens", "queue_max", "running_max"):
        assert getattr(slowly, name) == getattr(quickly, name)
    for name in ("seconds", "queue_mean"):
        assert getattr(slowly, name) == pytest.approx(getattr(quickly, name))
    for name in ("itl", "ttft"):
        for field in ("count", "p50", "p95", "p99", "max"):
            slow, quick = getattr(getattr(slowly, name), field), getattr(getattr(quickly, name), field)
            assert slow == pytest.approx(quick), (name, field)


def test_overlap_by_hand() -> None:
    """A step is planned when the one before it starts: b, which comes at 0.5 s, is not in step 2, which was
    planned at 0 s, but in 3 and 4; nobody's tokens come later than a second each."""
    looks: list[tuple[int, float]] = []
    found = simulate(
        [Arrival(0.0, 64, 4), Arrival(0.5, 100, 2)], Fixed(),
        EngineConfig(max_num_batched_tokens=64, max_num_seqs=4, overlap=True), num_blocks=500,
        max_model_len=4096, look=lambda scheduler, now: looks.append((scheduler.step, now)),
    )  # fmt: skip
    assert looks == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 2.0), (5, 3.0)]
    assert found.ttft == Spread.of([1.0, 3.5])
    assert found.itl == Spread(4, 1.0, 1.0, 1.0, 1.0)
    assert (found.steps, found.seconds, found.output_tokens) == (5, 5.0, 6)


def test_the_hosts_time_by_hand() -> None:
    """0.3 s to plan and launch a step, 0.2 s to hand its tokens over, 1 s on the device. It is hidden while
    another step runs; the first step waits for it, and every token is handed over."""

    class WithHost(Fixed):
        def parts(self, work: StepWork) -> tuple[float, float, float]:
            return 0.3, 1.0, 0.2

    traffic = [Arrival(0.0, 64, 4)]
    for overlap, ends in ((False, [1.5, 3.0, 4.5, 6.0]), (True, [1.5, 2.5, 3.5, 4.5])):
        found = run(traffic, WithHost(), overlap=overlap)
        assert found.ttft.max == pytest.approx(ends[0])
        assert found.itl.max == pytest.approx(ends[1] - ends[0])
        assert found.seconds == pytest.approx(ends[-1])


class Watched(SchedulingPolicy):
    """Its observe() is its own, so each step is planned; it knows who had how many tokens."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[str, int], ...]] = []

    def observe(self, plan: BatchPlan, seconds: float) -> None:
        self.steps.append(tuple(zip(plan.request_ids, np.diff(plan.cu_seqlens_q).tolist(), strict=True)))


def test_the_simulators_plans_are_the_engines() -> None:
    """Requests that are there from the start: whatever a step takes, an engine with overlap plans the
    same."""
    traffic = [Arrival(0.0, 5 + 13 * i % 90, 2 + 7 * i % 23) for i in range(30)]
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "prefix_caching": False}
    for overlap in (False, True):
        config = EngineConfig(**options, overlap=overlap, block_size=4)
        model = NoModel(model_config(), 200, 4)
        engine = Engine(model, IdTokenizer(), config)
        for number, arrival in enumerate(traffic):
            params = SamplingParams(max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True)
            engine.add_request([1] * arrival.prompt_tokens, params, str(number))
        while engine.has_unfinished:
            engine.step()
        real = [record.scheduled for record in engine.stats.history]
        watched = Watched()
        simulate(
            traffic, Fixed(), replace(config, scheduling_policy=watched), num_blocks=200, max_model_len=4096
        )
        assert watched.steps == real


def test_skipped_steps_are_those_that_plans_would_have_made() -> None:
    """Two schedulers side by side, one skipping what is quiet: then the same plan comes, token for token."""

    def ready(**options: Any) -> Scheduler:
        settings: dict[str, Any] = {"prefix_caching": False, "block_size": 4, "max_num_seqs": 3, **options}
        scheduler = Scheduler(EngineConfig(**settings), 60, 400)
        for name, tokens in (("a", 30), ("b", 20), ("c", 25), ("waits", 5)):
            params = SamplingParams(max_tokens=tokens, temperature=0.0)
            scheduler.add(Request(name, None, [3] * tokens, params, 0))
        return scheduler

    def step(scheduler: Scheduler) -> BatchPlan:
        plan = scheduler.plan()
        assert plan is not None
        rows = len(plan.logits_rows)
        scheduler.commit(plan, SampleOutput(np.ones(rows, np.int32), (None,) * rows))
        scheduler.check()
        return plan

    planned, skipping = ready(), ready()
    assert quiet_steps(skipping) == 0
    step(planned)
    step(skipping)
    quiet = quiet_steps(skipping)
    assert quiet == 18  # b's last token but one
    skip(skipping, quiet, 1)
    skipping.check()
    for _ in range(quiet):
        assert step(planned).num_decodes == 3
    assert skipping.step == planned.step
    for _ in range(10):
        ours, theirs = step(skipping), step(planned)
        assert ours.request_ids == theirs.request_ids
        for array in ("token_ids", "positions", "slot_mapping", "block_table", "context_lens"):
            assert (getattr(ours, array) == getattr(theirs, array)).all(), array
    with pytest.raises(ValueError, match=r"1000 steps cannot be skipped; \d+ are quiet"):
        skip(skipping, 1000, 1)
    ahead = skipping.plan()
    assert ahead is not None
    with pytest.raises(ValueError, match="1 steps cannot be skipped"):
        skip(skipping, 1, 1)
    for options in ({"admission": "optimistic"}, {"prefix_caching": True}):
        other = ready(**options)
        step(other)
        assert quiet_steps(other) == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options", [{"long_prefill_token_threshold": 1}, {"max_num_batched_tokens": 1, "max_num_seqs": 1}]
)
def test_prompts_read_a_token_at_a_time(options: dict[str, int], overlap: bool) -> None:
    """Chunks of one token look like decodes, but give no token but at the prompt's end."""
    config = EngineConfig(overlap=overlap, **options)
    found = simulate([Arrival(0.0, 5, 4)] * 2, Fixed(), config, num_blocks=9, max_model_len=99)
    assert (found.completed, found.output_tokens) == (2, 8)
    together = 1 if options.get("max_num_seqs") else 2
    assert found.steps == (5 + 3) * 2 // together
    assert found.ttft.p50 >= 5


# Latencies -----------------------------------------------------------------------------------------


def test_spreads() -> None:
    assert Spread.of([]) == Spread(0, 0, 0, 0, 0)
    values = list(range(1, 101))
    assert Spread.of(values) == Spread(100, 50, 95, 99, 100)
    assert Spread.of([3.0, 1.0], [1, 99]) == Spread(100, 1.0, 1.0, 1.0, 3.0)
    assert "p99 99000.00" in Spread.of(values).ms()


def test_the_clock_keeps_requests_apart() -> None:
    clock = TokenClock()
    clock.arrive("a", 1.0)
    clock.arrive("b", 2.0)
    for name, now in (("a", 3.0), ("a", 4.0), ("b", 4.0), ("a", 6.0), ("b", 9.0)):
        clock.token(name, now)
    assert clock.ttft == {"a": 2.0, "b": 2.0}
    assert clock.itl == Spread(3, 2.0, 5.0, 5.0, 5.0)
    clock.forget_gaps()
    clock.token("a", 10.0)  # reaches over the moment
    clock.token("a", 10.5)
    assert clock.itl == Spread(1, 0.5, 0.5, 0.5, 0.5)
    clock.end("a")
    assert clock.ttft_of(["b", "z"]).count == 1


# Files -----------------------------------------------------------------------------------------------


def test_workloads_survive_a_file(tmp_path: Path) -> None:
    traffic = random_traffic(50, 100, prompt=(1, 9), output=(2, 2), seed=1, day=True)
    assert all(
        1 <= a.prompt_tokens <= 9 and a.output_tokens == 2 and 0 <= a.arrival_s <= 100 for a in traffic
    )
    write_workload(tmp_path / "w", reversed(traffic))
    assert read_workload(tmp_path / "w") == traffic


def test_a_day_has_a_peak() -> None:
    times = np.array(
        [a.arrival_s for a in random_traffic(5000, 24, prompt=(1, 1), output=(1, 1), seed=2, day=True)]
    )
    assert (abs(times - 12) < 2).sum() > 8 * ((times < 2) | (times > 22)).sum()


GOOD = '{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2}\n'
BAD_LINES = [
    ('{"arrival_s": -1, "prompt_tokens": 5, "output_tokens": 2}', "arrival_s must be at least 0, not -1"),
    ('{"arrival_s": 1e999, "prompt_tokens": 5, "output_tokens": 2}', "arrival_s"),
    ('{"arrival_s": NaN, "prompt_tokens": 5, "output_tokens": 2}', "malformed"),
    ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 2}', "prompt_tokens must be in .*, not 0"),
    ('{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2147483648}', "output_tokens must be in"),
    ('{"arrival_s": 0, "prompt_tokens": 5.5, "output_tokens": 2}', "prompt_tokens"),
    ('{"arrival_s": 0, "prompt_tokens": 5}', "output_tokens"),
    ('{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2, "prio": 1}', "prio"),
    ('{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2, "priority": 1e10}', "priority"),
    ("[1, 2]", "array"),
    ("nope", "malformed"),
    ("\xff", "malformed|Invalid|utf"),
    ("[" * 100_000, "a line is"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line.encode("latin-1"))
    with pytest.raises(WorkloadError, match=rf"w.jsonl:3: .*({told})") as caught:
        read_workload(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_a_file_without_requests(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(data)
    with pytest.raises(WorkloadError, match="holds no requests"):
        read_workload(path)


# The command -----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "w.jsonl").write_text(GOOD * 20)
    (tmp_path / "p.json").write_bytes(probe().to_json())
    return ["simulate", "--workload", str(tmp_path / "w.jsonl"), "--probe", str(tmp_path / "p.json")]


def test_a_table_of_policies(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "fcfs", "--policy", "latency-target", "--set", "target_itl_ms=50"]
    assert main([*files, *words, "--set", "max_num_seqs=4", "--set", "prefix_caching=False"]) == 0
    out = capsys.readouterr().out
    assert "max_num_seqs 4" in out
    head, *rows = out.splitlines()[1:]
    assert head.split() == ["fcfs", "latency-target"]
    assert next(row for row in rows if row.startswith("completed")).split()[1:] == ["20", "20"]


def test_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["completed"] == 20
    assert found["runs"][0]["itl"]["p50"] > 0
    assert found["options"]["block_size"] == 16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy", "nope"], "scheduling_policy must be one of fcfs, .*, not 'nope'"),
        (["--policy", "latency-target"], "needs target_itl_ms"),
        (["--set", "target_itl_ms=5"], "goes with --policy latency-target"),
        (["--policy", "latency-target", "--set", "target_itl_ms=nan"], "positive number of milliseconds"),
        (["--policy", "latency-target", "--set", "target_itl_ms=0.001"], "cannot be met: .* takes"),
        (["--set", "max_num_seqs=0"], "max_num_seqs must be at least 1, not 0"),
        (["--set", "max_num_seqs=99999999999"], "max_num_seqs must be at most 2147483647"),
        (["--set", "max_num_seqs=many"], "max_num_seqs is 'many'; it must be a whole number"),
        (["--set", "seed=1"], "--set is 'seed=1'; it must be OPTION=VALUE, OPTION one of"),
        (["--set", "max_num_seqs"], "--set is 'max_num_seqs'"),
        (["--set", "prefix_caching=no"], "prefix_caching is 'no'; it must be true or false"),
        (["--set", "admission=hope"], "admission must be one of"),
    ],
)  # fmt: skip
def test_wrong_words(
    files: list[str], words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main([*files, *words]) == 2
    err = capsys.readouterr().err
    assert re.search(told, err), err
    assert len(err.splitlines()) == 1


def test_wrong_files(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data, told in ((b"{}", "missing required field"), (b"\xff", ""), (b'{"model": 1}', "model")):
        (tmp_path / "bad.json").write_bytes(data)
        assert main([*files[:3], "--probe", str(tmp_path / "bad.json")]) == 2
        err = capsys.readouterr().err
        assert "bad.json is not what `sharp probe --json` prints" in err
        assert told in err
    assert main([*files[:3], "--probe", "/nowhere"]) == 2
    assert "cannot read /nowhere: No such file" in capsys.readouterr().err
    assert main([files[0], "--workload", "/nowhere", *files[3:]]) == 2
    assert "cannot read /nowhere" in capsys.readouterr().err
