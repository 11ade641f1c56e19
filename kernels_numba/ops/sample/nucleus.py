"""Which ids top-k and top-p leave, in integers, so that neither order nor device nor rung changes a bit.

The order of a row's ids is one whole number, rank = (the logit's bits, made to ascend) 2^24 + (2^24 - 1 -
id): a higher logit first, of equal logits the lower id. An id's probability before its division by the sum is
a fixed-point number of 36 fraction bits, weight = 2^36 exp((logit - highest logit) / T), so a sum of 2^24 of
them is below 2^60 and the same in every order.

How far a weight is from the exact one: float32 gives y = (highest - logit) x (log2(e) / T) within a relative
1.5 2^-23 (three roundings to nearest: difference, quotient, product), y is cut to a multiple of 2^-25, and
2^-y is a polynomial in integers, within 2e-9. Together at most (0.7 y 1.8e-7 + 2.3e-8) of the weight, under
5e-6 where y is at its largest, 37; then it is rounded to a whole number, 2^-37 of the largest weight. Ids of
weight 0 (y > 37, 25.6 below the highest scaled logit) have no place in any nucleus, and their noise is too
narrow to win a draw (GUMBEL_SPREAD).

Knows: one row. Refuses to know: noise, batches, where logits lie.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit

FRACTION_BITS = 36  # of a weight
ONE = 1 << FRACTION_BITS  # the highest logit's weight
LOG2_E = 1.4426950408889634
OCTAVES = 37  # 2^-y of a larger y is rounded to 0
Y_BITS = 25  # fraction bits of y: 37 x 2^25 fits 31 bits
# 2^-u = 1 - u (c1 - u (c2 - u (c3 - ...))) for u in [0, 1], as multiples of 2^-32: interpolated at seven
# Chebyshev nodes in float64; never ascends, and is exact at both ends.
COEFFICIENTS = (2977044471, 1031764939, 238387495, 41304489, 5712048, 639488, 48550)
ID_BITS = 24
MAX_VOCAB = 1 << ID_BITS
BIN_BITS = 5  # an octave's 32 bins: y's first bits
NUM_BINS = (OCTAVES << BIN_BITS) + 1
DIGIT_BITS, DIGITS = 8, 7  # a rank has 32 + 24 bits


def y_spec(logits: Any, temperature: Any) -> Any:
    """(y as uint32 multiples of 2^-25, where it is at most 37) of logits f32[V]; NaN and -inf are not."""
    logits = np.asarray(logits, np.float32)
    comparable = logits > -np.inf
    best = logits.max(where=comparable, initial=-np.inf)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        y = (best - logits) * (np.float32(LOG2_E) / np.float32(temperature))
        y[comparable & (logits == best)] = 0
        near = comparable & (y <= np.float32(OCTAVES))
    steps = np.where(near, y, np.float32(0)) * np.float32(1 << Y_BITS)
    return steps.astype(np.uint32), near


def fixed_spec(steps: Any) -> Any:
    """uint64 weights of y given as uint32 multiples of 2^-25."""
    steps = np.asarray(steps, np.uint32).astype(np.uint64)
    half, one = np.uint64(32), np.uint64(1)
    u = (steps & np.uint64((1 << Y_BITS) - 1)) << np.uint64(32 - Y_BITS)
    p = np.full_like(u, COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        p = np.uint64(coefficient) - ((u * p) >> half)
    power = np.uint64(1 << 32) - ((u * p) >> half)
    shifted = (power << np.uint64(FRACTION_BITS - 31)) >> (steps >> np.uint64(Y_BITS))
    return (shifted + one) >> one


def weights_spec(logits: Any, temperature: Any) -> Any:
    """uint64[V]: 2^36 exp((logit - highest) / T), rounded; 0 for NaN and -inf."""
    steps, near = y_spec(logits, temperature)
    return np.where(near, fixed_spec(steps), np.uint64(0))


def share_spec(total: int, top_p: Any) -> int:
    """The weight that a nucleus reaches at least: top_p of a sum, rounded up; top_p as multiple of 2^-32."""
    share = max(1, int(np.float32(top_p) * np.float32(1 << 32))) if top_p > 0 else 1
    return -(-total * share >> 32)


def kept_spec(logits: Any, temperature: Any, top_k: int, top_p: Any) -> Any:
    """Ascending ids that stay of logits f32[V]: the `top_k` highest (0: all), then of these the shortest
    beginning of the order whose weights reach `top_p` of their sum (1 and above: all)."""
    logits = np.asarray(logits, np.float32)
    allowed = np.flatnonzero(logits > -np.inf)
    order = allowed[np.argsort(-logits[allowed], kind="stable")]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1 and order.size:
        sums = np.cumsum(weights_spec(logits, temperature)[order])
        order = order[: np.searchsorted(sums, np.uint64(share_spec(int(sums[-1]), top_p))) + 1]
    return np.sort(order)


@cache
def make_steps() -> Any:
    """Device function (logit, highest, log2(e) / T), float32 -> y as in y_spec, int32, or -1 where it is over
    37: also for NaN and -inf."""
    octaves, scale = np.float32(OCTAVES), np.float32(1 << Y_BITS)

    def steps(logit: Any, best: Any, slope: Any) -> Any:
        if logit == best:
            return np.int32(0)
        y = np.float32(np.float32(best - logit) * slope)
        if y <= octaves:  # false for NaN
            return np.int32(np.float32(y * scale))
        return np.int32(-1)

    return jit(device=True)(steps)


@cache
def make_fixed() -> Any:
    """Device function int32 (not negative) -> uint64, as fixed_spec."""
    c1, c2, c3, c4, c5, c6, c7 = (np.uint64(c) for c in COEFFICIENTS)
    half, one, two_32 = np.uint64(32), np.uint64(1), np.uint64(1 << 32)
    mask, widen, y_bits = np.uint64((1 << Y_BITS) - 1), np.uint64(32 - Y_BITS), np.uint64(Y_BITS)
    lift = np.uint64(FRACTION_BITS - 31)

    def fixed(steps: Any) -> Any:
        whole = np.uint64(steps)
        u = np.uint64((whole & mask) << widen)
        p = np.uint64(c6 - np.uint64((u * c7) >> half))
        p = np.uint64(c5 - np.uint64((u * p) >> half))
        p = np.uint64(c4 - np.uint64((u * p) >> half))
        p = np.uint64(c3 - np.uint64((u * p) >> half))
        p = np.uint64(c2 - np.uint64((u * p) >> half))
        p = np.uint64(c1 - np.uint64((u * p) >> half))
        power = np.uint64(two_32 - np.uint64((u * p) >> half))
        shifted = np.uint64(np.uint64(power << lift) >> np.uint64(whole >> y_bits))
        return np.uint64(np.uint64(shifted + one) >> one)

    return jit(device=True)(fixed)


@cache
def make_rank() -> Any:
    """Device function (logit float32, id) -> uint64 rank; 0 and -0 are one logit."""
    sign, nothing = np.uint32(0x80000000), np.uint32(0)
    last, id_bits = np.uint64(MAX_VOCAB - 1), np.uint64(ID_BITS)

    def rank(logit: Any, token_id: Any) -> Any:
        bits = np.uint32(np.float32(logit).view(np.uint32))
        if bits == sign:
            bits = nothing
        key = np.uint32(~bits) if bits & sign else np.uint32(bits | sign)
        return np.uint64(np.uint64(np.uint64(key) << id_bits) | np.uint64(last - np.uint64(token_id)))

    return jit(device=True)(rank)


@cache
def make_share() -> Any:
    """Device function (sum uint64 below 2^60, top_p float32 below 1) -> uint64, as share_spec."""
    two_32, half, low = np.float32(1 << 32), np.uint64(32), np.uint64(0xFFFFFFFF)
    one = np.uint64(1)

    def share(total: Any, top_p: Any) -> Any:
        part = one
        if top_p > np.float32(0):
            part = max(one, np.uint64(np.float32(top_p * two_32)))
        up = np.uint64(np.uint64(np.uint64(total & low) * part) + low)
        return np.uint64(np.uint64(np.uint64(total >> half) * part) + np.uint64(up >> half))

    return jit(device=True)(share)


GROUPS = 32  # runs of equal length that a sum is first made of


@cache
def make_cross(threads: int, length: int) -> Any:
    """Device function (s_values, s_groups, s_answer, thread, need) -> None, for a whole block.

    s_answer[0] is the first place at which the sum of s_values (u64[length], written before the block's last
    barrier) is `need` (over 0) or more, or `length` if it never is; s_answer[1] the sum before that place;
    s_answer[2] the sum of all. s_groups: u64[32]. It ends with a barrier, after which s_values may be written
    and s_answer be read until the next call, which has a barrier before it writes there.
    """
    run = -(-length // GROUPS)

    def cross(s_values: Any, s_groups: Any, s_answer: Any, thread: Any, need: Any) -> None:
        for group in range(thread, GROUPS, threads):
            total = np.uint64(0)
            for i in range(group * run, min(length, (group + 1) * run)):
                total = np.uint64(total + s_values[i])
            s_groups[group] = total
        cuda.syncthreads()
        if thread == 0:
            before, group = np.uint64(0), 0
            while group < GROUPS and np.uint64(before + s_groups[group]) < need:
                before = np.uint64(before + s_groups[group])
                group += 1
            place, total = min(length, group * run), before
            for other in range(group, GROUPS):
                total = np.uint64(total + s_groups[other])
            while place < length and np.uint64(before + s_values[place]) < need:
                before = np.uint64(before + s_values[place])
                place += 1
            s_answer[0], s_answer[1], s_answer[2] = np.uint64(place), before, total
        cuda.syncthreads()

    return jit(device=True)(cross)


@cache
def make_border(threads: int, load: Any) -> Any:
    """Device function (logits, row, vocab, best, slope, bound, by_weight, need, s_counts, s_weights,
    s_groups, s_answer) -> (rank, weight), for a whole block: where ids of weight in descending rank, `bound`
    and above, reach `need`.

    load(logits, row, id) reads a logit. by_weight: need is a sum of weights, else a number of ids; there must
    be as much. Returned: a rank that the last id needed has at least and every later id lies under; the
    weight of all from it upwards. A rank's digits are found from the top, eight bits a round, by a histogram
    of the ids that share the digits before (s_counts, s_weights: u64[256], the highest digit first); it is
    over as soon as all of a digit's ids are needed, or there is one.
    """
    steps_of, fixed, rank_of = make_steps(), make_fixed(), make_rank()
    size = 1 << DIGIT_BITS
    cross = make_cross(threads, size)

    def border(
        logits: Any, row: Any, vocab: Any, best: Any, slope: Any, bound: Any, by_weight: Any, need: Any,
        s_counts: Any, s_weights: Any, s_groups: Any, s_answer: Any,
    ) -> Any:  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        prefix, above = np.uint64(0), np.uint64(0)  # digits found; weight of all ids over them
        shift = np.uint64(DIGIT_BITS * DIGITS)
        going = True
        while going:
            known = shift
            shift = np.uint64(shift - np.uint64(DIGIT_BITS))
            for i in range(thread, size, threads):
                s_counts[i] = np.uint64(0)
                s_weights[i] = np.uint64(0)
            cuda.syncthreads()
            for token_id in range(thread, vocab, threads):
                logit = load(logits, row, token_id)
                steps = steps_of(logit, best, slope)
                if steps >= np.int32(0):
                    rank = rank_of(logit, token_id)
                    if rank >= bound and np.uint64(rank >> known) == np.uint64(prefix >> known):
                        digit = np.int32(np.uint64(rank >> shift) & np.uint64(size - 1))
                        cuda.atomic.add(s_counts, size - 1 - digit, np.uint64(1))
                        cuda.atomic.add(s_weights, size - 1 - digit, fixed(steps))
            cuda.syncthreads()
            if by_weight:
                cross(s_weights, s_groups, s_answer, thread, need)
            else:
                cross(s_counts, s_groups, s_answer, thread, need)
            place = np.int32(s_answer[0])
            need = np.uint64(need - s_answer[1])
            prefix = np.uint64(prefix | np.uint64(np.uint64(size - 1 - place) << shift))
            for i in range(place):
                above = np.uint64(above + s_weights[i])
            count, inside = s_counts[place], s_weights[place]
            if count == np.uint64(1) or (not by_weight and count == need) or shift == np.uint64(0):
                above = np.uint64(above + inside)
                going = False
            cuda.syncthreads()  # before the next round's zeros
        return prefix, above

    return jit(device=True)(border)
