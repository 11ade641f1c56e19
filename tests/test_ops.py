"""Every op against its definition: all cases, dtypes and rungs, and the promises that DESIGN.md makes about
bits.

Without a GPU the plain kernels run in numba's simulator at the toy cases (names that start with "toy");
larger ones would take minutes there. The reference rung runs all cases. With --device=cuda the chosen rung
runs all cases.
"""

from __future__ import annotations

import math
import zlib

import ml_dtypes
import numpy as np
import pytest
from tolerance import assert_close, error_ratio

from kernels_numba import compiler
from kernels_numba.compiler import cuda
from kernels_numba.cost import Cost, Peaks, roofline_fraction, roofline_seconds
from kernels_numba.inputs import BFLOAT16, Call, Cut, make_call
from kernels_numba.ops import OPS, resolve
from kernels_numba.philox import make_philox, philox_words

DTYPES = ("float32", "bfloat16")
ATTENTION = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 4, "block_size": 4}


def rng_of(*words):
    """A generator that depends on the test's own parameters, the same in every process."""
    return np.random.default_rng(zlib.crc32("/".join(map(str, words)).encode()))


class Runner:
    """Runs a rung on host or device copies of a call's arguments and returns the outputs as numpy arrays."""

    def __init__(self, on_gpu, forced):
        self.on_gpu, self.forced = on_gpu, forced

    def kernel_rung(self, op):
        return self.forced.get(op, "plain")

    def __call__(self, call, rung, dtype):
        on_device = rung != "reference"
        call = call.to_dtype(dtype)
        if not on_device:
            args = call.resolved()
            OPS[call.op].rungs[rung](*self._positional(args), **self._kwargs(call, args))
            return {name: np.array(args[name]) for name in call.outputs}, call.buffers

        def upload(array):
            return cuda.to_device(array.view(np.uint16) if array.dtype == BFLOAT16 else array)

        buffers = {name: upload(array) for name, array in call.buffers.items()}
        args = {name: a if isinstance(a, Cut) else upload(a) for name, a in call.args.items()}
        for name, host in call.resolved().items():
            if isinstance(args[name], Cut) and host.size == 0:  # numba refuses to slice an empty device array
                args[name] = upload(np.ascontiguousarray(host))
        args = Call(call.op, args, call.outputs, buffers=buffers).resolved(buffers)
        OPS[call.op].rungs[rung](*self._positional(args), **self._kwargs(call, args))
        cuda.synchronize()

        def download(array, like):
            host = array.copy_to_host()
            return host.view(BFLOAT16) if like.dtype == BFLOAT16 else host

        after = {name: download(buffers[name], call.buffers[name]) for name in buffers}
        held = Call(call.op, call.args, call.outputs, buffers=after).resolved(after)
        return {
            name: held[name] if isinstance(call.args[name], Cut) else download(args[name], call.args[name])
            for name in call.outputs
        }, after

    @staticmethod
    def _kwargs(call, args):
        kwargs = dict(call.kwargs)
        if "residual" in args:
            kwargs["residual"] = args["residual"]
        return kwargs

    @staticmethod
    def _positional(args):
        return [value for name, value in args.items() if name != "residual"]


@pytest.fixture(scope="module")
def run(on_gpu, forced_rungs):
    return Runner(on_gpu, forced_rungs)


def expectations(call, dtype):
    """(plain, truth) per output: the definition in the dtype, rounded; and in float64 on the same rounded
    inputs."""
    rounded = call.to_dtype(dtype)
    plain = rounded.spec()
    like = {name: value.dtype for name, value in rounded.resolved().items()}
    plain = {name: np.asarray(value).astype(like[name]) for name, value in plain.items()}
    return plain, rounded.to_float64().spec()


def in_orders(call, orders, rng):
    """The same call of attention with the dimensions of q and k in other orders: the same mathematics, so
    the definition in float32 rounds its scores otherwise."""
    args = call.resolved()
    for _ in range(orders):
        order = rng.permutation(args["q"].shape[-1])
        moved = {name: np.ascontiguousarray(args[name][..., order]) for name in ("q", "k_cache")}
        yield Call(call.op, args | moved, call.outputs, call.kwargs, terms=call.terms)


def check_call(run, call, rung, dtype, others=()):
    """others: calls that mean the same; the definition's error is the largest of all of them."""
    actual, after = run(call, rung, dtype)
    if call.op == "sample":
        check_samples(call, actual["out"])
    else:
        plain, truth = expectations(call, dtype)
        plains = [plain, *(expectations(other, dtype)[0] for other in others)]
        for name in call.outputs:
            kind = "float32" if name in call.fixed else dtype
            versions = [version[name] for version in plains]
            assert_close(actual[name], versions, truth[name], kind, call.terms, f"{call.op} {name}")
    before = call.to_dtype(dtype)
    for (
        name,
        buffer,
    ) in before.buffers.items():  # what lies between and behind the cut rows is nobody's to write
        mine = np.zeros(buffer.shape[1], bool)
        for cut in (a for n, a in before.args.items() if isinstance(a, Cut) and n in call.outputs):
            mine[cut.start : cut.stop] = True
        np.testing.assert_array_equal(bits(after[name][:, ~mine]), bits(buffer[:, ~mine]))
    return actual


