"""What the warp rungs take: arrays as addresses, checked once, and which of them runs where.

Knows: dtypes, shapes, strides, alignment, compute capability. Refuses to know: any kernel.

A launcher looks its launch up by the views of its arguments, and checks them only when it has not seen them
before: a view is all that the checks ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kernels_numba import compiler
from kernels_numba.checks import ALIGNMENT, check, fail
from kernels_numba.launch import Kernel, Launch

RUNG = "warp"
NEEDS = (8, 0)  # compute capability: cvt.rn.bf16x2
PDL_NEEDS = (9, 0)  # griddepcontrol
# Targets of the kernels by whether they are part of a chain of dependent launches: one kernel a target.
ARCHS = {
    False: ("sm_80", "sm_86", "sm_87", "sm_89"),
    True: ("sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"),
}
BFLOAT16, FLOAT16, FLOAT32 = np.dtype(np.uint16), np.dtype(np.float16), np.dtype(np.float32)  # bf16 as bits
INT32 = np.dtype(np.int32)
NAMES: dict[Any, str] = {BFLOAT16: "bfloat16", FLOAT16: "float16", FLOAT32: "float32"}
HALVES = (BFLOAT16, FLOAT16)
HEAD_DIMS = (64, 128, 256)
MAX_HIDDEN = 16384  # elements of a row that one block holds in registers
LIMIT = 1 << 31  # of bytes from row to row, and of rows


class View(NamedTuple):
    """Where an array lies and what it is: hashable, and enough for checks.check."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self.start, False), "shape": self.shape, "strides": self.strides,
            "typestr": self.dtype.str, "version": 2,
        }  # fmt: skip


def view(op: str, name: str, array: Any) -> View:
    """The View of a device array; ValueError for anything else."""
    start = getattr(array, "address", None)
    if start is None:
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            fail(op, name, f"is a {type(array).__name__}", "a device array (cuda.to_device)")
            raise AssertionError
        start = interface["data"][0] or 0
    return View(int(start), array.shape, array.strides, array.dtype)


def view_count(op: str, num_rows: Any) -> View | None:
    """The View of num_rows, or None without one."""
    return None if num_rows is None else view(op, "num_rows", num_rows)


def count_address(op: str, num_rows: View | None) -> int:
    """The address of the real number of rows, i32[1]; 0 without one."""
    if num_rows is None:
        return 0
    check(op, "num_rows", num_rows, (INT32,), (1,))
    if num_rows.start % 4:
        fail(op, "num_rows", f"starts at address {num_rows.start:#x}", "a multiple of 4 bytes")
    return num_rows.start


def indices(op: str, name: str, array: View, rows: int) -> int:
    """The address of i32[rows]."""
    check(op, name, array, (INT32,), (rows,))
    if array.start % 4:
        fail(op, name, f"starts at address {array.start:#x}", "a multiple of 4 bytes")
    return array.start


def packed(op: str, name: str, array: View, *, rows: int = 0) -> int:
    """The address of an array that is moved 16 bytes at a time; rows: as in checks.check, whose strides must
    be multiples of 16 bytes below 2**31."""
    if array.start % ALIGNMENT:
        fail(op, name, f"starts at address {array.start:#x}", f"a multiple of {ALIGNMENT} bytes")
    for axis in range(rows):
        stride = array.strides[axis]
        if array.shape[axis] > 1 and (stride % ALIGNMENT or stride >= LIMIT):
            required = f"a multiple of {ALIGNMENT} below 2**31"
            fail(op, f"{name}.strides[{axis}]", f"is {stride} bytes", required)
    return array.start


def row_bytes(array: View) -> int:
    """Bytes from one row to the next; of a single row its own length."""
    if array.shape[0] > 1:
        return int(array.strides[0])
    return int(array.size * array.dtype.itemsize)


def multiple_of_8(op: str, name: str, columns: int) -> None:
    """ValueError unless rows of 16-bit elements are whole packs of 16 bytes."""
    if columns == 0 or columns % 8:
        fail(op, name, f"is {columns}", "a positive multiple of 8 (16 bytes are moved at once)")


