"""What the end-to-end benches share: a model opened once, engines over it, rows, and the gate before a row.

Knows a model's three verbs and how a row is made. Refuses to know what is measured, and to make a row of
answers that are not what each request gets alone.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from sharp import results
from sharp.bench_engine import SOURCES
from sharp.busy import steps_busy
from sharp.config import EngineConfig, ModelConfig
from sharp.engine import Engine
from sharp.load import Load, run_load
from sharp.stall import disagreements, with_engine
from sharp.trace import RunStats
from sharp.trace_events import COMPUTE, Trace
from sharp.workloads import Arrival

GATE = 4  # requests whose answers are computed again, alone
BUSY_STEPS = 500
QUEUE = 1 << 20  # requests: a load that comes all at once waits, however large it is
# The largest step and the seats of the engine that is measured: one step's tokens keep the tensor cores busy
# and let a prompt in beside all decodes; two cores take a sixteenth of it in as long.
OPTIONS = {
    "cuda": {"max_num_batched_tokens": 4096, "max_num_seqs": 256, "max_model_len": 4096},
    "cpu": {"max_num_batched_tokens": 256, "max_num_seqs": 64, "max_model_len": 2048},
}


class Seen(NamedTuple):
    """What an engine leaves behind."""

    trace: Trace
    stats: RunStats


@dataclass(frozen=True)
class Opened:
    """A model on a device, and what its rows say of where they were measured."""

    name: str
    model: Any
    config: EngineConfig
    gpu: str
    driver: str | None
    commit: str
    say: Callable[[str], object] = print
    seen: deque[Seen] = field(default_factory=lambda: deque(maxlen=1))  # of the latest run

    def run(self, prompts: Sequence[list[int]], new: Sequence[int], times: Sequence[float]) -> Load:
        """A new engine's answers to these prompts, which arrive at these times; its trace is kept."""
        workload = [Arrival(at, len(ids), count) for at, ids, count in zip(times, prompts, new, strict=True)]

        def work(engine: Engine) -> Load:
            self.seen.append(Seen(engine.trace, engine.stats))
            return run_load(engine, workload, prompts=prompts)

        return with_engine(self.model, self.config, work)

    def warm(self) -> None:
        """Compile, capture, find and touch all that a step needs, outside of what is timed."""
        self.model.capture()
        self.run([[1] * 16, [2] * 70], [3, 3], [0.0, 0.0])

    def wrong(self, prompts: Sequence[list[int]], new: Sequence[int], load: Load) -> list[str]:
        """What keeps a load from counting, in words: requests that were refused or unfinished, answers of
        another length than asked for, and those of GATE requests that differ from the same request alone."""
        found = []
        if load.refused or load.unfinished:
            found.append(f"{load.refused} requests were refused, {load.unfinished} are unfinished")
        short = [place for place, count in enumerate(new) if len(load.answers.get(place, ())) != count]
        if short:
            place = short[0]
            found.append(
                f"{len(short)} answers have another length than asked for; of request {place} there are "
                f"{len(load.answers.get(place, ()))} of {new[place]} tokens"
            )
        measured = list(self.seen)
        for place in gate_places(len(prompts)):
            alone = self.run([prompts[place]], [new[place]], [0.0])
            if disagreements([{0: load.answers.get(place, ())}, alone.answers]):
                found.append(f"request {place} has another answer than alone")
        self.seen.extend(measured)
        return found

    def gpu_busy(self, steps: int = BUSY_STEPS) -> float | None:
        """How busy the GPU was over the latest run's last steps, see busy.py; None where no model says."""
        spans = [(span.start, span.end) for trace, _ in self.seen for span in trace.spans(COMPUTE)]
        return steps_busy(spans, min(steps, len(spans))) if spans else None

    def host_share(self, steps: int = BUSY_STEPS) -> float | None:
        """Median over the latest run's last steps of the host's own time over the device's; None where no
        model says."""
        records = [record for _, stats in self.seen for record in stats.history][-steps:]
        shares = [record.host_s / record.gpu_s for record in records if record.gpu_s]
        return statistics.median(shares) if shares else None

    def row(self, op: str, case: str, value: float, unit: str, us: float, **more: Any) -> dict[str, Any]:
        """A row of what passed the gate: its err is 0."""
        return results.make_row(
            op=op, case=case, rung=rung_of(self.model), dtype=self.model.device.dtype, value=round(value, 4),
            unit=unit, us=round(us, 2), err=0.0, commit=self.commit,
            source_hash=results.source_hash(SOURCES), date=date.today().isoformat(), gpu=self.gpu,
            driver=self.driver, **more,
        )  # fmt: skip


def options_of(kind: str, config: ModelConfig) -> dict[str, Any]:
    """OPTIONS of a device, and of a model of few positions no more than these."""
    found: dict[str, Any] = dict(OPTIONS[kind])
    found["max_model_len"] = min(found["max_model_len"], config.max_position_embeddings)
    return found


def gate_places(count: int) -> list[int]:
    """The places of GATE of `count` requests: first, last and between."""
    chosen = min(GATE, count)
    return [round(i * (count - 1) / max(1, chosen - 1)) for i in range(chosen)]


def rung_of(model: Any) -> str:
    """Of a model's ops, the kernels of the products: what sets its speed."""
    return str(getattr(model, "rungs", {}).get("gemm", model.device.default_rung))


def open_model(
    name: str,
    device_name: str,
    dtype: str,
    commit: str,
    options: Mapping[str, Any],
    say: Callable[[str], object] = print,
) -> Opened:
    """A model of files, or `random:SHAPE`, on a device; prefix caching is off, so that all work is done.

    options: of EngineConfig, over OPTIONS. Raises ValueError, RuntimeError or MemoryError."""
    from sharp import bench, bench_engine
    from sharp.device import open_device
    from sharp.model import Model
    from sharp.random_model import RandomCheckpoint
    from sharp.weights import open_checkpoint

    kind, _, shape = name.partition(":")
    checkpoint = RandomCheckpoint(shape) if kind == "random" else open_checkpoint(name)
    device = open_device(device_name, dtype)
    chosen = {**options_of(device.kind, checkpoint.config), **options}
    config = EngineConfig(
        device=device.kind, dtype=device.dtype, prefix_caching=False, max_queue_len=QUEUE, **chosen
    )
    start = time.perf_counter()
    model = Model(checkpoint, config, device)
    say(f"{name} loaded in {time.perf_counter() - start:.1f} s: {model.device_name}")
    gpu = bench.gpu_here() if device.kind == "cuda" else None
    where, driver = (gpu.name, gpu.driver) if gpu else (bench_engine.cpu_name(), None)
    label = shape if kind == "random" else Path(name).name
    return Opened(label, model, config, where, driver, commit, say)


def known_ids(prompts: Iterable[list[int]], vocab_size: int) -> list[list[int]]:
    """The prompts with ids that a smaller vocabulary has: those of a larger one are folded into it."""
    return [[token % vocab_size for token in ids] for ids in prompts]
