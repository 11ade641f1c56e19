"""The warp rungs of the small ops: their kernels' text in numpy, planned by their launchers; their doors; the
code that they become; and their numbers and bits on a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import no_simulator
import numpy as np
import pytest
from gpu_capture import OWN, captured
from hypothesis import given, settings
from hypothesis import strategies as st
from warp_calls import (
    CASES,
    ELEMENTS,
    KERNELS,
    bits,
    call_of,
    check_right,
    in_numpy,
    plan_of,
    same_bits,
    untouched,
)

from kernels_numba import prebuild
from kernels_numba.compiler import KernelsUnavailable
from kernels_numba.inputs import Call, Cut
from kernels_numba.ops import OPS, resolve
from kernels_numba.ops.warp import gather, lm_head, rms_norm
from kernels_numba.ops.warp.door import HEAD_DIMS, Sizes, View, refusal, view, warp_rungs
from kernels_numba.ops.warp.in_numpy import Arrays
from sharp.model_config import ModelConfig
from sharp.rungs import describe_rungs, small_op_rungs

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("bfloat16", "float16")


def rng_of(*words):
    return np.random.default_rng(list("/".join(map(str, words)).encode()))


def check(call, dtype="bfloat16", bucket=None, **how):
    """Run a call in numpy, hold it to its definition, and give its outputs."""
    got = in_numpy(call, bucket, **how)
    check_right(call, got.outputs, dtype)
    assert untouched(call, got.buffers)
    return got.outputs


# Numbers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CASES)
def test_the_kernels_text_is_the_definition(op, dtype):
    check(call_of(op, rng_of(op, dtype), dtype), dtype)


@pytest.mark.parametrize("op", CASES)
def test_a_link_of_a_chain_is_the_same_kernel(op):
    call = call_of(op, rng_of(op))
    assert same_bits(check(call, pdl=True), check(call))


@pytest.mark.parametrize("op", CASES)
def test_dependent_launches_wait_before_they_touch_anything(op):
    """By the text: without its wait a kernel gets nowhere. The gather begins a chain, and waits for all."""
    views = on_device(op)
    kernel = plan_of(op, views, None, 1e-5, True).kernel
    assert kernel.pdl == (op != "embedding")
    assert kernel.archs[0] == "sm_90"
    assert not plan_of(op, views, None, 1e-5, False).kernel.pdl

    def forget(_, text):
        return text.replace("griddep_wait()", "cuda.forgotten()")

    call = call_of(op, rng_of(op), num_tokens=1)
    if kernel.pdl:
        with pytest.raises(AttributeError, match="forgotten"):
            in_numpy(call, pdl=True, change=forget)


@pytest.mark.parametrize("real", [0, 1, 4])
@pytest.mark.parametrize("op", CASES)
def test_rows_past_the_real_number_are_left_alone(op, real):
    """They do not even exist: whatever touches one fails."""
    call = call_of(op, rng_of(op, real), num_tokens=real)
    in_bucket = check(call, bucket=7)
    assert same_bits(in_bucket, check(call))


@pytest.mark.parametrize("op", CASES)
def test_a_row_has_its_bits_alone_and_among_others(op):
    call = call_of(op, rng_of(op))
    together = check(call, seed=1)
    by_row = KERNELS[op][2]
    for row in range(CASES[op]["num_tokens"]):
        args = {
            n: a[row : row + 1] if n in by_row and not isinstance(a, Cut) else a for n, a in call.args.items()
        }
        buffers = {name: buffer[row : row + 1] for name, buffer in call.buffers.items()}
        one = in_numpy(Call(op, args, call.outputs, call.kwargs, buffers, call.fixed)).outputs
        for name in call.outputs:
            if name in by_row:
                np.testing.assert_array_equal(bits(one[name]), bits(together[name][row : row + 1]))


@pytest.mark.parametrize("op", CASES)
def test_nothing_to_do_is_no_launch(op):
    arrays = Arrays()
    call = call_of(op, rng_of(op), num_tokens=0)
    views = {name: arrays.view(array) for name, array in call.resolved().items()}
    assert plan_of(op, views, None, 1e-5) is None


SMALL = settings(max_examples=25, deadline=None, derandomize=False)


@SMALL
@given(st.integers(1, 600), st.integers(1, 3), st.booleans(), st.integers(0, 4), st.sampled_from(DTYPES))
def test_rms_norm_of_any_width(packs, rows, residual, more, dtype):
    call = call_of(
        "rms_norm", rng_of(packs, rows), dtype, num_tokens=rows, hidden_size=8 * packs, residual=residual
    )
    check(call, dtype, rows + more)


@SMALL
@given(st.integers(1, 700), st.integers(1, 3), st.integers(0, 3), st.sampled_from(DTYPES))
def test_silu_mul_of_any_width(groups, rows, more, dtype):
    call = call_of("silu_mul", rng_of(groups), dtype, num_tokens=rows, intermediate_size=8 * groups)
    check(call, dtype, rows + more)


@SMALL
@given(st.integers(1, 700), st.integers(1, 4), st.integers(0, 3), st.sampled_from([*DTYPES, "float32"]))
def test_embedding_of_any_width(packs, rows, more, dtype):
    call = call_of("embedding", rng_of(packs), dtype, num_tokens=rows, hidden_size=8 * packs)
    got = in_numpy(call, rows + more).outputs["out"]
    np.testing.assert_array_equal(bits(got), bits(call.args["weight"][call.args["token_ids"]]))


HEADS = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 3), "num_q_heads": st.integers(1, 40),
        "num_kv_heads": st.integers(1, 12), "head_dim": st.sampled_from(HEAD_DIMS),
    }
)  # fmt: skip


@SMALL
@given(HEADS, st.integers(0, 3), st.sampled_from(DTYPES))
def test_qk_norm_of_any_heads(heads, more, dtype):
    check(call_of("qk_norm", rng_of(*heads.values()), dtype, **heads), dtype, heads["num_tokens"] + more)


def turned(x, cos, sin):
    """rope's plain rung to the bit: fma with a product that was rounded before."""

    def fma(a, b, c):
        return (a.astype(np.float64) * b + c.astype(np.float64)).astype(np.float32)

    half = x.shape[-1] // 2
    low, high = (x[..., part].astype(np.float32) for part in (slice(half), slice(half, None)))
    both = fma(low, cos, -(high * sin)), fma(high, cos, low * sin)
    return np.concatenate(both, axis=-1).astype(x.dtype)