def check_samples(call, ids):
    """Equal ids, but where float32 logarithms of two libraries may order a near tie either way."""
    args = call.args
    names = ("logits", "temperatures", "seeds", "output_indices", "top_ks", "top_ps")
    rows = zip(*(args[name] for name in names), ids, strict=True)
    for row, (logits, temperature, seed, index, k, p, chosen) in enumerate(rows):
        truth = OPS["sample"].sample_spec(logits[None], [temperature], [seed], [index], [k], [p])[0]
        if chosen == truth:
            continue
        assert temperature > 0, f"row {row}: {chosen} instead of the argmax {truth}"
        kept = OPS["sample"].kept_spec(logits, temperature, int(k), p)
        assert chosen in kept, f"row {row}: {chosen} is not among what top-k {k} and top-p {p} leave"
        pair = np.array([chosen, truth])
        noise = OPS["sample"].gumbel_spec(int(seed), int(index), pair)
        scores = logits[pair].astype(np.float64) / temperature + noise
        assert abs(scores[0] - scores[1]) <= 1e-5 * max(1, abs(scores[1])), (
            f"row {row}: {chosen}, not {truth}"
        )


def bits(array):
    array = np.ascontiguousarray(array)
    return array.view(np.uint16 if array.dtype == BFLOAT16 else np.uint32)


def dtypes_of(op):
    return DTYPES if op != "sample" else ("float32",)  # logits are float32 in every engine


def pytest_generate_tests(metafunc):
    """(op, case, dtype) points; in the simulator kernels get the toy cases only."""
    if "case" in metafunc.fixturenames and metafunc.function.__name__.endswith("_matches_spec"):
        small = "kernel" in metafunc.function.__name__ and metafunc.config.getoption("--device") != "cuda"
        points = [
            pytest.param(op, case, dtype, id=f"{op}-{case}-{dtype}")
            for op, module in OPS.items()
            for case in module.CASES
            for dtype in dtypes_of(op)
            if case.startswith("toy") or not small
        ]
        metafunc.parametrize(("op", "case", "dtype"), points)


def test_kernel_matches_spec(run, op, case, dtype):
    check_call(run, make_call(op, case, rng_of(op, case, dtype)), run.kernel_rung(op), dtype)


@pytest.mark.parametrize("op", list(OPS))
def test_kernel_at_other_odd_sizes(run, op):
    for dtype in dtypes_of(op):
        check_call(run, make_call(op, shrink(op), rng_of(op, dtype)), run.kernel_rung(op), dtype)


def shrink(op):
    """One more simulator-sized case of each op, with other odd sizes than CASES has."""
    return {
        "embedding": {"num_tokens": 2, "hidden_size": 3, "vocab_size": 5},
        "rms_norm": {"num_tokens": 2, "hidden_size": 6, "residual": True},
        "gemm": {"m": 2, "n": 4, "k": 5, "bias": True},
        "qk_norm": {"num_tokens": 2, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 3},
        "rope": {"num_tokens": 2, "num_q_heads": 2, "num_kv_heads": 2, "head_dim": 2, "max_pos": 5},
        "store_kv": {"num_tokens": 3, "num_kv_heads": 1, "head_dim": 2, "num_blocks": 2, "block_size": 3},
        "rope_store_kv": {
            "num_tokens": 3, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 2, "max_pos": 5,
            "num_blocks": 2, "block_size": 3,
        },
        "prefill_attention": {**ATTENTION, "block_size": 3, "query_lens": (1, 2), "context_lens": (4, 2)},
        "decode_attention": {**ATTENTION, "block_size": 5, "context_lens": (5, 1)},
        "silu_mul": {"num_tokens": 1, "intermediate_size": 8},
        "gemm_silu_mul": {"m": 3, "n": 16, "k": 3},
        "lm_head": {"num_rows": 1, "num_tokens": 2, "vocab_size": 3, "hidden_size": 5},
        "sample": {"vocab_size": 5, "temperatures": (0.7,)},
    }[op]  # fmt: skip


def test_reference_matches_spec(run, op, case, dtype):
    """The faster numpy forms against the definitions, float32 and ml_dtypes bfloat16, at real sizes."""
    check_call(run, make_call(op, case, rng_of(op, case, dtype)), "reference", dtype)


