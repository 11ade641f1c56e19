"""The bench harness without a GPU: cases, turns, calls a replay, what counts as right, what others say."""

from __future__ import annotations

import numpy as np
import pytest
from bench_fakes import Lane, Simulated

from kernels_numba.bench import cases, contest, data, errors, peers, timing
from kernels_numba.bench.entry import windows
from kernels_numba.bench.ops import BENCH_OPS
from kernels_numba.ops import OP_NAMES, OPS

TOY = {
    "embedding": ["toy"],
    "rms_norm": ["toy", "toy_residual"],
    "gemm": ["toy_one_row", "toy_bias", "toy_many_rows"],
    "qk_norm": ["toy"],
    "rope": ["toy"],
    "store_kv": ["toy"],
    "rope_store_kv": ["toy"],
    "prefill_attention": ["toy_packed", "toy_mha", "toy_gqa_8"],
    "decode_attention": ["toy", "toy_mha"],
    "silu_mul": ["toy"],
    "gemm_silu_mul": ["toy"],
    "lm_head": ["toy"],
    "sample": ["toy"],
}
TOYS = [(op, case) for op, names in TOY.items() for case in names]


def test_every_op_has_cases_at_real_sizes():
    assert tuple(BENCH_OPS) == OP_NAMES
    for op in OP_NAMES:
        names, quick = cases.bench_cases(op), cases.bench_cases(op, quick=True)
        assert names
        assert 0 < len(quick) < len(names)
        assert quick.items() <= names.items(), "a quick case is a case of the grid"
        for name, params in names.items():
            cost = BENCH_OPS[op].cost(params)
            assert cost.bytes > 0, name
            assert set(next(iter(OPS[op].CASES.values()))) == set(params), "the keys of the op's own cases"
        if op.endswith("_attention"):
            for heads in ("32/8/128", "28/4/128", "9/3/64", "32/8/64"):
                assert any(name.startswith(f"{heads} ") for name in names)
        elif op not in ("gemm", "qk_norm"):
            for model in ("llama3.2-1b", "qwen2.5-7b", "smollm2-135m"):
                assert any(name.startswith(model) for name in names)


def test_the_grid_of_gemm():
    assert len(cases.bench_cases("gemm")) == 16 * (6 + 13) + 4 * 2
    assert len(cases.bench_cases("gemm", text="residual")) == 4 * 2
    assert len(cases.bench_cases("gemm", quick=True)) == 16 * 3
    assert {p["m"] for p in cases.bench_cases("gemm", text="M=1 |M=16 ").values()} == {1, 16}
    assert len(cases.bench_cases("lm_head")) == 3 * 9
    assert list(cases.bench_cases("gemm", text="M=1000 N=960 K=576")) == ["M=1000 N=960 K=576"]
    assert cases.bench_cases("gemm", text="M=7 ") == {}


def test_rotated_buffers_leave_the_cache():
    for size in (1 << 10, 5 << 20, 100 << 20, 1 << 30):
        sets = timing.buffer_sets(size)
        assert sets >= 2
        assert sets == timing.MAX_SETS or (sets - 1) * size >= timing.COLD_BYTES
        assert (timing.l2_state(size, sets) == "cold L2") == ((sets - 1) * size >= timing.COLD_BYTES)
    assert timing.buffer_sets(1 << 20, cold=False) == 1
    assert timing.l2_state(1 << 20, 1) == "warm L2"
    assert timing.l2_state(1000, timing.MAX_SETS) == "L2 may hold the 2 MB rotated"
    assert timing.cold_bytes(50 << 20) == timing.COLD_BYTES == 120 << 20
    larger = timing.cold_bytes(100 << 20)
    assert larger == 240 << 20
    assert timing.buffer_sets(10 << 20, needed=larger) == 25
    assert timing.l2_state(10 << 20, 13, larger) != "cold L2"


