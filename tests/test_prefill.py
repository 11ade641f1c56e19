"""Prefill attention on Hopper: its kernel's text in numpy (warps in threads) held to the order of
attention_contract.py bit by bit, the code that it becomes, the door, and its numbers and bits on a GPU."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from decode_batches import BF16, largest_difference
from prefill_batches import Batch, bits, make_batch
from tolerance import error_ratio

from kernels_numba import simt, simt_warps
from kernels_numba.attention_contract import TILE
from kernels_numba.compiler import KernelsUnavailable
from kernels_numba.ops.prefill_attention.config import (
    HEAD_DIMS,
    MUTANTS,
    REGISTERS,
    SMEM_LIMIT,
    WHOLE,
    Build,
    PrefillConfig,
    smem_plan,
)
from kernels_numba.ops.prefill_attention.door import operands, refusal
from kernels_numba.ops.prefill_attention.in_numpy import in_numpy
from kernels_numba.ops.prefill_attention.schedule import TOP
from kernels_numba.simt_turns import Stuck
from kernels_numba.simt_warpgroups import GroupWarp
from kernels_numba.simt_warps import Shared

ROOT = Path(__file__).resolve().parent.parent
# The mistakes that make wrong numbers; the others make kernels that hang or race.
WRONG = ("scale", "mask", "page", "stale_tail", "no_fold", "early_release")


# The kernel's text in numpy.


def run_in_numpy(batch, config=None, **how):
    """(out in the element type, log-sum-exp) of the kernel's text; the counters it leaves are 0."""
    config = config or PrefillConfig(batch.q.shape[2])
    out, lse = np.full(batch.q.shape, np.nan, BF16), np.full(batch.q.shape[:2], np.nan, np.float32)
    keys = (batch.k_cache, batch.v_cache, batch.block_table)
    if config.source == "rows":
        keys = batch.rows_of_keys()
    counters = in_numpy(
        config, bits(out), bits(batch.q), bits(keys[0]), bits(keys[1]), batch.cu_seqlens_q,
        batch.context_lens, keys[2], softmax_scale=batch.scale, window=batch.window, lse=lse, **how,
    )  # fmt: skip
    assert not counters.any()
    return out, lse


def same_bits(one, other):
    """Of tuples of arrays; a NaN is a NaN."""
    return all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def by_contract(batch):
    out, lse = batch.by_contract()
    return out.astype(BF16), lse


# query_lens, context_lens, kv heads, group, head_dim, window
BATCHES = [
    ([70, 0, 3, 1], [200, 9, 3, 1], 2, 3, 64, None),  # chunks, an empty one, prompts, a decode
    ([300], [300], 1, 1, 64, None),  # plain tokens of one head, tiles on the diagonal
    ([130, 20], [1150, 2100], 1, 1, 128, None),  # two and three splits
    ([20, 65], [2050, 66], 1, 16, 64, None),
    ([40, 9], [170, 1100], 1, 7, 128, None),
    ([5, 4, 3], [2, -3, 3], 1, 2, 64, None),  # rows before position 0
    ([70, 130, 5], [2200, 150, 3], 1, 3, 64, 100),
    ([40, 200], [1500, 200], 1, 9, 64, 1100),
    ([250], [700], 1, 1, 128, 1),
]


@pytest.mark.parametrize(("queries", "lens", "heads", "group", "head_dim", "window"), BATCHES)
def test_the_kernels_text_keeps_the_order_bit_by_bit(queries, lens, heads, group, head_dim, window):
    rng = np.random.default_rng(len(lens))
    batch = make_batch(rng, queries, lens, heads, group, head_dim, window=window, spread=2, margin=1)
    for consumers in (2, 3)[: 2 if head_dim == 64 else 1]:
        got = run_in_numpy(batch, PrefillConfig(head_dim, consumers=consumers), grid=3)
        assert same_bits(got, by_contract(batch)), consumers
    truth = np.nan_to_num(batch.truth()[0])
    rounded = truth.astype(BF16).astype(np.float32)
    error = error_ratio(np.nan_to_num(got[0].astype(np.float32)), rounded, truth, "bfloat16", max(lens))
    assert error <= 1


