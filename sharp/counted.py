"""Ops told how much of a bucket is real: each that takes `num_rows` gets it from device memory.

Knows: which count an op's rows are of. Refuses to know: what ops compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from sharp.device import Array

# Of what the forward launches: rope and store_kv are parts of rope_store_kv, silu_mul of gemm_silu_mul.
OF_TOKENS = ("embedding", "rms_norm", "gemm", "qk_norm", "rope_store_kv", "gemm_silu_mul")
OF_ROWS = ("lm_head", "sample")  # attention reads lengths: a sequence past the real ones has none


def takes_count(op: Callable[..., Any]) -> bool:
    """Whether a rung reads its real number of rows when it runs. One that does not computes all rows that it
    is given; those past the real ones are of token 0, are stored nowhere, and nobody reads them."""
    return "num_rows" in inspect.signature(op).parameters


def counted(ops: SimpleNamespace, num_tokens: Array, num_rows: Array) -> SimpleNamespace:
    """The same ops, those that take it with `num_rows`: num_tokens or num_rows, i32[1] on the device."""
    bound = dict(vars(ops))
    for names, count in ((OF_TOKENS, num_tokens), (OF_ROWS, num_rows)):
        for name in names:
            if name in bound and takes_count(bound[name]):
                bound[name] = partial(bound[name], num_rows=count)
    return SimpleNamespace(**bound)


def uncounted(ops: SimpleNamespace) -> tuple[str, ...]:
    """The ops whose rungs compute a bucket's rows past the real ones as well."""
    return tuple(
        name for name, op in vars(ops).items() if name in OF_TOKENS + OF_ROWS and not takes_count(op)
    )