@SMALL
@given(HEADS, st.sampled_from([1, 4, 64]), st.integers(0, 3), st.sampled_from(DTYPES))
def test_rope_store_kv_has_the_bits_of_its_two_parts(heads, block_size, more, dtype):
    call = call_of("rope_store_kv", rng_of(*heads.values()), dtype, **heads, block_size=block_size)
    if call.args["slot_mapping"].size > 1:
        assert (call.args["slot_mapping"] < 0).any()
    got = check(call, dtype, heads["num_tokens"] + more)
    args = call.resolved()
    rows = args["cos_sin"][args["positions"]][:, None, :]
    cos, sin = np.split(rows, 2, axis=-1)
    q, k = turned(args["q"], cos, sin), turned(args["k"], cos, sin)
    pages = OPS["store_kv"].store_kv_spec(
        args["k_cache"], args["v_cache"], k, args["v"], args["slot_mapping"]
    )
    wanted = dict(zip(("q", "k", "k_cache", "v_cache"), (q, k, *pages), strict=True))
    assert same_bits(got, wanted)


def test_ids_and_positions_outside_their_tables_give_nan_and_no_stray_access():
    call = call_of("embedding", rng_of("outside"), hidden_size=2056)
    call.args["token_ids"][:3] = -1, 11, 2**31 - 1
    out = in_numpy(call).outputs["out"].astype(np.float32)
    assert np.isnan(out[:3]).all()
    assert not np.isnan(out[3:]).any()
    call = call_of("rope_store_kv", rng_of("outside"))
    call.args["positions"][1:3] = -1, 20
    call.args["slot_mapping"][:] = 0, 1, -5, 5 * 4, 2**31 - 1
    got = in_numpy(call).outputs
    for name in ("q", "k"):
        turned_rows = np.isnan(got[name].astype(np.float32)).all(axis=(1, 2))
        assert turned_rows.tolist() == [False, True, True, False, False]
    changed = (bits(got["v_cache"]) != bits(call.args["v_cache"])).any(axis=(1, 3))
    assert sorted(np.flatnonzero(changed.reshape(-1))) == [0, 1]


def test_rms_norm_may_write_over_x():
    call = call_of("rms_norm", rng_of("over"), residual=False)
    apart = check(call)["out"]
    arrays, x = Arrays(), call.args["x"].copy()
    one, weight = arrays.view(x), arrays.view(call.args["weight"])
    plan = rms_norm.plan_rms_norm(one, one, weight, None, None, call.kwargs["eps"])
    arrays.run("rms_norm", "make_rms_norm_kernel", plan)
    np.testing.assert_array_equal(bits(x), bits(apart))