def test_contenders_take_turns():
    turns = []

    def contender(name):
        return lambda: turns.append(name) or float(len(turns))

    times = timing.interleaved({"ours": contender("ours"), "theirs": contender("theirs")}, 3)
    assert turns == ["ours", "theirs"] * 3
    assert times == {"ours": [1.0, 3.0, 5.0], "theirs": [2.0, 4.0, 6.0]}
    with pytest.raises(ValueError, match="rounds is 0"):
        timing.interleaved({}, 0)


def timed(call_us, sets=4, **options):
    lane = Lane(call_us=call_us, **options)
    return timing.Timed(lane, lane.call, sets)


@pytest.mark.parametrize(
    ("call_us", "sets", "calls"),
    [
        (10.0, 4, 100),  # as many as fill a millisecond, over all sets
        (3.0, 1000, 1000),  # every set once, at least
        (0.1, 1, 4096),  # no graph is larger
        (150_000.0, 2, 1),  # as long as this, one is enough
        (90_000.0, 4, 2),
    ],
)
def test_calls_of_a_replay(call_us, sets, calls):
    one = timed(call_us, sets)
    assert one.calls == calls
    assert one.once() == pytest.approx(call_us)
    assert one.once(400) == pytest.approx(call_us)


def test_a_hiccup_at_first_costs_no_sets():
    lane = Lane(call_us=10.0)
    spent = iter([1e6])  # the first call of all

    def elapsed(work):
        return max(Lane.elapsed_us(lane, work), next(spent, 0.0))

    lane.elapsed_us = elapsed
    assert timing.Timed(lane, lane.call, 8).calls == 104
    assert lane.warm == set(range(8))


def test_a_race_gives_median_least_and_most():
    turns = []
    contenders = {name: timed(us, name=name, turns=turns) for name, us in (("a", 10.0), ("b", 20.0))}
    times = iter([7.0, 7.0, 10.0, 20.0, 30.0, 22.0, 11.0, 21.0])  # the first round warms up
    for one in contenders.values():
        one.once = lambda least_calls: next(times)
    measured = timing.race(contenders, {"a": 0.25, "b": 0.5}, 3)
    assert measured["a"] == timing.Measurement(11.0, 10.0, 30.0, 0.25, 100, 4)
    assert measured["b"] == timing.Measurement(21.0, 20.0, 22.0, 0.5, 52, 4)


def test_sustained_is_at_least_that_many_calls_in_a_row():
    turns = []
    contenders = {name: timed(us, name=name, turns=turns) for name, us in (("a", 10.0), ("b", 30.0))}
    turns.clear()
    measured = timing.race(contenders, {"a": 0.0, "b": 0.0}, 5, 400)
    assert turns == ["a", "b"] * 6
    assert [one.calls for one in measured.values()] == [400, 432]  # whole replays of 100 and of 36


def test_only_a_right_result_is_within_its_tolerance():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 64))
    plain = exact + 1e-3 * rng.standard_normal((64, 64))
    right = exact + 1e-3 * rng.standard_normal((64, 64))
    assert errors.error_in_tolerances(right, plain, exact) < 1
    assert errors.error_in_tolerances(exact * 1.01, exact, exact) > 1
    for bad in (np.nan, np.inf):
        holed = exact.copy()
        holed[3, 4] = bad
        assert errors.error_in_tolerances(holed, plain, exact) == float("inf")
        assert errors.disagreement(holed, exact) == float("inf")
    small = np.vstack([exact, exact[:1] / 10])  # a row of small numbers is held as tightly as the others
    wrong = small.copy()
    wrong[-1] *= 1.03
    assert errors.error_in_tolerances(wrong, small, small) > 1
    assert errors.disagreement(wrong, small) > 1
    assert errors.error_in_tolerances(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3))) == 0


def test_windows_reach_both_ends():
    assert windows(20, 8) == [slice(0, 20)]
    assert windows(25, 8) == [slice(0, 8), slice(8, 16), slice(17, 25)]
    for length in (24, 25, 1000, 16384):
        rows = [i for part in windows(length, 8) for i in range(length)[part]]
        assert len(set(rows)) == len(rows)
        assert {0, length - 1} <= set(rows)


