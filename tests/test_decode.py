"""Decode attention on tensor cores: its order of operations in numpy, its kernel's text in numpy (warps in
threads), the code that it becomes, and its numbers and bits on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from decode_batches import BF16, ELEMENTS, bits, largest_difference, make_batch
from tolerance import error_ratio

from kernels_numba import attention_contract as contract
from kernels_numba.compiler import KernelsUnavailable
from kernels_numba.ops.decode_attention import decode_attention_spec
from kernels_numba.ops.decode_attention.config import (
    CONFIGS,
    HEAD_DIMS,
    MUTANTS,
    SMEM_LIMITS,
    Build,
    DecodeConfig,
    smem_plan,
)
from kernels_numba.ops.decode_attention.door import Operands, Workspace, operands, refusal
from kernels_numba.ops.decode_attention.fold import UNWRITTEN
from kernels_numba.ops.decode_attention.in_numpy import in_numpy
from kernels_numba.simt_turns import Stuck

ROOT = Path(__file__).resolve().parent.parent
# The mistakes that make wrong numbers; the others make kernels that hang or race.
WRONG = ("scale", "mask", "page", "stale_tail")


def rounder(dtype):
    return lambda x: np.asarray(x, np.float32).astype(ELEMENTS[dtype]).astype(np.float32)


def by_contract(batch, dtype="bfloat16"):
    """(out[B, Hq, D] float32, log-sum-exp) of a batch in the contract's order."""
    out, lse = np.zeros(batch.q.shape, np.float32), np.zeros(batch.q.shape[:2], np.float32)
    for seq in range(len(out)):
        length = max(0, int(batch.context_lens[seq]))
        first = contract.first_visible(length, batch.window)
        for head in range(batch.k_cache.shape[1]):
            k, v = (np.zeros((length, batch.q.shape[2]), np.float32) for _ in range(2))
            seen_k, seen_v = batch.keys_values(seq, head)
            k[first:], v[first:] = seen_k.astype(np.float32), seen_v.astype(np.float32)
            mine = slice(head * batch.group, (head + 1) * batch.group)
            q = batch.q[seq, mine].astype(np.float32)
            out[seq, mine], lse[seq, mine] = contract.attention(
                q, k, v, batch.scale, rounder(dtype), batch.window
            )
    return out, lse


# The order of operations.


@pytest.mark.parametrize(
    ("length", "window"), [(1, None), (127, None), (1025, None), (3000, None), (3000, 1100)]
)
def test_the_order_is_attention(length, window):
    batch = make_batch(np.random.default_rng(length), [length], 1, 3, 64, window=window, spread=3)
    out, lse = by_contract(batch)
    true_out, true_lse = batch.truth()
    # Weights are rounded to 8 bits before they meet the values; nothing else is.
    assert np.abs(out - true_out).max() <= 2.0**-8 * np.abs(true_out).max() + 2.0**-9
    assert np.abs(lse - true_lse).max() < 1e-5


def test_splits_and_tiles_are_aligned_to_key_0():
    assert list(contract.split_range(1024)) == [0]
    assert list(contract.split_range(1025)) == [0, 1]
    assert list(contract.split_range(4000, 900)) == [3]
    assert list(contract.split_range(4000, 1000)) == [2, 3]
    assert list(contract.split_range(0)) == []


def test_a_neighbour_that_sees_more_changes_nothing():
    """Tiles in which a row sees nothing, and splits of them, are exact no-ops: the same bits without them."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (2200, 64), (2200, 64)))
    c, length = contract.exponent_scale(0.125), 300
    short = contract.attention(q, k[:length], v[:length], 0.125, rounder("bfloat16"))
    state = contract.State(
        np.full(2, -np.inf, np.float32), np.zeros(2, np.float32), np.zeros((2, 64), np.float32)
    )
    for split in range(3):
        one = contract.attend_split(q, k, v, split, length, 0, c, rounder("bfloat16"))
        state = contract.fold(state, one)
    for mine, other in zip(short, contract.finish(state), strict=True):
        assert np.array_equal(mine, other)


def test_sums_have_places_of_their_own():
    """Sixteen places a row: the sum of weights is not numpy's, and its order is the documented one."""
    places = np.arange(16, dtype=np.float32).reshape(1, 4, 4) + np.float32(2.0**24)
    quads = [np.float32(np.float32(g[0] + g[1]) + np.float32(g[2] + g[3])) for g in places[0]]
    assert contract.sum_places(places)[0] == (quads[0] + quads[1]) + (quads[2] + quads[3])


