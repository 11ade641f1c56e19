"""The order of operations that every tensor-core attention keeps, in numpy: what makes a row's bits its own.

A row is one query of one head. Whatever shares its launch, its result depends on the row, the keys and values
it sees and their absolute positions alone, because every kernel does this, with these roundings:

    splits   of SPLIT = 1,024 keys, aligned to key 0, ascending; each starts from m = -inf, l = 0, o = 0
    tiles    of TILE = 128 keys, aligned to key 0, ascending. A tile in which the row sees nothing does
    nothing.
             S = Q K^T by tensor-core steps of 16 over head_dim, ascending from 0: queries M, keys N
             keys that the row does not see: S = -inf, by selection
             m' = max(m, max(S) c), the product rounded;  f = ex2(m - m');  p = ex2(fma(S, c, -m'))
             l = fma(l, f, t), one for each of LANES = 16 places; place (g, i) adds the unrounded p of the
             keys 32 g + 8 j + 2 i and the next one: t = ((pair j=0 + pair 1) + pair 2) + pair 3
             o = o f, rounded; then o += P V, P rounded to the element type, by tensor-core steps of 16 keys,
             ascending; steps in which the row sees nothing may be left out, since they add exact zeros
    its end  l: of each g (l0 + l1) + (l2 + l3), then (g0 + g1) + (g2 + g3)
    fold     left, in the order of splits: m' = max(m1, m2); a = ex2(m1 - m'); b = ex2(m2 - m');
             l = fma(l1, a, l2 b); o = fma(o1, a, o2 b)
    result   o (1 / l), rounded once; zeros where nothing is seen. Log-sum-exp: (m + log2 l) ln 2

c is softmax_scale log2(e), rounded to float32 once; it is positive, so the largest score scaled is the
largest scaled score, and a maximum that stays makes f exactly 1. Place (g, i) is what lane i of a quad holds
of 32 keys in the accumulator layout that wgmma and mma.sync share (ptx/mma.py); g is a place too so that four
warps can share a tile and each keep sums of its own.

What numpy cannot fix is left to the instructions: how one tensor-core step rounds its 16 products (here:
exact products and sum, added to the accumulator with one rounding), and the last bits of ex2 and log2. So two
kernels are compared with each other bit by bit, and with this file within rounding. Knows: one row after
another. Refuses to know: pages, batches, threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

TILE, SPLIT, STEP = 128, 1024, 16
GROUP_KEYS, QUAD = 32, 4
LANES = TILE // GROUP_KEYS * QUAD
LOG2E, LN2 = math.log2(math.e), np.float32(math.log(2.0))
_INF = np.float32(np.inf)


def exponent_scale(softmax_scale: float) -> Any:
    """c, float32: softmax_scale log2(e), so that exp(softmax_scale s) = 2^(c s)."""
    return np.float32(softmax_scale * LOG2E)


def first_visible(length: int, window: int | None) -> int:
    """The first of a row's keys: with a window it sees the last `window` of its `length` keys."""
    return 0 if window is None else max(0, length - window)