def test_silu_of_large_and_odd_gates():
    """2^x overflows to inf, which gives -0 as it should; a NaN stays one."""
    gates = np.array([-3e38, -200, -88, -1e-30, 0, 1e-30, 88, 200, 3e38, np.inf, np.nan, 1, 2, 3, 4, 5])
    call = call_of("silu_mul", rng_of("odd"), num_tokens=1, intermediate_size=16)
    pairs = call.args["gate_up"].reshape(2, 2, 8)
    pairs[:, 0], pairs[:, 1] = gates.reshape(2, 8), 2
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = OPS["silu_mul"].silu_mul_spec(call.args["gate_up"].astype(np.float64))
        wanted = wanted.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    got = in_numpy(call).outputs["out"].astype(np.float32)
    np.testing.assert_allclose(got, wanted, rtol=2.0**-7)


# The checks above can fail.

MUTANTS = [
    ("rms_norm", "cuda.syncthreads()", "pass"),
    ("rms_norm", "range(1, warps)", "range(1, warps - 1)"),
    ("rms_norm", "words, more, 4 * i)\n", "words, words, 4 * i)\n"),
    ("rms_norm", "add_f32(mean, eps)", "mean"),
    ("qk_norm", "lanes >> (step + 1)", "lanes >> step"),
    ("qk_norm", "select_i32(of_q, q_by[word], k_by[word])", "q_by[word]"),
    ("silu_mul", "pack(first_out, second_out)", "pack(second_out, first_out)"),
    ("silu_mul", "i * THREADS * 2 * PACK", "i * THREADS * PACK"),
    ("embedding", "- row * packs", "- packs"),
    ("embedding", "int32(row < real)", "int32(row <= real)"),
    ("rope_store_kv", "-mul_f32(y0, s0)", "mul_f32(y0, s0)"),
    ("rope_store_kv", "slot >> shift", "slot"),
    ("rope_store_kv", "& stored", "& 1"),
    ("rope_store_kv", "+ 2 * head_dim", "+ head_dim"),
]  # fmt: skip
SPREAD = {"rms_norm": {"eps": 3.0}, "qk_norm": {"eps": 3.0}}


@pytest.mark.parametrize(("op", "right", "wrong"), MUTANTS)
def test_mistakes_are_noticed(op, right, wrong):
    changed = []

    def change(name, text):
        changed.append(right in text)
        return text.replace(right, wrong)

    call = call_of(op, rng_of("mutants"))
    call.kwargs |= SPREAD.get(op, {})
    noticed = 0
    for seed in range(12):  # a barrier is missed in some orders of the warps
        try:
            check(call, seed=seed, change=change)
        except (AssertionError, IndexError):
            noticed += 1
    assert any(changed)
    assert noticed, f"{wrong} for {right} changes nothing"


@pytest.mark.parametrize("op", CASES)
def test_a_kernel_that_forgets_num_rows_is_noticed(op):
    call = call_of(op, rng_of(op), num_tokens=2)
    with pytest.raises(IndexError):
        in_numpy(call, 4, change=lambda _, text: text.replace("told < real", "told < 0"))


# Plans and doors.


def test_the_order_of_a_sum_depends_on_the_hidden_size_alone():
    seen = {}
    for hidden in range(8, 16384 + 1, 8):
        config = rms_norm.pick_rms_norm_config(hidden)
        assert hidden <= config.columns
        seen.setdefault(config, hidden)
    assert tuple(seen) == rms_norm.CONFIGS
    with pytest.raises(ValueError, match="hidden size is 16392; at most 16384 is required"):
        rms_norm.pick_rms_norm_config(16392)


class OnDevice:
    """Looks like a device array; nothing can be read from it."""

    def __init__(self, array, start=1 << 20):
        self.dtype, self.shape, self.strides = array.dtype, array.shape, array.strides
        self.size, self.ndim = array.size, array.ndim
        self.__cuda_array_interface__ = {"data": (start, False)}


def on_device(op, **changes):
    """Views of a call's arguments at an address, changed by name."""
    call = call_of(op, rng_of(op))
    arrays = {
        name: np.zeros_like(a.view(np.uint16) if a.dtype.kind == "V" else a)
        for name, a in call.resolved().items()
    }
    return {name: view(op, name, OnDevice(array)) for name, array in arrays.items()} | changes


def a_view(shape, dtype=np.uint16, start=1 << 20):
    return view("op", "name", OnDevice(np.zeros(shape, dtype), start))


def test_a_view_is_an_array_by_its_address():
    class Own:
        address, shape, strides, dtype = 4096, (2, 8), (16, 2), np.dtype(np.uint16)

    assert view("op", "x", Own) == View(4096, (2, 8), (16, 2), np.dtype(np.uint16))
    assert view("op", "x", OnDevice(np.zeros((2, 8), np.uint16), 4096)) == view("op", "x", Own)
    with pytest.raises(ValueError, match="op: x is a ndarray; a device array"):
        view("op", "x", np.zeros(3))