@pytest.mark.parametrize("rung", ["reference", "kernel"])
def test_random_batches(run, rung):
    """Ragged batches nobody thought of. The seed is in the assertion's text: put it here to see one again."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    big = rung == "reference" or run.on_gpu
    for _ in range(6 if big else 1):
        heads = int(rng.integers(1, 4 if big else 2))
        group = int(rng.choice([1, 3, 8] if big else [1, 2]))
        case = {
            "num_q_heads": heads * group,
            "num_kv_heads": heads,
            "head_dim": int(rng.integers(1, 70 if big else 4)),
            "block_size": int(rng.integers(1, 70 if big else 6)),
        }
        query_lens = rng.integers(0, 150 if big else 3, rng.integers(1, 6 if big else 3))
        context_lens = [int(q + rng.integers(0, 300 if big else 5)) for q in query_lens]
        case |= {"query_lens": query_lens.tolist(), "context_lens": context_lens}
        case["window"] = None if rng.random() < 0.5 else int(rng.integers(1, 200 if big else 5))
        dtype = str(rng.choice(DTYPES))
        try:
            for op in ("prefill_attention", "decode_attention"):
                name = "reference" if rung == "reference" else run.kernel_rung(op)
                call = make_call(op, case, rng)
                others = in_orders(call, 3, rng) if dtype == "float32" else ()
                check_call(run, call, name, dtype, others)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, case {case}, {dtype}: {error}") from error


def one_prompt(run, query_len, context_len, seed=1, window=None):
    """A prefill of one sequence; on the GPU with real heads, and long enough for several tiles of keys."""
    case = {**ATTENTION, "query_lens": (query_len,), "context_lens": (context_len,), "window": window}
    if run.on_gpu:
        case |= {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, "block_size": 64}
    return make_call("prefill_attention", case, np.random.default_rng(seed))


def with_rows(call, q, cu, lens, table):
    """The call's pages under another batch: its own q rows, cu_seqlens_q, context_lens and block_table."""
    args = dict(call.args)
    args["out"] = np.full(q.shape, np.nan, np.float32)
    args |= {"q": q, "cu_seqlens_q": np.asarray(cu, np.int32), "context_lens": np.asarray(lens, np.int32)}
    args["block_table"] = np.ascontiguousarray(table)
    return Call(call.op, args, call.outputs, call.kwargs, terms=call.terms)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_chunks_and_decode_are_bit_equal(run, dtype, window):
    """A prompt whole, cut in two at odd places, and its last row as a decode step: the same bits in a kernel
    rung.

    The reference is held to its tolerance only: BLAS changes the order of sums with the number of rows.
    """
    n = 333 if run.on_gpu else 7
    call = one_prompt(run, n, n, window=40 * window if window and run.on_gpu else window)
    q, table = call.resolved()["q"].copy(), call.args["block_table"]
    for rung in ("reference", run.kernel_rung("prefill_attention")):
        whole = run(with_rows(call, q, [0, n], [n], table), rung, dtype)[0]["out"]
        cut = n // 2 - 1
        parts = [
            run(with_rows(call, q[a:b], [0, b - a], [b], table), rung, dtype)[0]["out"]
            for a, b in ((0, cut), (cut, n))
        ]
        last = with_rows(call, q[-1:], [0, 1], [n], table)
        last.op = "decode_attention"
        del last.args["cu_seqlens_q"]
        decode_rung = "reference" if rung == "reference" else run.kernel_rung("decode_attention")
        decoded = run(last, decode_rung, dtype)[0]["out"]
        joined = np.concatenate(parts)
        if rung == "reference":
            plain, truth = expectations(with_rows(call, q, [0, n], [n], table), dtype)
            assert_close(joined, plain["out"], truth["out"], dtype, n, "chunks")
            assert_close(decoded, plain["out"][-1:], truth["out"][-1:], dtype, n, "decode")
        else:
            np.testing.assert_array_equal(bits(joined), bits(whole), "chunks differ from the whole prompt")
            np.testing.assert_array_equal(bits(decoded), bits(whole[-1:]), "decode differs from prefill")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_over_the_context_changes_no_bit(run, dtype):
    """So an engine may leave a window out that its max_model_len never reaches."""
    n = 333 if run.on_gpu else 7
    call = one_prompt(run, n, n)
    rung = run.kernel_rung("prefill_attention")
    for name in ("reference", rung):
        without = run(call, name, dtype)[0]["out"]
        call.kwargs["window"] = n
        np.testing.assert_array_equal(bits(run(call, name, dtype)[0]["out"]), bits(without))
        call.kwargs["window"] = n - 1
        assert (bits(run(call, name, dtype)[0]["out"]) != bits(without)).any()
        call.kwargs["window"] = None


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_packed_is_bit_equal_and_keeps_other_rows(run, dtype):
    """Three prompts in one call or one by one, and rows outside [cu[0], cu[B]) stay as they were."""
    lens = (130, 1, 67) if run.on_gpu else (2, 1, 3)
    case = {**ATTENTION, "query_lens": lens, "context_lens": tuple(n + 2 for n in lens)}
    call = make_call("prefill_attention", case, rng_of("packed"))
    rung = run.kernel_rung("prefill_attention")
    q, table = call.resolved()["q"].copy(), call.args["block_table"]
    together = run(call, rung, dtype)[0]["out"]
    cu = call.args["cu_seqlens_q"]
    for b in range(len(lens)):
        alone = with_rows(call, q, cu[b : b + 2], call.args["context_lens"][b : b + 1], table[b : b + 1])
        for name in ("reference", rung):
            out = run(alone, name, dtype)[0]["out"]
            mine = slice(cu[b], cu[b + 1])
            outside = np.delete(out, np.r_[mine], axis=0)
            assert np.isnan(outside.astype(np.float32)).all(), f"{name} wrote rows of other sequences"
            if name == rung:
                np.testing.assert_array_equal(bits(out[mine]), bits(together[mine]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_rows_are_bit_equal(run, dtype):
    """A row of x gives the same bits alone (FEW config) and among many (MANY), in gemm and through
    lm_head."""
    case = (
        {"m": 70, "n": 129, "k": 333, "bias": False}
        if run.on_gpu
        else {"m": 17, "n": 3, "k": 5, "bias": False}
    )
    call = make_call("gemm", case, rng_of("gemm rows"))
    rung = run.kernel_rung("gemm")
    many = run(call, rung, dtype)[0]["out"]
    x, weight = call.args["x"], call.args["weight"]
    for row in (0, 9, 16):
        args = {"out": np.full((1, case["n"]), np.nan, np.float32), "x": x[row : row + 1], "weight": weight}
        one = run(Call("gemm", args, ("out",)), rung, dtype)[0]["out"]
        np.testing.assert_array_equal(bits(one), bits(many[row : row + 1]))
    rows = np.array([16, 0], np.int32)
    args = {
        "out": np.full((2, case["n"]), np.nan, np.float32),
        "hidden": x,
        "weight": weight,
        "logits_rows": rows,
    }
    logits = run(
        Call("lm_head", args, ("out",), fixed=frozenset({"out"})), run.kernel_rung("lm_head"), dtype
    )[0]["out"]
    np.testing.assert_array_equal(bits(logits.astype(many.dtype)), bits(many[rows]))


@pytest.mark.parametrize("op", ["rms_norm", "silu_mul", "qk_norm", "rope", "embedding"])
def test_row_ops_are_bit_equal_alone(run, op):
    """The last row alone gives the bits that it gives in the batch."""
    real = ("smollm2", "qwen3")
    case = next(name for name in OPS[op].CASES if name.startswith(real if run.on_gpu else "toy"))
    call = make_call(op, case, rng_of("alone", op))
    shared = {"weight", "cos_sin", "q_weight", "k_weight"}
    args = {name: a if name in shared or isinstance(a, Cut) else a[-1:] for name, a in call.args.items()}
    buffers = {name: b[-1:] for name, b in call.buffers.items()}
    alone = Call(op, args, call.outputs, call.kwargs, buffers, call.fixed)
    together, one = (
        run(call, run.kernel_rung(op), "bfloat16")[0],
        run(alone, run.kernel_rung(op), "bfloat16")[0],
    )
    for name in call.outputs:
        np.testing.assert_array_equal(bits(one[name]), bits(together[name][-1:]))


def test_rms_norm_may_write_over_x(run):
    """out may be x: the device arrays are one."""
    call = make_call("rms_norm", "toy", rng_of("alias"))
    expected = run(call, run.kernel_rung("rms_norm"), "float32")[0]["out"]
    x, weight = (cuda.to_device(call.args[name]) for name in ("x", "weight"))
    OPS["rms_norm"].rungs[run.kernel_rung("rms_norm")](x, x, weight, **call.kwargs)
    np.testing.assert_array_equal(x.copy_to_host(), expected)
    host = call.args["x"].copy()
    OPS["rms_norm"].rungs["reference"](host, host, call.args["weight"], **call.kwargs)
    np.testing.assert_allclose(host, expected, rtol=1e-5)


# Mutants: each must leave the tolerance, or the tolerance tests nothing.


def _scale(call):
    call.kwargs["softmax_scale"] *= 1.2


def _mask(call):
    """Every row sees one key fewer, the youngest."""
    call.args["context_lens"] -= 1


def _window(call):
    """Every row sees one key more, the oldest."""
    call.kwargs["window"] += 1


def _no_window(call):
    call.kwargs["window"] = None


def _page(call):
    """The first pages of two sequences change places. (Two of one sequence may: keys have no order.)"""
    call.args["block_table"][:, 0] = call.args["block_table"][::-1, 0].copy()


def _tail(call):
    """A recycled page's old row just behind the context counts as a key: finite, so only the numbers show
    it."""
    call.args["context_lens"] += 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["prefill_attention", "decode_attention"])
@pytest.mark.parametrize(
    "mutate", [_scale, _mask, _page, _tail, _window, _no_window], ids=lambda f: f.__name__.strip("_")
)
def test_attention_mutants_fail(run, op, mutate, dtype):
    case = {**ATTENTION, "head_dim": 32, "block_size": 8, "context_lens": (21, 18), "query_lens": (2, 3)}
    if "window" in mutate.__name__:
        case["window"] = 9
    call = make_call(op, case, rng_of("mutant", op))
    for name in ("k_cache", "v_cache"):  # what lies before a window shows by its numbers alone
        call.args[name][np.isnan(call.args[name])] = 0.5
    plain, truth = expectations(call, dtype)
    good = run(call, "reference", dtype)[0]["out"]
    assert error_ratio(good, plain["out"], truth["out"], dtype, call.terms) <= 1
    mutant = call.cast(lambda _, array: array.copy())
    mutate(mutant)
    bad = run(mutant, "reference", dtype)[0]["out"]
    assert error_ratio(bad, plain["out"], truth["out"], dtype, call.terms) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "case", "mutate"),
    [
        ("rms_norm", "smollm2_135m_prefill", lambda call: call.kwargs.update(eps=0.5)),
        ("qk_norm", "odd_head_dim", lambda call: call.kwargs.update(eps=0.5)),
        ("qk_norm", "odd_head_dim", lambda call: call.args["k_weight"].__imul__(1.05)),
        ("rope", "toy", lambda call: call.args["positions"].__iadd__(1) % 11),
        ("gemm", "odd", lambda call: call.args["x"].__setitem__((slice(None), -1), 0)),
        ("silu_mul", "toy", lambda call: call.args["gate_up"].__imul__(1.05)),
        ("lm_head", "toy", lambda call: call.args["weight"].__setitem__(0, 0)),
        ("embedding", "toy", lambda call: call.args["token_ids"].__isub__(1) % 7),
    ],
)
def test_other_mutants_fail(run, op, case, mutate, dtype):
    call = make_call(op, case, rng_of("mutant", op))
    if "positions" in call.args:
        call.args["positions"] %= 9
    if "token_ids" in call.args:
        call.args["token_ids"] = call.args["token_ids"] % 6 + 1
    plain, truth = expectations(call, dtype)
    mutant = call.cast(lambda _, array: array.copy())
    mutate(mutant)
    bad = run(mutant, "reference", dtype)[0]
    worst = max(error_ratio(bad[n], plain[n], truth[n], dtype, call.terms) for n in call.outputs)
    assert worst > 1