def split_range(length: int, window: int | None = None) -> range:
    """The splits of a row that sees `length` keys, or those of the window's."""
    return range(first_visible(length, window) // SPLIT, -(-length // SPLIT))


def fma(x: Any, y: Any, z: Any) -> Any:
    """x y + z rounded once, float32. (The product is exact in float64; its sum with z is rounded there before
    it is rounded to float32, which differs from fma.rn about once in 2^29.)"""
    wide = np.asarray(x, np.float64) * np.asarray(y, np.float64) + np.asarray(z, np.float64)
    return wide.astype(np.float32)


def _exp2(x: Any) -> Any:
    return np.exp2(np.asarray(x, np.float64)).astype(np.float32)


def negated(m: Any) -> Any:
    """-m; 0 for m = -inf, so that what has seen nothing stays 0 and becomes no NaN."""
    return np.where(m == -_INF, np.float32(0), -m)


def steps(acc: Any, left: Any, right: Any) -> Any:
    """acc[rows, n] += left[rows, K] right[K, n] in steps of 16 along K, each rounded once to float32."""
    for at in range(0, left.shape[1], STEP):
        product = left[:, at : at + STEP].astype(np.float64) @ right[at : at + STEP].astype(np.float64)
        acc = (acc.astype(np.float64) + product).astype(np.float32)
    return acc


@dataclass(frozen=True)
class State:
    """What a split, or several folded ones, leave of rows: the largest score times c, m[rows]; the sum of
    weights l[rows]; their sum over values o[rows, D]; float32."""

    m: Any
    l: Any  # noqa: E741
    o: Any


def fold(first: State, second: State) -> State:
    """Two neighbouring ranges of splits as one."""
    m = np.maximum(first.m, second.m)
    a, b = _exp2(first.m + negated(m)), _exp2(second.m + negated(m))
    return State(m, fma(first.l, a, second.l * b), fma(first.o, a[:, None], second.o * b[:, None]))


def sum_places(places: Any) -> Any:
    """l[rows] of l[rows, 4 groups, 4 lanes]: quads first, then groups, in pairs."""
    quads = (places[..., 0] + places[..., 1]) + (places[..., 2] + places[..., 3])
    return (quads[..., 0] + quads[..., 1]) + (quads[..., 2] + quads[..., 3])


def attend_split(q: Any, k: Any, v: Any, split: int, length: int, first: int, c: Any, round_p: Any) -> State:
    """One split of rows q[rows, D] that see the keys from `first` up to `length` of k, v[length, D]; all
    float32 that holds rounded values. round_p: rounds float32 to the element type and back."""
    rows, head_dim = q.shape
    m, o = np.full(rows, -_INF), np.zeros((rows, head_dim), np.float32)
    places = np.zeros((rows, TILE // GROUP_KEYS, QUAD), np.float32)
    for start in range(split * SPLIT, min((split + 1) * SPLIT, length), TILE):
        if start + TILE <= first:
            continue
        keys = np.arange(start, start + TILE)
        seen = (first <= keys) & (keys < length)
        tile_k, tile_v = (np.zeros((TILE, head_dim), np.float32) for _ in range(2))
        tile_k[seen], tile_v[seen] = k[keys[seen]], v[keys[seen]]
        s = steps(np.zeros((rows, TILE), np.float32), q, tile_k.T)
        s = np.where(seen, s, -_INF)
        new_m = np.maximum(m, s.max(axis=1) * c)
        n = negated(new_m)
        f = _exp2(m + n)
        p = _exp2(fma(s, c, n[:, None]))
        pairs = p.reshape(rows, TILE // GROUP_KEYS, 4, QUAD, 2)  # row, g, j, i, which of the two
        pairs = pairs[..., 0] + pairs[..., 1]
        t = ((pairs[:, :, 0] + pairs[:, :, 1]) + pairs[:, :, 2]) + pairs[:, :, 3]
        places = fma(places, f[:, None, None], t)
        o = steps(o * f[:, None], round_p(p), tile_v)
        m = new_m
    return State(m, sum_places(places), o)


def finish(state: State) -> tuple[Any, Any]:
    """(result[rows, D], log-sum-exp[rows]), float32; zeros and -inf where nothing was seen."""
    some = state.l > 0
    inverse = np.where(some, np.float32(1) / np.where(some, state.l, 1), 0).astype(np.float32)
    log = np.log2(np.where(some, state.l, 1).astype(np.float64)).astype(np.float32)
    lse = np.where(some, (np.where(some, state.m, 0) + log) * LN2, -_INF)
    return state.o * inverse[:, None], lse.astype(np.float32)


def attention(
    q: Any, k: Any, v: Any, softmax_scale: float, round_p: Any, window: int | None = None
) -> tuple[Any, Any]:
    """(result[rows, D], log-sum-exp[rows]) of rows q[rows, D] that all see the n keys of k, v[n, D], with a
    window the last of them. Arguments and result are float32; round_p as in attend_split."""
    length, c = len(k), exponent_scale(softmax_scale)
    rows, head_dim = q.shape
    first = first_visible(length, window)
    state = State(np.full(rows, -_INF), np.zeros(rows, np.float32), np.zeros((rows, head_dim), np.float32))
    for split in split_range(length, window):
        state = fold(state, attend_split(q, k, v, split, length, first, c, round_p))
    return finish(state)