def test_the_definition_of_several_tokens_is_each_ones():
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((3, 2, 4, 8)).astype(np.float32) for _ in range(2))
    q, table = rng.standard_normal((6, 4, 8)).astype(np.float32), np.array([[2, 0], [1, -1]])
    together = decode_attention_spec(q, k, v, np.array([7, 2]), table, softmax_scale=0.3, query_tokens=3)
    lens, tables = np.array([5, 6, 7, 0, 1, 2]), np.repeat(table, 3, axis=0)
    assert np.array_equal(together, decode_attention_spec(q, k, v, lens, tables, softmax_scale=0.3))
    assert not together[3].any()


# The kernel's text in numpy.


def run_in_numpy(batch, feed, tokens=1, **how):
    """(out as float32, log-sum-exp) of the kernel's text, which leaves its workspace as it was."""
    out = np.full(batch.q.shape, np.nan, BF16)
    lse = np.full(batch.q.shape[:2], np.nan, np.float32)
    left = in_numpy(
        feed, bits(out), bits(np.ascontiguousarray(batch.q)), bits(batch.k_cache), bits(batch.v_cache),
        batch.context_lens[tokens - 1 :: tokens].copy(), batch.block_table[::tokens].copy(),
        softmax_scale=batch.scale, window=batch.window, lse=lse, tokens=tokens, **how,
    )  # fmt: skip
    assert left == 0
    return out.astype(np.float32), lse


def apart(batch, got):
    """How far a result is from the contract's, in bfloat16's largest rounding of the result (of a row's small
    numbers, of an eighth of its largest), or in 1e-5 of the log-sum-exp."""
    out, lse = by_contract(batch)
    scale = np.maximum(np.abs(out), np.abs(out).max(axis=-1, keepdims=True) / 8) + 2.0**-20
    error = np.nan_to_num(np.abs(got[0] - out) / scale, nan=np.inf).max() / 2.0**-8
    return max(float(error), largest_difference(got[1], lse) / 1e-5)


BATCHES = [
    ([1, 0, 65, 128, 200, -4], 2, 3, 64, None),
    ([63, 64, 129], 1, 9, 128, None),
    ([1023, 1024, 2500, 1], 1, 16, 64, None),
    ([2500, 300, 150, 140], 1, 4, 64, 150),
    ([0, 0, 5, 0, 0, 7], 1, 1, 64, None),
]


@pytest.mark.parametrize("feed", ["tma", "cp_async"])
@pytest.mark.parametrize(("lens", "heads", "group", "head_dim", "window"), BATCHES)
def test_the_kernels_text_keeps_the_order(feed, lens, heads, group, head_dim, window):
    batch = make_batch(
        np.random.default_rng(len(lens)), lens, heads, group, head_dim, window=window, spread=2
    )
    # One rounding, and a little, because the two sum a step's products differently.
    assert apart(batch, run_in_numpy(batch, feed, grid=3)) <= 1.1