# Sampling and its random numbers.

KNOWN_ANSWERS = [  # counter, key, words: kat_vectors of Random123, lines "philox4x32 10"
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert philox_words(np.array(counter, np.uint32), key).tolist() == list(words)


def test_philox_kernel_gives_the_same_words(run):
    philox = make_philox()

    @compiler.jit()
    def words_kernel(out, counters, keys):
        row = cuda.blockIdx.x
        out[row, 0], out[row, 1], out[row, 2], out[row, 3] = philox(
            counters[row, 0], counters[row, 1], counters[row, 2], counters[row, 3], keys[row, 0], keys[row, 1]
        )

    rng = rng_of("philox")
    counters = rng.integers(0, 2**32, (20, 4), dtype=np.uint32)
    keys = rng.integers(0, 2**32, (20, 2), dtype=np.uint32)
    for row, (counter, key, _) in enumerate(KNOWN_ANSWERS):
        counters[row], keys[row] = counter, key
    out = cuda.to_device(np.zeros((20, 4), np.uint32))
    words_kernel[20, 1](out, cuda.to_device(counters), cuda.to_device(keys))
    expected = np.stack([philox_words(c, k) for c, k in zip(counters, keys, strict=True)])
    np.testing.assert_array_equal(out.copy_to_host(), expected)


ODD_LOGITS = {
    "nan": ([np.nan, 1, 3, 2], 2),
    "all nan": ([np.nan] * 4, -1),
    "all -inf": ([-np.inf] * 4, -1),
    "inf": ([0, np.inf, 1, np.inf], 1),
    "tie": ([1, 5, 5, 5], 1),
    "only one": ([-np.inf, -np.inf, -3e38, np.nan], 2),
    "zero and -0": ([-0.0, 0.0, -1, 0], 0),
}


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # the simulator's own scalars say so
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.0, 0, 1), (1.0, 0, 1), (1e-40, 0, 1), (0.0, 2, 0.5), (1.0, 1, 1), (1.0, 0, 1e-9), (1e-40, 3, 0.5)],
)
@pytest.mark.parametrize("rung", ["spec", "reference", "kernel"])
def test_sample_odd_logits(run, rung, temperature, top_k, top_p):
    """NaN, infinities and ties; with a temperature the rows that leave one choice."""
    one = temperature == 0 or top_k == 1 or top_p < 1e-6
    names = [n for n in ODD_LOGITS if one or n not in ("nan", "tie", "zero and -0")]
    args = {
        "out": np.full(len(names), -7, np.int32),
        "logits": np.array([ODD_LOGITS[n][0] for n in names], np.float32),
        "temperatures": np.full(len(names), temperature, np.float32),
        "seeds": np.arange(len(names), dtype=np.uint64),
        "output_indices": np.arange(len(names), dtype=np.int32),
        "top_ks": np.full(len(names), top_k, np.int32),
        "top_ps": np.full(len(names), top_p, np.float32),
    }
    call = Call("sample", args, ("out",))
    if rung == "spec":
        ids = call.spec()["out"]
    else:
        ids = run(call, "reference" if rung == "reference" else run.kernel_rung("sample"), "float32")[0][
            "out"
        ]
    assert dict(zip(names, ids.tolist(), strict=True)) == {n: ODD_LOGITS[n][1] for n in names}


