"""Phase 0: what a model's steps take on this device, in time and in memory, before anything is promised.

Knows how to make steps of a chosen size and to time them through the model's own stage, forward and sample.
Refuses to decide memory (budget.py) and to know requests; what the times mean is curves.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from sharp.budget import BudgetReport, Term
from sharp.config import EngineConfig
from sharp.curves import Point, StepCurve
from sharp.meter import Meter, copy_bandwidth, open_meter
from sharp.plan import BatchPlan, StepModel

if TYPE_CHECKING:
    from sharp.device import Device
    from sharp.weights import Checkpoint

ROUNDS = 3  # timed steps of a point, at least; the median counts
CHEAP_S, CHEAP_ROUNDS = 0.1, 9  # so many steps where they fit in so many seconds: short ones are noisier
STEP_LIMIT = {"cpu": 1024, "cuda": 16384}  # tokens of the largest step that is tried
SEQS_LIMIT = {"cpu": 64, "cuda": 512}  # sequences of the largest decode batch
CONTEXTS = (0, 1024)  # keys in the pages before a chunk
DECODE_CONTEXTS = (64, 1024)  # and of each sequence before a decode
FIRST_JUMP = (
    4  # how much longer the second point may be guessed to take: weights are read once for all tokens
)
WARMUP_BELOW = 0.25  # seconds: a slower step needs no round that does not count, the median drops the first
SECONDS = 16.0  # for the curves: with loading and copies this stays under 20 s for a model of 1 B parameters


@dataclass(frozen=True)
class Proposal:
    """Engine options that follow from the curves, and why."""

    max_num_batched_tokens: int
    max_num_seqs: int
    why: str


@dataclass(frozen=True)
class Curves:
    """Timed points (tokens, context, median seconds) and what time or pages left out."""

    prefill: tuple[Point, ...]
    decode: tuple[Point, ...]
    skipped: tuple[str, ...]


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

    def __post_init__(self) -> None:
        _ = self.prefill, self.decode  # ValueError for points that no step can have

    @property
    def prefill(self) -> StepCurve:
        return StepCurve(self.curves.prefill)

    @property
    def decode(self) -> StepCurve:
        return StepCurve(self.curves.decode)

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


def uniform_step(
    num_seqs: int, tokens: int, context: int, block_size: int, vocab_size: int, step: int = 0
) -> BatchPlan:
    """A step of num_seqs sequences, `tokens` new tokens each behind `context` keys, in pages of their own.

    Ids are random; each sequence wants the logits of its last row, drawn greedily.
    """
    count, length = num_seqs * tokens, context + tokens
    pages = -(-length // block_size)
    table = np.arange(num_seqs * pages, dtype=np.int32).reshape(num_seqs, pages)
    positions = np.arange(context, length, dtype=np.int32)
    slots = table[:, positions // block_size] * block_size + positions % block_size
    ends = np.arange(1, num_seqs + 1, dtype=np.int32) * tokens
    return BatchPlan(
        step=step,
        request_ids=tuple(f"probe-{i}" for i in range(num_seqs)),
        num_decodes=num_seqs if tokens == 1 else 0,
        token_ids=np.random.default_rng(step).integers(0, vocab_size, count, dtype=np.int32),
        positions=np.tile(positions, num_seqs),
        cu_seqlens_q=np.concatenate([np.zeros(1, np.int32), ends]),
        context_lens=np.full(num_seqs, length, np.int32),
        block_table=table,
        slot_mapping=slots.reshape(count).astype(np.int32),
        logits_rows=ends - 1,
        temperatures=np.zeros(num_seqs, np.float32),
        seeds=np.zeros(num_seqs, np.uint64),
        output_indices=np.zeros(num_seqs, np.int32),
        num_logprobs=np.full(num_seqs, -1, np.int32),
        token_budget=count,
    )


def measure_curves(
    model: StepModel,
    config: EngineConfig,
    meter: Meter,
    *,
    max_model_len: int,
    limit_s: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Curves:
    """Time steps of doubling size, through the model, until the time or the pages are used up.

    limit_s: seconds for all of it, each line (prefill or decode, one context) a share. A point is
    left out where its rounds, guessed from others, would not end in time: fewer points, never fewer rounds.
    The smallest step of a line is always timed.
    """
    steps = iter(range(1, 1 << 30))

    def once(num_seqs: int, tokens: int, context: int) -> float:
        plan = uniform_step(
            num_seqs, tokens, context, config.block_size, model.config.vocab_size, step=next(steps)
        )
        start = clock()
        batch = model.stage(plan)
        logits = model.forward(batch)
        meter.look()
        model.sample(logits, batch)  # waits for the step, as the engine does
        return clock() - start

    def sweep(what: str, sizes: list[int], context: int, deadline: float) -> None:
        line: list[tuple[int, float]] = []
        left_out: dict[str, list[int]] = {}
        for size in sizes:
            num_seqs, tokens = (size, 1) if what == "decode" else (1, size)
            length = context + tokens
            pages = num_seqs * -(-length // config.block_size)
            guess = _guess(sorted(line), size)
            if length > max_model_len or pages > model.num_blocks:
                why = f"over the {model.num_blocks} pages or {max_model_len} positions"
            elif line and clock() + ROUNDS * guess > deadline:
                why = f"{ROUNDS} rounds would take too long"
            else:
                if guess < WARMUP_BELOW:
                    once(num_seqs, tokens, context)
                taken = [once(num_seqs, tokens, context) for _ in range(ROUNDS)]
                while len(taken) < CHEAP_ROUNDS and sum(taken) < CHEAP_S:
                    taken.append(once(num_seqs, tokens, context))
                line.append((size, statistics.median(taken)))
                points[what].append((size, context, line[-1][1]))
                continue
            left_out.setdefault(why, []).append(size)
        for why, sizes in left_out.items():
            skipped.append(f"{what} of {', '.join(map(str, sorted(sizes)))} at context {context}: {why}")

    skipped: list[str] = []
    points: dict[str, list[Point]] = {"prefill": [], "decode": []}
    chunks, batches = _sizes(config.max_num_batched_tokens), _sizes(config.max_num_seqs)
    start, room = clock(), max_model_len - config.max_num_batched_tokens
    contexts = sorted({min(context, room) for context in CONTEXTS})
    # Keys that every sequence of the largest batch can have in these pages.
    room = min(model.num_blocks // config.max_num_seqs * config.block_size, max_model_len) - 1
    decode_contexts = sorted({max(0, min(context, room)) for context in DECODE_CONTEXTS})
    lines = [("prefill", chunks, c) for c in contexts] + [("decode", batches, c) for c in decode_contexts]
    shares = (0.4, 0.28, 0.16, 0.16) if len(lines) == 4 else (1 / len(lines),) * len(lines)
    deadline = start
    for (what, sizes, context), share in zip(lines, shares, strict=True):
        deadline += share * limit_s  # what one line leaves of its time, the next ones have
        sweep(what, sizes, context, deadline)
    return Curves(tuple(points["prefill"]), tuple(points["decode"]), tuple(skipped))


def _sizes(limit: int) -> list[int]:
    """Powers of two up to the limit, and the limit itself: every third first, so a slow device is seen far out
    before it is seen closely."""
    powers = range(limit.bit_length())
    coarse = [1 << i for i in powers if i % 3 == 0]
    return list(dict.fromkeys([*coarse, limit, *(1 << i for i in powers)]))


def _guess(line: list[tuple[int, float]], size: int) -> float:
    """Seconds of a step from those measured: as the last two went, at most in proportion; 0 for the first."""
    if not line:
        return 0.0
    if len(line) > 1:
        return StepCurve.of((t, 0, s) for t, s in line).predict(size)
    return line[0][1] * min(size / line[0][0], FIRST_JUMP)


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
    outside: int | None = None,
    limit_s: float = SECONDS,
    progress: bool = False,
) -> Probe:
    """Load the model on the device, measure all of it, close it. Raises what Model raises.

    outside: free bytes before the device's context was made (meter.free_before_context).
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
        meter.start_peak()
        curves = measure_curves(model, config, meter, max_model_len=model.max_model_len, limit_s=limit_s)
        at = dict(readings)
        measured = {
            "weights": at["weights"] - at["start"],
            "buffers": at["buffers"] - at["weights"],
            "reserve": meter.peak(),
        }
        if device.kind == "cuda" and outside is not None:
            measured["context"] = max(0, outside - free)
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
