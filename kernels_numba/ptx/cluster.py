"""A cluster: its blocks' numbers, its barrier, whole or in two halves, and its shared memory (PTX ISA,
"barrier.cluster", "mapa", "%cluster_ctarank").

The barrier is .aligned: whole warps come to it together. No block may end while another still reaches into
its shared memory or multicasts to it.
"""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

cluster_rank = instruction(
    "cluster_rank", "mov.u32 $0, %cluster_ctarank;", "", "r", memory=False, volatile=False,
    doc="This block's number in its cluster (%cluster_ctarank).",
)  # fmt: skip
cluster_sync = instruction(
    "cluster_sync", "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;",
    doc="Wait for every thread of the cluster; shared memory written before is seen after (barrier.cluster).",
)  # fmt: skip
cluster_arrive_relaxed = instruction(
    "cluster_arrive_relaxed", "barrier.cluster.arrive.relaxed.aligned;",
    doc="Arrive, but make no write visible; cluster_wait follows (barrier.cluster.arrive.relaxed).",
)  # fmt: skip
cluster_wait = instruction(
    "cluster_wait", "barrier.cluster.wait.acquire.aligned;",
    doc="Wait until every thread of the cluster has arrived (barrier.cluster.wait).",
)  # fmt: skip
cluster_address = instruction(
    "cluster_address", "mapa.shared::cluster.u32 $0, $1, $2;", "rr", "r", memory=False, volatile=False,
    doc="The cluster address of shared address `address` in block `rank` (mapa).",
)  # fmt: skip