@pytest.mark.parametrize(("tokens", "lens", "heads", "group", "head_dim", "window"), [
    (2, [1, 0, 65, 129, 200, -4], 2, 3, 64, None), (8, [1030, 5, 64], 1, 7, 64, None),
    (5, [1026, 3], 1, 4, 128, None), (3, [1030, 300, 140, 1], 1, 4, 64, 100),
])  # fmt: skip
def test_the_text_of_several_tokens_keeps_each_ones_order(tokens, lens, heads, group, head_dim, window):
    """Every token has the result, and the bits, that it has alone."""
    rng = np.random.default_rng([tokens, group])
    reach = None if window is None else window + tokens - 1
    rows = make_batch(rng, lens, heads, group, head_dim, window=reach, spread=2).by_tokens(rng, tokens)
    got = run_in_numpy(rows, "tma", tokens=tokens, grid=2)
    assert apart(rows, got) <= 1.1
    alone = run_in_numpy(rows, "tma", grid=2)
    assert all(np.array_equal(mine, other) for mine, other in zip(got, alone, strict=True))


def test_any_order_of_warps_gives_the_same_bits():
    batch = make_batch(np.random.default_rng(2), [130, 0, 0, 1, 1500], 1, 3, 64)
    results = [run_in_numpy(batch, "tma", grid=1 + seed % 2, seed=seed) for seed in range(8)]
    assert all(
        np.array_equal(got, want) for result in results for got, want in zip(result, results[0], strict=True)
    )


def test_scorers_too_far_ahead_would_read_what_is_not_there():
    """Weights' places alone do not hold them back enough, where the ring is short."""
    batch = make_batch(np.random.default_rng(5), [1024], 1, 2, 128)

    def late(name, text):
        wait = "wait_added(int32(smem + added_at + 8 * turn), int32(turn_phase ^ 1))\n"
        weights = "                    for step in range(2):\n                        for j in range(4):"
        if name[-7:] != "scorers":
            return text
        assert text.count(wait) == text.count(weights) == 1
        return text.replace(wait, "\n").replace(weights, f"                    {wait}{weights}")

    def wrong(seed):
        try:
            return apart(batch, run_in_numpy(batch, "cp_async", grid=1, seed=seed, change=late)) > 1.1
        except (Stuck, RuntimeError):
            return True

    assert any(wrong(seed) for seed in (8, 16, 20, 31, 36))
    assert all(apart(batch, run_in_numpy(batch, "cp_async", grid=1, seed=seed)) <= 1.1 for seed in (8, 16))


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m])
def test_mistakes_are_noticed_in_numpy(mutant):
    lens = [100, 700] if mutant in WRONG else [100, 1800]  # more pages than stages
    batch = make_batch(np.random.default_rng(8), lens, 1, 2, 64)
    if mutant in WRONG:
        try:
            assert apart(batch, run_in_numpy(batch, "tma", mutant=mutant)) > 1.1
        except (IndexError, Stuck):  # a page too far may lie outside the cache
            assert mutant == "page"
    else:
        with pytest.raises((Stuck, AssertionError, RuntimeError)):
            assert apart(batch, run_in_numpy(batch, "tma", mutant=mutant, grid=1)) <= 1.1


# What it becomes. In a child, because this process runs numba's simulator.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.decode_attention.config import Build, DecodeConfig
from kernels_numba.ops.decode_attention.tensor_core import decode_kernel
reports = []
for feed, arch, head_dim, dtype, window, lse in (
    ("tma", "sm_90a", 128, "bfloat16", None, True), ("tma", "sm_90a", 64, "float16", 300, True),
    ("cp_async", "sm_80", 128, "float16", 300, True), ("cp_async", "sm_120", 64, "bfloat16", None,
    True),
):
    report = assemble_kernel(decode_kernel(DecodeConfig(head_dim, feed), dtype, window, lse), arch)
    reports.append([asdict(report), report.problems, feed, head_dim])
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def assembled():
    return json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT))))


def test_tiles_stay_in_registers(assembled):
    assert len(assembled) == 4
    for report, problems, feed, head_dim in assembled:
        assert problems == [], report
        assert report["registers"] <= 168, report  # 384 threads an SM
        # 16 rows x 128 keys x head_dim: four warps share 8 x head_dim / 16 products of each kind, P V in
        # pages.
        assert report["main_loop"]["HMMA"] >= head_dim // 8, report
        assert report["main_loop"]["LDSM"] >= head_dim // 16, report
        counts = report["instructions"]
        assert ("UTMALDG" in counts) == (feed == "tma"), report
        assert ("LDGSTS" in counts) == (feed == "cp_async"), report
        assert ("ACQBULK" in counts) == (feed == "tma"), report


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shared_memory_holds_a_tile_and_more(config):
    plan = smem_plan(config)
    assert plan.bytes <= SMEM_LIMITS[config.feed] <= 232_448
    assert config.stages >= 5  # a tile is four chunks
    assert all(plan.offset("chunk", i) % 1024 == 0 for i in range(config.stages))


