"""Prefill attention by mma.sync: its kernel's text in numpy held to the order of attention_contract.py bit by
bit, the code that it becomes, and its numbers and bits on a GPU beside the other rungs'."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import no_simulator
import numpy as np
import pytest
from decode_batches import BF16
from prefill_batches import Batch, bits, make_batch
from test_prefill import BATCHES, CONTEXTS, QUERIES, WRONG, OnGpu, check, same_bits

from kernels_numba.ops.prefill_attention.config import HEAD_DIMS, MUTANTS, Build
from kernels_numba.ops.prefill_attention.door import MMA, Workspace, operands, refusal
from kernels_numba.ops.prefill_attention.mma_config import SMEM_LIMIT, MmaConfig, smem_plan
from kernels_numba.ops.prefill_attention.mma_in_numpy import in_numpy
from kernels_numba.simt_turns import Stuck

ROOT = Path(__file__).resolve().parent.parent


def run_in_numpy(batch, config=None, **how):
    """(out in the element type, log-sum-exp) of the kernel's text; the counters it leaves are 0."""
    config = config or MmaConfig(batch.q.shape[2])
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


def by_contract(batch):
    out, lse = batch.by_contract()
    return out.astype(BF16), lse


@pytest.mark.parametrize(("queries", "lens", "heads", "group", "head_dim", "window"), BATCHES)
def test_the_text_keeps_the_order_bit_by_bit(queries, lens, heads, group, head_dim, window):
    rng = np.random.default_rng(len(lens))
    batch = make_batch(rng, queries, lens, heads, group, head_dim, window=window, spread=2, margin=1)
    assert same_bits(run_in_numpy(batch, grid=3), by_contract(batch))


def test_rows_of_keys_give_the_same_bits():
    """The other source, neighbours' rows poisoned."""
    batch = make_batch(np.random.default_rng(5), [140, 33], [1100, 40], 2, 2, 64, spread=2)
    assert same_bits(run_in_numpy(batch, MmaConfig(64, "rows")), by_contract(batch))
    batch = make_batch(np.random.default_rng(6), [60, 5], [300, 40], 1, 2, 128, window=70)
    assert same_bits(run_in_numpy(batch, MmaConfig(128, "rows")), by_contract(batch))


def test_chunks_and_strangers_and_orders_of_warps_change_no_bit():
    rng = np.random.default_rng(7)
    batch = make_batch(rng, [190, 1, 77], [1300, 2, 1100], 1, 3, 64, spread=2)
    packed = run_in_numpy(batch, grid=2)
    for seq, chunks in ((0, (1, 63, 64)), (2, (5, 7, 11)), (1, ())):
        parts = [run_in_numpy(part, grid=1, seed=3) for part in batch.only(seq, chunks)]
        first, last = batch.cu_seqlens_q[seq : seq + 2]
        alone = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        assert same_bits(alone, [array[first:last] for array in packed])
    assert all(same_bits(run_in_numpy(batch, grid=1 + seed, seed=seed), packed) for seed in range(3))


def is_right(batch, want, **how):
    """Whether the numbers are the contract's; False for an access outside of an array, or a hang."""
    try:
        return same_bits(run_in_numpy(batch, **how), want)
    except (IndexError, Stuck, RuntimeError, AssertionError):
        return False


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m])
def test_mistakes_in_the_text_are_noticed(mutant):
    batch = make_batch(np.random.default_rng(8), [80, 30], [1100, 1190], 1, 2, 128)
    want = by_contract(batch)
    # What is a race is lost in some order of events.
    assert not all(is_right(batch, want, build=Build(mutant=mutant), seed=seed) for seed in range(4))


@pytest.mark.parametrize(("part", "line", "instead"), [
    ("kernel", "wait_full(int32(smem + full_at + 8 * stage), phase)", "pass"),
    ("loads", "wait_empty(int32(smem + empty_at + 8 * to_stage), int32(to_phase ^ 1))", "pass"),
])  # fmt: skip
def test_a_missing_wait_is_noticed(part, line, instead):
    batch = make_batch(np.random.default_rng(8), [100], [400], 1, 2, 64)
    want = by_contract(batch)

    def without(name, text):
        if not name.endswith(f"mma_{part}"):
            return text
        assert line in text
        return text.replace(line, instead)

    assert not all(is_right(batch, want, change=without, seed=seed) for seed in range(6))


# What it becomes. In a child, because this process runs numba's simulator.

COMPILE = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.prefill_attention.mma_config import MmaConfig
from kernels_numba.ops.prefill_attention.mma_sync import prefill_mma_kernel
reports = []
for arch, head_dim, source, dtype, window, lse in (
    ("sm_80", 128, "pages", "bfloat16", None, True), ("sm_86", 64, "pages", "float16", None, False),
    ("sm_89", 128, "pages", "float16", None, False), ("sm_90", 128, "rows", "bfloat16", None, True),
    ("sm_120", 64, "rows", "bfloat16", 300, True), ("sm_120", 128, "pages", "bfloat16", 300, False),
):
    kernel = prefill_mma_kernel(MmaConfig(head_dim, source), dtype, window, lse)
    report = assemble_kernel(kernel, arch)
    reports.append([asdict(report), report.problems, head_dim])
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def assembled():
    return json.loads(no_simulator.last_line(COMPILE.format(root=str(ROOT))))


