"""Phase 0: what a model's steps take on this device, in time and in memory, before anything is promised.

Knows in which order a model is loaded, read and timed, and which options follow. The steps are step_times.py,
the readings meter.py, the meaning of times curves.py; refuses to divide memory (budget.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from sharp.budget import BudgetReport, Term
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.host_time import measure_host
from sharp.meter import copy_bandwidth, open_meter
from sharp.predictor import NO_HOST, HostTime, StepPredictor
from sharp.step_times import SECONDS, Curves, measure_curves

if TYPE_CHECKING:
    from sharp.device import Device
    from sharp.weights import Checkpoint

STEP_LIMIT = {"cpu": 1024, "cuda": 16384}  # tokens of the largest step that is tried
SEQS_LIMIT = {"cpu": 64, "cuda": 512}  # sequences of the largest decode batch


@dataclass(frozen=True)
class Proposal:
    """Engine options that follow from the curves, and why."""

    max_num_batched_tokens: int
    max_num_seqs: int
    why: str


@dataclass(frozen=True)
class Probe:
    """Plain numbers of one model on one device. Bytes and seconds, unless a name says otherwise.

    memory: named terms, predicted beside measured. copies: see meter.copy_bandwidth. fingerprint: what these
    numbers depend on (see probe_cache.py); from_cache: whether they were measured now.
    """

    model: str
    device: str
    kind: str
    dtype: str
    free: int  # before the weights
    total: int
    memory: tuple[Term, ...]
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    curves: Curves
    copies: tuple[dict[str, Any], ...]
    seconds: float  # that the probe took
    date: str
    fingerprint: dict[str, str]
    from_cache: bool = False
    host_s: HostTime = NO_HOST  # the engine's own
    overlap: bool = False  # steps run beside the host

    def __post_init__(self) -> None:
        _ = self.prefill, self.decode  # ValueError for points that no step can have

    @property
    def prefill(self) -> StepCurve:
        return StepCurve(self.curves.prefill)

    @property
    def decode(self) -> StepCurve:
        return StepCurve(self.curves.decode)

    @property
    def predictor(self) -> StepPredictor:
        """Seconds of any step: what sharp/simulate.py and latency-target ask."""
        return StepPredictor(self.prefill, self.decode, self.host_s, overlap=self.overlap)

    @property
    def budget(self) -> BudgetReport:
        return BudgetReport(self.memory)

    def propose(self, target_itl_ms: float | None = None) -> Proposal:
        """Options by the knee, or under a latency target the largest step that stays under it.

        target_itl_ms: milliseconds that no step may exceed, at the longest context measured. Raises
        ValueError for a target that is no positive number, or that even a step of one token misses.
        """
        if target_itl_ms is None:
            knee = self.prefill.knee(self.prefill.contexts[0])
            tokens = max(knee, self.max_num_seqs)
            rate = self.prefill.throughput(knee, self.prefill.contexts[0])
            why = (
                f"the knee: from {knee} tokens a step on, prefill is within 10 % of its best ({rate:,.0f}/s)"
            )
            if knee == self.prefill.tokens[-1]:
                why += "; it is the largest step that was timed, and larger ones may be faster still"
            if tokens > knee:
                why += f"; raised to max_num_seqs, as each of {tokens} sequences decodes a token a step"
            return Proposal(tokens, self.max_num_seqs, why)
        if isinstance(target_itl_ms, bool) or not 0 < target_itl_ms < float("inf"):
            raise ValueError(f"target_itl_ms must be a positive number of milliseconds, not {target_itl_ms}")
        chunk_context, decode_context = self.prefill.contexts[-1], self.decode.contexts[-1]
        tokens = self.prefill.largest_under(target_itl_ms / 1e3, chunk_context)
        seqs = self.decode.largest_under(target_itl_ms / 1e3, decode_context)
        if not (tokens and seqs):
            floor = max(self.prefill.predict(1, chunk_context), self.decode.predict(1, decode_context)) * 1e3
            raise ValueError(
                f"target_itl_ms {target_itl_ms:g} cannot be met: a step of one token takes {floor:.3g} ms "
                f"here at a context of {max(chunk_context, decode_context)}"
            )
        took = self.prefill.predict(tokens, chunk_context) * 1e3
        why = (
            f"the largest step under {target_itl_ms:g} ms at a context of {chunk_context}: "
            f"{tokens} tokens, predicted {took:.3g} ms"
        )
        return Proposal(tokens, min(seqs, tokens), why)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Probe:
        """The Probe of to_json's bytes. Raises msgspec.ValidationError or DecodeError (both ValueError)."""
        return msgspec.json.decode(data, type=cls)


