"""Calls of the ops that have a warp rung, for numpy and for a GPU: how a call of inputs.py is planned, run in
numpy in a bucket that is not full, and what its outputs must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tolerance import assert_close

from kernels_numba.inputs import BFLOAT16, Call, make_call
from kernels_numba.ops.warp.gather import EMBEDDING, plan_gather
from kernels_numba.ops.warp.in_numpy import Arrays
from kernels_numba.ops.warp.qk_norm import plan_qk_norm
from kernels_numba.ops.warp.rms_norm import plan_rms_norm
from kernels_numba.ops.warp.rope_store_kv import plan_rope_store_kv
from kernels_numba.ops.warp.silu_mul import plan_silu_mul

# op -> (module, factory, arguments that have a row a token)
KERNELS = {
    "embedding": ("gather", "make_gather_kernel", ("out", "token_ids")),
    "rms_norm": ("rms_norm", "make_rms_norm_kernel", ("out", "x", "residual")),
    "qk_norm": ("qk_norm", "make_qk_norm_kernel", ("q", "k")),
    "silu_mul": ("silu_mul", "make_silu_mul_kernel", ("out", "gate_up")),
    "rope_store_kv": (
        "rope_store_kv", "make_rope_store_kv_kernel", ("q", "k", "v", "positions", "slot_mapping"),
    ),
}  # fmt: skip
HEADS = {"num_q_heads": 3, "num_kv_heads": 2, "head_dim": 64}
CASES = {
    "embedding": {"num_tokens": 5, "hidden_size": 584, "vocab_size": 11},
    "rms_norm": {"num_tokens": 5, "hidden_size": 584, "residual": True},
    "qk_norm": {"num_tokens": 5, **HEADS},
    "silu_mul": {"num_tokens": 5, "intermediate_size": 2056},
    "rope_store_kv": {"num_tokens": 5, **HEADS, "max_pos": 20, "num_blocks": 5, "block_size": 4},
}
ELEMENTS = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def call_of(op: str, rng: Any, dtype: str = "bfloat16", **changes: Any) -> Call:
    """A random call of CASES[op], changed by name, in an element type."""
    return make_call(op, CASES[op] | changes, rng).cast(lambda _, array: array.astype(ELEMENTS[dtype]))


def plan_of(op: str, views: dict[str, Any], num_rows: Any, eps: float, pdl: bool = False) -> Any:
    """What the op's launcher plans for views of its arguments."""
    if op == "embedding":
        return plan_gather(op, *(views[name] for name in EMBEDDING), num_rows, EMBEDDING, pdl)
    if op == "rms_norm":
        return plan_rms_norm(
            views["out"], views["x"], views["weight"], views.get("residual"), num_rows, eps, pdl
        )
    if op == "qk_norm":
        return plan_qk_norm(*views.values(), num_rows, eps, pdl)
    return {"silu_mul": plan_silu_mul, "rope_store_kv": plan_rope_store_kv}[op](
        *views.values(), num_rows, pdl
    )


@dataclass
class Outcome:
    """Outputs by name, and the buffers from which rows were cut, after a launch."""

    outputs: dict[str, Any]
    buffers: dict[str, Any]


def in_numpy(call: Call, bucket: int | None = None, pdl: bool = False, **how: Any) -> Outcome:
    """Run the op's warp kernel in numpy on copies of a call's arrays.

    bucket: the launch is made for so many rows, and told by num_rows how many there are; the others do not
    even exist, so that an access to them fails. how: see Arrays.run."""
    call = call.cast(lambda _, array: array.copy())
    module, factory, by_row = KERNELS[call.op]
    args, arrays = call.resolved(), Arrays()
    views = {name: arrays.view(a, bucket if name in by_row else None) for name, a in args.items()}
    num_rows = None
    if bucket is not None:
        num_rows = arrays.view(np.array([len(args[by_row[0]])], np.int32))
    plan = plan_of(call.op, views, num_rows, call.kwargs.get("eps", 0.0), pdl)
    arrays.run(module, factory, plan, **how)
    return Outcome({name: np.array(args[name]) for name in call.outputs}, call.buffers)


def check_right(call: Call, got: dict[str, Any], dtype: str) -> None:
    """Each output against its definition in float64, with the definition in `dtype` as the allowance."""
    rounded = {name: np.asarray(value) for name, value in call.spec().items()}
    truth = call.to_float64().spec()
    for name in call.outputs:
        plain = rounded[name].astype(ELEMENTS[dtype])
        assert_close(got[name], plain, truth[name], dtype, call.terms, f"{call.op} {name}")


def bits(array: Any) -> Any:
    """An array's bits, to be compared."""
    return np.ascontiguousarray(array).view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all outputs are equal to the bit."""
    return all(np.array_equal(bits(one[name]), bits(other[name])) for name in one)


def untouched(before: Call, after: dict[str, Any]) -> bool:
    """Whether what lies in the buffers beside the outputs is as it was."""
    args = before.args
    for name, buffer in before.buffers.items():
        other = np.ones(buffer.shape[1], bool)
        for output in before.outputs:
            if getattr(args[output], "buffer", None) == name:
                other[args[output].start : args[output].stop] = False
        if not np.array_equal(bits(after[name][:, other]), bits(buffer[:, other])):
            return False
    return True
