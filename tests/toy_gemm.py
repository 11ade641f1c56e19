"""Every GEMM kernel of the Hopper rung, for the test of a warm start: what hopper.kernels() offers, or else
each tile with each dtype, result and bias."""

from kernels_numba.ops.gemm import hopper


def kernels():
    if hasattr(hopper, "kernels"):
        yield from hopper.kernels()
        return
    for config in hopper.CONFIGS.values():
        for dtype in ("bfloat16", "float16"):
            for out_dtype in (dtype, "float32"):
                for has_bias in (False, True):
                    yield hopper.hopper_kernel(config, dtype, out_dtype, has_bias)