def test_random_numbers_are_normal_and_differ_from_set_to_set():
    shared = {}
    first, second = data.Maker(0, shared), data.Maker(1, shared)
    a = first.normal(3, 667, scale=2.0, dtype="float32").copy_to_host()
    assert abs(a.mean()) < 0.2
    assert 1.9 < a.std() < 2.1
    assert 0.02 < (abs(a) > 4).mean() < 0.08  # a normal number leaves two sigmas in 4.6 %
    b = second.normal(3, 667, scale=2.0, dtype="float32").copy_to_host()
    assert not (a == b).any()
    assert np.isfinite(data.to_host(first.normal(5)).astype(np.float32)).all()
    assert first.normal(0, 3).shape == (0, 3)
    kept = first.shared("w", lambda: first.blank(2))
    assert second.shared("w", lambda: second.blank(9)) is kept


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "NaN"), ("float32", "NaN"), ("int32", "-7")])
def test_what_was_never_written_is_seen(dtype, kind):
    array = data.Maker(0, {}).blank(5, 3, dtype=dtype)
    data.poison(array)
    assert data.holes(array) == 15, kind
    host = np.zeros((5, 3), array.dtype)
    array.copy_to_device(host)
    assert data.holes(array) == 0


def workload(op, case, **options):
    params = OPS[op].CASES[case] if isinstance(case, str) else case
    return contest.Workload(op, params, cold=False, lane=Simulated(), **options)


@pytest.mark.parametrize(("op", "case"), TOYS)
def test_a_right_kernel_is_timed(op, case):
    """Data, launch, check and turns of every op, with the real plain kernel, in the simulator."""
    outcome = workload(op, case).compare({"plain": OPS[op].rungs["plain"]}, 5)
    assert outcome.refused == {}
    assert {"made", "checked", "captured", "timed"} <= set(outcome.seconds)
    assert all(seconds > 0 for seconds in outcome.seconds.values())
    assert outcome.baseline is None
    assert outcome.l2 == "warm L2"
    assert list(outcome.measured) == ["plain"]
    assert outcome.measured["plain"].err <= 1


def spoiled(op, spoil):
    """The plain rung, whose result `spoil` then changes: spoil(outputs by name)."""

    def rung(stream=None, **arguments):
        OPS[op].rungs["plain"](**arguments, stream=stream)
        spoil(arguments)

    return rung


def scale(name, factor):
    def spoil(arguments):
        host = arguments[name].copy_to_host()
        arguments[name].copy_to_device(
            data.to_host(arguments[name]).astype(np.float32).__mul__(factor).astype(np.float32)
            if host.dtype == np.float32
            else (data.to_host(arguments[name]) * data.ml_dtypes.bfloat16(factor)).view(np.uint16)
        )

    return spoil


@pytest.mark.parametrize(
    ("op", "case", "output"),
    [
        ("embedding", "toy", "out"),
        ("rms_norm", "toy_residual", "out"),
        ("rms_norm", "toy_residual", "residual"),
        ("gemm", "toy_bias", "out"),
        ("gemm", "toy_residual", "out"),
        ("store_kv", "toy", "v_cache"),
        ("prefill_attention", "toy_packed", "out"),
        ("decode_attention", "toy", "out"),
        ("silu_mul", "toy", "out"),
        ("gemm_silu_mul", "toy", "out"),
        ("lm_head", "toy", "out"),
    ],
)
@pytest.mark.parametrize("factor", [0.9, -1.0])
def test_a_wrong_kernel_is_refused_and_never_timed(op, case, output, factor):
    lane = Simulated()
    lane.capture = lambda work: pytest.fail("a wrong result was captured")
    bench = contest.Workload(op, OPS[op].CASES[case], cold=False, lane=lane)
    outcome = bench.compare({"wrong": spoiled(op, scale(output, factor))}, 5)
    assert outcome.measured == {}
    assert "times the tolerance" in outcome.refused["wrong"]