@pytest.mark.parametrize(("op", "name", "wrong", "message"), [
    ("embedding", "weight", a_view((11, 592)), r"weight has shape \(11, 592\); \(any, 584\)"),
    ("embedding", "token_ids", a_view((5,), np.int64), "token_ids has dtype int64; int32"),
    ("embedding", "out", a_view((5, 584), start=(1 << 20) + 8), "out starts at address 0x100008; a"),
    ("rms_norm", "x", a_view((5, 584), np.float16), "x has dtype float16; uint16"),
    ("rms_norm", "x", a_view((4, 584)), r"x has shape \(4, 584\); \(5, 584\)"),
    ("rms_norm", "out", a_view((5, 584), np.float32), "out has dtype float32; uint16 or float16"),
    ("rms_norm", "residual", View(1 << 20, (5, 584), (1170, 2), np.dtype(np.uint16)),
     r"residual.strides\[0\] is 1170 bytes; a multiple of 16"),
    ("qk_norm", "q_weight", a_view((60,)), r"q_weight has shape \(60,\); \(64\)"),
    ("qk_norm", "k", a_view((5, 2, 32)), r"k has shape \(5, 2, 32\)"),
    ("silu_mul", "gate_up", a_view((5, 2056)), r"gate_up has shape \(5, 2056\); \(5, 4112\)"),
    ("rope_store_kv", "cos_sin", a_view((20, 64)), "cos_sin has dtype uint16; float32"),
    ("rope_store_kv", "slot_mapping", a_view((4,), np.int32), r"slot_mapping has shape \(4,\); \(5\)"),
    ("rope_store_kv", "k_cache", a_view((5, 2, 3, 64)), r"v_cache has shape \(5, 2, 4, 64\)"),
    ("rope_store_kv", "v", a_view((5, 3, 64)), r"v has shape \(5, 3, 64\)"),
])  # fmt: skip
def test_the_door_names_what_is_wrong(op, name, wrong, message):
    assert plan_of(op, on_device(op), None, 1e-5) is not None
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        plan_of(op, on_device(op, **{name: wrong}), None, 1e-5)


def test_the_door_names_numbers_that_do_not_fit():
    for op in ("rms_norm", "qk_norm"):
        with pytest.raises(ValueError, match="eps is nan; a number of at least 0"):
            plan_of(op, on_device(op), None, float("nan"))
    with pytest.raises(ValueError, match=r"num_rows has shape \(2,\); \(1\)"):
        plan_of("silu_mul", on_device("silu_mul"), a_view((2,), np.int32), 0)
    with pytest.raises(ValueError, match="num_rows has dtype int64"):
        plan_of("silu_mul", on_device("silu_mul"), a_view((1,), np.int64), 0)
    odd = {
        "out": a_view((5, 580)),
        "x": a_view((5, 580)),
        "weight": a_view((580,)),
        "residual": a_view((5, 580)),
    }
    with pytest.raises(ValueError, match=r"rms_norm: out.shape\[1\] is 580; a positive multiple of 8"):
        plan_of("rms_norm", odd, None, 1e-5)
    with pytest.raises(ValueError, match="embedding: out has rows of 1160 bytes; a multiple of 16"):
        plan_of("embedding", on_device("embedding", out=odd["out"], weight=a_view((11, 580))), None, 0)
    heads = {n: a_view((5, 2, 96)) for n in ("q", "k")} | {n: a_view((96,)) for n in ("q_weight", "k_weight")}
    with pytest.raises(ValueError, match=r"q.shape\[2\] is 96; head_dim 64 or 128 or 256"):
        plan_of("qk_norm", heads, None, 1e-5)
    pages = {n: a_view((5, 2, 3, 64)) for n in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"k_cache.shape\[2\] is 3; a power of two"):
        plan_of("rope_store_kv", on_device("rope_store_kv", **pages), None, 0)


def test_lm_heads_workspace():
    out = a_view((3, 40), np.float32)
    assert lm_head.workspace_view(out, a_view((9, 64))) == a_view((9, 64))._replace(shape=(3, 64))
    with pytest.raises(ValueError, match="lm_head: x_rows has 2 rows; at least 3"):
        lm_head.workspace_view(out, a_view((2, 64)))
    good = (a_view((7, 64)), a_view((40, 64)), a_view((3,), np.int32), a_view((3, 64)))
    lm_head.check_operands(out, *good)
    with pytest.raises(ValueError, match=r"x_rows has shape \(3, 72\); \(3, 64\)"):
        lm_head.check_operands(out, *good[:3], a_view((3, 72)))
    with pytest.raises(ValueError, match=r"out has shape \(3, 40\); \(any, 48\)"):
        lm_head.check_operands(out, good[0], a_view((48, 64)), *good[2:])


