"""Token ids from logits: the highest logit, or a draw from softmax(logits / temperature) by the Gumbel-max
trick.

Source of the trick: Gumbel 1954; argmax(logits / T + g) with independent g = -log(-log(u)) is such a draw.
Knows: rows of logits with a temperature, a seed and an output index each. Refuses to know: top-k, top-p,
requests.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, require_device
from kernels_numba.compiler import SIMULATOR, cuda, jit
from kernels_numba.cost import Cost
from kernels_numba.philox import make_philox, philox_words
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

THREADS = 2 if SIMULATOR else 512  # a power of two: the reduction halves it
WORDS = 4  # random words, and so token ids, of one Philox call
# g lies in [-log(24 log 2 + ...), 24 log 2 + ...] = [-2.82, 16.64]: a token further than this below the best
# scaled logit cannot win. Rounding is far below the slack.
GUMBEL_SPREAD = 20.0


def gumbel_spec(seed: int, output_index: int, token_ids: Any) -> Any:
    """float32 noise of the token ids: u = ((word >> 9) + 0.5) 2**-23 in (0, 1), g = -log(-log(u)).

    The word of id v is number v % 4 of Philox with key (seed low, seed high), counter (v // 4, output_index,
    0, 0).
    """
    ids = np.asarray(token_ids)
    counter = np.zeros((*ids.shape, 4), np.uint32)
    counter[..., 0] = ids // WORDS
    counter[..., 1] = output_index
    words = philox_words(counter, (int(seed) & 0xFFFFFFFF, int(seed) >> 32))
    word = np.take_along_axis(words, (ids % WORDS)[..., None], axis=-1)[..., 0]
    uniform = ((word >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))


def sample_spec(logits: Any, temperatures: Any, seeds: Any, output_indices: Any) -> Any:
    """ids int32[R] from logits[R, V], temperatures float32[R], seeds uint64[R], output_indices int32[R].

    Temperature 0 (or none above 0): argmax. Else argmax of logits / T + gumbel_spec(seed, output index). Ties
    go to the lowest id; NaN and -inf logits are never chosen; a row with nothing else gives -1.
    """
    logits = wide(logits)
    out = np.full(len(logits), -1, np.int32)
    for row, values in enumerate(logits):
        allowed = np.flatnonzero(values > -np.inf)
        scores = values[allowed]
        temperature = logits.dtype.type(temperatures[row])
        if temperature > 0:
            with np.errstate(over="ignore"):
                scores = scores / temperature + gumbel_spec(
                    int(seeds[row]), int(output_indices[row]), allowed
                )
        if allowed.size:
            out[row] = allowed[np.argmax(scores)]
    return out


def sample_cost(num_rows: int, vocab_size: int, num_random: int = 0) -> Cost:
    """Each logit read once, 20 bytes of parameters and result a row; a comparison a logit, and in the
    `num_random` rows with a temperature 8 float operations more (convert, add, scale, 2 log, 2 negations, add
    and divide as one fused count). Philox's integer work is not counted."""
    return Cost(bytes=num_rows * (4 * vocab_size + 20), flops=vocab_size * (num_rows + 8 * num_random))