def test_other_sizes_are_refused():
    for head_dim, feed in ((96, "tma"), (64, "by_hand")):
        with pytest.raises(
            ValueError, match=f"head_dim is {head_dim}, feed '{feed}'; head_dim 64 or 128, and"
        ):
            DecodeConfig(head_dim, feed)


# The door.


class OnDevice:
    """Looks like a device array; nothing can be read from it."""

    def __init__(self, array, start=1 << 20):
        self.dtype, self.shape, self.strides = array.dtype, array.shape, array.strides
        self.size, self.nbytes, self.ndim = array.size, array.nbytes, array.ndim
        self.__cuda_array_interface__ = {"data": (start, False)}


def door_arguments(**other):
    """Arguments of a call with four sequences, changed by name."""
    shapes = {"out": (4, 6, 64), "q": (4, 6, 64), "k_cache": (9, 2, 64, 64), "v_cache": (9, 2, 64, 64)}
    arguments = {name: OnDevice(np.zeros(shape, np.uint16)) for name, shape in shapes.items()}
    arguments["context_lens"] = OnDevice(np.zeros(4, np.int32))
    arguments["block_table"] = OnDevice(np.zeros((4, 33), np.int32))
    return {**arguments, "softmax_scale": 0.125, **other}


def test_the_door_lets_good_arguments_in():
    o = operands(**door_arguments())
    assert isinstance(o, Operands)
    assert (o.num_seqs, o.num_kv_heads, o.group, o.head_dim) == (4, 2, 3, 64)
    assert (o.max_splits(), o.max_splits(256)) == (3, 9)
    assert (o.q_stride, o.table_stride, o.dtype, o.lse) == (768, 33, "bfloat16", 0)
    wide = OnDevice(np.zeros((4, 10, 64), np.uint16)[:, :6])
    assert operands(**door_arguments(q=wide)).q_stride == 1280


@pytest.mark.parametrize(("other", "message"), [
    ({"softmax_scale": 0.0}, "softmax_scale is 0.0; a positive number is required"),
    ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
    ({"window": 0}, "window is 0; None or a whole number of at least 1"),
    ({"window": True}, "window is True"),
    ({"query_tokens": 0}, "query_tokens is 0; a whole number from 1 to 8"),
    ({"query_tokens": 9}, "query_tokens is 9; a whole number from 1 to 8"),
    ({"query_tokens": 3}, "out has 4 rows; a multiple of the 3 query tokens"),
    ({"query_tokens": 2}, r"context_lens has shape \(4,\); \(2\)"),
    ({"q": np.zeros((4, 6, 64), np.uint16)[:3]}, "q is a ndarray; a device array"),
    ({"q": OnDevice(np.zeros((3, 6, 64), np.uint16))}, r"q has shape \(3, 6, 64\); \(4, 6, 64\)"),
    ({"q": OnDevice(np.zeros((4, 6, 64), np.float16))}, "q has dtype float16; uint16"),
    ({"out": OnDevice(np.zeros((4, 6, 64), np.float32))}, "out has dtype float32; uint16 or float16"),
    ({"k_cache": OnDevice(np.zeros((9, 2, 32, 64), np.uint16))}, r"k_cache has shape \(9, 2, 32, 64\)"),
    ({"k_cache": OnDevice(np.zeros((9, 2, 64, 64), np.uint16), 8)}, "k_cache starts at address 0x8"),
    ({"v_cache": OnDevice(np.zeros((8, 2, 64, 64), np.uint16))}, r"v_cache has shape \(8, 2, 64, 64\)"),
    ({"context_lens": OnDevice(np.zeros(5, np.int32))}, r"context_lens has shape \(5,\)"),
    ({"context_lens": OnDevice(np.zeros(4, np.int64))}, "context_lens has dtype int64"),
    ({"block_table": OnDevice(np.zeros((3, 33), np.int32))}, r"block_table has shape \(3, 33\)"),
    ({"lse": OnDevice(np.zeros((4, 5), np.float32))}, r"lse has shape \(4, 5\); \(4, 6\)"),
])  # fmt: skip
def test_the_door_names_what_is_wrong(other, message):
    with pytest.raises(ValueError, match=message):
        operands(**door_arguments(**other))