def test_lm_heads_views_are_operands_of_the_product():
    """The GEMM's own door takes them: x is the workspace's first rows."""
    from kernels_numba.ops.gemm.door import operands

    out, weight = a_view((3, 40), np.float32, 1 << 21), a_view((40, 64), start=1 << 22)
    x_rows = lm_head.workspace_view(out, a_view((9, 64), start=1 << 23))
    o = operands(out, x_rows, weight)
    assert (o.out, o.x, o.weight, o.bias) == (1 << 21, 1 << 23, 1 << 22, 0)
    assert (o.m, o.n, o.k, o.x_stride, o.out_stride, o.out_dtype) == (3, 40, 64, 128, 160, "float32")


def test_a_launch_seen_before_is_found_again():
    """And what it costs the host can be measured; in a child, whose door is taken away."""
    code = """
import json, launch_times
from kernels_numba.ops.warp import rms_norm
launch_times.CALLS, launch_times.ROUNDS = 20, 2
times = launch_times.measure()
print(json.dumps([times, rms_norm.prepared.cache_info()[:2]]))
"""
    times, (hits, misses) = json.loads(no_simulator.last_line(code, PYTHONPATH=no_simulator.WITH_TESTS))
    assert set(times) == set(CASES)
    assert all(0 < us < 5000 for us in times.values())
    assert (hits, misses) == (39, 1)


def test_lm_heads_rows_are_gathered():
    rng, arrays = rng_of("rows"), Arrays()
    hidden = rng.standard_normal((9, 72)).astype(ml_dtypes.bfloat16)
    rows, taken = np.array([8, 0, 4], np.int32), np.full((3, 72), np.nan, ml_dtypes.bfloat16)
    views = (arrays.view(taken), arrays.view(rows), arrays.view(hidden))
    arrays.run("gather", "make_gather_kernel", gather.plan_gather("lm_head", *views, None, lm_head.ROWS))
    np.testing.assert_array_equal(bits(taken), bits(hidden[rows]))


def test_without_a_compiler_the_rungs_say_so(on_gpu):
    if on_gpu:
        pytest.skip("there is one")
    for op in CASES:
        args = {n: OnDevice(np.zeros(v.shape, v.dtype)) for n, v in on_device(op).items()}
        kwargs = {"eps": 1e-5} if op.endswith("norm") else {}
        if op == "rms_norm":
            kwargs["residual"] = args.pop("residual")
        with pytest.raises(KernelsUnavailable, match="rung warp is made of PTX instructions"):
            OPS[op].rungs["warp"](*args.values(), **kwargs)


# Which rung runs where.

LLAMA = Sizes(hidden_size=2048, intermediate_size=8192, head_dim=64, block_size=64)
ALL = ("embedding", "rms_norm", "qk_norm", "rope_store_kv", "silu_mul", "lm_head")


@pytest.mark.parametrize(("op", "capability", "dtype", "sizes", "why"), [
    ("rms_norm", (8, 0), "bfloat16", LLAMA, ""),
    ("rms_norm", (12, 0), "float16", LLAMA, ""),
    ("gemm", None, "float32", LLAMA, ""),
    ("rms_norm", (7, 5), "bfloat16", LLAMA, "8.0 or newer, here is compute capability 7.5"),
    ("rms_norm", None, "bfloat16", LLAMA, "here is no GPU"),
    ("silu_mul", (9, 0), "float32", LLAMA, "bfloat16 or float16, not float32"),
    ("silu_mul", (9, 0), "bfloat16", Sizes(2048, 100, 64, 64), "multiples of 8, not 100"),
    ("rms_norm", (9, 0), "bfloat16", Sizes(2048, 100, 64, 64), ""),
    ("embedding", (9, 0), "bfloat16", Sizes(100, 8, 64, 64), "multiples of 8, not 100"),
    ("rms_norm", (9, 0), "bfloat16", Sizes(20480, 8, 64, 64), "up to 16,384, not 20,480"),
    ("rope_store_kv", (9, 0), "bfloat16", Sizes(8, 8, 80, 64), "head_dim 64 or 128 or 256, not 80"),
    ("rope_store_kv", (9, 0), "bfloat16", Sizes(8, 8, 64, 48), "a power of two of keys, not 48"),
])  # fmt: skip
def test_rungs_that_cannot_run_say_why(op, capability, dtype, sizes, why):
    said = refusal(op, capability, dtype, sizes)
    assert said == "" if not why else why in said


