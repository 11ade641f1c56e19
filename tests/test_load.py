"""Workloads in real time over a model that sleeps: what is timed and refused, the simulator beside it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config, model_config
from test_latency_target import curves_of

from sharp import bench, bench_scheduler, results, stall
from sharp.accuracy import KINDS, Comparison, compare_runs, workload_of
from sharp.bench_scheduler import Bench, verdicts
from sharp.engine import Engine
from sharp.host_time import NoModel, measure_host
from sharp.load import Load, run_load
from sharp.plan import BatchPlan, SampleOutput
from sharp.plan_times import plan_us
from sharp.predictor import HostTime, StepPredictor, StepWork
from sharp.pretend import PretendDevice
from sharp.random_model import SHAPES, IdTokenizer, RandomCheckpoint, RandomSource
from sharp.workloads import Arrival


def slow(work: StepWork) -> float:
    """3 ms, 50 us a token."""
    return 3e-3 + 50e-6 * (work.decodes + sum(count for count, _ in work.chunks))


class Sleeping(NoModel):
    """Takes known times, and answers with a hash of request and position, whoever shares its steps."""

    def __init__(self, seconds: Any = slow, num_blocks: int = 4000) -> None:
        super().__init__(model_config(8192), num_blocks, 64)
        self.seconds = seconds
        self.device = SimpleNamespace(kind="cpu", default_rung="reference", dtype="float32")
        self.budget = SimpleNamespace(weights=10**9)
        self.closed = 0

    def forward(self, plan: BatchPlan) -> BatchPlan:
        time.sleep(self.seconds(StepWork.of(plan)))
        return plan

    def sample(self, logits: Any, plan: BatchPlan) -> SampleOutput:
        places = plan.context_lens[plan.logits_seqs] + 7 * plan.token_ids[plan.logits_rows]
        return SampleOutput((places % 250 + 2).astype(np.int32), (None,) * len(places))

    def close(self) -> None:
        self.closed += 1


def engine(model: Any = None, **options: Any) -> Engine:
    options = {"block_size": 64, "max_num_batched_tokens": 128, **options}
    return Engine(model or Sleeping(), FakeTokenizer(), engine_config(**options))


def test_requests_come_when_the_workload_says() -> None:
    one = engine()
    workload = [Arrival(0.0, 20, 3), Arrival(0.1, 20, 2), Arrival(0.1, 9000, 2)]
    start = time.perf_counter()
    load = run_load(one, workload)
    one.close()
    assert 0.1 < load.seconds <= time.perf_counter() - start
    assert set(load.ttft) == {0, 1}
    assert load.refused == 1  # 9,000 tokens never fit
    assert load.itl.count == 3
    assert {place: len(ids) for place, ids in load.answers.items()} == {0: 3, 1: 2}
    assert (load.answer_tokens, load.unfinished) == (5, 0)
    assert load.tokens == 20 + 2 + 20 + 1
    assert {place: len(times) for place, times in load.times.items()} == {0: 3, 1: 2}
    for place, times in load.times.items():
        assert times[0] == pytest.approx(load.ttft[place], abs=1e-9)
        assert list(times) == sorted(times)
    assert sum(np.diff(load.times[0])) + np.diff(load.times[1]) == pytest.approx(3 * 5e-3, abs=0.1)
    assert load.ttft_of([1, 5]).count == 1
    assert load.ttft_of().max < 0.1


def test_prompts_may_be_given() -> None:
    """Answers are a hash of the last token and the position: those of the ids that were given."""
    one, prompts = engine(), [[5, 6, 7], [9] * 30]
    workload = [Arrival(0.0, len(ids), 1) for ids in prompts]
    load = run_load(one, workload, prompts=prompts)
    one.close()
    assert load.answers == {place: ((len(ids) + 7 * ids[-1]) % 250 + 2,) for place, ids in enumerate(prompts)}


def test_standing_streams_run_before_the_clock_and_are_ended_with_it() -> None:
    one = engine()
    standing = [Arrival(0.0, 10, 4000)] * 3
    load = run_load(one, [Arrival(0.05, 100, 4), Arrival(9.0, 10, 1)], standing=standing, duration=0.3)
    assert not one.has_unfinished
    one.close()
    assert 0.3 <= load.seconds < 0.6
    assert set(load.answers) == {0, -1, -2, -3}
    assert load.itl.count == pytest.approx(3 * load.steps, abs=8)
    assert set(load.ttft) == {0}
    assert load.unfinished == 0
    assert load.answer_tokens < sum(map(len, load.answers.values()))  # the first tokens came before the clock


def test_streams_that_end_begin_again() -> None:
    """Three of 12 tokens over and over: the same answer to the same prompt, of which one token alone is
    computed; the times between two requests of a stream are none between tokens."""
    one = engine(prefix_caching=True, max_model_len=200)
    standing = [Arrival(0.0, 129, 12)] * 3
    load = run_load(one, [Arrival(0.1, 20, 2)], standing=standing, again=True, duration=0.6)
    assert not one.has_unfinished
    hits = one.scheduler.pages.hit_tokens
    one.close()
    for stream in (-1, -2, -3):
        places = range(stream, min(load.answers) - 1, -3)
        rounds = [load.answers[place] for place in places if place in load.answers]
        assert len(rounds) > 3
        assert all(len(ids) == 12 for ids in rounds[:-1])
        assert all(a[: len(b)] == b[: len(a)] for a, b in pairwise(rounds))
    again = len(load.answers) - 1 - 3
    assert 128 * again <= hits <= 128 * (again + 3)  # those that were begun and had no token yet
    assert load.tokens == pytest.approx(load.answer_tokens + 20, abs=12)
    assert load.itl.max < 0.1
    assert load.refused == load.unfinished == 0


def test_a_full_queue_is_counted() -> None:
    one = engine(max_num_seqs=1, max_queue_len=1)
    load = run_load(one, [Arrival(0.0, 10, 30)] * 6)
    one.close()
    assert load.refused >= 3
    assert len(load.answers) == 6 - load.refused


def test_the_engines_error_ends_the_run() -> None:
    model = FakeModel(block_size=64, fail_in="forward", fail_at=3, error=OSError("gone"))
    one = engine(model)
    with pytest.raises(OSError, match="gone"):
        run_load(one, [Arrival(0.0, 10, 30)])
    one.close()


def test_the_simulator_says_what_a_real_engine_does() -> None:
    """Over a model of known step times: the same steps, and times within what a busy machine's sleep adds."""
    predictor = StepPredictor(*curves_of(slow), host_s=HostTime(2e-4, 1e-5))
    config = engine_config(block_size=64, max_num_batched_tokens=256, max_num_seqs=16, max_model_len=2048)
    found = list(compare_runs(Sleeping(), config, predictor, 1.0))
    assert [one.name for one in found] == list(KINDS)
    for one in found:
        assert one.predicted.completed == one.predicted.requests == len(one.real.ttft)
        assert one.real.steps == pytest.approx(one.predicted.steps, rel=0.3)
        assert set(one.errors) == {"TTFT p50", "TTFT p95", "ITL p50", "ITL p95"}
        assert -0.8 < one.errors["ITL p50"] < 0.1  # a sleep is never shorter than asked for
        assert "requests; TTFT p50" in one.text()
        assert 0.9 < one.drift < 3.0