@cache
def make_sample_kernel(threads: int = THREADS) -> Any:
    """out[r] = argmax_v of logits[r, v], or of logits[r, v] / T + gumbel(seed, output_index, v).

    Arguments: out i32[R], logits f32[R, V], temperatures f32[R], seeds u64[R], output_indices i32[R].
    Who does what: block r owns row r; thread i walks the quads of ids i, i + threads, ... (one Philox call
    gives the four words of a quad), keeps its best (score, id), and a tree folds `threads` of them. One block
    a row needs no scratch memory, and the best pair under (higher score, then lower id) is the same in any
    order of folding. Shared memory: s_score f32[threads], s_id i32[threads]. Barriers: each hands a level of
    the tree to the next.
    """
    philox = make_philox()

    @jit()
    def sample_kernel(out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any) -> None:
        s_score = cuda.shared.array(threads, np.float32)
        s_id = cuda.shared.array(threads, np.int32)
        words = cuda.local.array(WORDS, np.uint32)
        row = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        vocab = logits.shape[1]
        temperature = temperatures[row]
        key_low = np.uint32(seeds[row] & np.uint64(0xFFFFFFFF))
        key_high = np.uint32(seeds[row] >> np.uint64(32))
        output_index = np.uint32(output_indices[row])
        best_score = np.float32(-np.inf)
        best_id = np.int32(-1)
        for quad in range(thread, (vocab + WORDS - 1) // WORDS, threads):
            if temperature > np.float32(0):
                words[0], words[1], words[2], words[3] = philox(
                    np.uint32(quad), output_index, np.uint32(0), np.uint32(0), key_low, key_high
                )
            for i in range(WORDS):
                token_id = quad * WORDS + i
                if token_id < vocab:
                    score = logits[row, token_id]
                    if score > np.float32(-np.inf):  # false for NaN too
                        if temperature > np.float32(0):
                            uniform = np.float32(words[i] >> np.uint32(9)) + np.float32(0.5)
                            uniform = uniform * np.float32(2.0**-23)
                            noise = np.float32(-math.log(np.float32(-math.log(uniform))))
                            score = score / temperature + noise
                        if (
                            best_id < 0 or score > best_score
                        ):  # ids ascend: an equal score keeps the lower one
                            best_score = score
                            best_id = np.int32(token_id)
        s_score[thread] = best_score
        s_id[thread] = best_id
        cuda.syncthreads()
        half = threads // 2
        while half > 0:
            if thread < half:
                other_score = s_score[thread + half]
                other_id = s_id[thread + half]
                mine = s_score[thread]
                mine_id = s_id[thread]
                if other_id >= 0:
                    if mine_id < 0 or other_score > mine or (other_score == mine and other_id < mine_id):
                        s_score[thread] = other_score
                        s_id[thread] = other_id
            cuda.syncthreads()
            half = half // 2
        if thread == 0:
            out[row] = s_id[0]

    return sample_kernel


def _check(
    kind: type[Host], out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any
) -> None:
    check("sample", "logits", logits, kind.float32, (None, None), rows=1)
    rows = (logits.shape[0],)
    check("sample", "out", out, kind.int32, rows)
    check("sample", "temperatures", temperatures, kind.float32, rows)
    check("sample", "seeds", seeds, kind.uint64, rows)
    check("sample", "output_indices", output_indices, kind.int32, rows)


def sample_reference(
    out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, *, stream: Any = None
) -> None:
    """Rung "reference": the ids of sample_spec, with noise drawn only for tokens that could still win."""
    _check(Host, out, logits, temperatures, seeds, output_indices)
    if logits.shape[1] == 0:
        out[...] = -1
        return
    for row, temperature in enumerate(temperatures):
        values = logits[row]
        best = int(np.argmax(values))  # the first NaN, where there is one
        if not np.isfinite(values[best]):
            out[row] = sample_spec(
                values[None], temperatures[row : row + 1], seeds[row : row + 1], output_indices[row : row + 1]
            )[0]
        elif not temperature > 0:
            out[row] = best
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                scores = values / temperature
                near = np.flatnonzero(scores >= scores[best] - np.float32(GUMBEL_SPREAD))
            noise = gumbel_spec(int(seeds[row]), int(output_indices[row]), near)
            out[row] = near[np.argmax(scores[near] + noise)]


def sample(
    out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, *, stream: Any = None
) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    require_device("sample", "out", out)
    _check(Device, out, logits, temperatures, seeds, output_indices)
    if out.size == 0:
        return
    make_sample_kernel()[out.shape[0], THREADS, stream or 0](out, logits, temperatures, seeds, output_indices)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 13, "temperatures": (0.0, 1.0, 0.5)},
    "toy_one_id": {"vocab_size": 1, "temperatures": (1.0,)},
    "toy_empty": {"vocab_size": 8, "temperatures": ()},
    "smollm2_135m": {"vocab_size": 49152, "temperatures": (0.0, 1.0, 0.3, 2.0)},
    "qwen2_odd": {"vocab_size": 151_937, "temperatures": (1.0, 0.0)},
}
rungs: dict[str, Rung] = {"reference": sample_reference, "plain": sample}
register = make_register("sample", rungs)