def test_sample_is_a_draw_from_the_softmax():
    """Frequencies over 4,000 output indices against softmax(logits / T), within 5 standard deviations
    each."""
    logits, temperature, draws = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32), 0.8, 4000
    ids = np.empty(draws, np.int32)
    rows = np.broadcast_to(logits, (draws, 5)).copy()
    seeds = np.full(draws, 2**63 + 12345, np.uint64)
    OPS["sample"].rungs["reference"](
        ids, rows, np.full(draws, temperature, np.float32), seeds, np.arange(draws, dtype=np.int32),
        np.zeros(draws, np.int32), np.ones(draws, np.float32),
    )  # fmt: skip
    p = np.exp(logits / temperature)
    p /= p.sum()
    counts = np.bincount(ids, minlength=5)
    assert (np.abs(counts - draws * p) < 5 * np.sqrt(draws * p * (1 - p))).all(), counts


def test_gumbel_noise_is_bounded_by_the_spread():
    """The reference draws noise only where it can matter; that rests on g in [-2.82, 16.64]."""
    lowest, highest = -math.log(-math.log(0.5 * 2.0**-23)), -math.log(-math.log(1 - 0.5 * 2.0**-23))
    assert highest - lowest < OPS["sample"].GUMBEL_SPREAD
    noise = OPS["sample"].gumbel_spec(2**64 - 1, 7, np.arange(40_000))
    assert noise.dtype == np.float32
    assert lowest - 1e-3 <= noise.min() <= noise.max() <= highest + 1e-3