@dataclass(frozen=True)
class Plan:
    """A launch before it meets a GPU. kernel.key is what its factory was called with."""

    kernel: Kernel
    grid: int
    arguments: tuple[int | float, ...]


def _have(capability: tuple[int, int] | None) -> str:
    return "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"


def warp_kernel(
    name: str, factory: Callable[..., Any], specialised: tuple[Any, ...], signature: str, threads: int,
    pdl: bool, *, waits: bool = True,
) -> Kernel:  # fmt: skip
    """The Kernel that factory(*specialised, pdl) makes; waits: as part of a chain of dependent launches it
    may begin before those before it have ended."""
    key = (*specialised, pdl)
    return Kernel(
        f"{name}_pdl" if pdl else name, lambda: factory(*key), key, signature, threads, pdl=pdl and waits,
        archs=ARCHS[pdl],
    )  # fmt: skip


def require_capability(op: str) -> bool:
    """Whether the current GPU has dependent launches. ValueError if it is too old for the rung;
    KernelsUnavailable in numba's simulator."""
    if compiler.SIMULATOR:
        raise compiler.KernelsUnavailable(
            f"rung {RUNG} is made of PTX instructions: it needs numba.cuda's compiler, not its simulator"
        )
    have = tuple(compiler.cuda.get_current_device().compute_capability)
    if have < NEEDS:
        fail(op, f"rung {RUNG}", f"was called on {_have(have)}", f"{NEEDS[0]}.{NEEDS[1]} or newer")
    return have >= PDL_NEEDS


def ready(op: str, plan: Plan | None) -> Launch | None:
    """A planned launch, to be repeated; None for nothing to do. ValueError on a GPU that is too old."""
    require_capability(op)
    return None if plan is None else plan.kernel.prepare(plan.grid, plan.arguments)


def plan_and_prepare(op: str, plan: Callable[..., Plan | None], *operands: Any) -> Launch | None:
    """ready() of plan(*operands, pdl), for the current GPU. ValueError from either."""
    return ready(op, plan(*operands, require_capability(op)))


@dataclass(frozen=True)
class Sizes:
    """What of a model the warp rungs ask for."""

    hidden_size: int
    intermediate_size: int
    head_dim: int
    block_size: int


OPS = ("embedding", "rms_norm", "qk_norm", "rope_store_kv", "silu_mul", "lm_head")


def refusal(op: str, capability: tuple[int, int] | None, dtype: str, sizes: Sizes) -> str:
    """Why an op's warp rung cannot run a model, or "" if it can; capability None: no GPU."""
    if op not in OPS:
        return ""
    if capability is None or capability < NEEDS:
        return f"it needs compute capability {NEEDS[0]}.{NEEDS[1]} or newer, here is {_have(capability)}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {dtype}"
    columns = {"silu_mul": sizes.intermediate_size}.get(op, sizes.hidden_size)
    if op in ("embedding", "rms_norm", "silu_mul", "lm_head") and columns % 8:
        return f"it takes sizes that are multiples of 8, not {columns}"
    if op == "rms_norm" and sizes.hidden_size > MAX_HIDDEN:
        return f"it takes a hidden size of up to {MAX_HIDDEN:,}, not {sizes.hidden_size:,}"
    if op in ("qk_norm", "rope_store_kv") and sizes.head_dim not in HEAD_DIMS:
        return f"it takes head_dim {' or '.join(map(str, HEAD_DIMS))}, not {sizes.head_dim}"
    if op == "rope_store_kv" and not power_of_two(sizes.block_size):
        return f"it takes pages of a power of two of keys, not {sizes.block_size}"
    return ""


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def warp_rungs(
    default: str, capability: tuple[int, int] | None, dtype: str, sizes: Sizes, ops: Sequence[str] = OPS
) -> dict[str, str]:
    """The ops that take the warp rung by themselves: those that can, in bfloat16, where plain is the
    default."""
    if default != "plain" or dtype != "bfloat16":
        return {}
    return {op: RUNG for op in ops if not refusal(op, capability, dtype, sizes)}
