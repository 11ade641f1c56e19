"""The plain sampling kernel, one block a row: no warps, no PTX, so that any GPU and numba's simulator run it.

Also the two pieces that it shares with the kernels of warp_kernels.py: the noise, and which of two ids is the
better one. Knows: rows of logits. Refuses to know: launches.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.compiler import cuda, jit
from kernels_numba.ops.sample.nucleus import (
    DIGIT_BITS,
    GROUPS,
    LOG2_E,
    make_border,
    make_fixed,
    make_rank,
    make_share,
    make_steps,
)
from kernels_numba.philox import make_philox

WORDS = 4  # random words, and so token ids, of one Philox call


@cache
def make_noisy() -> Any:
    """Device function (logit, temperature, word) -> logit / T + gumbel, as gumbel_spec, all float32."""
    half, step, nine = np.float32(0.5), np.float32(2.0**-23), np.uint32(9)

    def noisy(logit: Any, temperature: Any, word: Any) -> Any:
        uniform = np.float32(np.float32(word >> nine) + half)
        uniform = np.float32(uniform * step)
        noise = np.float32(-math.log(np.float32(-math.log(uniform))))
        return np.float32(np.float32(logit / temperature) + noise)

    return jit(device=True)(noisy)


@cache
def make_better() -> Any:
    """Device function (score, id, other score, other id) -> whether the other one is better: the higher
    score, of equal ones the lower id; an id of -1 is none."""

    def better(score: Any, token_id: Any, other: Any, other_id: Any) -> Any:
        if other_id < 0:
            return False
        return token_id < 0 or other > score or (other == score and other_id < token_id)

    return jit(device=True)(better)


@cache
def make_consider() -> Any:
    """Device function (values f32[4], words u32[4], first id, noise, cut, bound, best, slope, temperature,
    key_low, key_high, output_index, score, id) -> (score, id): the better one of what there was and a quad
    of logits.

    noise: score logits / T + gumbel, else logits; cut: only ids of rank `bound` and above count. Random words
    are made where an id of the quad counts, into `words`. NaN and -inf never count.
    """
    philox, noisy, better = make_philox(), make_noisy(), make_better()
    steps_of, rank_of = make_steps(), make_rank()
    lowest, none = np.float32(-np.inf), np.uint32(0)

    def consider(
        values: Any, words: Any, first: Any, noise: Any, cut: Any, bound: Any, best: Any, slope: Any,
        temperature: Any, key_low: Any, key_high: Any, output_index: Any, score: Any, token: Any,
    ) -> Any:  # fmt: skip
        drawn = False
        for i in range(WORDS):
            value, token_id = values[i], np.int32(first + i)
            counts = value > lowest  # false for NaN too
            if counts and cut:
                counts = steps_of(value, best, slope) >= np.int32(0) and rank_of(value, token_id) >= bound
            if counts:
                if noise:
                    if not drawn:
                        quad = np.uint32(np.uint32(first) // np.uint32(WORDS))
                        words[0], words[1], words[2], words[3] = philox(
                            quad, output_index, none, none, key_low, key_high
                        )
                        drawn = True
                    value = noisy(value, temperature, words[i])
                if better(score, token, value, token_id):
                    score, token = value, token_id
        return score, token

    return jit(device=True)(consider)


@cache
def make_truncates() -> Any:
    """Device function (temperature, top_k, top_p, vocab) -> whether a row draws from a part of its ids."""

    def truncates(temperature: Any, top_k: Any, top_p: Any, vocab: Any) -> Any:
        return temperature > np.float32(0) and ((top_k > 0 and top_k < vocab) or top_p < np.float32(1))

    return jit(device=True)(truncates)


def _load(logits: Any, row: Any, token_id: Any) -> Any:
    return logits[row, token_id]


@cache
def make_sample_kernel(threads: int) -> Any:
    """out[r] = argmax_v of logits[r, v], or of logits[r, v] / T + gumbel(seed, output_index, v) over the ids
    that top-k and top-p leave; -1 for a row without a comparable logit.

    Arguments: out i32[R], logits f32[R, V], temperatures f32[R], seeds u64[R], output_indices i32[R], top_ks
    i32[R], top_ps f32[R]. threads: a power of two.
    Who does what: block r owns row r. Thread i walks the quads of ids i, i + threads, ... (one Philox call
    gives the four words of a quad), keeps its best (score, id), and a tree folds `threads` of them: the best
    pair under (higher score, then lower id) is the same in any order of folding. A row that top-k or top-p
    cuts is walked once for its highest logit, then make_border finds the lowest rank that top-k keeps and,
    above it, the lowest that top-p keeps, and the last walk draws from what is left.
    Shared memory: s_score f32[threads], s_id i32[threads]; a histogram of 256 numbers and weights, its runs,
    an answer. Barriers: each hands a level of the tree to the next; the rest is make_border's.
    """
    better, consider, steps_of, fixed = make_better(), make_consider(), make_steps(), make_fixed()
    share, truncates = make_share(), make_truncates()
    border = make_border(threads, jit(device=True)(_load))
    digits, answers, log2_e = 1 << DIGIT_BITS, 3, np.float32(LOG2_E)

    @jit(device=True)
    def walk(
        logits: Any, row: Any, noise: Any, cut: Any, bound: Any, best: Any, slope: Any, temperature: Any,
        seed: Any, output_index: Any,
    ) -> Any:  # fmt: skip
        """This thread's best (score, id): of all ids, or if `cut` of those of rank `bound` and above."""
        words = cuda.local.array(WORDS, np.uint32)
        values = cuda.local.array(WORDS, np.float32)
        key_low = np.uint32(seed & np.uint64(0xFFFFFFFF))
        key_high = np.uint32(seed >> np.uint64(32))
        vocab = logits.shape[1]
        score, token = np.float32(-np.inf), np.int32(-1)
        for quad in range(cuda.threadIdx.x, (vocab + WORDS - 1) // WORDS, threads):
            first = np.int32(quad * WORDS)
            for i in range(WORDS):
                values[i] = logits[row, first + i] if first + i < vocab else np.float32(-np.inf)
            score, token = consider(
                values, words, first, noise, cut, bound, best, slope, temperature, key_low, key_high,
                output_index, score, token,
            )  # fmt: skip
        return score, token

    @jit(device=True)
    def tally(logits: Any, row: Any, best: Any, slope: Any, s_answer: Any) -> Any:
        """How many ids have a weight, and the sum of their weights."""
        thread, vocab = cuda.threadIdx.x, logits.shape[1]
        count, weight = np.uint64(0), np.uint64(0)
        for token_id in range(thread, vocab, threads):
            steps = steps_of(logits[row, token_id], best, slope)
            if steps >= np.int32(0):
                count = np.uint64(count + np.uint64(1))
                weight = np.uint64(weight + fixed(steps))
        if thread == 0:
            s_answer[0], s_answer[1] = np.uint64(0), np.uint64(0)
        cuda.syncthreads()
        cuda.atomic.add(s_answer, 0, count)
        cuda.atomic.add(s_answer, 1, weight)
        cuda.syncthreads()
        return s_answer[0], s_answer[1]

    @jit(device=True)
    def fold(s_score: Any, s_id: Any, score: Any, token: Any) -> None:
        """Leaves the block's best in s_score[0], s_id[0]."""
        thread = cuda.threadIdx.x
        s_score[thread] = score
        s_id[thread] = token
        cuda.syncthreads()
        half = threads // 2
        while half > 0:
            if thread < half:
                if better(s_score[thread], s_id[thread], s_score[thread + half], s_id[thread + half]):
                    s_score[thread] = s_score[thread + half]
                    s_id[thread] = s_id[thread + half]
            cuda.syncthreads()
            half = half // 2

    @jit()
    def sample_kernel(
        out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any
    ) -> None:
        s_score = cuda.shared.array(threads, np.float32)
        s_id = cuda.shared.array(threads, np.int32)
        s_counts = cuda.shared.array(digits, np.uint64)
        s_weights = cuda.shared.array(digits, np.uint64)
        s_groups = cuda.shared.array(GROUPS, np.uint64)
        s_answer = cuda.shared.array(answers, np.uint64)
        row = cuda.blockIdx.x
        vocab = np.int32(logits.shape[1])
        temperature, top_k, top_p = temperatures[row], top_ks[row], top_ps[row]
        seed, output_index = seeds[row], np.uint32(output_indices[row])
        cut = truncates(temperature, top_k, top_p, vocab)
        none, zero = np.uint64(0), np.float32(0)
        score, token = walk(
            logits, row, temperature > zero and not cut, False, none, zero, zero, temperature, seed,
            output_index,
        )  # fmt: skip
        fold(s_score, s_id, score, token)
        if cut and s_id[0] >= 0:  # the same for all threads
            best, slope = s_score[0], np.float32(log2_e / temperature)
            bound = none
            number, total = tally(logits, row, best, slope, s_answer)
            if top_k > 0 and np.uint64(top_k) < number:
                bound, total = border(
                    logits, row, vocab, best, slope, bound, False, np.uint64(top_k), s_counts, s_weights,
                    s_groups, s_answer,
                )  # fmt: skip
            if top_p < np.float32(1):
                bound, total = border(
                    logits, row, vocab, best, slope, bound, True, share(total, top_p), s_counts, s_weights,
                    s_groups, s_answer,
                )  # fmt: skip
            score, token = walk(logits, row, True, True, bound, best, slope, temperature, seed, output_index)
            fold(s_score, s_id, score, token)
        if cuda.threadIdx.x == 0:
            out[row] = s_id[0]

    return sample_kernel