# Costs, by counting what a tiny call touches.


class Counter:
    """Counts distinct elements read or written, and operations, in the obvious loops over a tiny shape."""

    def __init__(self):
        self.touched, self.flops = {}, 0

    def touch(self, name, itemsize, *index, direction="r"):
        self.touched[(name, direction, *index)] = itemsize

    def cost(self):
        return Cost(sum(self.touched.values()), self.flops)


def test_cost_of_gemm_and_lm_head():
    count, m, n, k = Counter(), 2, 3, 5
    for i in range(m):
        for j in range(n):
            for kk in range(k):
                count.touch("x", 2, i, kk)
                count.touch("w", 2, j, kk)
                count.flops += 2
            count.touch("b", 2, j)
            count.flops += 1
            count.touch("out", 2, i, j)
    assert OPS["gemm"].gemm_cost(m, n, k, bias=True) == count.cost()
    for i in range(m):
        for j in range(n):
            count.touch("residual", 2, i, j)
            count.flops += 1
    assert OPS["gemm"].gemm_cost(m, n, k, bias=True, residual=True) == count.cost()
    head = OPS["gemm"].gemm_cost(m, n, k, out_dtype="float32")
    assert OPS["lm_head"].lm_head_cost(m, n, k) == head + Cost(4 * m, 0)
    assert OPS["gemm"].gemm_cost(0, n, k) == Cost(0, 0)


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_cost_of_attention(window):
    count, hq, hkv, d = Counter(), 4, 2, 3
    queries, contexts = (2, 1), (5, 2)
    for b, (rows, n) in enumerate(zip(queries, contexts, strict=True)):
        count.touch("context_lens", 4, b)
        for i in range(rows):
            for h in range(hq):
                for e in range(d):
                    count.touch("q", 2, b, i, h, e)
                    count.touch("out", 2, b, i, h, e)
                    count.flops += 1
                visible = n - rows + i + 1
                for j in range(max(0, visible - window) if window else 0, visible):
                    count.flops += 5
                    for e in range(d):
                        count.touch("k", 2, b, h // 2, j, e)
                        count.touch("v", 2, b, h // 2, j, e)
                        count.flops += 4
    for i in range(3):
        count.touch("cu", 4, i)
    prefill_cost = OPS["prefill_attention"].prefill_attention_cost
    assert prefill_cost(queries, contexts, hq, hkv, d, window=window) == count.cost()
    ones = prefill_cost((1, 1), contexts, hq, hkv, d, window=window)
    decode = OPS["decode_attention"].decode_attention_cost(contexts, hq, hkv, d, window=window)
    assert decode == Cost(ones.bytes - 12, ones.flops)


def test_cost_of_row_ops():
    t, h = 3, 8
    for residual in (False, True):
        count = Counter()
        for i in range(t):
            for j in range(h):
                names = [("x", "r"), ("out", "w")] + ([("res", "r"), ("res", "w")] if residual else [])
                for name, direction in names:
                    count.touch(name, 2, i, j, direction=direction)
                count.touch("w", 2, j)
                count.flops += 5 if residual else 4
            count.flops += 4
        assert OPS["rms_norm"].rms_norm_cost(t, h, residual) == count.cost()
    count = Counter()
    for i in range(t):
        count.touch("position", 4, i)
        for e in range(4):
            count.touch("cos_sin", 4, i, e)
        for head in range(3):
            for e in range(4):
                count.touch("qk", 2, i, head, e)
                count.touch("qk", 2, i, head, e, direction="w")
                count.flops += 3
    assert OPS["rope"].rope_cost(t, 2, 1, 4) == count.cost()
    for i in range(t):  # one head's k is turned and stored, its v read and stored
        count.touch("slot", 4, i)
        for e in range(4):
            count.touch("v", 2, i, e)
            for name in ("k_cache", "v_cache"):
                count.touch(name, 2, i, e, direction="w")
    assert OPS["rope_store_kv"].rope_store_kv_cost(t, 2, 1, 4) == count.cost()
    count = Counter()
    for i in range(t):
        for head in range(3):
            count.flops += 4
            for e in range(4):
                count.touch("qk", 2, i, head, e)
                count.touch("qk", 2, i, head, e, direction="w")
                count.touch("weight", 2, head < 2, e)
                count.flops += 4
    assert OPS["qk_norm"].qk_norm_cost(t, 2, 1, 4) == count.cost()
    assert OPS["silu_mul"].silu_mul_cost(t, h) == Cost(3 * t * h * 2, 5 * t * h)
    of_two = Cost((t * 5 + 2 * h * 5 + t * h) * 2, 2 * t * 2 * h * 5 + 5 * t * h)
    assert OPS["gemm_silu_mul"].gemm_silu_mul_cost(t, 2 * h, 5) == of_two
    assert OPS["store_kv"].store_kv_cost(t, 2, 4) == Cost(t * (2 * 2 * 2 * 4 * 2 + 4), 0)
    assert OPS["embedding"].embedding_cost(t, h) == Cost(t * (2 * h * 2 + 4), 0)
    assert OPS["sample"].sample_cost(2, 10, 1) == Cost(2 * 68, 10 * 2 + 10 * 8)


def test_roofline():
    peaks = Peaks(bytes_per_s=100, flops_per_s=1000)
    assert roofline_seconds(Cost(200, 1000), peaks) == 2
    assert roofline_seconds(Cost(50, 4000), peaks) == 4
    assert roofline_fraction(Cost(50, 4000), peaks, 8) == 0.5
    with pytest.raises(ValueError, match="bytes_per_s is 0"):
        Peaks(0, 1)


# Bad input at the door.


def _dtype(call):
    name = next(n for n in reversed(call.args) if n not in ("bias",) and isinstance(call.args[n], np.ndarray))
    call.args[name] = np.nan_to_num(call.args[name]).astype(np.int16)
    return name, "dtype int16"


def _shape(call):
    name = next(
        n for n in reversed(call.args) if isinstance(call.args[n], np.ndarray) and call.args[n].ndim == 1
    )
    call.args[name] = np.concatenate([call.args[name], call.args[name][:1]])
    return name, f"({len(call.args[name])},)"


def _stride(call):
    name = next(name for name in ("weight", "q_weight", "k_cache") if name in call.args)
    array = call.args[name]
    call.args[name] = np.repeat(array, 2, axis=-1)[..., ::2]
    return name, "stride"


@pytest.mark.parametrize("rung", ["reference", "kernel"])
@pytest.mark.parametrize(
    ("op", "spoil"),
    [
        pytest.param(op, spoil, id=f"{op}-{spoil.__name__.strip('_')}")
        for op in OPS
        for spoil in (_dtype, _shape, _stride)
        if (op, spoil) != ("gemm_silu_mul", _shape)
        and (op != "silu_mul" or spoil is _dtype)
        and (op not in ("rope", "sample") or spoil is not _stride)
    ],  # gemm_silu_mul and silu_mul have no vector, and silu_mul, rope and sample no dense matrix
)
def test_bad_arrays_are_refused(run, op, spoil, rung):
    """ValueError that names the op, the argument and what is wrong with it."""
    call = make_call(op, next(iter(OPS[op].CASES)), rng_of("bad"))
    if spoil is _shape and op == "gemm":
        call = make_call(op, "toy_bias", rng_of("bad"))
    name, text = spoil(call)
    if rung == "kernel" and spoil is _stride:  # to_device would make the array dense: spoil the device array
        device = cuda.to_device(np.repeat(call.args[name], 2, axis=-1))
        args = {n: cuda.to_device(np.ascontiguousarray(a)) for n, a in call.resolved().items()}
        args[name] = device[
            (slice(None),) * (device.ndim - 1) + (slice(None, None, 2),)
        ]  # numba has no `...`
        kwargs = Runner._kwargs(call, args)
        with pytest.raises(ValueError, match=rf"^{op}: {name} .*{text}"):
            OPS[op].rungs[run.kernel_rung(op)](*Runner._positional(args), **kwargs)
        return
    args = call.resolved()
    if rung == "kernel":
        args = {n: cuda.to_device(np.ascontiguousarray(a)) for n, a in args.items()}
    kwargs = Runner._kwargs(call, args)
    with pytest.raises(ValueError, match=rf"^{op}: {name} .*{text.replace('(', '[(]').replace(')', '[)]')}"):
        OPS[op].rungs["reference" if rung == "reference" else run.kernel_rung(op)](
            *Runner._positional(args), **kwargs
        )


def test_bad_values_are_refused(run):
    host = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"embedding: out is a ndarray; a numba device array"):
        OPS["embedding"].rungs["plain"](host, np.zeros(2, np.int32), host)
    with pytest.raises(ValueError, match=r"silu_mul: out has 12 columns; a multiple of 8"):
        OPS["silu_mul"].rungs["reference"](np.zeros((1, 12), np.float32), np.zeros((1, 24), np.float32))
    with pytest.raises(ValueError, match=r"rms_norm: eps is -1"):
        OPS["rms_norm"].rungs["reference"](host, host, np.ones(8, np.float32), eps=-1)
    with pytest.raises(ValueError, match=r"embedding: token_ids holds 9; ids from 0 to 1"):
        OPS["embedding"].rungs["reference"](host, np.array([0, 9], np.int32), host)
    with pytest.raises(ValueError, match=r"lm_head: logits_rows holds -1"):
        OPS["lm_head"].rungs["reference"](np.zeros((1, 2), np.float32), host, host, np.array([-1], np.int32))
    q = np.zeros((1, 1, 3), np.float32)
    with pytest.raises(ValueError, match=r"head_dim 3; an even head_dim"):
        OPS["rope"].rungs["reference"](q, q.copy(), np.zeros(1, np.int32), np.zeros((4, 3), np.float32))
    call = make_call("store_kv", "toy", rng_of("bad"))
    call.args["slot_mapping"][0] = 12
    with pytest.raises(ValueError, match=r"store_kv: slot_mapping holds 12; under 12"):
        OPS["store_kv"].rungs["reference"](*call.resolved().values())
    call = make_call("decode_attention", "toy", rng_of("bad"))
    call.args["block_table"][0, 0] = 99
    with pytest.raises(ValueError, match=r"block_table row 0 holds a page outside the cache"):
        OPS["decode_attention"].rungs["reference"](*call.resolved().values(), softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"qk_norm: eps is nan; a number of at least 0"):
        OPS["qk_norm"].rungs["reference"](q, q.copy(), q[0, 0], q[0, 0], eps=float("nan"))
    for op in ("prefill_attention", "decode_attention"):
        for window in (0, -1, True, 2.5):
            call = make_call(op, next(iter(OPS[op].CASES)), rng_of("bad"))
            call.kwargs["window"] = window
            with pytest.raises(ValueError, match=rf"{op}: window is {window}; None or a whole number"):
                OPS[op].rungs["reference"](*call.resolved().values(), **call.kwargs)
    call = make_call("prefill_attention", "toy_mha", rng_of("bad"))
    call.args["k_cache"] = call.args["k_cache"][:, :1].repeat(3, axis=1)
    call.args["v_cache"] = call.args["k_cache"]
    with pytest.raises(ValueError, match=r"q has 2 heads; a multiple of the 3 kv heads"):
        OPS["prefill_attention"].rungs["reference"](*call.resolved().values(), softmax_scale=1.0)


def test_ids_outside_their_table_never_read_memory(run):
    """A kernel cannot raise: an unknown token or position gives NaN, and a slot past the cache writes
    nothing."""
    call = make_call("embedding", "toy", rng_of("outside"))
    call.args["token_ids"][:2] = [-1, 7]
    out = run(call, run.kernel_rung("embedding"), "bfloat16")[0]["out"].astype(np.float32)
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2]).all()
    call = make_call("rope", "toy", rng_of("outside"))
    call.args["positions"][0] = 11
    turned = run(call, run.kernel_rung("rope"), "float32")[0]["q"]
    assert np.isnan(turned[0]).all()
    assert np.isfinite(turned[1]).all()
    call = make_call("store_kv", "toy", rng_of("outside"))
    call.args["slot_mapping"][:] = 12
    after = run(call, run.kernel_rung("store_kv"), "float32")[0]["k_cache"]
    np.testing.assert_array_equal(after, call.args["k_cache"])