def test_packed_rows_of_keys_give_the_same_bits():
    """The other source, neighbours' rows poisoned; with and without turns and early weights."""
    batch = make_batch(np.random.default_rng(5), [140, 33], [1100, 40], 2, 2, 64, spread=2)
    want = by_contract(batch)
    for change in (
        {"source": "rows"},
        {"turns": False},
        {"early": 0},
        {"turns": False, "consumers": 3},
    ):
        assert same_bits(run_in_numpy(batch, PrefillConfig(64, **change)), want), change
    batch = make_batch(np.random.default_rng(6), [60, 5], [300, 40], 1, 2, 128, window=70)
    assert same_bits(run_in_numpy(batch, PrefillConfig(128, "rows")), by_contract(batch))


def test_other_splits_are_attention_with_other_bits():
    """What is measured to see what the folds cost."""
    batch = make_batch(np.random.default_rng(5), [60], [2100], 1, 2, 64, spread=2)
    want, truth = by_contract(batch), batch.truth()[0]
    for split in (128, WHOLE):
        got = run_in_numpy(batch, build=Build(split=split))
        assert (
            error_ratio(got[0].astype(np.float32), want[0].astype(np.float32), truth, "bfloat16", 2100) <= 1
        )
        assert not same_bits(got, want)


def test_chunks_cut_anywhere_and_strangers_change_no_bit():
    rng = np.random.default_rng(7)
    batch = make_batch(rng, [190, 1, 77], [1300, 2, 1100], 1, 3, 64, spread=2)
    packed = run_in_numpy(batch, grid=2)
    for seq, chunks in ((0, (1, 63, 64)), (2, (5, 7, 11)), (1, ())):
        parts = [run_in_numpy(part, grid=1, seed=3) for part in batch.only(seq, chunks)]
        first, last = batch.cu_seqlens_q[seq : seq + 2]
        alone = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        assert same_bits(alone, [array[first:last] for array in packed])


def test_any_order_of_warps_gives_the_same_bits():
    batch = make_batch(np.random.default_rng(2), [130, 0, 1, 40], [130, 0, 1, 1100], 1, 2, 64)
    want = by_contract(batch)
    assert all(same_bits(run_in_numpy(batch, grid=1 + seed % 3, seed=seed), want) for seed in range(6))


def is_right(batch, want, **how):
    """Whether the numbers are the contract's; False for an access outside of an array, or a hang."""
    try:
        return same_bits(run_in_numpy(batch, **how), want)
    except (IndexError, Stuck, RuntimeError):
        return False


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m])
def test_mistakes_are_noticed_in_numpy(mutant):
    batch = make_batch(np.random.default_rng(8), [80, 30], [1100, 1190], 1, 2, 128)
    want = by_contract(batch)
    assert is_right(batch, want)
    # What is a race is lost in some order of events.
    assert not all(is_right(batch, want, build=Build(mutant=mutant), seed=seed) for seed in range(6))


def test_a_product_that_is_read_too_early_is_noticed():
    """Numpy's wgmma is not done before its wait, and reads A and B then."""
    batch = make_batch(np.random.default_rng(8), [100], [400], 1, 2, 64)
    want = by_contract(batch)
    for line in ("scores_ready(s)", "output_ready(o)"):

        def without(name, text, line=line):
            return text.replace(line, "pass") if name.endswith("kernel") else text

        assert not is_right(batch, want, change=without), line


def test_a_product_without_its_inputs_is_noticed():
    batch = make_batch(np.random.default_rng(8), [100], [400], 1, 2, 64)
    want = by_contract(batch)
    for line in (
        "wait_full(int32(smem + v_full + 8 * v_stage), v_phase)",
        "wait_full(int32(smem + k_full + 8 * stage), phase)",
    ):

        def without(name, text, line=line):
            return text.replace(line, "pass") if name.endswith("kernel") else text

        assert not all(is_right(batch, want, change=without, seed=seed) for seed in range(6)), line


# The schedule.


def numpy_warp(memory):
    """(the schedule's module on one warp in numpy, its lanes)."""
    warp = GroupWarp(Shared(1, 16, np.random.default_rng(0)), memory, {}, 0, 1, 0)
    module = simt_warps.link(warp, ["kernels_numba.ops.prefill_attention.schedule"], lambda name, text: text)
    return module, simt.lanes(np.arange(32))


