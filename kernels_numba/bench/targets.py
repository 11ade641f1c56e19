"""What GEMM, LM head and the ops between are meant to reach on an H100, and what measured rows come to.

Against torch.matmul: many tokens 1.03x in the mean, up to 64 tokens 1.08x where weights are large and the
time of their bytes where they are small, between the two 1.02x; a share of what the card reads; what rung
mma_sync and the price of one order of additions are to be. Of the ops that move memory and compute little:
a share of what the card copies. Knows: rows of results, as dicts. Refuses to know: how they were measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels_numba.bench.cases import GEMM_FEW_M, Params, bench_cases

FEW = 64  # tokens up to which reading the weights is all the work
LARGE = 30e6  # bytes of weights from which torch must be beaten there
SPEED, FIXED_US = 3.0e12, 2.5  # bytes a second, microseconds: the time that smaller ones may take
READ_SHARE = 0.92  # of the card's reading, on:
WIDE = ((28672, 4096), (37888, 3584))  # and the heads
MMA_M = 2048  # tokens from which rung mma_sync has a share of cuBLAS's speed to reach
PRICE = 0.05
COPY_SHARE, COPY_TOKENS = 0.8, 8192  # of the card's copying, and the tokens from which it is to be reached:
COPYING = ("rms_norm", "rope_store_kv", "silu_mul", "embedding")  # in rung "warp"
RUNGS = {"gemm": "hopper", "lm_head": "warp"}


def sizes_of(op: str, params: Params) -> tuple[int, int, int]:
    """(M, N, K) of a case of gemm or lm_head."""
    names = ("m", "n", "k") if op == "gemm" else ("num_rows", "vocab_size", "hidden_size")
    m, n, k = (int(params[name]) for name in names)
    return m, n, k


def grid(op: str) -> dict[str, Params]:
    """The cases of an op that are held against the targets: those that add no residual."""
    return {name: params for name, params in bench_cases(op).items() if not params.get("residual")}


def reads_weights(op: str, params: Params) -> bool:
    """Whether a case has so few tokens that the card's reading is what it is held against."""
    few = op in RUNGS and sizes_of(op, params)[0] <= GEMM_FEW_M[-1]
    return few and not params.get("residual")


def copies(op: str, params: Params) -> bool:
    """Whether a case is held against what the card copies."""
    return op in COPYING and int(params["num_tokens"]) >= COPY_TOKENS


@cache
def bytes_of(op: str, m: int, n: int, k: int) -> int:
    """What the case must move: both ops' rows are bfloat16, a head's logits float32."""
    from kernels_numba.ops.gemm import gemm_cost
    from kernels_numba.ops.lm_head import lm_head_cost

    return gemm_cost(m, n, k).bytes if op == "gemm" else lm_head_cost(m, n, k).bytes


def floor_us(moved: float) -> float:
    """The time that small weights may take."""
    return moved / SPEED * 1e6 + FIXED_US


@dataclass(frozen=True)
class Timed:
    """A row of the grid: ratio is torch's time over ours, None without torch."""

    op: str
    rung: str
    m: int
    n: int
    k: int
    us: float
    ratio: float | None

    @property
    def bytes(self) -> int:
        return bytes_of(self.op, self.m, self.n, self.k)

    @property
    def large(self) -> bool:
        return 2 * self.n * self.k >= LARGE


def timed(rows: Iterable[dict[str, Any]]) -> list[Timed]:
    """The rows that are cases of the grid, burst and with a cold L2."""
    grids = {op: grid(op) for op in RUNGS}
    return [
        Timed(row["op"], row["rung"], *sizes_of(row["op"], grids[row["op"]][row["case"]]), row["us"],
              row["ratio"])
        for row in rows
        if row["case"] in grids.get(row["op"], ())
    ]  # fmt: skip


def note(
    op: str, params: Params, us: float, read_gbs: float | None, copy_gbs: float | None = None,
    gbs: float | None = None,
) -> str:  # fmt: skip
    """What a case adds to its line: one of few tokens its share of the card's reading, and the time of its
    bytes if its weights are small; one of COPYING, at `gbs`, its share of the card's copying."""
    if copies(op, params) and copy_gbs and gbs:
        return f", {gbs / copy_gbs:.0%} of what the card copies"
    if not reads_weights(op, params):
        return ""
    m, n, k = sizes_of(op, params)
    moved = bytes_of(op, m, n, k)
    text = f", {moved / us / 1e3 / read_gbs:.0%} of what the card reads" if read_gbs else ""
    small = m <= FEW and 2 * n * k < LARGE
    return text + (f", {floor_us(moved):.2f} us allowed" if small else "")


def _verdict(reached: float, wanted: float) -> str:
    return f"{reached:.3f} ({wanted:g} wanted: {'met' if reached >= wanted else 'MISSED'})"


