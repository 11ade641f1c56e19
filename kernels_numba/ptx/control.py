"""Warps and registers: who runs, with how many registers, and who waits for whom."""

from __future__ import annotations

from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx.asm import USABLE, instruction, intrinsic, signature, unavailable

if USABLE:
    from llvmlite import ir

_REGISTERS = "a multiple of 8 from 24 to 256 is required"


def _registers(count: int) -> bool:
    return 24 <= count <= 256 and count % 8 == 0


setmaxnreg_inc = instruction(
    "setmaxnreg_inc", "setmaxnreg.inc.sync.aligned.u32 @0;", "n", valid=_registers, rule=_REGISTERS,
    doc="Raise this warpgroup's registers a thread to n; waits until they are free (setmaxnreg, sm_90a).",
)  # fmt: skip
setmaxnreg_dec = instruction(
    "setmaxnreg_dec", "setmaxnreg.dec.sync.aligned.u32 @0;", "n", valid=_registers, rule=_REGISTERS,
    doc="Give back this warpgroup's registers above n a thread (setmaxnreg, sm_90a).",
)  # fmt: skip
elect_one = instruction(
    "elect_one", "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 $0, 1, 0, p;\n}", "", "r",
    doc="1 in one thread of a full warp, 0 in the others (elect.sync, sm_90).",
)  # fmt: skip
warp_uniform = instruction(
    "warp_uniform", "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "r", "r",
    doc="Lane 0's value: tells the assembler that it is the same in the whole warp (shfl.sync.idx).",
)  # fmt: skip
shfl_xor_f32 = instruction(
    "shfl_xor_f32", "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "fr", "f",
    doc="x of the lane whose number differs by `mask` (shfl.sync.bfly).",
)  # fmt: skip
shfl_down_f32 = instruction(
    "shfl_down_f32", "shfl.sync.down.b32 $0, $1, $2, 0x1f, 0xffffffff;", "fr", "f",
    doc="x of the lane `delta` above; its own beyond the last (shfl.sync.down).",
)  # fmt: skip
shfl_idx_i32 = instruction(
    "shfl_idx_i32", "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "rr", "r",
    doc="x of the lane `source` (shfl.sync.idx).",
)  # fmt: skip
lane_id = instruction(
    "lane_id", "mov.u32 $0, %laneid;", "", "r", memory=False, volatile=False, doc="0 to 31 (%laneid)."
)
named_barrier_sync = instruction(
    "named_barrier_sync", "bar.sync $0, $1;", "rr",
    doc="Wait at barrier id (0 to 15; 0 is syncthreads') until `threads` threads are there (bar.sync).",
)  # fmt: skip
named_barrier_arrive = instruction(
    "named_barrier_arrive",
    "bar.arrive $0, $1;",
    "rr",
    doc="Count at barrier id without waiting (bar.arrive).",
)
nanosleep = instruction(
    "nanosleep", "nanosleep.u32 $0;", "r", doc="Suspend for up to 2 ns ... 1 ms (nanosleep)."
)
trap = instruction("trap", "trap;", doc="Abort the grid with an error (trap).")
griddep_wait = instruction(
    "griddep_wait", "griddepcontrol.wait;",
    doc="Wait until the grids this one depends on are done and their writes visible (griddepcontrol).",
)  # fmt: skip
griddep_launch = instruction(
    "griddep_launch", "griddepcontrol.launch_dependents;",
    doc="Let dependent grids start when every block has said so or ended (griddepcontrol).",
)  # fmt: skip
cluster_rank = instruction(
    "cluster_rank", "mov.u32 $0, %cluster_ctarank;", "", "r", memory=False, volatile=False,
    doc="This block's number in its cluster (%cluster_ctarank).",
)  # fmt: skip
cluster_sync = instruction(
    "cluster_sync",
    "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;",
    doc="Wait for every thread of the cluster; shared memory written before is seen after (barrier.cluster).",
)


def _dynamic_shared() -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def dynamic_shared(typingctx: Any) -> Any:
        """Shared-window address (int32) of the block's dynamic shared memory, aligned to 1024 bytes."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            module, name = builder.module, "sharp_dynamic_shared"
            memory = module.globals.get(name)
            if memory is None:
                memory = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=3)
                memory.linkage = "external"
                memory.align = 1024  # the 128-byte swizzle repeats every 1024 bytes
            return builder.trunc(builder.ptrtoint(memory, ir.IntType(64)), ir.IntType(32))

        return signature(compiler.cuda.types.int32), codegen

    return dynamic_shared


def _shared_address() -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def shared_address(typingctx: Any, array: Any) -> Any:
        """Shared-window address (int32) of a `cuda.shared.array`."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            pointer = builder.addrspacecast(data, data.type.pointee.as_pointer(3))
            return builder.trunc(builder.ptrtoint(pointer, ir.IntType(64)), ir.IntType(32))

        return signature(compiler.cuda.types.int32, array), codegen

    return shared_address


dynamic_shared = _dynamic_shared() if USABLE else unavailable("dynamic_shared")
shared_address = _shared_address() if USABLE else unavailable("shared_address")