def test_the_warp_rungs_are_taken_where_they_run():
    assert warp_rungs("plain", (9, 0), "bfloat16", LLAMA) == dict.fromkeys(ALL, "warp")
    assert warp_rungs("plain", (8, 6), "bfloat16", Sizes(576, 1536, 80, 64)) == dict.fromkeys(
        ("embedding", "rms_norm", "silu_mul", "lm_head"), "warp"
    )
    for other in (
        ("reference", (9, 0), "bfloat16"),
        ("plain", (7, 5), "bfloat16"),
        ("plain", (9, 0), "float32"),
    ):
        assert warp_rungs(*other, LLAMA) == {}
    assert warp_rungs("plain", None, "bfloat16", LLAMA) == {}  # numba's simulator


def model_config(**changes):
    from sharp.weights import open_checkpoint

    config = open_checkpoint(ROOT / "weights" / "tiny").config
    assert isinstance(config, ModelConfig)
    from dataclasses import replace

    return replace(config, **{"hidden_size": 64, "intermediate_size": 64, "head_dim": 64, **changes})


def test_a_model_takes_them_unless_told_otherwise():
    def picked(forced, **changes):
        return small_op_rungs("plain", (9, 0), "bfloat16", model_config(**changes), 64, forced)

    assert picked({}) == dict.fromkeys(ALL, "warp")
    assert picked({"rms_norm": "plain"}) == dict.fromkeys([op for op in ALL if op != "rms_norm"], "warp")
    assert "rope_store_kv" not in picked({"rope": "mine"})
    assert picked({"rms_norm": "warp"}) == dict.fromkeys([op for op in ALL if op != "rms_norm"], "warp")
    wanted = (
        "rung 'warp' of rope_store_kv does not run this model: it takes head_dim 64 or 128 or 256, not 16"
    )
    with pytest.raises(ValueError, match=wanted):
        picked({"rope_store_kv": "warp"}, head_dim=16)


def test_a_host_says_why_it_cannot_have_them():
    from sharp import LLM

    wanted = "rung 'warp' of silu_mul does not run this model: it needs compute capability 8.0 or newer"
    with pytest.raises(ValueError, match=wanted):
        LLM(str(ROOT / "weights" / "tiny"), device="cpu", rungs={"silu_mul": "warp"})


def test_rungs_are_described_by_kernel():
    rungs = {"gemm": "hopper", "embedding": "warp", "rms_norm": "warp", "sample": "plain"}
    assert describe_rungs(rungs, "plain") == ", gemm hopper, embedding + rms_norm warp"
    assert describe_rungs({"gemm": "plain"}, "plain") == ""