def test_a_wrong_id_and_a_wrong_angle_are_refused():
    def next_id(arguments):
        arguments["out"].copy_to_device((arguments["out"].copy_to_host() + 1) % 13)

    outcome = workload("sample", "toy").compare({"wrong": spoiled("sample", next_id)}, 5)
    assert "times the tolerance" in outcome.refused["wrong"]
    outcome = workload("rope", "toy").compare({"idle": lambda **_: None}, 5)
    assert "times the tolerance" in outcome.refused["idle"]


def test_what_a_kernel_leaves_out_or_raises_refuses_it_alone():
    def broken(**_):
        raise ValueError("gemm: n is odd")

    contenders = {"idle": lambda **_: None, "broken": broken, "plain": OPS["gemm"].rungs["plain"]}
    outcome = workload("gemm", "toy_bias").compare(contenders, 5)
    assert outcome.refused["idle"].startswith("ArithmeticError: idle: inf times the tolerance")
    assert outcome.refused["broken"] == "ValueError: gemm: n is odd"
    assert list(outcome.measured) == ["plain"]


def test_several_contenders_and_the_sustained_rate():
    plain = OPS["gemm"].rungs["plain"]
    bench = workload("gemm", "toy_one_row")
    bench.lane.elapsed_us = lambda work: work() or 900.0
    outcome = bench.compare({"a": plain, "b": plain}, 5, sustained=True)
    assert set(outcome.measured) == set(outcome.sustained) == {"a", "b"}
    assert outcome.sustained["a"].calls >= timing.SUSTAINED_CALLS
    bench.lane.elapsed_us = lambda work: work() or 1e5  # as long as this, a burst is sustained
    assert bench.compare({"a": plain}, 5, sustained=True).sustained == {}
    with pytest.raises(ValueError, match="a contender is called 'baseline'"):
        bench.compare({"baseline": plain}, 5)


def test_doors():
    with pytest.raises(ValueError, match="no op 'gem' to measure; there are embedding"):
        contest.Workload("gem", {}, lane=Simulated())
    with pytest.raises(ValueError, match="against is 'tensorflow'; torch or none"):
        contest.torch_side("tensorflow")
    assert contest.torch_side("none") is None


@pytest.mark.parametrize(
    ("gpu", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some GPU", None),
    ],
)  # fmt: skip
def test_peaks_by_name(gpu, tera):
    found = peers.datasheet(gpu)
    assert (found and found.flops_per_s / 1e12) == tera


def test_figures_of_a_measurement():
    cost = BENCH_OPS["gemm"].cost({"m": 1024, "n": 1024, "k": 1024, "bias": False})
    mine, theirs = timing.Measurement(10.0, 9.0, 11.0, 0.5, 9, 2), timing.Measurement(12.0, 12, 12, 0, 9, 2)
    figures = peers.figures("gemm", cost, mine, theirs, "NVIDIA H200")
    assert figures["tflops"] == figures["value"] == pytest.approx(2 * 1024**3 / 10e-6 / 1e12, abs=0.1)
    assert figures["unit"] == "TFLOP/s"
    assert figures["gbs"] == pytest.approx(3 * 1024**2 * 2 / 10e-6 / 1e9, abs=0.1)
    assert (figures["ratio"], figures["baseline_us"]) == (1.2, 12.0)
    assert figures["roofline"] == pytest.approx(2 * 1024**3 / 989.4e12 / 10e-6, abs=1e-4)
    alone = peers.figures("silu_mul", cost, mine, None, "Some GPU")
    assert (alone["roofline"], alone["ratio"], alone["baseline_us"]) == (None, None, None)
    assert (alone["value"], alone["unit"]) == (alone["gbs"], "GB/s")


def test_references_are_of_cases_that_exist_and_of_one_gpu():
    for op, case in peers.REFERENCES:
        assert case in cases.bench_cases(op), case
    value, source = peers.reference("prefill_attention", "32/8/128 1x16384", "NVIDIA H100 80GB HBM3")
    assert value == 727
    assert "FlashAttention 3" in source
    assert peers.reference("prefill_attention", "32/8/128 1x16384", "NVIDIA H200") == (None, None)
    assert peers.reference("gemm", "x", "NVIDIA H100 80GB HBM3") == (None, None)
