"""Orders between kinds of memory access (PTX ISA, "membar, fence")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

fence_proxy_async = instruction(
    "fence_proxy_async", "fence.proxy.async.shared::cta;",
    doc="This thread's shared-memory accesses come before later ones by TMA, wgmma (fence.proxy.async).",
)  # fmt: skip
fence_proxy_async_global = instruction(
    "fence_proxy_async_global", "fence.proxy.async.global;",
    doc="This thread's ordinary accesses to global memory come before later ones by TMA (fence.proxy.async).",
)  # fmt: skip
fence_acq_rel_cta = instruction(
    "fence_acq_rel_cta", "fence.acq_rel.cta;", doc="Orders accesses, seen by the block (fence)."
)
fence_acq_rel_cluster = instruction(
    "fence_acq_rel_cluster", "fence.acq_rel.cluster;", doc="Orders accesses, seen by the cluster (fence)."
)
fence_acq_rel_gpu = instruction(
    "fence_acq_rel_gpu", "fence.acq_rel.gpu;", doc="Orders accesses, seen by the GPU (fence)."
)
