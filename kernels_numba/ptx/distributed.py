"""Stores to the shared memory of another block of the cluster that carry their own signal, and what reads
them back (PTX ISA, "st.async", "ld").

Addresses of data and barrier are cluster addresses of one block (cluster.cluster_address). No barrier of the
cluster is needed, whose release is a device-wide fence: who waits for the mbarrier sees the data.
"""

from __future__ import annotations

from kernels_numba.ptx.arrays import array_instruction
from kernels_numba.ptx.asm import instruction

_STORE = "st.async.shared::cluster.mbarrier::complete_tx::bytes"
st_async_f32 = instruction(
    "st_async_f32", f"{_STORE}.f32 [$0], $1, [$2];", "rfr",
    doc="A float32, its bytes counted on `bar`: (address, value, bar) (st.async).",
)  # fmt: skip
st_async_v2_f32 = instruction(
    "st_async_v2_f32", f"{_STORE}.v2.f32 [$0], {{$1, $2}}, [$3];", "rffr",
    doc="Two float32, their bytes counted on `bar`: (address, first, second, bar) (st.async).",
)  # fmt: skip
st_async_v4 = array_instruction(
    "st_async_v4", f"{_STORE}.v4.b32 [<address>], <values>, [<bar>];", "address:r values:r4 bar:r",
    doc="16 bytes, values[0..3], counted on `bar`: (address, values, bar) (st.async).",
)  # fmt: skip