def test_the_door_names_heads_that_do_not_fit():
    def with_heads(num_q_heads, num_kv_heads, head_dim):
        rows = OnDevice(np.zeros((4, num_q_heads, head_dim), np.uint16))
        cache = OnDevice(np.zeros((9, num_kv_heads, 64, head_dim), np.uint16))
        return door_arguments(out=rows, q=rows, k_cache=cache, v_cache=cache)

    for heads, message in (
        ((6, 4, 64), "q has 6 heads; a multiple of the 4 kv heads"),
        ((34, 2, 64), "q has 17 heads a kv head; at most 16"),
        ((6, 2, 96), r"out.shape\[2\] is 96; head_dim 64 or 128"),
    ):
        with pytest.raises(ValueError, match=message):
            operands(**with_heads(*heads))
    with pytest.raises(ValueError, match="workspace for 4 sequences and 3 splits"):
        Workspace.of(4, 3, 6, 2, 64)


@pytest.mark.parametrize(("rung", "capability", "dtype", "head_dim", "group", "block_size", "why"), [
    ("hopper", (9, 0), "bfloat16", 128, 7, 64, ""),
    ("hopper", (8, 0), "bfloat16", 128, 7, 64, "compute capability 9.0, here is compute capability 8.0"),
    ("hopper", (10, 0), "bfloat16", 128, 7, 64, "here is compute capability 10.0"),
    ("hopper", None, "bfloat16", 128, 7, 64, "here is no GPU"),
    ("mma_sync", (12, 0), "float16", 64, 16, 64, ""),
    ("mma_sync", (7, 5), "bfloat16", 64, 16, 64, "8.0 or newer"),
    ("mma_sync", (8, 6), "float32", 64, 16, 64, "bfloat16 or float16, not float32"),
    ("mma_sync", (8, 6), "bfloat16", 80, 16, 64, "head_dim 64 or 128, not 80"),
    ("mma_sync", (8, 6), "bfloat16", 64, 17, 64, "up to 16 query heads a kv head, not 17"),
    ("mma_sync", (8, 6), "bfloat16", 64, 1, 32, "pages of 64 keys, not 32"),
    ("plain", None, "float32", 80, 40, 1, ""),
])  # fmt: skip
def test_rungs_that_cannot_run_say_why(rung, capability, dtype, head_dim, group, block_size, why):
    said = refusal(rung, capability, dtype, head_dim, group, block_size)
    assert said == "" if not why else why in said


def test_unknown_mutants_are_named():
    with pytest.raises(ValueError, match="mutant is 'typo'; there are scale"):
        Build(mutant="typo")


# On a GPU.

RUNGS = ("hopper", "mma_sync")


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have[0] == 9, "9.0")


