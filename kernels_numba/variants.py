"""Every plain kernel as an engine specialises it, for assemble.py.

Knows: each op's factory and the types of its kernel's arguments. Refuses to know: targets and assemblers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels_numba import compiler, paged_attention
from kernels_numba.ops import (
    decode_attention,
    embedding,
    gemm,
    lm_head,
    prefill_attention,
    qk_norm,
    rms_norm,
    rope,
    sample,
    silu_mul,
    store_kv,
)
from kernels_numba.ops.sample.plain import make_sample_kernel


@dataclass(frozen=True)
class Variant:
    """One specialisation: a kernel, its argument types, its block's threads."""

    name: str
    kernel: Any
    signature: tuple[Any, ...]
    threads: int


def variants() -> Iterator[Variant]:
    """Every plain kernel at the shapes of a small and a large model, both dtypes, dense and strided views."""
    types = compiler.cuda.types
    i32, f32, u64 = types.int32, types.float32, types.uint64

    def array(dtype: Any, ndim: int, layout: str = "C") -> Any:
        return types.Array(dtype, ndim, layout)

    ids = array(i32, 1)
    for dtype in compiler.STORAGE:
        t = f32 if dtype == "float32" else types.uint16
        for layout, kind in (("C", "dense"), ("A", "strided")):

            def name(op: str, dtype: str = dtype, kind: str = kind) -> str:
                return f"{op}/{dtype}/{kind}"

            rows2, rows3, cache = array(t, 2, layout), array(t, 3, layout), array(t, 4)
            dense2, dense1 = array(t, 2), array(t, 1)
            threads = embedding.THREADS
            kernel = embedding.make_embedding_kernel(dtype)
            yield Variant(name("embedding"), kernel, (rows2, ids, dense2), threads)
            for residual in (False, True):
                kernel = rms_norm.make_rms_norm_kernel(dtype, residual)
                label = name("rms_norm_residual" if residual else "rms_norm")
                yield Variant(label, kernel, (rows2, rows2, dense1, rows2, f32), rms_norm.THREADS)
            kernel = qk_norm.make_qk_norm_kernel(128, dtype)
            yield Variant(name("qk_norm"), kernel, (rows3, rows3, dense1, dense1, f32), qk_norm.THREADS)
            kernel = rope.make_rope_kernel(64, dtype)
            yield Variant(name("rope"), kernel, (rows3, rows3, ids, array(f32, 2)), rope.THREADS)
            kernel = store_kv.make_store_kv_kernel(64, 64)
            yield Variant(name("store_kv"), kernel, (cache, cache, rows3, rows3, ids), store_kv.THREADS)
            kernel = silu_mul.make_silu_mul_kernel(dtype)
            yield Variant(name("silu_mul"), kernel, (rows2, rows2), silu_mul.THREADS)
            for label, config in (("few", gemm.FEW), ("many", gemm.MANY)):
                if layout == "C":
                    kernel = gemm.make_gemm_kernel(config, dtype, dtype, has_bias=True)
                    arguments = (rows2, rows2, dense2, dense1, rows2, rows2)
                    yield Variant(name(f"gemm_bias_{label}"), kernel, arguments, config.threads)
                kernel = gemm.make_gemm_kernel(config, dtype, dtype, has_bias=False)
                arguments = (rows2, rows2, dense2, dense2, rows2, rows2)
                yield Variant(name(f"gemm_{label}"), kernel, arguments, config.threads)
                kernel = gemm.make_gemm_kernel(config, dtype, dtype, has_bias=False, has_residual=True)
                yield Variant(name(f"gemm_residual_{label}"), kernel, arguments, config.threads)
                kernel = lm_head.make_lm_head_kernel(1 if label == "few" else gemm.FEW_ROWS + 1, dtype)
                arguments = (array(f32, 2, layout), rows2, dense2, dense2, ids, rows2)
                yield Variant(name(f"lm_head_{label}"), kernel, arguments, config.threads)
            table = array(i32, 2, layout)
            paged = (rows3, rows3, cache, cache, ids, ids, table, f32)
            for head_dim in (64, 128) if layout == "C" else (64,):
                threads = paged_attention.THREADS
                kernel = prefill_attention.make_prefill_attention_kernel(head_dim, 3, 64, dtype)
                yield Variant(name(f"prefill_attention_d{head_dim}"), kernel, paged, threads)
                kernel = decode_attention.make_decode_attention_kernel(head_dim, 3, 64, dtype)
                yield Variant(name(f"decode_attention_d{head_dim}"), kernel, paged, threads)
            if layout == "C":
                kernel = prefill_attention.make_prefill_attention_kernel(128, 4, 64, dtype, window=4096)
                yield Variant(name("prefill_attention_window"), kernel, paged, paged_attention.THREADS)
    sample_arguments = (ids, array(f32, 2), array(f32, 1), array(u64, 1), ids, ids, array(f32, 1))
    kernel = make_sample_kernel(sample.THREADS)
    yield Variant("sample", kernel, sample_arguments, sample.THREADS)