def items_of(queries, lens, heads, group, tile_rows, step=1, start=0):
    """What locate finds for the numbers start, start + step, ...: (sequence, head, first row, rows, first
    token, start) of each."""
    memory = simt.Memory()
    cu = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    arrays = memory.put(cu), memory.put(np.asarray(lens, np.int32))
    module, lane = numpy_warp(memory)
    locate, (begin, end) = (
        module["make_schedule"](tile_rows),
        module["make_span"]()(arrays[0], len(lens), lane),
    )
    state, target, items = (TOP, begin, 0, -1), start, []
    while True:
        found, *item, level, chunk, before, lower = locate(
            *arrays, begin, end, heads, group, lane, target, *state
        )
        if not found:
            return items
        items.append(tuple(int(x) for x in item))
        state, target = (level, chunk, before, lower), target + step


@pytest.mark.parametrize(("queries", "lens", "heads", "group"), [
    ([300, 0, 1, 64, 700], [300, 50, 4000, 64, 1800], 2, 3),
    ([5], [5], 8, 4),
    ([1] * 70, list(range(1, 2000, 28))[:70], 1, 7),
    ([4, 200, 3], [-5, 100, 1], 3, 16),
    ([], [], 1, 1),
    ([0] * 90 + [190, 200, 0, 3] * 20 + [0] * 86, [7] * 90 + [190, 260, 5, 3] * 20 + [0] * 86, 2, 4),
])  # fmt: skip
@pytest.mark.parametrize("tile_rows", [128, 192])
def test_every_item_once_and_the_longest_first(queries, lens, heads, group, tile_rows):
    rows = [n * group for n in queries]
    firsts = np.concatenate([[0], np.cumsum(queries)]).tolist()
    want = [
        (seq, head, row, rows[seq], firsts[seq], lens[seq] - queries[seq])
        for seq in range(len(lens))
        for head in range(heads)
        for row in range(0, rows[seq], tile_rows)
    ]
    got = items_of(queries, lens, heads, group, tile_rows) if lens else []
    assert sorted(got) == sorted(want)

    def tiles(item):
        _, _, row, count, _, start = item
        return -(-max(0, start + -(-min(row + tile_rows, count) // group)) // TILE)

    levels = [tiles(item) for item in got]
    assert levels == sorted(levels, reverse=True)
    if lens:
        shares = [items_of(queries, lens, heads, group, tile_rows, 3, start) for start in range(3)]
        assert sorted(item for share in shares for item in share) == sorted(want)


@pytest.mark.parametrize("count", [1, 32, 33, 256, 300, 1024, 1025, 5000])
def test_the_sequences_with_rows_are_found(count):
    """Whatever is in front of them and behind them; with few sequences all are looked at."""
    rng = np.random.default_rng(count)
    for first, last in [
        (0, count),
        (count - 1, count),
        (0, 1),
        (count // 2, count // 2),
        *rng.integers(0, count, (20, 2)),
    ]:
        queries = np.zeros(count, np.int64)
        queries[first:last] = rng.integers(1, 4, max(last - first, 0))
        cu = np.concatenate([[5], 5 + np.cumsum(queries)]).astype(np.int32)
        memory = simt.Memory()
        module, lane = numpy_warp(memory)
        begin, end = module["make_span"]()(memory.put(cu), count, lane)
        want = (first, last) if first < last else (0, 1)
        assert (begin, end) == ((0, count) if count <= 32 else want)


@pytest.mark.parametrize("group", range(1, 17))
def test_a_row_knows_its_token(group):
    module, _ = numpy_warp(simt.Memory())
    inverse, quotient = module["make_quotient"]()
    edges = np.arange(0, 1 << 28, group * 123_457)
    rows = np.unique(np.concatenate([np.arange(2000), edges, edges[1:] - 1, (1 << 28) - 2 - np.arange(50)]))
    assert (np.asarray(quotient(simt.lanes(rows), inverse(group))) == rows // group).all()


# What it becomes. In a child, because this process runs numba's simulator.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
import re
from dataclasses import asdict
from kernels_numba import assemble
from kernels_numba.ops.prefill_attention.config import PrefillConfig
from kernels_numba.ops.prefill_attention.hopper import prefill_kernel
codes, disassemble = [], assemble.disassemble
assemble.disassemble = lambda *which: codes.append(disassemble(*which)) or codes[-1]
reports = []
for head_dim, source, early, dtype, window, lse, consumers in (
    (128, "pages", None, "bfloat16", None, True, 2), (64, "pages", None, "float16", None, False, 2),
    (128, "pages", 0, "float16", None, False, 2), (128, "rows", 4, "bfloat16", 300, True, 2),
    (64, "pages", None, "bfloat16", None, False, 3), (64, "rows", 3, "bfloat16", 300, True, 3),
):
    config = PrefillConfig(head_dim, source, early=early, consumers=consumers)
    kernel = prefill_kernel(config, dtype, window, lse)
    report = assemble.assemble_kernel(kernel, "sm_90a")
    sass = codes[-1].sass
    opcode = r"^\\s+/\\*[0-9a-f]+\\*/\\s+(?:@!?U?P\\d\\s+)?([A-Z][A-Z0-9.]*)"
    watched = ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")
    words = [word for word in re.findall(opcode, sass, re.MULTILINE) if word.startswith(watched)]
    kept = [word.partition(".")[0] for word in words]
    registers = 1 + max(map(int, re.findall(r"\\bR(\\d+)", sass)))
    reports.append([asdict(report), report.problems, head_dim, config.early, kept, registers, consumers])
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def assembled():
    return json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT))))


def test_tiles_stay_in_registers(assembled):
    assert len(assembled) == 6
    for report, problems, head_dim, _, _, registers, consumers in assembled:
        assert problems == [], report
        assert report["setmaxnreg"] == list(REGISTERS[consumers])
        assert registers <= REGISTERS[consumers][1], registers
        assert report["main_loop"]["HGMMA"] == head_dim // 16 + 8, (
            report
        )  # S in steps of 16 columns, P V of 16 keys
        assert report["instructions"]["UTMALDG"] >= 4, report
        assert report["instructions"]["LDGSTS"] >= 1, report