def test_workloads_keep_a_device_half_busy() -> None:
    predictor = StepPredictor(*curves_of(slow))
    config = engine_config(block_size=64, max_num_batched_tokens=256, max_num_seqs=16)
    for kind in KINDS:
        workload = workload_of(kind, 30.0, predictor, config, 4000, 4096)
        assert len(workload) >= 8
        together = KINDS[kind][2]
        assert workload[0].arrival_s == workload[together - 1].arrival_s
        assert max(a.prompt_tokens + a.output_tokens for a in workload) <= 4096


def test_the_stall_scenario_and_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocking stalls, the others do not; all answers are the same; the rows can be recorded."""
    predictor = StepPredictor(*curves_of(slow), host_s=HostTime(2e-4, 1e-5))
    config = engine_config(block_size=64, max_num_batched_tokens=128, max_num_seqs=16, max_model_len=8192)
    model = Sleeping()
    made = Bench(model, config, predictor, "CPU Test", None, "0123abc")
    tiny = stall.Scenario(
        streams=3, context=20, answer=40, prompt=500, prompt_s=0.25, long=1500, long_s=0.6, duration=1.0
    )
    rows = {row["case"]: row for row in made.stall(tiny)}
    out = capsys.readouterr().out
    assert "answers that differ between policies: 0" in out
    assert "A: p99 ITL" in out
    assert "B: " in out
    assert model.closed == 0  # lent to four engines
    values = {name: rows[f"stall/{name}"]["value"] for name in ("decode-only", "blocking", "chunked-latency")}
    assert values["blocking"] > 2 * values["decode-only"]
    assert values["blocking"] > values["chunked-latency"]
    assert rows["stall/blocking"]["ratio"] < 0.5
    assert rows["stall/blocking tokens"]["unit"] == "token/s"
    assert rows["stall/chunked-throughput ttft-p95"]["value"] > 0
    assert "stall/decode-only ttft-p95" not in rows
    assert all(set(row) == set(results.FIELDS) and row["err"] == 0 for row in rows.values())
    assert all(results.format_row(row) for row in rows.values())


def test_answers_are_compared_as_far_as_both_go() -> None:
    assert stall.disagreements([{0: (1, 2, 3)}, {0: (1, 2)}, {0: (1, 2, 3, 4), 1: (5,)}]) == 0
    assert stall.disagreements([{0: (1, 2)}, {0: (1, 2, 3)}, {0: (1, 2, 4), 2: ()}]) == 1
    assert stall.disagreements([{0: (1,), 1: (2,)}, {0: (2,), 1: (3,)}]) == 2


def test_the_two_points_in_words() -> None:
    from sharp.latencies import Spread

    def load(p99: float, tokens: int, ttft: float) -> Load:
        return Load(1.0, Spread(9, p99, p99, p99, p99), {0: ttft}, {}, tokens, 1, 1, 0, 0)

    mixed = {
        "chunked-latency": load(1.4, 90, 3),
        "chunked-throughput": load(4, 99, 5),
        "blocking": load(9, 100, 2),
    }
    a, b, last = verdicts(load(1.0, 1, 1), mixed)
    assert a == "A: p99 ITL 1.40x decode-only's (at most 1.5), 90.0% of the best throughput: met"
    assert "99.0% of the best throughput (at least 97 %), p99 ITL 4.00x decode-only's: met" in b
    assert b.endswith("2.50x blocking's (at most 2): missed")
    assert last == "blocking: p99 ITL 9.00x decode-only's, 100.0% of the best throughput"
    mixed["chunked-latency"], mixed["chunked-throughput"] = load(1.6, 90, 3), load(4, 96, 3)
    a, b, _ = verdicts(load(1.0, 1, 1), mixed)
    assert a.endswith("missed")
    assert "missed; p95" in b
    assert b.endswith("1.50x blocking's (at most 2): met")


def test_packed_prefill_reads_the_weights_less_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_scheduler.PACKED_TOKENS, "cpu", 2048)

    def fast(work: StepWork) -> float:
        return 2e-3

    config = engine_config(block_size=64, max_num_batched_tokens=128, max_num_seqs=16, max_model_len=4096)
    made = Bench(Sleeping(fast), config, StepPredictor(*curves_of(slow)), "CPU Test", None, "0123abc")
    rows = {row["case"]: row for row in made.prefill()}
    assert "32 passes, 32.00 GB of weights read" in capsys.readouterr().out
    assert rows["prefill/packed"]["ratio"] > 2
    assert rows["prefill/one-by-one"]["ratio"] == 1
    assert rows["prefill/packed ttft-p95"]["value"] < rows["prefill/one-by-one ttft-p95"]["value"]


def test_plan_is_timed_with_everybody_decoding() -> None:
    found = plan_us(20, 50, steps=30)
    assert 0 < found.best <= found.median < 1e5
    assert 0 <= found.cpu < 2 * found.median + 1e4


def test_the_bench_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    config = engine_config(block_size=64)
    made = Bench(Sleeping(), config, StepPredictor(*curves_of(slow)), "CPU Test", None, "0123abc")
    seen: list[Any] = []

    def opened(*words: Any) -> Bench:
        seen.append(words)
        return made

    monkeypatch.setattr(bench_scheduler, "open_bench", opened)
    monkeypatch.setattr("sharp.plan_times.PLAN_STEPS", 5)
    commit = "012345678"
    monkeypatch.setattr("sharp.bench_ops.check_commit", lambda commit: commit)
    out = tmp_path / "rows.json"
    words = ["--part", "plan", "--out", str(out), "--commit", commit]
    bench.main(["scheduler", *words])
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(printed[-1])
    assert json.loads(out.read_text()) == rows
    assert [row["case"] for row in rows] == ["plan/256+1000", "plan/1024"]
    assert seen == [(None, "auto", "auto", commit)]
    missed = made.row("plan/9", 1.0, "us", 1.0, 1.5)
    monkeypatch.setattr(Bench, "plan", lambda self, times: [*rows, missed])
    bench.main(["scheduler", *words])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == rows == json.loads(out.read_text())
    assert "missed, no row: plan/9, 1.5 times its tolerance" in lines
    for bad in (["--duration", "0"], ["--streams", "-1"], ["--probe-s", "nan"], ["--part", "x"]):
        with pytest.raises(SystemExit) as caught:
            bench.main(["scheduler", *bad])
        assert caught.value.code == 2


def test_rows_are_kept_part_by_part(tmp_path: Any) -> None:
    """A file grows by what is measured at the same commit; answers that differ take all stalls with them."""
    config = engine_config(block_size=64)
    out, said = tmp_path / "rows.json", list[str]()

    def row(case: str, err: float = 0.0, commit: str = "0123abc") -> dict[str, Any]:
        return Bench(Sleeping(), config, None, "CPU Test", None, commit).row(case, 1.0, "ms", 1.0, err)

    def cases() -> list[str]:
        return [one["case"] for one in json.loads(out.read_text())]

    def broken() -> Any:
        yield row("stall/a")
        yield row("stall/a tokens")
        raise TimeoutError

    results.RowFile(out, "fff0000").take([row("plan/1", commit="fff0000")], said.append)
    results.RowFile(out, "0123abc").take([row("prefill/packed")], said.append)
    assert cases() == ["prefill/packed"]
    with pytest.raises(TimeoutError):
        results.RowFile(out, "0123abc").take(broken(), said.append)
    assert cases() == ["prefill/packed", "stall/a", "stall/a tokens"]
    results.RowFile(out, "0123abc").take([row("simulate/x", 1.2), row("stall/b", 2.0)], said.append)
    assert cases() == ["prefill/packed"]
    assert said == [
        "missed, no row: simulate/x, 1.2 times its tolerance",
        "missed, no row: stall/b, 2.0 times its tolerance",
    ]  # fmt: skip


def test_a_file_of_something_else_is_told(tmp_path: Any) -> None:
    for number, text in enumerate(("{", "[1]", '[{"case": "x"}]', "7")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{number}.json, which holds something else than rows"):
            results.RowFile(path, "0123abc")
        assert path.read_text() == text
    with pytest.raises(ValueError, match=", a folder; the name of a file is required"):
        results.RowFile(tmp_path, "0123abc")


def test_a_model_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["scheduler", "--model", "random:gpt-9", "--commit", "0" * 9])
    assert "not measured" in capsys.readouterr().out


def test_random_models() -> None:
    checkpoint = RandomCheckpoint("smollm2-135m")
    name = "model.layers.3.mlp.up_proj.weight"
    weight = checkpoint.read(name)
    assert weight.shape == (1536, 576)
    assert (weight == checkpoint.read(name)).all()
    assert np.linalg.norm(weight, axis=1) == pytest.approx(np.ones(1536), rel=0.2)
    other = RandomCheckpoint("smollm2-135m", seed=1).read(name)
    assert (weight != other).mean() > 0.99  # another seed, another model
    assert weight.reshape(-1).mean() == pytest.approx(0, abs=1e-3)
    gate = checkpoint.read(name.replace("up_proj", "gate_proj"))
    assert (weight != gate).mean() > 0.99
    assert abs(np.corrcoef(weight[0], weight[1])[0, 1]) < 0.2  # rows are no copies of each other
    source = RandomSource("x", SHAPES["qwen2.5-7b"])
    for name in (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.norm.weight",
    ):
        whole = source.rows(name, 0, 512)
        assert whole.dtype == ml_dtypes.bfloat16
        for start, stop in ((0, 1), (7, 300), (511, 512), (3, 3)):  # past the pool's end, too
            assert (source.rows(name, start, stop) == whole[start:stop]).all()
    assert 0.05 < source.rows("model.layers.1.self_attn.k_proj.bias", 0, 512).astype(float).std() < 0.2
    assert SHAPES["qwen2.5-7b"].num_parameters == pytest.approx(7.62e9, rel=0.01)
    assert SHAPES["llama-3.2-1b"].num_parameters == pytest.approx(1.24e9, rel=0.01)
    with pytest.raises(ValueError, match=r"one of smollm2-135m, llama-3\.2-1b, qwen2\.5-7b, not 'x'"):
        RandomCheckpoint("x")
    with pytest.raises(ValueError, match="prompts are token ids"):
        IdTokenizer().encode("text")


def test_the_engines_own_time() -> None:
    found = measure_host(model_config(), 8)
    assert 0 < found.before < 0.1
    assert 0 < found.after < 0.1
    assert 0 <= found.before_each < 0.05
    assert 0 <= found.after_each < 0.05


def test_the_engines_own_time_beside_a_device() -> None:
    """Waiting for steps of 10 ms is no part of it, launching them for 1 ms is."""
    config, calls = model_config(4096), list[int]()

    def seconds(plan: BatchPlan) -> float:
        calls.append(plan.num_seqs)
        return 10e-3

    device = PretendDevice(config, seconds, launch_s=1e-3)
    found = measure_host(config, 4, model=device, max_tokens=256)
    assert 1e-3 < found.before < 6e-3
    assert 0 < found.after + found.before < 8e-3
    assert set(calls) == {1, 4}
    calls.clear()
    measure_host(config, 4, model=device, max_tokens=255)  # four prompts are no step of it
    assert not calls


def test_comparison_names_the_worst() -> None:
    from sharp.latencies import Spread

    spread = Spread(9, 1.0, 2.0, 3.0, 4.0)
    simulated: Any = SimpleNamespace(ttft=spread, itl=replace(spread, p95=2.4))
    real: Any = SimpleNamespace(ttft_of=lambda: replace(spread, p50=0.9), itl=spread)
    found = Comparison("x", simulated, real)
    assert found.worst == pytest.approx(0.2)
    assert found.errors["TTFT p50"] == pytest.approx(1 / 9)
