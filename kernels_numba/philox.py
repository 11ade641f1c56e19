"""Philox4x32-10, the counter-based random generator that keys sampling by (seed, output index, token id).

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; its Random123 package publishes the
known-answer vectors that the tests hold. Knows: words. Refuses to know: what they decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.compiler import jit

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox_words(counter: Any, key: tuple[int, int]) -> Any:
    """Four words per counter: counter uint32[..., 4], key two uint32 numbers -> uint32[..., 4]."""
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = int(key[0]), int(key[1])
    low, shift = np.uint64(_MASK), np.uint64(32)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0, c1 = (product_1 >> shift) ^ c1 ^ np.uint64(k0), product_1 & low
        c2, c3 = (product_0 >> shift) ^ c3 ^ np.uint64(k1), product_0 & low
        k0, k1 = (k0 + WEYL_0) & _MASK, (k1 + WEYL_1) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def make_philox() -> Any:
    """Device function (c0, c1, c2, c3, k0, k1), all uint32 -> four uint32 words, the same as philox_words.

    Products are 32 x 32 -> 64 bits in uint64; every other value is masked back to 32 bits.
    """
    mask, shift = np.uint64(_MASK), np.uint64(32)
    multiplier_0, multiplier_1 = np.uint64(MULTIPLIER_0), np.uint64(MULTIPLIER_1)
    weyl_0, weyl_1 = np.uint64(WEYL_0), np.uint64(WEYL_1)

    def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
        x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
        y0, y1 = np.uint64(k0), np.uint64(k1)
        for _ in range(ROUNDS):
            product_0 = multiplier_0 * x0
            product_1 = multiplier_1 * x2
            x0 = np.uint64((product_1 >> shift) ^ x1 ^ y0)
            x1 = np.uint64(product_1 & mask)
            x2 = np.uint64((product_0 >> shift) ^ x3 ^ y1)
            x3 = np.uint64(product_0 & mask)
            y0 = np.uint64((y0 + weyl_0) & mask)
            y1 = np.uint64((y1 + weyl_1) & mask)
        return np.uint32(x0), np.uint32(x1), np.uint32(x2), np.uint32(x3)

    return jit(device=True)(philox)