def test_weights_are_made_while_products_run(assembled):
    """Of a tile's 64 exponentials a row pair, between the wait for S and that for P V: ptxas moves the latter
    up where nothing holds it."""
    for _, _, head_dim, early, kept, _, _ in assembled:
        products = "HGMMA " * (head_dim // 16 + 8)
        loop = " ".join(kept).split(products, 1)[1]
        loop = loop.split("WARPGROUP")  # in front of the first: nothing; then up to the wait for P V
        made = loop[1].count("MUFU")
        assert 16 * early <= made < 16 * early + 16, made


@pytest.mark.parametrize(("head_dim", "consumers"), [(64, 2), (64, 3), (128, 2)])
def test_shared_memory_holds_two_tiles_and_what_is_folded(head_dim, consumers):
    config = PrefillConfig(head_dim, consumers=consumers)
    plan = smem_plan(config)
    assert plan.bytes <= SMEM_LIMIT == 232_448
    assert config.stages >= 2
    assert all(plan.offset(name) % 1024 == 0 for name in ("k", "v", "q", "state"))
    few, many = REGISTERS[consumers]
    launched = {384: 168, 512: 128}[config.threads]  # a thread
    assert few + consumers * many <= (consumers + 1) * launched


def test_settings_that_do_not_exist_are_named():
    for arguments, message in (
        ((96,), "head_dim is 96, source 'pages'; head_dim 64 or 128"),
        ((64, "files"), "source 'files'"),
        ((128, "pages", True, None, 3), "consumers is 3; 0 or 2 to 2 are possible at head_dim 128"),
        ((64, "rows", 3, True, 4), "consumers is 4; 0 or 2 to 3 are possible at head_dim 64"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefillConfig(*arguments)
    with pytest.raises(ValueError, match="mutant is 'typo'; there are scale"):
        Build(mutant="typo")
    for split in (64, 1000, 1 << 27):
        with pytest.raises(ValueError, match=f"split is {split}; a power of two from 128"):
            Build(split=split)


# The door.


class OnDevice:
    """Looks like a device array; nothing can be read from it."""

    def __init__(self, array, start=1 << 20):
        self.dtype, self.shape, self.strides = array.dtype, array.shape, array.strides
        self.size, self.nbytes, self.ndim = array.size, array.nbytes, array.ndim
        self.__cuda_array_interface__ = {"data": (start, False)}


def device(*shape, dtype=np.uint16, start=1 << 20):
    return OnDevice(
        np.broadcast_to(np.zeros((), dtype), shape) if 0 in shape else np.zeros(shape, dtype), start
    )


def door_arguments(**other):
    """Arguments of a call with four sequences and ten tokens, changed by name."""
    arguments = {
        "out": device(10, 6, 64), "q": device(10, 6, 64), "k": device(9, 2, 64, 64),
        "v": device(9, 2, 64, 64), "cu_seqlens_q": device(5, dtype=np.int32),
        "context_lens": device(4, dtype=np.int32), "table": device(4, 33, dtype=np.int32),
    }  # fmt: skip
    return {**arguments, "softmax_scale": 0.125, **other}


def test_the_door_lets_good_arguments_in():
    o = operands(**door_arguments())
    assert (o.tokens, o.num_seqs, o.num_kv_heads, o.group, o.head_dim) == (10, 4, 2, 3, 64)
    assert (o.q_stride, o.table_stride, o.dtype, o.lse, o.keys, o.key_columns) == (
        768,
        33,
        "bfloat16",
        0,
        1152,
        64,
    )
    wide = OnDevice(np.zeros((10, 10, 64), np.uint16)[:, :6])
    assert operands(**door_arguments(q=wide)).q_stride == 1280
    rows = {"k": device(77, 2, 64), "v": device(77, 2, 64), "table": device(5, dtype=np.int32)}
    o = operands(**door_arguments(**rows), paged=False)
    assert (o.keys, o.key_columns, o.table_stride) == (77, 128, 1)


@pytest.mark.parametrize(("other", "message"), [
    ({"softmax_scale": 0.0}, "softmax_scale is 0.0; a positive number is required"),
    ({"softmax_scale": float("inf")}, "softmax_scale is inf"),
    ({"window": 0}, "window is 0; None or a whole number of at least 1"),
    ({"window": True}, "window is True"),
    ({"q": np.zeros((10, 6, 64), np.uint16)}, "q is a ndarray; a device array"),
    ({"q": device(9, 6, 64)}, r"q has shape \(9, 6, 64\); \(10, 6, 64\)"),
    ({"q": device(10, 6, 64, dtype=np.float16)}, "q has dtype float16; uint16"),
    ({"q": device(10, 6, 64, start=8)}, "q starts at address 0x8; a multiple of 16 bytes"),
    ({"q": OnDevice(np.ndarray((10, 6, 64), np.uint16, bytes(9000), strides=(776, 128, 2)))},
     r"q.strides\[0\] is 776 bytes; a multiple of 16"),
    ({"out": device(10, 6, 64, dtype=np.float32)}, "out has dtype float32; uint16 or float16"),
    ({"k": device(9, 2, 32, 64)}, r"k_cache has shape \(9, 2, 32, 64\)"),
    ({"k": device(9, 2, 64, 64, start=8)}, "k_cache starts at address 0x8"),
    ({"v": device(8, 2, 64, 64)}, r"v_cache has shape \(8, 2, 64, 64\)"),
    ({"cu_seqlens_q": device(4, dtype=np.int32)}, r"cu_seqlens_q has shape \(4,\); \(5\) is required"),
    ({"context_lens": device(4, dtype=np.int64)}, "context_lens has dtype int64"),
    ({"table": device(3, 33, dtype=np.int32)}, r"block_table has shape \(3, 33\)"),
    ({"lse": device(10, 5, dtype=np.float32)}, r"lse has shape \(10, 5\); \(10, 6\)"),
    ({"out": device(10, 6, 96), "q": device(10, 6, 96)}, r"out.shape\[2\] is 96; head_dim 64 or 128"),
    ({"out": device(10, 34, 64), "q": device(10, 34, 64)}, "q has 17 heads a kv head; at most 16"),
    ({"out": device(10, 5, 64), "q": device(10, 5, 64)}, "q has 5 heads; a multiple of the 2 kv heads"),
])  # fmt: skip
def test_the_door_names_what_is_wrong(other, message):
    with pytest.raises(ValueError, match=message):
        operands(**door_arguments(**other))


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "group", "block_size", "why"), [
    ((9, 0), "bfloat16", 128, 7, 64, ""),
    ((8, 0), "bfloat16", 128, 7, 64, "compute capability 9.0, here is compute capability 8.0"),
    ((10, 0), "bfloat16", 128, 7, 64, "here is compute capability 10.0"),
    (None, "bfloat16", 128, 7, 64, "here is no GPU"),
    ((9, 0), "float32", 128, 7, 64, "bfloat16 or float16, not float32"),
    ((9, 0), "float16", 80, 7, 64, "head_dim 64 or 128, not 80"),
    ((9, 0), "float16", 64, 17, 64, "up to 16 query heads a kv head, not 17"),
    ((9, 0), "float16", 64, 1, 32, "pages of 64 keys, not 32"),
])  # fmt: skip
def test_models_that_it_cannot_run(capability, dtype, head_dim, group, block_size, why):
    said = refusal(capability, dtype, head_dim, group, block_size)
    assert said == "" if not why else why in said


def test_without_a_compiler_the_rung_says_so(on_gpu):
    from kernels_numba.ops.prefill_attention.door import require_capability

    if on_gpu:
        pytest.skip("there is one")
    with pytest.raises(KernelsUnavailable, match="rung hopper is made of PTX instructions"):
        require_capability()


# On a GPU.


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have == (9, 0), "9.0")