class OnGpu:
    """A batch's arrays on the device, and calls of rungs on them."""

    def __init__(self, cuda, batch):
        self.cuda, self.batch = cuda, batch
        rows, heads, dim = batch.q.shape
        wide = np.full((rows, heads + 5, dim), np.nan, batch.q.dtype)
        wide[:, :heads] = batch.q
        self.q = cuda.to_device(bits(wide))[:, :heads]
        self.arrays = [cuda.to_device(bits(x)) for x in (batch.k_cache, batch.v_cache)]
        self.arrays += [cuda.to_device(x) for x in (batch.context_lens, batch.block_table)]

    def __call__(self, rung, query_tokens=1, **how):
        """(out in the element type, log-sum-exp) by a tensor-core rung; query_tokens: that a sequence has,
        of a batch by_tokens."""
        from kernels_numba.ops.decode_attention.tensor_core import attend

        batch = self.batch
        out = self.cuda.to_device(bits(np.full(batch.q.shape, np.nan, batch.q.dtype)))
        lse = self.cuda.to_device(np.full(batch.q.shape[:2], np.nan, np.float32))
        lens, table = batch.context_lens[query_tokens - 1 :: query_tokens], batch.block_table[::query_tokens]
        caches = self.arrays[:2]
        each = (self.cuda.to_device(np.ascontiguousarray(x)) for x in (lens, table))
        attend(
            rung, out, self.q, *caches, *each, softmax_scale=batch.scale, window=batch.window, lse=lse,
            query_tokens=query_tokens, **how,
        )  # fmt: skip
        self.cuda.synchronize()
        return out.copy_to_host().view(batch.q.dtype), lse.copy_to_host()

    def plain(self):
        """out by the plain rung, bfloat16 only."""
        from kernels_numba.ops.decode_attention import decode_attention

        batch = self.batch
        out = self.cuda.to_device(bits(np.full(batch.q.shape, np.nan, batch.q.dtype)))
        decode_attention(out, self.q, *self.arrays, softmax_scale=batch.scale, window=batch.window)
        return out.copy_to_host().view(batch.q.dtype)


def check(batch, got, plain=None):
    """The error of (out, lse) from float64 over what is allowed: twice the plain rung's, or a rounding of the
    truth where that rung does not go, and a rounding."""
    truth, lse = batch.truth()
    plain = truth.astype(batch.q.dtype) if plain is None else plain
    terms = max(1, *batch.context_lens.tolist())
    dtype = "bfloat16" if batch.q.dtype == BF16 else "float16"
    ratio = error_ratio(got[0].astype(np.float32), plain.astype(np.float32), truth, dtype, terms)
    return ratio if largest_difference(got[1], lse) < 1e-4 else np.inf


def same_bits(one, other):
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(one, other, strict=True))


LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 251, 1023, 1024, 1025, 1151, 2047, 2048, 3001, 4099, -1]
HEADS = [(4, 7, 128), (8, 4, 128), (3, 3, 64), (8, 4, 64), (1, 1, 128), (2, 9, 64), (1, 16, 128), (2, 1, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decode_against_float64(cuda, num_kv_heads, group, head_dim, dtype):
    rng = np.random.default_rng([num_kv_heads, group, head_dim])
    batch = make_batch(rng, LENGTHS, num_kv_heads, group, head_dim, dtype=dtype, spread=2)
    gpu = OnGpu(cuda, batch)
    results = [gpu(rung) for rung in RUNGS]
    plain = gpu.plain() if dtype == "bfloat16" else None
    assert check(batch, results[0], plain) <= 1
    assert same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 100, 1500, 5000])
def test_decode_with_a_window(cuda, window):
    rng = np.random.default_rng(window)
    batch = make_batch(rng, LENGTHS, 2, 4, 128, window=window, spread=2)
    gpu = OnGpu(cuda, batch)
    results = [gpu(rung) for rung in RUNGS]
    assert check(batch, results[0], gpu.plain()) <= 1
    assert same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "group", "head_dim", "window", "rungs"), [
    (2, 7, 128, None, RUNGS), (8, 7, 128, None, RUNGS[:1]), (8, 4, 64, None, RUNGS[:1]),
    (3, 4, 128, 300, RUNGS[:1]),
])  # fmt: skip
def test_decode_of_several_tokens(cuda, tokens, group, head_dim, window, rungs):
    """Each token has the bits that it has alone, and is right."""
    rng = np.random.default_rng([tokens, group])
    reach = None if window is None else window + tokens - 1
    rows = make_batch(rng, LENGTHS, 2, group, head_dim, window=reach, spread=2).by_tokens(rng, tokens)
    gpu = OnGpu(cuda, rows)
    alone = gpu("hopper")
    assert check(rows, alone, gpu.plain()) <= 1
    assert all(same_bits(gpu(rung, query_tokens=tokens), alone) for rung in rungs)


