"""Which kernel a rung of gemm or lm_head runs: few or many tokens on Hopper, mma.sync elsewhere; and on a GPU
that a graph sized for more tokens gives the bits of a call that is not."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from gpu_capture import captured

from kernels_numba import simt
from kernels_numba.compiler import SIMULATOR, KernelsUnavailable, cuda
from kernels_numba.ops import OPS
from kernels_numba.ops.gemm import on_hopper
from kernels_numba.ops.gemm_few import config
from kernels_numba.ops.warp import lm_head
from kernels_numba.ops.warp.door import BFLOAT16, FLOAT32, View
from kernels_numba.prebuild import kernel_modules
from sharp.counted import takes_count


@pytest.fixture
def launches(monkeypatch):
    """Which of Hopper's kernels was launched, instead of launching it."""
    seen = []
    monkeypatch.setattr(on_hopper, "require_capability", lambda rung: None)
    monkeypatch.setattr(on_hopper.many, "num_sms", lambda: 132)
    monkeypatch.setattr(on_hopper.few, "gemm_few", lambda *args, **how: seen.append(("few", args, how)))
    monkeypatch.setattr(on_hopper.many, "gemm_hopper", lambda *args, **how: seen.append(("many", args, how)))
    return seen


@pytest.mark.parametrize("m", [0, 1, 8, 32, 64, 512, 4096])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 1536), (28672, 4096)])
def test_the_capacity_decides_and_all_arguments_arrive(launches, m, n, k):
    out, x, weight = (np.empty(shape, np.uint16) for shape in ((m, n), (m, k), (n, 8)))
    weight = np.lib.stride_tricks.as_strided(weight, (n, k))
    bias, count, stream = np.empty(n, np.uint16), object(), object()
    OPS["gemm"].rungs["hopper"](out, x, weight, bias, residual=out, stream=stream, num_rows=count)
    OPS["gemm_silu_mul"].rungs["hopper"](out, x, weight, out, stream=stream, num_rows=count)
    for (which, given, how), activation in zip(launches, ("", "silu"), strict=True):
        assert how.pop("residual") is (None if activation else out)
        assert which == ("few" if config.use_few(m, n, k, 132) else "many")
        wanted = (out, x, weight, None if activation else bias)
        assert all(a is b for a, b in zip(given, wanted, strict=True))
        assert how == {"stream": stream, "num_rows": count, "activation": activation}


def test_one_token_and_a_prompt_take_different_kernels():
    for n, k in ((4096, 4096), (28672, 4096), (2048, 8192), (960, 576)):
        assert config.use_few(1, n, k, 132)
        assert config.use_few(32, n, k, 132)
        assert not config.use_few(512, n, k, 132)


def test_arrays_of_other_shapes_go_to_a_door(launches):
    OPS["gemm"].rungs["hopper"](np.empty(3), np.empty((1, 8)), np.empty((8, 8)))
    assert launches[0][0] == "many"


@pytest.mark.parametrize("rung", ["hopper", "mma_sync"])
def test_both_take_the_count_and_name_the_simulator(rung):
    function = OPS["gemm"].rungs[rung]
    assert takes_count(function)
    assert list(inspect.signature(function).parameters)[:4] == ["out", "x", "weight", "bias"]
    if SIMULATOR:
        arrays = [cuda.to_device(np.zeros(shape, np.uint16)) for shape in ((1, 16), (1, 8), (16, 8))]
        with pytest.raises(KernelsUnavailable, match=f"rung {rung} is made of PTX"):
            function(*arrays)


def a_view(shape, dtype=BFLOAT16):
    return View(1 << 20, shape, (shape[1] * dtype.itemsize, dtype.itemsize), dtype)


@pytest.mark.parametrize(("rows", "vocab", "capability", "product"), [
    (1, 128256, (9, 0), "few"), (8, 49152, (9, 0), "few"), (512, 128256, (9, 0), "many"),
    (1, 128256, (8, 6), "mma"), (64, 49152, (12, 0), "mma"),
    (4, 32001, (9, 0), ""), (4, 32001, (8, 9), ""),
])  # fmt: skip
def test_the_product_of_a_head(monkeypatch, rows, vocab, capability, product):
    monkeypatch.setattr(lm_head.many, "num_sms", lambda: 132)
    out, x_rows = a_view((rows, vocab), FLOAT32), a_view((rows, 576))
    assert lm_head.pick_product(out, x_rows, capability) == product
    forced = {"few": "many", "many": "few"}.get(product, "")
    if forced:
        assert lm_head.pick_product(out, x_rows, capability, forced) == forced
    assert product in ("", *lm_head.PRODUCTS)


def test_what_an_engine_can_pick_is_built_ahead():
    names = kernel_modules()
    assert {"kernels_numba.ops.gemm_few.hopper", "kernels_numba.ops.gemm_mma"} <= set(names)
    assert not any(name.startswith("kernels_numba.ops.gemm.ladder") for name in names)


# On a GPU.


@pytest.fixture
def rung(on_gpu, request):
    """A rung that the GPU has, which the test names."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    have = tuple(cuda.get_current_device().compute_capability)
    if have < (8, 0) or (request.param == "hopper" and have[0] != 9):
        pytest.skip(f"rung {request.param} does not run on compute capability {have}")
    return request.param


def random_bits(rng, *shape):
    return cuda.to_device(simt.to_bits(rng.standard_normal(shape).astype(np.float32)))


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["hopper", "mma_sync"], indirect=True)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (960, 576), (264, 200)])
def test_a_graph_of_a_bucket_has_the_bits_of_a_call(rung, n, k):
    """Of any bucket that holds the tokens: which kernel is launched depends on the bucket alone."""
    rng = np.random.default_rng([n, k])
    gemm = OPS["gemm"].rungs[rung]
    weight, bias, count = random_bits(rng, n, k), random_bits(rng, n), cuda.to_device(np.zeros(1, np.int32))
    stream = cuda.stream()
    for real in (1, 7, 30):
        x = random_bits(rng, 600, k)
        alone = random_bits(rng, real, n)
        gemm(alone, x[:real], weight, bias)
        for bucket in (real, 32, 40, 64, 128, 600):
            if bucket < real:
                continue
            out = random_bits(rng, bucket, n)
            before = out.copy_to_host()
            count.copy_to_device(np.array([0], np.int32))
            cuda.synchronize()

            def step(out=out, x=x[:bucket]):
                gemm(out, x, weight, bias, stream=stream, num_rows=count)

            step()  # compiled and prepared before it is captured
            stream.synchronize()
            replay = captured(stream, step)
            count.copy_to_device(np.array([real], np.int32))
            cuda.synchronize()
            replay()
            stream.synchronize()
            after = out.copy_to_host()
            np.testing.assert_array_equal(after[:real], alone.copy_to_host(), f"{real} in {bucket}")
            np.testing.assert_array_equal(after[real:], before[real:], f"{real} in {bucket}")