def test_bfloat16_helpers_round_like_ml_dtypes(run):
    """Every kind of float32 through the kernels' two helpers: ties, subnormals, infinities, NaN."""
    patterns = rng_of("bf16").integers(0, 2**32, 100, dtype=np.uint32)
    special = [0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x80000000, 0x7F7F8000]
    values = np.concatenate([patterns, np.array(special, np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)]
    to_float, from_float = compiler.element("bfloat16").to_float, compiler.element("bfloat16").from_float

    @compiler.jit()
    def round_trip(out, back, values):
        i = cuda.blockIdx.x
        out[i] = from_float(values[i])
        back[i] = to_float(out[i])

    values = np.append(values, np.float32(np.nan))
    out, back = (
        cuda.to_device(np.zeros(len(values), np.uint16)),
        cuda.to_device(np.zeros(len(values), np.float32)),
    )
    round_trip[len(values), 1](out, back, cuda.to_device(values))
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out.copy_to_host()[:-1], expected[:-1].view(np.uint16))
    np.testing.assert_array_equal(back.copy_to_host(), expected.astype(np.float32))


# The registry.


def test_register_and_resolve():
    module = OPS["rope"]
    with pytest.raises(ValueError, match="'plain' is a built-in rung"):
        module.register("plain", print)
    with pytest.raises(ValueError, match="identifier"):
        module.register("my kernel", print)
    with pytest.raises(TypeError, match="'mine' is a int"):
        module.register("mine", 3)
    try:
        module.register("mine", len)
        module.register("mine", print)  # a notebook cell, run again
        ops = resolve("reference", {"rope": "mine"})
        assert ops.rope is print
        assert ops.gemm is OPS["gemm"].rungs["reference"]
    finally:
        module.rungs.pop("mine", None)
    with pytest.raises(ValueError, match=r"rope: no rung 'mine'; there are plain, reference"):
        resolve("reference", {"rope": "mine"})
    with pytest.raises(ValueError, match=r"no op 'ropes'; there are embedding, "):
        resolve("plain", {"ropes": "plain"})
    with pytest.raises(ValueError, match="no rung 'wgmma'"):
        resolve("wgmma")


@pytest.mark.parametrize("op", list(OPS))
def test_op_files_have_their_parts(op):
    module = OPS[op]
    parts = [f"{op}_spec", f"{op}_cost", f"make_{op}_kernel", op, "CASES", "rungs", "register"]
    if op in ("rope_store_kv", "gemm_silu_mul"):  # made of two others
        parts.remove(f"make_{op}_kernel")
    assert [part for part in parts if not hasattr(module, part)] == []
    assert module.rungs["plain"] is getattr(module, op)
    assert any(case.startswith("toy") for case in module.CASES)
