"""The scheduler measured: plan(), stalls under four policies, packed prefill, the simulator beside reality.

Knows which cases there are and what makes a row. Refuses to know kernels: a model is three verbs, and runs on
whatever device is there. Answers are compared between the runs before any of their times counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sharp import results
from sharp.accuracy import compare_runs
from sharp.bench_model import rung_of
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.host_time import measure_host
from sharp.load import Load, run_load
from sharp.plan_times import PlanTime, plan_times
from sharp.predictor import StepPredictor
from sharp.random_model import SHAPES, RandomCheckpoint
from sharp.stall import CPU, GPU, Scenario, disagreements, run_stall, with_engine
from sharp.workloads import Arrival

PARTS = ("plan", "prefill", "stall", "simulate")  # in this order: plan before there is a device
SOURCES = (
    "sharp/scheduler.py", "sharp/running.py", "sharp/waiting.py", "sharp/pagebook.py", "sharp/batching.py",
    "sharp/blocks.py", "sharp/policies.py", "sharp/latency_target.py", "sharp/predictor.py",
    "sharp/engine.py", "sharp/pipeline.py", "sharp/flights.py", "sharp/simulate.py", "sharp/quiet.py",
    "sharp/plan_times.py", "sharp/step_times.py", "sharp/host_time.py", "sharp/stall.py", "sharp/load.py",
)  # fmt: skip
PROMPTS, SHORTEST, LONGEST = 32, 64, 512  # of the packed prefill
STEP_TOKENS = {"cuda": 2048, "cpu": 256}  # the step budget of the stall runs
PACKED_TOKENS = {"cuda": 8192, "cpu": 1024}
MODELS = {"cuda": "random:llama-3.2-1b", "cpu": "random:smollm2-135m"}
LENGTH = 32768 + 256  # tokens of the longest request: a prompt of 32k, and its answer
PROBE_S = 14.0


@dataclass(frozen=True)
class Bench:
    """A model on a device, its predictor, and how rows are made of it."""

    model: Any
    config: EngineConfig
    predictor: StepPredictor | None  # None: step times are measured when a part asks for them
    gpu: str
    driver: str | None
    commit: str
    say: Callable[[str], object] = print
    noise: tuple[float, ...] = ()  # of single steps, see Curves.noise

    def row(self, case: str, value: float, unit: str, us: float, err: float, **more: Any) -> dict[str, Any]:
        return results.make_row(
            op="scheduler", case=case, rung=rung_of(self.model), dtype=self.model.device.dtype,
            value=round(value, 4), unit=unit, us=round(us, 2), err=round(err, 3), commit=self.commit,
            source_hash=results.source_hash(SOURCES), date=date.today().isoformat(), gpu=self.gpu,
            driver=self.driver, **more,
        )  # fmt: skip

    def stall(self, scenario: Scenario) -> Iterator[dict[str, Any]]:
        """p99 ITL of each policy as soon as it has run, with throughput and TTFT in rows of their own; then
        the two points. Answers are compared with those of the policies before."""
        assert self.predictor is not None
        runs: dict[str, Load] = {}
        for name, load in run_stall(scenario, self.model, self.config, self.predictor, say=self.say):
            runs[name] = load
            wrong = disagreements(one.answers for one in runs.values())
            self.say(f"answers that differ between policies: {wrong}")
            alone, err = runs["decode-only"].itl.p99, 2.0 * (wrong > 0)
            against = {"baseline": f"decode-only; {scenario}", "baseline_us": round(alone * 1e6, 2)}
            p99, ratio = load.itl.p99, round(alone / load.itl.p99, 3)
            yield self.row(f"stall/{name}", p99 * 1e3, "ms", p99 * 1e6, err, **against, ratio=ratio)
            step_us = load.seconds / load.steps * 1e6
            yield self.row(f"stall/{name} tokens", load.tokens_per_s, "token/s", step_us, err)
            if load.ttft:
                p95 = load.ttft_of().p95
                yield self.row(f"stall/{name} ttft-p95", p95 * 1e3, "ms", p95 * 1e6, err)
        for line in verdicts(runs.pop("decode-only"), runs):
            self.say(line)

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

    def simulate(self, seconds: float) -> Iterator[dict[str, Any]]:
        """The simulator beside real runs; err 1 is an error of 10 %."""
        assert self.predictor is not None
        for found in compare_runs(self.model, self.config, self.predictor, seconds, self.noise):
            self.say(found.text())
            worst, us = found.worst, found.real.seconds * 1e6
            yield self.row(f"simulate/{found.name}", 100 * worst, "%", us, worst / 0.1)

    def plan(self, times: dict[str, PlanTime]) -> list[dict[str, Any]]:
        """Of what plan_times() has measured on this device's host."""
        return [self.row(case, time.median, "us", time.median, 0.0) for case, time in times.items()]

    def with_step_times(self, limit_s: float) -> Bench:
        """The same, with measured step times of this model and the engine's own."""
        from sharp.meter import open_meter
        from sharp.step_times import measure_curves

        start, model, kind = time.perf_counter(), self.model, self.model.device.kind
        length = model.max_model_len  # half of it at most is a step, so that another half can be its context
        probed = replace(self.config, max_num_batched_tokens=min(STEP_TOKENS[kind], length // 2))
        meter = open_meter(model.device)
        curves = measure_curves(model, probed, meter, max_model_len=length, limit_s=limit_s, kind=kind)
        tokens, real = PACKED_TOKENS[kind], model if model.overlaps else None
        host = measure_host(model.config, model=real, max_tokens=tokens)
        prefill, decode = StepCurve(curves.prefill), StepCurve(curves.decode)
        predictor = StepPredictor(prefill, decode, host, overlap=model.overlaps)
        self.say(f"curves in {time.perf_counter() - start:.1f} s")
        for what, points in (("prefill", curves.prefill), ("decode", curves.decode)):
            self.say(" ".join((what, *(f"{t}@{c}: {s * 1e3:.2f}" for t, c, s in sorted(points)), "ms")))
        for line in curves.skipped:
            self.say(f"left out: {line}")
        noise = curves.noise
        self.say(f"single steps over their median: p5 {noise[2]:.2f}, p95 {noise[-3]:.2f}")
        before, before_each, after, after_each = (1e6 * seconds for seconds in host)
        self.say(
            f"the engine itself: {before:.0f} us and {before_each:.1f} a sequence before a step, {after:.0f} "
            f"and {after_each:.1f} after it"
        )
        return replace(self, predictor=predictor, noise=noise)


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


def open_bench(model: str | None, device_name: str, dtype: str, commit: str) -> Bench:
    """Load the model (None: MODELS) with all its graphs. `random:SHAPE` needs no file."""
    from sharp import bench, bench_engine
    from sharp.device import open_device
    from sharp.model import Model
    from sharp.weights import open_checkpoint

    def say(text: str) -> None:
        print(text, flush=True)

    start = time.perf_counter()
    device = open_device(device_name, dtype)
    name = model or MODELS[device.kind]
    kind, _, shape = name.partition(":")
    checkpoint = RandomCheckpoint(shape) if kind == "random" else open_checkpoint(name)
    config = EngineConfig(
        device=device.kind, dtype=device.dtype, max_num_batched_tokens=PACKED_TOKENS[device.kind],
        max_num_seqs=64, max_model_len=min(checkpoint.config.max_position_embeddings, LENGTH),
    )  # fmt: skip
    loaded = Model(checkpoint, config, device)
    say(f"{name} loaded in {time.perf_counter() - start:.1f} s: {loaded.device_name}")
    start = time.perf_counter()
    loaded.capture()
    say(f"graphs in {time.perf_counter() - start:.1f} s")
    gpu = bench.gpu_here() if device.kind == "cuda" else None
    where, driver = (gpu.name, gpu.driver) if gpu else (bench_engine.cpu_name(), None)
    config = replace(config, max_num_batched_tokens=STEP_TOKENS[device.kind])
    return Bench(loaded, config, None, where, driver, commit, say)


def main(words: list[str]) -> int:
    """`python -m sharp.bench scheduler`. The rows as JSON are the last line; with --out they are written
    after each of them."""
    from sharp.bench import head_commit
    from sharp.bench_ops import check_commit

    parser = argparse.ArgumentParser(
        prog="sharp.bench scheduler",
        description="plan(), packed prefill, stalls, the simulator; on a GPU where there is one.",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may repeat")
    parser.add_argument(
        "--model",
        help=f"as for sharp, or random:SHAPE ({', '.join(SHAPES)}); default {MODELS['cuda']} on a GPU, "
        f"{MODELS['cpu']} on a CPU",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    for field in fields(Scenario):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int if field.type == "int" else float,
            help=f"of the stall scenario (GPU: {getattr(GPU, field.name)}, CPU: {getattr(CPU, field.name)})",
        )  # fmt: skip
    parser.add_argument("--simulate-s", type=float, default=20.0, help="seconds of each simulated workload")
    parser.add_argument("--probe-s", type=float, default=PROBE_S, help="seconds for the step times at most")
    parser.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, for `import`")
    args = parser.parse_args(words)
    chosen = {field.name: getattr(args, field.name) for field in fields(Scenario)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for name, value in {**chosen, "simulate_s": args.simulate_s, "probe_s": args.probe_s}.items():
        if not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be over 0")
    wanted = args.part or PARTS
    try:
        commit = check_commit(args.commit) if args.commit else head_commit(args.out is not None)
        rows = results.RowFile(args.out, commit)
        planned = plan_times(partial(print, flush=True)) if "plan" in wanted else {}
        bench = open_bench(args.model, args.device, args.dtype, commit)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        print(f"not measured: {error}")
        return 1
    if bench.predictor is None and {"stall", "simulate"} & set(wanted):
        bench = bench.with_step_times(args.probe_s)
    scenario = replace(GPU if bench.model.device.kind == "cuda" else CPU, **chosen)
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "plan": lambda: bench.plan(planned),
        "prefill": bench.prefill,
        "stall": lambda: bench.stall(scenario),
        "simulate": lambda: bench.simulate(args.simulate_s),
    }
    for name in (name for name in PARTS if name in wanted):
        start = time.perf_counter()
        rows.take(parts[name](), bench.say)
        bench.say(f"{name}: {time.perf_counter() - start:.1f} s")
    bench.model.close()
    for row in rows.all:
        print(results.format_row(row))
    print(json.dumps(rows.all))
    return 0