class OnGpu:
    """A batch's arrays on the device, and calls of the rung on them (a subclass names another)."""

    rung = "hopper"

    def __init__(self, cuda, batch: Batch):
        self.cuda, self.batch = cuda, batch
        rows, heads, dim = batch.q.shape
        wide = np.full((rows, heads + 4, dim), np.nan, batch.q.dtype)
        wide[:, :heads] = batch.q
        self.q = cuda.to_device(bits(wide))[:, :heads]
        self.lens = [cuda.to_device(x) for x in (batch.cu_seqlens_q, batch.context_lens)]

    @functools.cached_property
    def pages(self):
        batch = self.batch
        return [self.cuda.to_device(x) for x in (bits(batch.k_cache), bits(batch.v_cache), batch.block_table)]

    def __call__(self, source="pages", **how):
        """(out in the element type, log-sum-exp)."""
        module = importlib.import_module(f"kernels_numba.ops.prefill_attention.{self.rung}")
        batch = self.batch
        out = self.cuda.to_device(bits(np.full(batch.q.shape, np.nan, batch.q.dtype)))
        lse = self.cuda.to_device(np.full(batch.q.shape[:2], np.nan, np.float32))
        how = {"softmax_scale": batch.scale, "window": batch.window, "lse": lse, **how}
        if source == "pages":
            k, v, table = self.pages
            module.attend(out, self.q, k, v, *self.lens, table, **how)
        else:
            k, v, table = (self.cuda.to_device(bits(x)) for x in batch.rows_of_keys())
            module.attend_rows(out, self.q, k, v, self.lens[0], table, self.lens[1], **how)
        self.cuda.synchronize()
        return out.copy_to_host().view(batch.q.dtype), lse.copy_to_host()

    def decoded(self, rows, length):
        """(out, log-sum-exp) of the first sequence's `rows` rows, its last of `length` keys, each as a decode
        of its own over the same pages, by decode's rung of the same name."""
        from kernels_numba.ops.decode_attention.tensor_core import attend

        cuda, batch, (k, v, _) = self.cuda, self.batch, self.pages
        mine = batch.q[:rows]
        table = cuda.to_device(np.repeat(batch.block_table[:1], rows, axis=0))
        context = cuda.to_device(np.arange(length - rows + 1, length + 1, dtype=np.int32))
        q, out = cuda.to_device(bits(mine.copy())), cuda.to_device(bits(np.zeros_like(mine)))
        lse = cuda.to_device(np.zeros(mine.shape[:2], np.float32))
        attend(self.rung, out, q, k, v, context, table, softmax_scale=batch.scale, lse=lse)
        cuda.synchronize()
        return out.copy_to_host().view(batch.q.dtype), lse.copy_to_host()

    def plain(self):
        """out by the plain rung, bfloat16 only."""
        from kernels_numba.ops.prefill_attention import prefill_attention

        batch = self.batch
        out = self.cuda.to_device(bits(np.full(batch.q.shape, np.nan, batch.q.dtype)))
        k, v, table = self.pages
        prefill_attention(
            out, self.q, k, v, *self.lens, table, softmax_scale=batch.scale, window=batch.window
        )
        return out.copy_to_host().view(batch.q.dtype)


