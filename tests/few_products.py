"""Products for the GEMM for few tokens: random operands cut from wider arrays, and their bits by the order
that every GEMM here keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kernels_numba import simt
from kernels_numba.attention_contract import steps
from kernels_numba.ops.gemm_few import in_numpy as few
from kernels_numba.ops.warp import silu_mul
from kernels_numba.ops.warp.in_numpy import Arrays


def to_float(array):
    """float32 of bfloat16 bits, float16 or float32."""
    return simt.to_float(array) if array.dtype == np.uint16 else array.astype(np.float32)


def rounded(values, dtype):
    """float32 as float32, bfloat16 bits or float16."""
    if dtype == "float32":
        return values
    return simt.to_bits(values) if dtype == "bfloat16" else values.astype(np.float16)


def same_bits(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


@dataclass(frozen=True)
class Product:
    """x[M, K], weight[N, K], bias[N], residual[M, N], the last two or None, in `dtype`."""

    dtype: str
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None = None
    residual: np.ndarray | None = None
    activation: str = ""

    def only(self, rows):
        """The same weights with some of the tokens."""
        residual = None if self.residual is None else np.ascontiguousarray(self.residual[rows])
        return replace(self, x=np.ascontiguousarray(self.x[rows]), residual=residual)

    def sums(self):
        """float32[M, N] in the order of K, the bias added."""
        x, weight = to_float(self.x), to_float(self.weight)
        sums = steps(np.zeros((len(x), len(weight)), np.float32), x, weight.T)
        return sums if self.bias is None else sums + to_float(self.bias)

    def unfused(self, out_dtype):
        """What a gemm, then an addition or silu_mul's rung "warp", leave."""
        product = rounded(self.sums(), out_dtype)
        if self.residual is not None:
            return rounded(to_float(self.residual) + to_float(product), self.dtype)
        return silu_by_warps(product) if self.activation else product

    def exact(self):
        """float64[M, N], without epilogue."""
        exact = to_float(self.x).astype(np.float64) @ to_float(self.weight).astype(np.float64).T
        return exact if self.bias is None else exact + to_float(self.bias)

    def fused(self, config, out_dtype="", real=None, **how):
        """The kernel's result in numpy; what it may not write is poisoned and looked at."""
        out_dtype = out_dtype or self.dtype
        m, n = len(self.x), len(self.weight) // (2 if self.activation else 1)
        wider = rounded(np.full((m + 2, n + 8), np.nan, np.float32), out_dtype)
        before = wider.copy()
        out = wider[1 : m + 1, :n]
        count = None if real is None else np.array([real], np.int32)
        few.in_numpy(
            config, out, self.x, self.weight, self.bias, residual=self.residual, activation=self.activation,
            num_rows=count, **how,
        )  # fmt: skip
        written = m if real is None else max(min(m, real), 0)
        got = out[:written].copy()
        out[:written] = before[1 : written + 1, :n]
        assert same_bits(wider, before), "wrote outside of [M, N]"
        return got


def silu_by_warps(gate_up):
    """silu_mul's rung "warp", by its own text, in numpy."""
    out = np.zeros((len(gate_up), gate_up.shape[1] // 2), gate_up.dtype)
    arrays = Arrays()
    plan = silu_mul.plan_silu_mul(arrays.view(out), arrays.view(np.ascontiguousarray(gate_up)), None)
    arrays.run("silu_mul", "make_silu_mul_kernel", plan)
    return out


def make_product(rng, m, n, k, dtype="bfloat16", bias=False, epilogue=""):
    def normal(rows, columns, more, scale=1.0):
        return rounded((rng.standard_normal((rows, columns + more)) * scale).astype(np.float32), dtype)[
            :, :columns
        ]

    return Product(
        dtype, normal(m, k, 8), normal(n, k, 16, 3 * k**-0.5), normal(1, n, 0)[0] if bias else None,
        normal(m, n, 24) if epilogue == "residual" else None, "silu" if epilogue == "silu" else "",
    )  # fmt: skip
