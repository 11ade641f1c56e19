"""What a launch of a warp rung costs the host, without a GPU: everything up to the driver's call.

`python tests/launch_times.py` prints, for each op, the least time of a call whose operands were seen before
(arrays become views, views find their launch), in us. What numba's arrays and the driver add is not in it:
the arrays here keep their address as an attribute, as the engine's own do. Refuses to know: the device's
time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels_numba.launch import Launch
from kernels_numba.ops import OPS
from kernels_numba.ops.warp import door

CALLS, ROUNDS = 2000, 30
BF16 = np.dtype(np.uint16)
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "heads": (32, 8), "head_dim": 128}


@dataclass
class Array:
    """An array by its address."""

    shape: tuple[int, ...]
    dtype: Any = BF16
    address: int = 1 << 24
    strides: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.dtype)
        strides, step = [], self.dtype.itemsize
        for length in reversed(self.shape):
            strides.append(step)
            step *= length
        self.strides = tuple(reversed(strides))


def calls(rows: int) -> dict[str, tuple[tuple[Array, ...], dict[str, Any]]]:
    """(arguments, keywords) of each op but lm_head, which asks for its GPU's kind."""
    hidden, inner = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"]
    (hq, hkv), dim, ids = LLAMA_8B["heads"], LLAMA_8B["head_dim"], Array((rows,), np.int32)
    x, q, k = Array((rows, hidden)), Array((rows, hq, dim)), Array((rows, hkv, dim))
    cache = Array((100, hkv, 64, dim))
    return {
        "embedding": ((x, ids, Array((1000, hidden))), {}),
        "rms_norm": ((x, x, Array((hidden,))), {"eps": 1e-5, "residual": x}),
        "qk_norm": ((q, k, Array((dim,)), Array((dim,))), {"eps": 1e-5}),
        "rope_store_kv": ((q, k, k, ids, Array((8192, dim), np.float32), cache, cache, ids), {}),
        "silu_mul": ((Array((rows, inner)), Array((rows, 2 * inner))), {}),
    }


def least_us(call: Any) -> float:
    """The least mean of ROUNDS times CALLS calls."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def measure(rows: int = 64) -> dict[str, float]:
    """{op: us}. Leaves the door and the driver's call out of the process from then on."""
    door.require_capability = lambda op: False  # type: ignore[assignment]
    Launch.__call__ = lambda self, stream=None: None  # type: ignore[method-assign]
    count = Array((1,), np.int32)
    times = {}
    for op, (args, kwargs) in calls(rows).items():
        rung = OPS[op].rungs["warp"]
        times[op] = least_us(
            lambda rung=rung, args=args, kwargs=kwargs: rung(*args, **kwargs, num_rows=count)
        )
    return times


if __name__ == "__main__":
    for name, us in measure().items():
        print(f"{name:14} {us:5.2f} us")