@pytest.mark.gpu
def test_decode_of_100k_keys_beside_short_ones(cuda):
    batch = make_batch(np.random.default_rng(1), [500, 100_003, 1, 499], 2, 7, 128)
    gpu = OnGpu(cuda, batch)
    results = [gpu(rung) for rung in RUNGS]
    assert check(batch, results[0]) <= 1
    assert same_bits(*results)


@pytest.mark.gpu
def test_decode_of_random_batches(cuda):
    """New numbers, lengths, heads and company each run: right, and the same bits alone as among strangers."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(6):
        heads, group, dim = HEADS[int(rng.integers(len(HEADS)))]
        lens = rng.integers(0, 3000, int(rng.integers(1, 300)))
        batch = make_batch(rng, lens, heads, group, dim, spread=float(rng.uniform(0.1, 4)))
        gpu = OnGpu(cuda, batch)
        results = [gpu(rung) for rung in RUNGS]
        assert check(batch, results[0]) <= 1, seed
        assert same_bits(*results), seed
        for seq in rng.integers(0, len(lens), 4).tolist():
            alone = OnGpu(cuda, batch.only(seq))("hopper")
            assert same_bits(alone, [x[seq : seq + 1] for x in results[0]]), (seed, seq)


@pytest.mark.gpu
def test_decode_over_shared_pages(cuda):
    """Sequences with the same beginning read the same pages; the same query over the same keys: same bits."""
    rng = np.random.default_rng(3)
    batch = make_batch(rng, [1300, 1290, 1600, 1280], 2, 3, 64, shared=20)
    batch.q[1:] = batch.q[:1]
    batch.context_lens[:] = [1280, 1280, 1600, 1280]
    results = OnGpu(cuda, batch)("hopper")
    assert check(batch, results) <= 1
    for row in (1, 3):
        assert same_bits([x[row] for x in results], [x[0] for x in results])


@pytest.mark.gpu
def test_decode_replays_and_leaves_counters_at_0(cuda):
    from kernels_numba.ops.decode_attention.tensor_core import own_workspace

    batch = make_batch(np.random.default_rng(6), [3000, 5, 0, 2048, 1025], 4, 7, 128)
    gpu = OnGpu(cuda, batch)
    first = gpu("hopper")
    assert all(same_bits(gpu("hopper"), first) for _ in range(20))
    space = own_workspace(5, 5 * -(-batch.block_table.shape[1] * 64 // 1024), 28, 4, 128)
    assert not space.counters.copy_to_host().any()
    for partial in (space.partial, space.partial_ml):
        assert (partial.copy_to_host().view(np.int32) == UNWRITTEN).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("lens", [[0] * 700, [*[0] * 300, 1500, *[-3] * 300]])
def test_sequences_without_keys_are_zeros(cuda, rung, lens):
    """An engine's bucket is mostly such; also of several query tokens, where a sequence has fewer keys."""
    batch = make_batch(np.random.default_rng(len(lens)), lens, 2, 4, 64)
    out, lse = OnGpu(cuda, batch)(rung)
    empty = np.array(lens) <= 0
    assert not out[empty].astype(np.float32).any()
    assert np.isneginf(lse[empty]).all()
    assert np.isfinite(out.astype(np.float32)).all()
    rows = make_batch(np.random.default_rng(1), [2, 0, 5], 2, 4, 64).by_tokens(np.random.default_rng(2), 3)
    gpu = OnGpu(cuda, rows)
    assert same_bits(gpu(rung, query_tokens=3), gpu(rung))