def test_a_forced_part_is_part_of_the_whole():
    """rungs={"rope": ...} still decides what the forward runs."""
    seen = []
    module = OPS["rope"]
    module.register("watched", lambda q, k, *rest, stream=None: seen.append(len(q)))
    try:
        ops = resolve("reference", {"rope": "watched"})
    finally:
        del module.rungs["watched"]
    args = call_of("rope_store_kv", rng_of("forced")).resolved()
    ops.rope_store_kv(*args.values())
    assert seen == [5]
    slots = args["slot_mapping"]
    np.testing.assert_array_equal(args["v_cache"][slots[0] // 4, :, slots[0] % 4], args["v"][0])


# What they become.

COMPILE = """
import json, sys
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.warp import qk_norm, rms_norm, rope_store_kv, silu_mul
from kernels_numba.prebuild import fitting, kernel_modules
modules = [name for name in kernel_modules() if ".warp." in name]
wanted = [(kernel, "sm_90a") for _, kernel in fitting(modules, "sm_90a")]
halves = [
    rms_norm.rms_norm_kernel(rms_norm.CONFIGS[2], "float16", True, True),
    silu_mul.silu_mul_kernel("float16", True),
    qk_norm.qk_norm_kernel(128, "float16", True), rope_store_kv.rope_store_kv_kernel(64, "float16", True),
]
wanted += [(kernel, "sm_90a") for kernel in halves]
reports = [assemble_kernel(*one) for one in wanted]
print(json.dumps([(r.name, r.arch, r.registers, r.problems, r.instructions) for r in reports]))
"""
REGISTERS = {"gather": 32, "rms_norm": 80, "qk_norm": 64, "silu_mul": 48, "rope_store_kv": 96}


def test_every_configuration_stays_in_registers_and_loads_wide():
    """As their docstrings say. test_assemble.py assembles all of them for all targets."""
    rows = json.loads(no_simulator.last_line(COMPILE, PYTHONPATH=no_simulator.WITH_TESTS))
    assert len(rows) == 1 + 6 + 3 + 1 + 3 + 4  # rms_norm without a residual: products add it
    for name, arch, registers, problems, instructions in rows:
        assert problems == [], (name, arch)
        op = name.partition("_warp")[0]
        assert registers <= REGISTERS[op], (name, arch, registers)
        if op == "rms_norm" and "x2_" in name:
            assert registers <= 48, (name, arch, registers)
        assert not {"LDL", "STL", "ATOM", "RED"} & set(instructions), (name, arch)
        assert instructions["LDG"] >= 4, (name, arch)
        assert ("ACQBULK" in instructions) == (op != "gather"), name  # griddepcontrol.wait


def test_they_are_built_ahead():
    names = [name for name in prebuild.kernel_modules() if ".warp." in name]
    package = "kernels_numba.ops.warp"
    assert sorted(names) == [
        f"{package}.{n}" for n in ("gather", "qk_norm", "rms_norm", "rope_store_kv", "silu_mul")
    ]
    for arch, there in (("sm_75", 0), ("sm_80", 14), ("sm_86", 14), ("sm_90a", 14), ("sm_120a", 14)):
        assert len(list(prebuild.fitting(names, arch))) == there


# On a GPU.


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have >= (8, 0), "8.0")


REAL = {
    "embedding": [{"hidden_size": 2048}, {"hidden_size": 3584}, {"hidden_size": 584}],
    "rms_norm": [
        {"hidden_size": hidden, "residual": residual}
        for hidden in (72, 576, 1024, 2048, 3584, 8192, 16384) for residual in (False, True)
    ],
    "qk_norm": [
        {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}, {"num_q_heads": 5, "num_kv_heads": 1},
        {"num_q_heads": 7, "num_kv_heads": 3, "head_dim": 256},
    ],
    "silu_mul": [{"intermediate_size": 8192}, {"intermediate_size": 18944}, {"intermediate_size": 1544}],
    "rope_store_kv": [
        {"num_q_heads": hq, "num_kv_heads": hkv, "head_dim": dim, "block_size": 64, "num_blocks": 40,
         "max_pos": 5000}
        for hq, hkv, dim in ((32, 8, 64), (28, 4, 128), (9, 3, 64), (64, 8, 128), (4, 2, 256))
    ],
}  # fmt: skip


class OnGpu:
    """Copies of a call's arrays on the device, with room for `bucket` rows that hold NaN beyond the real."""

    def __init__(self, cuda, call, bucket=None):
        self.cuda, self.call = cuda, call
        by_row = KERNELS[call.op][2]
        rows = len(call.resolved()[by_row[0]])
        self.more = 0 if bucket is None else bucket - rows
        self.num_rows = None if bucket is None else cuda.to_device(np.array([rows], np.int32))

        def upload(name, array):
            host = array.view(np.uint16) if array.dtype.kind == "V" else array
            if self.more and (name in by_row or name in call.buffers):
                fill = 0x7E7E if host.dtype == np.uint16 else 7 if host.dtype.kind == "i" else np.nan
                host = np.concatenate([host, np.full((self.more, *host.shape[1:]), fill, host.dtype)])
            return cuda.to_device(np.ascontiguousarray(host))

        self.buffers = {name: upload(name, array) for name, array in call.buffers.items()}
        args = {n: a if isinstance(a, Cut) else upload(n, a) for n, a in call.args.items()}
        self.args = Call(call.op, args, call.outputs, buffers=self.buffers).resolved()

    def launch(self, stream=None, rung="warp"):
        args = dict(self.args)
        kwargs = dict(self.call.kwargs)
        if "residual" in args:
            kwargs["residual"] = args.pop("residual")
        if rung == "warp":
            kwargs["num_rows"] = self.num_rows
        OPS[self.call.op].rungs[rung](*args.values(), **kwargs, stream=stream)

    def read(self):
        """{output: its real rows}; fails if a row beyond them was written."""
        self.cuda.synchronize()
        by_row = KERNELS[self.call.op][2]
        outputs = {}
        for name in self.call.outputs:
            like = self.call.resolved()[name]
            value = self.call.args[name]
            if isinstance(value, Cut):
                host = self.buffers[value.buffer].copy_to_host()[:, value.start : value.stop]
            else:
                host = self.args[name].copy_to_host()
            host = host.view(like.dtype) if like.dtype.kind == "V" else host
            if name in by_row and self.more:
                beyond = bits(host[len(like) :])
                assert (
                    (beyond == 0x7E7E).all() if like.dtype.kind == "V" else np.isnan(host[len(like) :]).all()
                )
                host = host[: len(like)]
            outputs[name] = host
        return outputs

    def run(self, rung="warp"):
        self.launch(rung=rung)
        return self.read()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "sizes"), [(op, sizes) for op, cases in REAL.items() for sizes in cases], ids=str
)
def test_warp_rungs_against_float64(cuda, op, sizes, dtype):
    """And the same bits alone, among others, and in any bucket."""
    for tokens in (1, 37, 600):
        call = call_of(op, rng_of(op, tokens), dtype, **{"num_tokens": tokens, "vocab_size": 1000, **sizes})
        got = OnGpu(cuda, call).run()
        check_right(call, got, dtype)
        for bucket in (tokens, tokens + 3, 1024):
            assert same_bits(got, OnGpu(cuda, call, bucket).run()), bucket


