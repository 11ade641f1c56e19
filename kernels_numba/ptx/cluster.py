"""A cluster's barrier in two halves, and its blocks' shared memory (PTX ISA, "barrier.cluster", "mapa")."""

from __future__ import annotations

from kernels_numba.ptx.asm import instruction

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
