"""PTX instructions as functions that kernels call: one family a file, one instruction a function, named after
it. Each says its section of NVIDIA's "PTX ISA" manual; tests/test_ptx.py shows what each becomes and
tests/ptx_kernels.py a small kernel around each. Open the file for the job:

Moving data
ldst.py           one value a thread: ld, st, prefetch
vector.py         8 and 16 bytes a thread, with cache hints: ld.v4, ld.global.nc, st.global.cs
relaxed.py        what other blocks read or write meanwhile: ld.relaxed, st.relaxed
cp_async.py       16 bytes, global to shared memory, while the thread goes on: cp.async (sm_80)
matrix.py         8 x 8 matrices, shared memory to a warp's registers and back: ldmatrix, stmatrix (.trans)
tma.py            boxes of tensors and runs of bytes by the copy engine, multicast, tensor maps (sm_90)
policy.py         what the L2 cache should keep: createpolicy, for every function that ends in _hint

Multiplying matrices
mma.py            a warp's 16 x 8 x 16 product: mma.sync (sm_80), and who holds which element
wgmma.py          a warpgroup's 64 x N product from shared memory: wgmma (sm_90a), and its descriptors
epilogue.py       its accumulators out of registers: packed, staged by stmatrix, stored, a bias added
residual.py       a residual added to them, rounded, from shared or from global memory

Waiting for one another
mbarrier.py       barriers in shared memory that count arrivals and bytes: mbarrier
named_barrier.py  barriers of some of a block's warps: bar
fences.py         orders between accesses: fence, fence.proxy.async
cluster.py        a cluster's ranks, barrier and shared memory: barrier.cluster, mapa (sm_90)
griddep.py        a grid that starts while the one before it ends: griddepcontrol (sm_90)

Within a block
control.py        registers of a warpgroup, one elected lane, dynamic shared memory: setmaxnreg, elect.sync
shuffle.py        values from other lanes: shfl.sync

Finding what is wrong
debug.py          waits that end with their barrier's name, warps that pause at random
clock.py          when and on which SM a thread runs: %globaltimer, %smid

How a function becomes an instruction
asm.py            one PTX text with scalar operands, checked when the kernel is compiled
arrays.py         the same with operands in local arrays
"""
