"""The scheduler measured: plan(), stalls under four policies, packed prefill, the simulator beside reality.

Knows which cases there are and what makes a row. Refuses to know kernels: a model is three verbs, and runs on
whatever device is there. Answers are compared between the runs before any of their times counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from sharp import results
from sharp.accuracy import compare_runs
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.host_time import measure_host
from sharp.load import Load, run_load
from sharp.plan import SampleOutput
from sharp.predictor import StepPredictor
from sharp.random_model import SHAPES, RandomCheckpoint
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler
from sharp.stall import CPU, GPU, Scenario, disagreements, run_stall, with_engine
from sharp.workloads import Arrival

PARTS = ("plan", "stall", "prefill", "simulate")
SOURCES = (
    "sharp/scheduler.py", "sharp/running.py", "sharp/waiting.py", "sharp/pagebook.py", "sharp/batching.py",
    "sharp/blocks.py", "sharp/policies.py", "sharp/latency_target.py", "sharp/predictor.py",
    "sharp/engine.py", "sharp/pipeline.py", "sharp/flights.py", "sharp/simulate.py", "sharp/quiet.py",
)  # fmt: skip
PLAN_STEPS, PLAN_CONTEXT = 400, 1024
PROMPTS, SHORTEST, LONGEST = 32, 64, 512  # of the packed prefill
STEP_TOKENS = {"cuda": 2048, "cpu": 256}  # the step budget of the stall runs
PACKED_TOKENS = {"cuda": 8192, "cpu": 1024}
PROBE_S = 14.0


def plan_us(running: int, waiting: int, steps: int = PLAN_STEPS) -> tuple[float, float]:
    """Median and best microseconds of plan() with so many decoding behind PLAN_CONTEXT tokens, and so many in
    the queue for which there are no pages."""
    answer = steps + 10
    pages = -(-(PLAN_CONTEXT + answer - 1) // 64)
    config = EngineConfig(
        max_num_seqs=running + waiting, max_num_batched_tokens=running * PLAN_CONTEXT + waiting,
        max_queue_len=max(running, waiting),
    )  # fmt: skip
    scheduler = Scheduler(config, running * pages + pages - 1, PLAN_CONTEXT + answer)
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)

    def step() -> tuple[float, int]:
        start = time.perf_counter()
        plan = scheduler.plan()
        taken = time.perf_counter() - start
        assert plan is not None
        rows = len(plan.logits_rows)
        scheduler.commit(plan, SampleOutput(np.ones(rows, np.int32), (None,) * rows))
        return taken, plan.num_decodes

    for first, stop in ((0, running), (running, running + waiting)):
        for i in range(first, stop):  # prompts with nothing in common
            scheduler.add(Request(str(i), None, [i] * PLAN_CONTEXT, params, 0))
        step()  # the first one reads all prompts that run
    taken, decodes = zip(*(step() for _ in range(steps)), strict=True)
    assert set(decodes) == {running}
    assert len(scheduler.waiting) == waiting
    return statistics.median(taken) * 1e6, min(taken) * 1e6


@dataclass(frozen=True)
class Bench:
    """A model on a device, its predictor, and how rows are made of it."""

    model: Any
    config: EngineConfig
    predictor: StepPredictor
    gpu: str
    driver: str | None
    commit: str
    say: Callable[[str], object] = print
    noise: tuple[float, ...] = ()  # of single steps, see Curves.noise

    def row(self, case: str, value: float, unit: str, us: float, err: float, **more: Any) -> dict[str, Any]:
        return results.make_row(
            op="scheduler", case=case, rung=self.model.device.default_rung, dtype=self.model.device.dtype,
            value=round(value, 4), unit=unit, us=round(us, 2), err=round(err, 3), commit=self.commit,
            source_hash=results.source_hash(SOURCES), date=date.today().isoformat(), gpu=self.gpu,
            driver=self.driver, **more,
        )  # fmt: skip

    def stall(self, scenario: Scenario) -> list[dict[str, Any]]:
        """p99 ITL of each policy, with throughput and TTFT in rows of their own, and the two points."""
        runs = run_stall(scenario, self.model, self.config, self.predictor, say=self.say)
        mixed = {name: load for name, load in runs.items() if name != "decode-only"}
        wrong = disagreements(load.answers for load in runs.values())
        self.say(f"answers that differ between policies: {wrong}")
        alone, rows = runs["decode-only"], []
        for name, load in runs.items():
            ratio = alone.itl.p99 / load.itl.p99
            rows.append(
                self.row(
                    f"stall/{name}",
                    load.itl.p99 * 1e3,
                    "ms",
                    load.itl.p99 * 1e6,
                    2.0 * (wrong > 0),
                    baseline="decode-only",
                    baseline_us=round(alone.itl.p99 * 1e6, 2),
                    ratio=round(ratio, 3),
                )
            )
            step_us = load.seconds / load.steps * 1e6
            rows.append(
                self.row(f"stall/{name} tokens", load.tokens_per_s, "token/s", step_us, 2.0 * (wrong > 0))
            )
            if load.ttft:
                p95 = load.ttft_of().p95
                rows.append(self.row(f"stall/{name} ttft-p95", p95 * 1e3, "ms", p95 * 1e6, 2.0 * (wrong > 0)))
        for line in verdicts(alone, mixed):
            self.say(line)
        return rows

    def prefill(self) -> list[dict[str, Any]]:
        """32 prompts at once, packed under the step budget and one prompt a pass."""
        lengths = np.linspace(SHORTEST, LONGEST, PROMPTS).astype(int)
        lengths = np.random.default_rng(0).permutation(lengths)
        crowd = [Arrival(0.0, int(length), 1) for length in lengths]
        device = self.model.device
        tokens, rounds = PACKED_TOKENS[device.kind], 1 if device.kind == "cpu" else 3
        weight_bytes = self.model.budget.weights
        loads: dict[str, Load] = {}
        for name, seqs in (("packed", PROMPTS), ("one-by-one", 1)):
            config = replace(self.config, max_num_seqs=seqs, max_num_batched_tokens=tokens)
            with_engine(self.model, config, lambda engine: run_load(engine, crowd[:4]))  # compiles
            tries = [
                with_engine(self.model, config, lambda engine: run_load(engine, crowd)) for _ in range(rounds)
            ]
            loads[name] = min(tries, key=lambda load: load.seconds)
        wrong = disagreements(load.answers for load in loads.values())
        rows = []
        for name, load in loads.items():
            gigabytes, p95 = load.steps * weight_bytes / 1e9, load.ttft_of().p95
            self.say(
                f"prefill/{name:<12} {load.tokens_per_s:,.0f} tokens/s, TTFT p95 {p95 * 1e3:.1f} ms, "
                f"{load.steps} passes, {gigabytes:.2f} GB of weights read"
            )
            other = loads["one-by-one"]
            rows.append(
                self.row(
                    f"prefill/{name}",
                    load.tokens_per_s,
                    "token/s",
                    load.seconds * 1e6,
                    2.0 * (wrong > 0),
                    gbs=round(gigabytes / load.seconds, 2),
                    baseline="one prompt a pass",
                    baseline_us=round(other.seconds * 1e6, 2),
                    ratio=round(other.seconds / load.seconds, 3),
                )
            )
            rows.append(self.row(f"prefill/{name} ttft-p95", p95 * 1e3, "ms", p95 * 1e6, 2.0 * (wrong > 0)))
        return rows

    def simulate(self, seconds: float) -> list[dict[str, Any]]:
        """The simulator beside real runs; err 1 is an error of 10 %."""
        rows = []
        for found in compare_runs(self.model, self.config, self.predictor, seconds, self.noise):
            self.say(found.text())
            worst = found.worst
            rows.append(
                self.row(f"simulate/{found.name}", 100 * worst, "%", found.real.seconds * 1e6, worst / 0.1)
            )
        return rows

    def plan(self) -> list[dict[str, Any]]:
        """plan() alone; the device plays no part, its host does."""
        rows = []
        for case, running, waiting in (("plan/256+1000", 256, 1000), ("plan/1024", 1024, 0)):
            median, best = plan_us(running, waiting)
            self.say(f"{case:<16} median {median:.0f} us, best {best:.0f} us over {PLAN_STEPS} steps")
            rows.append(self.row(case, median, "us", median, 0.0))
        return rows


def verdicts(alone: Load, mixed: dict[str, Load]) -> list[str]:
    """The two points in words: A holds p99 ITL near decode-only's, B holds the best throughput."""
    best = max(load.tokens_per_s for load in mixed.values())
    a, b, blocking = (mixed[name] for name in ("chunked-latency", "chunked-throughput", "blocking"))
    ratio, share = a.itl.p99 / alone.itl.p99, b.tokens_per_s / best
    delay = b.ttft_of().p95 / max(1e-9, blocking.ttft_of().p95)
    return [
        f"A: p99 ITL {ratio:.2f}x decode-only's (at most 1.5), {a.tokens_per_s / best:.1%} of the best "
        f"throughput: {'met' if ratio <= 1.5 else 'missed'}",
        f"B: {share:.1%} of the best throughput (at least 97 %), p99 ITL {b.itl.p99 / alone.itl.p99:.2f}x "
        f"decode-only's: {'met' if share >= 0.97 else 'missed'}; p95 TTFT of prompts {delay:.2f}x "
        f"blocking's (at most 2): {'met' if delay <= 2 else 'missed'}",
        f"blocking: p99 ITL {blocking.itl.p99 / alone.itl.p99:.2f}x decode-only's, "
        f"{blocking.tokens_per_s / best:.1%} of the best throughput",
    ]


