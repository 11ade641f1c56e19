"""How long steps of a model take: plans of chosen sizes, and the order and rounds in which they are timed.

Knows plans and a clock. Refuses to know requests, devices and what the times are for.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from sharp.buckets import Buckets
from sharp.config import EngineConfig
from sharp.curves import Point, StepCurve
from sharp.meter import Meter
from sharp.plan import BatchPlan, Launched, StepModel

ROUNDS = 3  # timed steps of a point, at least; the median counts
CHEAP_S, CHEAP_ROUNDS = 0.2, 9  # so many steps where they fit in so many seconds: short ones are noisier
CHEAP_AHEAD_S = (
    0.05  # of those that run beside the host, which disturbs them little; and there are more sizes
)
NOISE = 40  # quantiles
# Keys in the pages before a chunk, and of each sequence before a decode. A GPU reads a thousand keys in the
# noise of a step, and sequences side by side in pieces of a thousand: only far ones show what a key costs.
CONTEXTS = {"cpu": (0, 1024), "cuda": (0, 8192)}
DECODE_CONTEXTS = {"cpu": (64, 1024), "cuda": (64, 8192)}
FIRST_JUMP = 4  # times: the most that a second point is guessed to take, as all tokens share reading weights
WARMUP_BELOW = 0.25  # seconds: a slower step needs no round that does not count, the median drops the first
SECONDS = 14.0  # for the curves: with loading and copies this stays under 20 s for a model of 1 B parameters


@dataclass(frozen=True)
class Curves:
    """Timed points (tokens, context, median seconds) and what time or pages left out.

    noise: quantiles of single steps over their point's median, NOISE of them, of all points together.
    """

    prefill: tuple[Point, ...]
    decode: tuple[Point, ...]
    skipped: tuple[str, ...]
    noise: tuple[float, ...] = ()


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
        top_ks=np.zeros(num_seqs, np.int32),
        top_ps=np.ones(num_seqs, np.float32),
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
    kind: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Curves:
    """Time steps as the engine runs them, launch and land, until the time or the pages are used up. Where
    steps run beside the host, the next one is launched before one is landed, so a time is that from one
    step's tokens to the next's, whatever the device does in between.

    limit_s: seconds for all of it, each line (prefill or decode, one context) a share. kind: of device, whose
    CONTEXTS are taken. A point is left out where its rounds, guessed from others, would not end in time:
    fewer points, never fewer rounds. The smallest step of a line is always timed. What a first step of a size
    takes beyond later ones (kernels are compiled, or found on disk, and a graph is captured) counts for
    neither.
    """
    steps = iter(range(1, 1 << 30))
    compiling = 0.0
    ahead = 1 if getattr(model, "overlaps", False) else 0  # steps in flight while one is landed
    cheap_s = CHEAP_AHEAD_S if ahead else CHEAP_S

    def spent() -> float:
        return clock() - compiling

    def row(num_seqs: int, tokens: int, context: int, count: int) -> list[float]:
        """Seconds of each of `count` equal steps in a row."""
        plans = [
            uniform_step(num_seqs, tokens, context, config.block_size, model.config.vocab_size, next(steps))
            for _ in range(count + ahead)
        ]
        flying: deque[Launched] = deque()
        taken, last = [], clock()

        def land() -> None:
            nonlocal last
            # Pages before a chunk hold what their memory held, NaN perhaps: times are all that is asked for.
            with suppress(FloatingPointError):
                model.land(flying.popleft())
            now = clock()
            taken.append(now - last)
            last = now

        for plan in plans:
            flying.append(model.launch(plan))
            meter.look()
            if len(flying) > ahead:
                land()
        while flying:
            land()
        return taken[ahead:]  # the first of several had its own launch in its time

    def sweep(what: str, sizes: list[int], context: int, deadline: float) -> None:
        nonlocal compiling
        line: list[tuple[int, float]] = []
        left_out: dict[str, list[int]] = {}
        for size in sizes:
            num_seqs, tokens = (size, 1) if what == "decode" else (1, size)
            length = context + tokens
            pages = num_seqs * -(-length // config.block_size)
            guess = _guess(sorted(line), size)
            if length > max_model_len or pages > model.num_blocks:
                why = f"over the {model.num_blocks} pages or {max_model_len} positions"
            elif line and spent() + ROUNDS * guess > deadline:
                why = f"{ROUNDS} rounds would take too long"
            else:
                before = clock()
                if guess < WARMUP_BELOW:
                    row(num_seqs, tokens, context, 1)
                first = clock() - before
                taken = row(num_seqs, tokens, context, ROUNDS)
                compiling += max(0.0, max(first / (1 + ahead), taken[0]) - min(taken))
                more = min(CHEAP_ROUNDS - ROUNDS, int((cheap_s - sum(taken)) / statistics.median(taken)))
                if more > 0:
                    taken += row(num_seqs, tokens, context, more)
                line.append((size, statistics.median(taken)))
                ratios.extend(seconds / line[-1][1] for seconds in taken)
                points[what].append((size, context, line[-1][1]))
                continue
            left_out.setdefault(why, []).append(size)
        for why, sizes in left_out.items():
            skipped.append(f"{what} of {', '.join(map(str, sorted(sizes)))} at context {context}: {why}")

    skipped: list[str] = []
    ratios: list[float] = []
    points: dict[str, list[Point]] = {"prefill": [], "decode": []}
    chunks, batches = _sizes(config.max_num_batched_tokens), _sizes(config.max_num_seqs)
    if ahead:
        chunks, batches = _bucket_edges(config.max_num_batched_tokens, config.max_num_seqs)
    start, room = spent(), max_model_len - config.max_num_batched_tokens
    contexts = sorted({min(context, room) for context in CONTEXTS[kind]})
    # Keys that every sequence of the largest batch can have in these pages.
    room = min(model.num_blocks // config.max_num_seqs * config.block_size, max_model_len) - 1
    decode_contexts = sorted({max(0, min(context, room)) for context in DECODE_CONTEXTS[kind]})
    lines = [("prefill", chunks, c) for c in contexts] + [("decode", batches, c) for c in decode_contexts]
    shares = (0.4, 0.28, 0.16, 0.16) if len(lines) == 4 else (1 / len(lines),) * len(lines)
    deadline = start
    for (what, sizes, context), share in zip(lines, shares, strict=True):
        deadline += share * limit_s  # what one line leaves of its time, the next ones have
        sweep(what, sizes, context, deadline)
    noise = np.quantile(ratios, (np.arange(NOISE) + 0.5) / NOISE).tolist()
    return Curves(tuple(points["prefill"]), tuple(points["decode"]), tuple(skipped), tuple(noise))


def _sizes(limit: int) -> list[int]:
    """Powers of two up to the limit, and the limit itself: every third first, so a slow device is seen far
    out before it is seen closely."""
    powers = range(limit.bit_length())
    coarse = [1 << i for i in powers if i % 3 == 0]
    return list(dict.fromkeys([*coarse, limit, *(1 << i for i in powers)]))


def _bucket_edges(max_tokens: int, max_seqs: int) -> tuple[list[int], list[int]]:
    """Tokens of chunks, sequences of decodes: the first and the last size of each bucket that steps are
    launched for (a time may jump from one to the next), the last ones first. A step of one token decodes."""
    buckets = Buckets(max_tokens, max_seqs)
    found = []
    for ladder, most in ((buckets.mixed, max_tokens), (buckets.decode, max_seqs)):
        ends = [bucket.tokens for bucket in ladder]
        firsts = [end + 1 for end in ends if end < most]
        least = [1, 2] if ladder is buckets.mixed else [1]
        found.append([size for size in dict.fromkeys([*least, *ends, *firsts]) if size <= most])
    return found[0], found[1]


def _guess(line: list[tuple[int, float]], size: int) -> float:
    """Seconds of a step from those measured: as the last two went, at most in proportion; 0 for the first."""
    if not line:
        return 0.0
    if len(line) > 1:
        return StepCurve.of((t, 0, s) for t, s in line).predict(size)
    return line[0][1] * min(size / line[0][0], FIRST_JUMP)
