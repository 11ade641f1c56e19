"""Token ids from logits: the highest logit, or a draw from softmax(logits / temperature) over what top-k and
top-p leave, by the Gumbel-max trick.

Source of the trick: Gumbel 1954; argmax(logits / T + g) with independent g = -log(-log(u)) is such a draw,
from any subset of the ids. The order is the field's: temperature, then top-k, then top-p on what top-k left,
its probabilities summing to 1 again (vLLM's sampler, Hugging Face's logits processors); greedy rows ignore
both. So an id that is drawn without a cut is drawn with every cut that keeps it. nucleus.py says which ids
stay. Knows: rows of logits with their parameters. Refuses to know: requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, fail, require_device
from kernels_numba.compiler import SIMULATOR
from kernels_numba.cost import Cost
from kernels_numba.ops.sample.nucleus import MAX_VOCAB, kept_spec, share_spec, weights_spec
from kernels_numba.ops.sample.plain import WORDS, make_sample_kernel
from kernels_numba.philox import philox_words
from kernels_numba.registry import Rung, make_register
from kernels_numba.wide import wide

THREADS = 2 if SIMULATOR else 512  # a power of two: the reduction halves it
FIRST_SORTED = 256  # logits that the reference sorts before it looks whether a nucleus ends among them
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


def sample_spec(
    logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any
) -> Any:
    """ids int32[R] from logits[R, V], temperatures float32[R], seeds uint64[R], output_indices int32[R],
    top_ks int32[R], top_ps float32[R].

    Temperature 0 (or none above 0): argmax. Else argmax of logits / T + gumbel_spec(seed, output index) over
    kept_spec's ids: top_k 0 (or less) and top_p 1 (or more) keep all. Ties go to the lowest id; NaN and -inf
    logits are never chosen; a row with nothing else gives -1.
    """
    logits = wide(logits)
    out = np.full(len(logits), -1, np.int32)
    for row, values in enumerate(logits):
        temperature = logits.dtype.type(temperatures[row])
        if temperature > 0:
            allowed = kept_spec(values, temperature, int(top_ks[row]), top_ps[row])
            noise = gumbel_spec(int(seeds[row]), int(output_indices[row]), allowed)
            with np.errstate(over="ignore"):
                scores = values[allowed] / temperature + noise
        else:
            allowed = np.flatnonzero(values > -np.inf)
            scores = values[allowed]
        if allowed.size:
            out[row] = allowed[np.argmax(scores)]
    return out


def sample_cost(num_rows: int, vocab_size: int, num_random: int = 0) -> Cost:
    """Each logit read once, 28 bytes of parameters and result a row; a comparison a logit, and in the
    `num_random` rows with a temperature 8 float operations more (convert, add, scale, 2 log, 2 negations, add
    and divide as one fused count). Philox's integer work is not counted, nor what top-k and top-p read
    again."""
    return Cost(bytes=num_rows * (4 * vocab_size + 28), flops=vocab_size * (num_rows + 8 * num_random))


def _check(
    kind: type[Host], out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any,
    top_ps: Any,
) -> None:  # fmt: skip
    check("sample", "logits", logits, kind.float32, (None, None), rows=1)
    rows = (logits.shape[0],)
    if logits.shape[1] > MAX_VOCAB:
        fail("sample", "logits", f"has {logits.shape[1]:,} ids a row", f"at most {MAX_VOCAB:,}")
    check("sample", "out", out, kind.int32, rows)
    check("sample", "temperatures", temperatures, kind.float32, rows)
    check("sample", "seeds", seeds, kind.uint64, rows)
    check("sample", "output_indices", output_indices, kind.int32, rows)
    check("sample", "top_ks", top_ks, kind.int32, rows)
    check("sample", "top_ps", top_ps, kind.float32, rows)


def _highest(values: Any, ids: Any, count: int) -> Any:
    """The `count` highest of the ids, in no order; ties at the border to the lowest ids, which ascend."""
    if count >= ids.size:
        return ids
    own = values[ids]
    border = np.partition(own, ids.size - count)[ids.size - count]
    above = ids[own > border]
    return np.concatenate([above, ids[own == border][: count - above.size]])


def _kept_reference(values: Any, temperature: Any, top_k: int, top_p: Any) -> Any:
    """kept_spec without ids of no weight, which cannot win; sorts no more than the nucleus needs."""
    weights = weights_spec(values, temperature)
    ids = np.flatnonzero(weights)
    if top_k > 0:
        ids = _highest(values, ids, top_k)
    if top_p < 1:
        need, size = share_spec(int(weights[ids].sum()), top_p), FIRST_SORTED
        while True:
            first = np.sort(_highest(values, np.sort(ids), size))
            order = first[np.argsort(-values[first], kind="stable")]
            sums = np.cumsum(weights[order])
            if int(sums[-1]) >= need:
                return np.sort(order[: np.searchsorted(sums, np.uint64(need)) + 1])
            size *= 8
    return np.sort(ids)


def sample_reference(
    out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any, *,
    stream: Any = None,
) -> None:  # fmt: skip
    """Rung "reference": the ids of sample_spec, with noise drawn only for tokens that could still win."""
    _check(Host, out, logits, temperatures, seeds, output_indices, top_ks, top_ps)
    if logits.shape[1] == 0:
        out[...] = -1
        return
    for row, temperature in enumerate(temperatures):
        values, top_k, top_p = logits[row], int(top_ks[row]), top_ps[row]
        best = int(np.argmax(values))  # the first NaN, where there is one
        if not np.isfinite(values[best]):
            one = slice(row, row + 1)
            out[row] = sample_spec(
                values[None], temperatures[one], seeds[one], output_indices[one], top_ks[one], top_ps[one]
            )[0]
        elif not temperature > 0:
            out[row] = best
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                scores = values / temperature
                near = np.flatnonzero(scores >= scores[best] - np.float32(GUMBEL_SPREAD))
            if 0 < top_k < values.size or top_p < 1:
                kept = _kept_reference(values, temperature, top_k, top_p)
                near = kept[scores[kept] >= scores[best] - np.float32(GUMBEL_SPREAD)]
            noise = gumbel_spec(int(seeds[row]), int(output_indices[row]), near)
            out[row] = near[np.argmax(scores[near] + noise)]


def sample(
    out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any, *,
    stream: Any = None,
) -> None:  # fmt: skip
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides."""
    require_device("sample", "out", out)
    _check(Device, out, logits, temperatures, seeds, output_indices, top_ks, top_ps)
    if out.size == 0:
        return
    make_sample_kernel(THREADS)[out.shape[0], THREADS, stream or 0](
        out, logits, temperatures, seeds, output_indices, top_ks, top_ps
    )


