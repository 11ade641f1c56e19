"""A cluster: its blocks' numbers, its barrier, whole or in two halves, and its shared memory (PTX ISA,
"barrier.cluster", "mapa", "%cluster_ctarank", "st.async").

The barrier is .aligned: whole warps come to it together. No block may end while another still reaches into
its shared memory or multicasts to it.
"""

from __future__ import annotations

from kernels_numba.ptx.arrays import array_instruction
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
# Asynchronous stores carry their own signal: no barrier of the cluster, whose release is a device-wide fence.
_ASYNC = "st.async.shared::cluster.mbarrier::complete_tx::bytes"
st_async_f32 = instruction(
    "st_async_f32", f"{_ASYNC}.f32 [$0], $1, [$2];", "rfr",
    doc="A float32 to a cluster address, bytes counted on `bar` there: (address, value, bar) (st.async).",
)  # fmt: skip
st_async_v2_f32 = instruction(
    "st_async_v2_f32", f"{_ASYNC}.v2.f32 [$0], {{$1, $2}}, [$3];", "rffr",
    doc="Two float32 to a cluster address: (address, first, second, bar) (st.async).",
)  # fmt: skip
st_async_v4 = array_instruction(
    "st_async_v4", f"{_ASYNC}.v4.b32 [<address>], <values>, [<bar>];", "address:r values:r4 bar:r",
    doc="16 bytes, values[0..3], to a cluster address: (address, values, bar) (st.async).",
)  # fmt: skip
