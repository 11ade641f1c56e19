"""Warps, their registers and where a block's shared memory begins (PTX ISA, "setmaxnreg", "elect.sync",
"nanosleep", "trap", "Special Registers").

The names at the end of the imports live in files of their own; kernels may take them from here too.
"""

from __future__ import annotations

from typing import Any

from kernels_numba import compiler
from kernels_numba.ptx.asm import USABLE, instruction, intrinsic, signature, unavailable
from kernels_numba.ptx.cluster import cluster_rank, cluster_sync
from kernels_numba.ptx.griddep import griddep_launch, griddep_wait
from kernels_numba.ptx.named_barrier import named_barrier_arrive, named_barrier_sync
from kernels_numba.ptx.shuffle import shfl_down_f32, shfl_idx_i32, shfl_xor_f32, warp_uniform

if USABLE:
    from llvmlite import ir

__all__ = [
    "cluster_rank", "cluster_sync", "dynamic_shared", "elect_one", "griddep_launch", "griddep_wait",
    "lane_id", "named_barrier_arrive", "named_barrier_sync", "nanosleep", "setmaxnreg_dec", "setmaxnreg_inc",
    "shared_address", "shfl_down_f32", "shfl_idx_i32", "shfl_xor_f32", "trap", "warp_uniform",
]  # fmt: skip

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
lane_id = instruction(
    "lane_id", "mov.u32 $0, %laneid;", "", "r", memory=False, volatile=False, doc="0 to 31 (%laneid)."
)
nanosleep = instruction(
    "nanosleep", "nanosleep.u32 $0;", "r", doc="Suspend for up to 2 ns ... 1 ms (nanosleep)."
)
trap = instruction("trap", "trap;", doc="Abort the grid with an error (trap).")


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
