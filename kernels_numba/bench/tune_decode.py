"""`just tune decode`: what the contract of attention costs a decode, and what the card can read at all.

Measures the hopper rung of decode attention with splits of 1,024 keys, which the contract fixes, beside other
lengths, which would give other bits; and a kernel that reads and does nothing else. Changes no file; prints
lines for notebooks/LOG.md. Knows: what to vary. Refuses to know: how a kernel is timed (contest.py).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np

from kernels_numba.attention_contract import SPLIT
from kernels_numba.bench.cases import Params, bench_cases
from kernels_numba.bench.contest import Workload, device_lane
from kernels_numba.bench.data import Maker
from kernels_numba.compiler import cuda
from kernels_numba.launch import Kernel, address
from kernels_numba.ops.decode_attention import OP, decode_attention_hopper
from kernels_numba.ops.decode_attention.config import SPLITS, Build
from kernels_numba.ops.decode_attention.tensor_core import num_sms
from kernels_numba.ptx.ldst import st_global_b32
from kernels_numba.ptx.vector import ld_global_nc_v4

THREADS, BLOCKS_PER_SM, READ_BYTES = 512, 4, 2 << 30
AT_ONCE = 8  # loads of 16 bytes in flight, a thread


def make_read_kernel() -> Any:
    """(data, rounds, out): reads `rounds` times AT_ONCE x 16 bytes a thread of all blocks; stores the one bit
    of it that keeps the loads alive, if ever it is set in all words of a thread."""
    int32, int64 = cuda.types.int32, cuda.types.int64

    def read(data: Any, rounds: Any, out: Any) -> None:
        words = cuda.local.array(4, np.int32)
        thread = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        step = int64(cuda.gridDim.x) * THREADS * 16
        at = int64(data + thread * 16)
        kept = int32(-1)
        for _ in range(rounds):
            for _ in range(AT_ONCE):
                ld_global_nc_v4(words, at)
                kept = int32(kept & words[0] & words[1] & words[2] & words[3])
                at = int64(at + step)
        if kept == -1:
            st_global_b32(out, kept)

    return read


def read_gbs(rounds: int = 5) -> float:
    """GB/s at which the current device reads 2 GiB that are read once."""
    lane, blocks = device_lane(), BLOCKS_PER_SM * num_sms()
    each = blocks * THREADS * AT_ONCE * 16
    turns = READ_BYTES // each
    data, out = Maker(0, {}).normal(READ_BYTES // 2), cuda.device_array(1, np.int32)
    kernel = Kernel("read", make_read_kernel, (), "void(int64, int32, int64)", THREADS)
    launch = kernel.prepare(blocks, (address(data), turns, address(out)))
    times = [lane.elapsed_us(lambda: launch(lane.stream)) for _ in range(rounds + 1)]
    return float(turns * each / min(times[1:]) / 1e3)


def kv_bytes(params: Params) -> int:
    """Bytes of K and V that a case reads, in bfloat16."""
    return 2 * 2 * sum(params["context_lens"]) * int(params["num_kv_heads"] * params["head_dim"])


def contenders_of() -> dict[str, Any]:
    """By its number of keys: splits of every length."""
    return {str(n): partial(decode_attention_hopper, build=Build(split=n)) for n in SPLITS}


def price(params: Params, rounds: int) -> dict[str, float]:
    """Microseconds by contender, each checked first. ArithmeticError where one is wrong."""
    contenders = contenders_of()
    with Workload(OP, params) as workload:
        outcome = workload.compare(contenders, rounds)
    if outcome.refused:
        raise ArithmeticError("; ".join(outcome.refused.values()))
    return {name: outcome.measured[name].us for name in contenders}


def describe(case: str, params: Params, times: dict[str, float]) -> str:
    """The printed line: every contender's time, and the contract's, as it is picked, over the best one's."""
    each = ", ".join(f"{n} {us:.2f} us" for n, us in times.items())
    contract = times[str(SPLIT)] / min(times.values())
    gbs = kv_bytes(params) / times[str(SPLIT)] / 1e3
    return f"{case}: {each}; the contract's {gbs:.0f} GB/s, {contract:.3f}x the best"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tune decode", description="what the contract costs a decode")
    parser.add_argument("--case", default="", help="only cases whose name contains this text")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cases = bench_cases(OP, text=arguments.case)
    if not cases:
        parser.error(f"no case contains {arguments.case!r}")
    print(f"reading alone: {read_gbs(arguments.rounds):.0f} GB/s")
    for case, params in cases.items():
        print(describe(case, params, price(params, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