def check(batch, got, plain=None):
    """The error of (out, lse) from float64 over what is allowed: twice the plain rung's, or a rounding of the
    truth where that rung does not go, and a rounding. Rows of no sequence must be as they were."""
    truth, lse = batch.truth()
    outside = np.isnan(truth)
    if not np.array_equal(outside, np.isnan(got[0].astype(np.float32))):
        return np.inf
    plain = truth.astype(batch.q.dtype) if plain is None else plain
    arrays = [np.where(outside, 0, x.astype(np.float64)) for x in (got[0], plain, truth)]
    dtype = "bfloat16" if batch.q.dtype == BF16 else "float16"
    ratio = error_ratio(*arrays, dtype, max(1, *batch.context_lens.tolist()))
    return ratio if largest_difference(got[1], lse) < 1e-4 else np.inf


QUERIES = [0, 1, 63, 64, 65, 127, 128, 129, 251, 40, 3, 300, 17, 1]
CONTEXTS = [9, 1, 63, 64, 65, 1151, 128, 1200, 2047, 4099, 1027, 300, 17, 3000]
HEADS = [(4, 7, 128), (8, 4, 128), (3, 3, 64), (8, 4, 64), (1, 1, 128), (2, 9, 64), (1, 16, 128), (2, 1, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefill_attention_against_float64(cuda, num_kv_heads, group, head_dim, dtype):
    rng = np.random.default_rng([num_kv_heads, group, head_dim])
    batch = make_batch(rng, QUERIES, CONTEXTS, num_kv_heads, group, head_dim, dtype=dtype, spread=2, margin=2)
    gpu = OnGpu(cuda, batch)
    got = gpu()
    assert check(batch, got, gpu.plain() if dtype == "bfloat16" else None) <= 1
    assert same_bits(gpu("rows"), got)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 64, 100, 1000, 1500, 5000])