def test_tiles_stay_in_registers(assembled):
    assert len(assembled) == 6
    for report, problems, head_dim in assembled:
        if "window" in report["name"]:
            # The compiler keeps scores in memory between mask and weights there: a known loss of speed.
            assert all(problem.endswith("accesses to local memory") for problem in problems), report
        else:
            assert problems == [], report  # no spills, no local memory, shared memory fits
        assert report["dynamic_bytes"] <= SMEM_LIMIT, report
        assert report["registers"] <= 255, report
        # 16 rows x 128 keys x head_dim: 16 / 8 products of each kind a step of 16, two of them a load.
        assert report["main_loop"]["HMMA"] == 2 * head_dim, report
        assert report["main_loop"]["LDSM"] == head_dim, report
        assert report["instructions"]["LDGSTS"] >= 2, report


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_holds_a_tile_and_half_of_the_next(head_dim):
    config = MmaConfig(head_dim)
    plan = smem_plan(config)
    assert plan.bytes <= SMEM_LIMIT == 101_376
    assert config.stages >= 6
    assert config.ahead >= 4
    assert all(plan.offset("chunk", i) % 1024 == 0 for i in range(config.stages))


def test_settings_that_do_not_exist_are_refused():
    for arguments in ((96,), (64, "files")):
        with pytest.raises(ValueError, match="head_dim 64 or 128, source pages or rows is required"):
            MmaConfig(*arguments)


@pytest.mark.parametrize(("capability", "dtype", "why"), [
    ((8, 0), "bfloat16", ""), ((12, 0), "float16", ""), ((9, 0), "bfloat16", ""),
    ((7, 5), "bfloat16", "it needs compute capability 8.0 or newer, here is compute capability 7.5"),
    (None, "bfloat16", "here is no GPU"), ((8, 6), "float32", "bfloat16 or float16, not float32"),
])  # fmt: skip
def test_models_that_the_rung_cannot_run(capability, dtype, why):
    said = refusal(capability, dtype, 128, 7, rung=MMA)
    assert said == "" if not why else why in said


def test_a_workspace_without_state_is_refused():
    from test_prefill import door_arguments

    o = operands(**door_arguments())
    with pytest.raises(ValueError, match=r"workspace has state None; \(192, 9216\): of\(head_dim\)"):
        Workspace(np.zeros(2, np.int32)).check(o)
    Workspace(np.zeros(2, np.int32), np.zeros((192, 9216), np.float32)).check(o)


# On a GPU.


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have >= (8, 0), "8.0")


class MmaOnGpu(OnGpu):
    """The same by this rung, and by Hopper's."""

    rung = MMA

    @functools.cached_property
    def hopper(self):
        """By the Hopper rung where it runs, else None."""
        if tuple(self.cuda.get_current_device().compute_capability) != (9, 0):
            return None
        return OnGpu(self.cuda, self.batch)()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), [(4, 7, 128), (3, 3, 64), (2, 16, 64)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma_prefill_against_float64_and_hopper(cuda, num_kv_heads, group, head_dim, dtype):
    rng = np.random.default_rng([num_kv_heads, group, head_dim])
    batch = make_batch(rng, QUERIES, CONTEXTS, num_kv_heads, group, head_dim, dtype=dtype, spread=2, margin=2)
    gpu = MmaOnGpu(cuda, batch)
    got = gpu()
    assert check(batch, got, gpu.plain() if dtype == "bfloat16" else None) <= 1
    assert same_bits(gpu("rows"), got)
    assert gpu.hopper is None or same_bits(gpu.hopper, got)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 100, 1500])
def test_mma_prefill_with_a_window(cuda, window):
    for dim in HEAD_DIMS:
        rng = np.random.default_rng(window)
        batch = make_batch(rng, QUERIES, CONTEXTS, 2, 4, dim, window=window, spread=2)
        gpu = MmaOnGpu(cuda, batch)
        got = gpu()
        assert check(batch, got) <= 1
        assert gpu.hopper is None or same_bits(gpu.hopper, got)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (7, 128)])
def test_mma_prefill_is_the_same_in_chunks_and_alone_and_in_decode(cuda, group, head_dim):
    """Any cut of a prompt, 100 strangers or none, and each token by the decode rung: the same bits."""
    rng = np.random.default_rng(group)
    queries = [700, *rng.integers(1, 80, 100).tolist()]
    lens = [2300, *(n + int(rng.integers(0, 500)) for n in queries[1:])]
    batch = make_batch(rng, queries, lens, 2, group, head_dim, spread=2)
    gpu = MmaOnGpu(cuda, batch)
    packed = gpu()
    assert all(same_bits(gpu(), packed) for _ in range(10))
    mine = [array[:700] for array in packed]
    for chunks in ((), (1,), (512,), (63, 64, 65, 1), tuple(rng.integers(1, 200, 5).tolist())):
        parts = [MmaOnGpu(cuda, part)() for part in batch.only(0, chunks) if len(part.q)]
        assert same_bits([np.concatenate(arrays) for arrays in zip(*parts, strict=True)], mine), chunks
    assert same_bits(gpu.decoded(700, 2300), mine)


@pytest.mark.gpu
def test_mma_prefill_bits_survive_random_pauses(cuda):
    for dim in HEAD_DIMS:
        batch = make_batch(np.random.default_rng(7), QUERIES, CONTEXTS, 3, 5, dim)
        gpu = MmaOnGpu(cuda, batch)
        want = gpu()
        for _ in range(3):
            assert same_bits(gpu(build=Build(stress=True)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("mutant", [m for m in WRONG if m != "early_release"])
def test_mma_prefill_notices_mistakes(cuda, mutant):
    batch: Batch = make_batch(np.random.default_rng(9), [100, 60], [1100, 1350], 2, 7, 128)
    # A page too far must lie within the cache, so the last is not in use.
    batch.block_table[batch.block_table == batch.k_cache.shape[0] - 1] = 0
    gpu = MmaOnGpu(cuda, batch)
    assert check(batch, gpu(build=Build(mutant=mutant))) > 1
    assert check(batch, gpu()) <= 1