@pytest.mark.gpu
@pytest.mark.parametrize("op", CASES)
def test_warp_rows_have_their_bits_alone(cuda, op):
    for sizes in REAL[op]:
        call = call_of(op, rng_of(op), **{"num_tokens": 50, "vocab_size": 1000, **sizes})
        together, by_row = OnGpu(cuda, call).run(), KERNELS[op][2]
        for row in (0, 17, 49):
            args = {
                n: a[row : row + 1] if n in by_row and not isinstance(a, Cut) else a
                for n, a in call.args.items()
            }
            buffers = {name: buffer[row : row + 1] for name, buffer in call.buffers.items()}
            one = OnGpu(cuda, Call(op, args, call.outputs, call.kwargs, buffers, call.fixed)).run()
            for name in set(call.outputs) & set(by_row):
                np.testing.assert_array_equal(bits(one[name]), bits(together[name][row : row + 1]))


@pytest.mark.gpu
def test_warp_rope_store_kv_has_the_plain_rungs_bits(cuda):
    for sizes in REAL["rope_store_kv"]:
        call = call_of("rope_store_kv", rng_of("plain"), **{"num_tokens": 300, **sizes})
        assert same_bits(OnGpu(cuda, call).run(), OnGpu(cuda, call).run("plain"))


@pytest.mark.gpu
def test_warp_kernels_of_the_text_in_numpy_give_the_same_copies(cuda):
    call = call_of("embedding", rng_of("copies"), num_tokens=9)
    assert same_bits(OnGpu(cuda, call).run(), in_numpy(call).outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("op", CASES)
def test_warp_launches_are_captured_and_read_the_rows_of_their_replay(cuda, op):
    """One graph, replayed with other numbers of rows in the same bucket; it allocates nothing."""
    call = call_of(op, rng_of(op), **{"num_tokens": 40, "vocab_size": 1000, **REAL[op][0]})
    gpu = OnGpu(cuda, call, 64)
    whole = OnGpu(cuda, call).run()
    other = OnGpu(cuda, call, 64)  # its first launch prepares nothing new of the kernel
    other.run()
    stream = cuda.stream()
    gpu.num_rows.copy_to_device(np.array([0], np.int32))
    gpu.launch(stream)  # prepared and loaded before the capture; no row is written
    stream.synchronize()
    free = cuda.current_context().get_memory_info().free
    replay = captured(stream, lambda: gpu.launch(stream))
    assert free - cuda.current_context().get_memory_info().free <= OWN
    gpu.num_rows.copy_to_device(np.array([40], np.int32))
    cuda.synchronize()
    replay()
    stream.synchronize()
    assert same_bits(gpu.read(), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 64, 200])
def test_warp_lm_head(cuda, rows):
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    case = {"num_rows": rows, "num_tokens": 3 * rows, "vocab_size": 4096, "hidden_size": 576}
    from kernels_numba.inputs import make_call

    call = make_call("lm_head", case, rng).to_dtype("bfloat16")
    args = {n: cuda.to_device(a.view(np.uint16) if a.dtype.kind == "V" else a) for n, a in call.args.items()}
    work = cuda.to_device(np.zeros((rows + 9, 576), np.uint16))
    op = OPS["lm_head"]
    op.rungs["warp"](*args.values(), x_rows=work)
    got = args["out"].copy_to_host()
    host = call.to_float64().args
    want = host["hidden"][host["logits_rows"]] @ host["weight"].T
    # Tensor cores cut off low bits: test_gemm.py allows as much, of weights that are sqrt(576) times smaller.
    assert (np.abs(got - want) <= 2e-5 * (np.abs(want) + 24)).all()
    real = rows // 2 + 1
    fewer = cuda.to_device(np.full(got.shape, np.nan, np.float32))
    count = cuda.to_device(np.array([real], np.int32))
    cuda.synchronize()
    op.rungs["warp"](fewer, *list(args.values())[1:], x_rows=work, num_rows=count)
    part = fewer.copy_to_host()
    np.testing.assert_array_equal(bits(part[:real]), bits(got[:real]))
    if cuda.get_current_device().compute_capability[0] == 9:
        assert np.isnan(part[real:]).all()


def test_every_op_of_the_door_has_the_rung():
    assert {*ALL, "sample"} == {op for op, module in OPS.items() if "warp" in module.rungs}
    assert set(CASES) | {"lm_head"} == set(ALL)
    assert set(ELEMENTS) == {"bfloat16", "float16", "float32"}
