"""Rows of a tile fetched in boxes of powers of two: which boxes, and the kernels' text that asks for them."""

from __future__ import annotations

import numpy as np
import pytest
from few_products import make_product, same_bits

from kernels_numba import simt_gemm
from kernels_numba.ops.gemm_few.config import FewConfig
from kernels_numba.ptx.tma_rows import row_boxes


def test_boxes_are_powers_of_two_that_fill_every_multiple_of_eight():
    assert row_boxes(128) == (128, 64, 32, 16, 8)
    assert row_boxes(24) == (24, 16, 8)
    assert row_boxes(224) == (224, 128, 64, 32, 16, 8)
    assert row_boxes(8) == (8,)
    for tile in range(8, 257, 8):
        first, *others = row_boxes(tile)
        assert first == tile
        assert sum(others) >= tile - 8
    for tile in (0, 4, 12, 264):
        with pytest.raises(ValueError, match=f"tile is {tile} rows; a multiple of 8"):
            row_boxes(tile)


@pytest.mark.parametrize(("real", "fetched"), [(1, 8), (8, 8), (9, 16), (61, 64), (70, 72), (None, 72)])
def test_rows_that_no_token_needs_are_not_fetched(monkeypatch, real, fetched):
    """Of 70 tokens in tiles of 64: boxes reach at most 7 rows beyond the real number, so few rows are filled.
    The last step of K is counted."""
    asked = []
    load = simt_gemm.GemmWarp.tma_load_2d_hint

    def counted(self, dst, tensor_map, bar, x, y, policy):
        _, (rows, _) = self.maps[int(self.one(tensor_map))]
        asked.append((int(self.one(x)), int(self.one(y)), rows))
        load(self, dst, tensor_map, bar, x, y, policy)

    monkeypatch.setattr(simt_gemm.GemmWarp, "tma_load_2d_hint", counted)
    product = make_product(np.random.default_rng(1), 70, 64, 136)
    got = product.fused(FewConfig(64, 64), "float32", real, grid=1)
    assert same_bits(got, product.sums()[:real])
    tiles = 1 if fetched <= 64 else 2
    last = [rows for x, _, rows in asked if x == 128]
    assert sum(last) == 64 * tiles + fetched  # weights, then tokens