def test_prefill_attention_with_a_window(cuda, window):
    rng = np.random.default_rng(window)
    for dim in HEAD_DIMS:
        batch = make_batch(rng, QUERIES, CONTEXTS, 2, 4, dim, window=window, spread=2)
        gpu = OnGpu(cuda, batch)
        got = gpu()
        assert check(batch, got, gpu.plain()) <= 1
        assert same_bits(gpu("rows"), got)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (3, 64), (7, 128)])
def test_prefill_attention_is_the_same_in_chunks_and_alone_and_in_decode(cuda, group, head_dim):
    """Any cut of a prompt, 200 strangers or none, and each token by the decode rung: the same bits."""
    rng = np.random.default_rng(group)
    queries = [1100, *rng.integers(1, 80, 200).tolist()]
    lens = [2300, *(n + int(rng.integers(0, 500)) for n in queries[1:])]
    batch = make_batch(rng, queries, lens, 2, group, head_dim, spread=2)
    gpu = OnGpu(cuda, batch)
    packed = gpu()
    mine = [array[:1100] for array in packed]
    for chunks in ((), (1,), (512, 512), (63, 64, 65, 1), tuple(rng.integers(1, 200, 8).tolist())):
        parts = [OnGpu(cuda, part)() for part in batch.only(0, chunks) if len(part.q)]
        assert same_bits([np.concatenate(arrays) for arrays in zip(*parts, strict=True)], mine), chunks
    assert same_bits(gpu.decoded(1100, 2300), mine)