def _ratios(what: str, of: Sequence[Timed], mean: float = 0, least: float = 0) -> list[str]:
    """A line, if anything was measured: the geometric mean and the least ratio, against their targets."""
    found = [one.ratio for one in of if one.ratio is not None]
    if not found:
        return []
    reached, worst = statistics.geometric_mean(found), min(found)
    least_at = next(one for one in of if one.ratio == worst)
    words = [
        _verdict(reached, mean) if mean else f"{reached:.3f}",
        _verdict(worst, least) if least else f"{worst:.3f}",
    ]
    at = f"M={least_at.m} N={least_at.n} K={least_at.k}"
    return [
        f"{what}, times torch's speed: geometric mean {words[0]}, least {words[1]} at {at}, of {len(found)}"
    ]


def _small(of: Sequence[Timed]) -> list[str]:
    if not of:
        return []
    over = {one: one.us - floor_us(one.bytes) for one in of}
    late = [one for one in of if over[one] > 0]
    line = f"up to {FEW} tokens, smaller weights: {len(of) - len(late)} of {len(of)} within bytes / 3.0 TB/s"
    line += f" + {FIXED_US} us ({'MISSED' if late else 'met'})"
    if late:
        worst = max(late, key=lambda one: over[one])
        line += f", the latest by {over[worst]:.2f} us at M={worst.m} N={worst.n} K={worst.k}"
    return [line]


def _reading(of: Sequence[Timed], read_gbs: float | None) -> list[str]:
    if not of:
        return []
    if read_gbs is None:
        return ["share of the card's reading: its reading was not measured"]
    share = {one: one.bytes / one.us / 1e3 / read_gbs for one in of}
    least = min(of, key=lambda one: share[one])
    reach = sum(value >= READ_SHARE for value in share.values())
    reached = f"{_verdict(share[least], READ_SHARE)} at M={least.m} N={least.n} K={least.k}"
    what = f"up to {FEW} tokens, widest weights, share of the {read_gbs:.0f} GB/s that the card reads"
    return [f"{what}: least {reached}, {reach} of {len(of)} reach it"]


def _copying(rows: Sequence[dict[str, Any]], copy_gbs: float | None) -> list[str]:
    """How the ops between stand beside copying, an op a line."""
    if copy_gbs is None:
        return []
    lines = []
    for op in COPYING:
        grid = bench_cases(op)
        mine = [row for row in rows if (row["op"], row["rung"]) == (op, "warp") and row["case"] in grid]
        share = {row["case"]: row["gbs"] / copy_gbs for row in mine if copies(op, grid[row["case"]])}
        if share:
            least = min(share, key=lambda case: share[case])
            lines.append(
                f"{op} at {COPY_TOKENS:,} tokens, share of the {copy_gbs:.0f} GB/s that the card copies: "
                f"least {_verdict(share[least], COPY_SHARE)} at {least}, of {len(share)}"
            )
    return lines


def _price(of: Sequence[Timed]) -> list[str]:
    """What the one order of additions costs: hopper's time over that of the best kernel, gemv included."""
    default = {(one.m, one.n, one.k): one.us for one in of if one.rung == "hopper"}
    free = {(one.m, one.n, one.k): one.us for one in of if one.rung == "gemv"}
    costs = {at: default[at] / min(us, default[at]) - 1 for at, us in free.items() if at in default}
    if not costs:
        return []
    mean, most = statistics.fmean(costs.values()), max(costs, key=lambda at: costs[at])
    each = f"most {costs[most]:.1%} at N={most[1]} K={most[2]}, of {len(costs)}"
    verdict = "met" if mean <= PRICE else "MISSED"
    return [
        f"price of batch invariance at one token: mean {mean:.1%} ({PRICE:.0%} allowed: {verdict}), {each}"
    ]


def summary(
    rows: Iterable[dict[str, Any]], read_gbs: float | None = None, copy_gbs: float | None = None
) -> list[str]:
    """A line a target that anything of `rows` speaks to: reached, wanted, met or missed. read_gbs, copy_gbs:
    what the card was seen to read, and to copy (read and written)."""
    rows = list(rows)
    every = timed(rows)
    ours = [one for one in every if one.rung == RUNGS[one.op]]
    few = [one for one in ours if one.m <= FEW]
    beyond = [one for one in ours if FEW < one.m <= GEMM_FEW_M[-1]]
    mma = [one for one in every if one.rung == "mma_sync" and one.m >= MMA_M]
    many = [one for one in ours if one.m > GEMM_FEW_M[-1]]
    wide = [one for one in few if one.op == "lm_head" or (one.n, one.k) in WIDE]
    return [
        *_ratios("many tokens (512 and more)", many, 1.03, 0.97),
        *_ratios(f"up to {FEW} tokens, weights of 30 MB and more", [o for o in few if o.large], 1.08, 0.97),
        *_small([one for one in few if not one.large]),
        *_reading(wide, read_gbs),
        *_ratios("65 to 384 tokens", [one for one in beyond if one.op == "gemm"], 1.02, 0.95),
        *_ratios("heads of 128 and 256 rows", [one for one in beyond if one.op == "lm_head"]),
        *_ratios(f"rung mma_sync from {MMA_M} tokens on", mma, 0.6),
        *_price(every),
        *_copying(rows, copy_gbs),
    ]