@pytest.mark.gpu
def test_decode_of_nan_ends(cuda):
    """A result that is NaN is no missing result: whoever folds does not wait for it."""
    batch = make_batch(np.random.default_rng(3), [3000, 100], 2, 4, 128)
    batch.q[0, 1] = np.nan
    out, _ = OnGpu(cuda, batch)("hopper")
    assert np.isnan(out[0, 1].astype(np.float32)).all()
    assert np.isfinite(np.delete(out[0], 1, axis=0).astype(np.float32)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
def test_decode_bits_survive_random_pauses(cuda, rung):
    """Warps that dawdle at random reach orders that never happen by themselves; waits are bounded."""
    for dim in HEAD_DIMS:
        batch = make_batch(np.random.default_rng(7), [*LENGTHS, 0, 0, 3, 0], 3, 5, dim)
        gpu = OnGpu(cuda, batch)
        want = gpu(rung)
        for _ in range(4):
            assert same_bits(gpu(rung, build=Build(debug=True, stress=True)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("mutant", WRONG)
def test_decode_notices_mistakes(cuda, mutant):
    batch = make_batch(np.random.default_rng(9), [100, 700, 1100], 2, 7, 128)
    # A page too far must lie within the cache, so the last is not in use.
    used = batch.block_table == batch.k_cache.shape[0] - 1
    batch.block_table[used] = 0
    assert check(batch, OnGpu(cuda, batch)("hopper", build=Build(mutant=mutant))) > 1
    assert check(batch, OnGpu(cuda, batch)("hopper")) <= 1


# A child's: a failed assertion in a kernel ends its CUDA context.
CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from decode_batches import make_batch
from test_decode import OnGpu, Build, same_bits
from kernels_numba.compiler import cuda
from kernels_numba.ops.decode_attention.door import Workspace
batch = make_batch(np.random.default_rng(6), [2000] * 40, 4, 7, 128)
gpu = OnGpu(cuda, batch)
want = gpu("hopper")
space = Workspace.of(40, {splits}, 28, 4, 128)
got = gpu("hopper", workspace=space, build=Build(debug=True, mutant={mutant!r}))
print("same bits" if same_bits(got, want) else "other bits")
"""


def run_child(mutant="", splits=80):
    """What a child says that compares this build with the product's, and whether it ended well."""
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), mutant=mutant, splits=splits)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    return child.stdout + child.stderr, child.returncode == 0


@pytest.mark.gpu
def test_decode_that_would_hang_or_overflow_says_so(cuda):
    said, ended = run_child()
    assert ended, said
    assert "same bits" in said
    said, ended = run_child("wrong_phase")
    assert "other bits" in said or not ended, said
    said, ended = run_child("lost_arrival")
    assert not ended, said
    assert "mbarrier wait timed out" in said, said
    said, ended = run_child(splits=79)
    assert not ended, said


@pytest.mark.gpu
def test_decode_refuses_a_workspace_for_others(cuda):
    batch = make_batch(np.random.default_rng(6), [20] * 4, 2, 3, 64)
    gpu = OnGpu(cuda, batch)
    with pytest.raises(ValueError, match="workspace is for 2 sequences; one for 4"):
        gpu("hopper", workspace=Workspace.of(2, 2, 6, 2, 64))
    with pytest.raises(ValueError, match=r"workspace is for \(heads, head_dim\) \(6, 128\)"):
        gpu("hopper", workspace=Workspace.of(4, 4, 6, 2, 128))


def test_without_a_compiler_the_rungs_say_so(on_gpu):
    from kernels_numba.ops.decode_attention.door import require_capability

    if on_gpu:
        pytest.skip("there is one")
    with pytest.raises(KernelsUnavailable, match="rung hopper is made of PTX instructions"):
        require_capability("hopper")


def test_a_model_says_why_it_cannot_have_the_rung():
    from sharp import LLM

    wanted = "rung 'mma_sync' of decode_attention does not run this model: it needs compute capability 8.0"
    with pytest.raises(ValueError, match=wanted):
        LLM(str(ROOT / "weights" / "tiny"), device="cpu", rungs={"decode_attention": "mma_sync"})