@pytest.mark.gpu
def test_prefill_attention_of_32k_tokens(cuda):
    """One prompt of 32,768 tokens: the last 40 rows against float64, some in the middle as chunks of their
    own."""
    batch = make_batch(np.random.default_rng(1), [32768], [32768], 1, 2, 128)
    got = OnGpu(cuda, batch)()
    [*_, last] = batch.only(0, (32728,))
    assert check(last, [array[32728:] for array in got]) <= 1
    middle = batch.only(0, (17000, 100))[1]
    assert same_bits(OnGpu(cuda, middle)(), [array[17000:17100] for array in got])


@pytest.mark.gpu
def test_prefill_attention_of_random_batches(cuda):
    """New numbers, lengths, heads and company each run: right, and the same bits alone as among strangers."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(6):
        heads, group, dim = HEADS[int(rng.integers(len(HEADS)))]
        queries = rng.integers(0, 200, int(rng.integers(1, 40)))
        lens = queries + rng.integers(0, 2000, len(queries))
        batch = make_batch(rng, queries, lens, heads, group, dim, spread=float(rng.uniform(0.1, 4)))
        got = OnGpu(cuda, batch)()
        assert check(batch, got) <= 1, seed
        for seq in rng.integers(0, len(lens), 4).tolist():
            first, last = batch.cu_seqlens_q[seq : seq + 2]
            if last > first:
                [alone] = batch.only(seq)
                assert same_bits(OnGpu(cuda, alone)(), [x[first:last] for x in got]), (seed, seq)


@pytest.mark.gpu
def test_prefill_attention_replays_and_leaves_counters_at_0(cuda):
    from kernels_numba.ops.prefill_attention.hopper import own_workspace

    batch = make_batch(np.random.default_rng(6), [900, 5, 0, 300], [3000, 5, 0, 300], 4, 7, 128)
    gpu = OnGpu(cuda, batch)
    first = gpu()
    assert all(same_bits(gpu(), first) for _ in range(20))
    assert not own_workspace().counters.copy_to_host().any()
    for change in ({"turns": False}, {"early": 0}, {"short_turns": True}, {"turns": False, "early": 4}):
        assert same_bits(gpu(config=PrefillConfig(128, **change)), first), change


@pytest.mark.gpu
def test_prefill_attention_bits_survive_random_pauses(cuda):
    """Warps that dawdle at random reach orders that never happen by themselves; waits are bounded."""
    for dim in HEAD_DIMS:
        batch = make_batch(np.random.default_rng(7), QUERIES, CONTEXTS, 3, 5, dim)
        gpu = OnGpu(cuda, batch)
        want = gpu()
        for _ in range(4):
            assert same_bits(gpu(build=Build(debug=True, stress=True)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("mutant", [m for m in WRONG if m != "early_release"])
def test_prefill_attention_notices_mistakes(cuda, mutant):
    batch = make_batch(np.random.default_rng(9), [100, 60], [1100, 1350], 2, 7, 128)
    # A page too far must lie within the cache, so the last is not in use.
    batch.block_table[batch.block_table == batch.k_cache.shape[0] - 1] = 0
    gpu = OnGpu(cuda, batch)
    assert check(batch, gpu(build=Build(mutant=mutant))) > 1
    assert check(batch, gpu()) <= 1


# A child's: a failed assertion in a kernel ends its CUDA context.
CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from prefill_batches import make_batch
from test_prefill import OnGpu, Build, same_bits
from kernels_numba.compiler import cuda
batch = make_batch(np.random.default_rng(6), [600] * 10, [2000] * 10, 4, 7, 128)
gpu = OnGpu(cuda, batch)
want = gpu()
got = gpu(build=Build(debug=True, mutant={mutant!r}))
print("same bits" if same_bits(got, want) else "other bits")
"""


@pytest.mark.gpu
def test_prefill_attention_that_would_hang_says_so(cuda):
    def run_child(mutant):
        code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), mutant=mutant)
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        return child.stdout + child.stderr, child.returncode == 0

    said, ended = run_child("")
    assert ended, said
    assert "same bits" in said
    said, ended = run_child("wrong_phase")
    assert "other bits" in said or not ended, said
    said, ended = run_child("lost_arrival")
    assert not ended, said
    assert "mbarrier wait timed out" in said, said