def sample_warp(
    out: Any, logits: Any, temperatures: Any, seeds: Any, output_indices: Any, top_ks: Any, top_ps: Any, *,
    stream: Any = None, num_rows: Any = None, workspace: Any = None,
) -> None:  # fmt: skip
    """Rung "warp" (sm_80 and newer): several blocks a row; see warp.py, which is imported when first used.
    num_rows: device i32[1], the real number of rows; those from there on are left alone. workspace: a
    Workspace of warp.py, the caller's."""
    from kernels_numba.ops.sample import warp

    arrays = (out, logits, temperatures, seeds, output_indices, top_ks, top_ps)
    warp.sample_warp(*arrays, stream=stream, num_rows=num_rows, workspace=workspace)


CASES: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 13, "temperatures": (0.0, 1.0, 0.5), "top_ks": (0,) * 3, "top_ps": (1.0,) * 3},
    "toy_one_id": {"vocab_size": 1, "temperatures": (1.0,)},
    "toy_empty": {"vocab_size": 8, "temperatures": ()},
    "toy_cut": {
        "vocab_size": 11, "temperatures": (2.0, 0.7, 3.0, 0.0), "top_ks": (3, 0, 7, 1),
        "top_ps": (1.0, 0.8, 0.9, 0.5),
    },
    "smollm2_135m": {"vocab_size": 49152, "temperatures": (0.0, 1.0, 0.3, 2.0)},
    "qwen2_odd": {"vocab_size": 151_937, "temperatures": (1.0, 0.0)},
    "qwen2_cut": {
        "vocab_size": 151_936, "temperatures": (0.7, 1.0, 4.0, 1.0, 0.7, 0.0, 5.0),
        "top_ks": (20, 0, 0, 40, 5000, 9, 0), "top_ps": (0.8, 0.95, 0.9, 1.0, 0.99, 0.3, 1.0),
    },
}  # fmt: skip
rungs: dict[str, Rung] = {"reference": sample_reference, "plain": sample, "warp": sample_warp}
register = make_register("sample", rungs)