def open_bench(model: str, device_name: str, dtype: str, commit: str, probe_s: float) -> Bench:
    """Load the model, measure its curves and the engine's own time. `random:SHAPE` needs no file."""
    from sharp import bench, bench_engine
    from sharp.device import open_device
    from sharp.meter import open_meter
    from sharp.model import Model
    from sharp.step_times import measure_curves
    from sharp.weights import open_checkpoint

    kind, _, shape = model.partition(":")
    checkpoint = RandomCheckpoint(shape) if kind == "random" else open_checkpoint(model)
    device = open_device(device_name, dtype)
    tokens = PACKED_TOKENS[device.kind]
    config = EngineConfig(
        device=device.kind, dtype=device.dtype, max_num_batched_tokens=tokens, max_num_seqs=64,
        max_model_len=min(checkpoint.config.max_position_embeddings, 32768),
    )  # fmt: skip
    start = time.perf_counter()
    loaded = Model(checkpoint, config, device)
    print(f"loaded in {time.perf_counter() - start:.1f} s: {loaded.device_name}", flush=True)
    start = time.perf_counter()
    length = loaded.max_model_len  # half of it at most is a step, so that another half can be its context
    probed = replace(config, max_num_batched_tokens=min(STEP_TOKENS[device.kind], length // 2))
    curves = measure_curves(loaded, probed, open_meter(device), max_model_len=length, limit_s=probe_s)
    host = measure_host(checkpoint.config)
    predictor = StepPredictor(StepCurve(curves.prefill), StepCurve(curves.decode), host)
    print(f"curves in {time.perf_counter() - start:.1f} s", flush=True)
    for what, points in (("prefill", curves.prefill), ("decode", curves.decode)):
        print(what, *(f"{t}@{c}: {s * 1e3:.2f}" for t, c, s in sorted(points)), "ms", flush=True)
    for line in curves.skipped:
        print("left out:", line)
    print(f"single steps over their median: p5 {curves.noise[2]:.2f}, p95 {curves.noise[-3]:.2f}")
    print(f"the engine itself: {host[0] * 1e6:.0f} us a step, {host[1] * 1e6:.1f} us a sequence", flush=True)
    gpu = bench.gpu_here() if device.kind == "cuda" else None
    name, driver = (gpu.name, gpu.driver) if gpu else (bench_engine.cpu_name(), None)
    config = replace(config, max_num_batched_tokens=STEP_TOKENS[device.kind])
    return Bench(
        loaded, config, predictor, name, driver, commit, lambda text: print(text, flush=True), curves.noise
    )


def main(words: list[str]) -> int:
    """`python -m sharp.bench scheduler`. The rows as JSON are the last line; with --out they are written
    after each part."""
    from sharp.bench import head_commit
    from sharp.bench_ops import check_commit

    parser = argparse.ArgumentParser(
        prog="sharp.bench scheduler",
        description="plan(), stalls, packed prefill, the simulator; on a GPU where there is one.",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may repeat")
    parser.add_argument(
        "--model", default="random:smollm2-135m", help=f"as for sharp, or random:SHAPE ({', '.join(SHAPES)})"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    for field in fields(Scenario):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int if field.type == "int" else float,
            help=f"of the stall scenario (GPU: {getattr(GPU, field.name)}, CPU: {getattr(CPU, field.name)})",
        )  # fmt: skip
    parser.add_argument("--simulate-s", type=float, default=20.0, help="seconds of each simulated workload")
    parser.add_argument("--probe-s", type=float, default=PROBE_S, help="seconds for the step times")
    parser.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, for `import`")
    args = parser.parse_args(words)
    chosen = {field.name: getattr(args, field.name) for field in fields(Scenario)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for name, value in {**chosen, "simulate_s": args.simulate_s, "probe_s": args.probe_s}.items():
        if not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be over 0")
    try:
        commit = check_commit(args.commit) if args.commit else head_commit(args.out is not None)
        bench = open_bench(args.model, args.device, args.dtype, commit, args.probe_s)
    except (ValueError, RuntimeError, MemoryError) as error:
        print(f"not measured: {error}")
        return 1
    scenario = replace(GPU if bench.model.device.kind == "cuda" else CPU, **chosen)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "plan": bench.plan,
        "prefill": bench.prefill,
        "stall": lambda: bench.stall(scenario),
        "simulate": lambda: bench.simulate(args.simulate_s),
    }
    rows: list[dict[str, Any]] = []
    for name, part in parts.items():
        if args.part and name not in args.part:
            continue
        start = time.perf_counter()
        for row in part():
            if row["err"] <= 1:
                rows.append(row)
            else:  # an import would refuse the whole file for it
                bench.say(f"missed, no row: {row['case']}, {row['err']} times its tolerance")
        bench.say(f"{name}: {time.perf_counter() - start:.1f} s")
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bench.model.close()
    for row in rows:
        print(results.format_row(row))
    print(json.dumps(rows))
    return 0