def probe_options(kind: str, max_positions: int, config: EngineConfig) -> EngineConfig:
    """`config` with the largest step and decode batch that a probe of such a device tries."""
    tokens = max(1, min(STEP_LIMIT[kind], max_positions // 2))
    return replace(config, max_num_batched_tokens=tokens, max_num_seqs=min(SEQS_LIMIT[kind], tokens))


def run_probe(
    checkpoint: Checkpoint,
    config: EngineConfig,
    device: Device,
    fingerprint: dict[str, str],
    *,
    outside: tuple[int, int] | None = None,
    limit_s: float = SECONDS,
    progress: bool = False,
) -> Probe:
    """Load the model on the device, measure all of it, close it. Raises what Model raises.

    outside: (free, total) bytes before the device's context was made (meter.free_before_context).
    """
    from sharp.model import Model

    start = time.perf_counter()
    config = probe_options(device.kind, checkpoint.config.max_position_embeddings, config)
    meter = open_meter(device)
    free, readings = meter.free(), [("start", meter.used())]
    model = Model(
        checkpoint, config, device, progress=progress, observe=lambda m: readings.append((m, meter.used()))
    )
    try:
        touch(model)
        readings.append(("buffers", meter.used()))
        runtime = getattr(model, "runtime", None)
        if runtime is not None:
            runtime.capture(progress)  # their memory is a term of its own, not a peak of the steps
        meter.start_peak()
        length, kind = model.max_model_len, device.kind
        curves = measure_curves(model, config, meter, max_model_len=length, limit_s=limit_s, kind=kind)
        at = dict(readings)
        measured = {"reserve": meter.peak()}
        if runtime is not None and runtime.graphs is not None:
            measured["graphs"] = runtime.graphs.num_bytes
        if model.arena is not None:  # by its own books, and as the device sees it
            measured |= {**model.arena.terms, "arena": max(0, at["buffers"] - at["start"])}
        else:  # a host may reuse memory that it held before
            measured["weights"] = max(0, at["weights"] - at["start"])
            measured["buffers"] = max(0, at["buffers"] - at["weights"])
        # NVML speaks of the whole card: of a MIG slice, say, it tells nothing.
        if device.kind == "cuda" and outside and abs(outside[1] - meter.total()) < 0.05 * outside[1]:
            measured["context"] = max(0, outside[0] - free)
        return Probe(
            model=str(checkpoint.path),
            device=device.name,
            kind=device.kind,
            dtype=device.dtype,
            free=free,
            total=meter.total(),
            memory=model.budget.report(measured).terms,
            kv_bytes_per_token=model.budget.page_bytes // config.block_size,
            block_size=config.block_size,
            num_blocks=model.num_blocks,
            max_num_seqs=config.max_num_seqs,
            curves=curves,
            copies=tuple(copy_bandwidth(device)),
            seconds=time.perf_counter() - start,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint,
            host_s=measure_host(
                model.config,
                model=model if model.overlaps else None,
                max_tokens=config.max_num_batched_tokens,
            ),
            overlap=model.overlaps,
        )
    finally:
        model.close()


def touch(model: Any) -> None:
    """Write zeros to buffers in host memory: an array that nobody wrote takes no memory yet, and reads fast.

    Device arrays stay as they are: they take their memory at once, and no kernel's time depends on contents.
    """
    arrays = [*vars(model.work).values(), *(a for cache in model.kv for a in (cache.k, cache.v))]
    for array in arrays:
        if isinstance(array, np.ndarray):
            array.fill(0)
