"""The GEMM for many tokens: its kernel's text in numpy, bit by bit against the order of K."""

from __future__ import annotations

import numpy as np
import pytest
from few_products import make_product, rounded, same_bits
from many_products import many_in_numpy

from kernels_numba.ops.gemm.boxes import heights
from kernels_numba.ops.gemm.hopper_config import CONFIGS, HopperConfig


def product_of(product, config, out_dtype="bfloat16", real=None, **how):
    """What the kernel leaves below `real`; nothing else may be written."""
    m, n = len(product.x), len(product.weight) // (2 if product.activation else 1)
    wider = rounded(np.full((m + 2, n + 8), np.nan, np.float32), out_dtype)
    before = wider.copy()
    out = wider[1 : m + 1, :n]
    many_in_numpy(
        config, out, product.x, product.weight, product.bias, real, activation=product.activation,
        residual=product.residual, **how,
    )  # fmt: skip
    written = m if real is None else real
    got = out[:written].copy()
    out[:written] = before[1 : written + 1, :n]
    assert same_bits(wider, before), "wrote outside of [M, N]"
    return got


@pytest.mark.parametrize("config", [*CONFIGS, HopperConfig(64, 32, deep=True)], ids=str)
def test_bits_are_those_of_the_order_along_k(config):
    """Whole and partial rows, columns and steps of K. Shared memory that no box fills is NaN."""
    for m, n, k in ((1, 8, 8), (77, 328, 200), (192, 264, 72)):
        product = make_product(np.random.default_rng([m, n, k]), m, n, k, bias=m == 77)
        assert same_bits(product_of(product, config), rounded(product.sums(), "bfloat16")), m
    assert same_bits(product_of(product, config, "float32", grid=3, group=2), product.sums())


CLUSTERS = [
    HopperConfig(64, 32, True, 4),
    HopperConfig(128, 64, cluster=2),
    HopperConfig(128, 16, cluster=4),
]


@pytest.mark.parametrize("config", CLUSTERS, ids=str)
def test_blocks_of_a_cluster_fetch_x_for_one_another(config):
    """Parts of a tile's rows that are equal, overlap, or are one row; several tiles a cluster."""
    for m, n, k in ((1, 256, 72), (77, 512, 200), (131, 248, 1100)):
        product = make_product(np.random.default_rng([m, n, k]), m, n, k, bias=m == 77)
        want = rounded(product.sums(), "bfloat16")
        for seed in range(2):
            assert same_bits(product_of(product, config, grid=1 + seed, group=2, seed=seed), want), (m, seed)
        real = m // 2
        assert same_bits(product_of(product, config, real=real), want[:real])


@pytest.mark.parametrize(
    "config", [HopperConfig(64, 48), HopperConfig(128, 112), HopperConfig(128, 256)], ids=str
)
def test_the_real_number_of_rows_is_read_by_the_kernel(config):
    product = make_product(np.random.default_rng(1), 140, 200, 136)
    want = rounded(product.sums(), "bfloat16")
    for real in (0, 1, 63, 64, 65, 128, 129, 140):
        assert same_bits(product_of(product, config, real=real), want[:real]), real


MISTAKES = {
    "fewer bytes are waited for": (
        "hopper",
        "mbarrier_expect_tx(ready, stage_bytes)",
        "mbarrier_expect_tx(ready, x_bytes)",
    ),
    "rows past the last are written": ("hopper", "int32(m - row), int32(n - col)", "64, int32(n - col)"),
    "columns past the last are written": (
        "hopper",
        "int32(m - row), int32(n - col)",
        "int32(m - row), 1 << 20",
    ),
    "partial rows leave by whole boxes": ("hopper", "int32(row + 64 <= m)", "int32(1)"),
    "the last tile's boxes are whole ones": ("boxes", "int32(height < whole) * MAP_BYTES", "0"),
    "the last tile waits for whole boxes": (
        "boxes",
        "(height + weight_height) * row_bytes",
        "(height + tile_weight) * row_bytes",
    ),
}


SHARED_MISTAKES = {
    "a stage is handed back to one block": (
        "hopper",
        "mbarrier_arrive_remote(barrier, lane)",
        "mbarrier_arrive(barrier)",
    ),
    "a stage is refilled when one block is done": ("hopper", "4 * consumers * cluster)", "4 * consumers)"),
    "all blocks fetch the same part of x": ("boxes", "int32(cluster_rank()) * part", "part"),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *SHARED_MISTAKES])
def test_mistakes_are_noticed_in_numpy(mistake):
    part, old, new = (MISTAKES | SHARED_MISTAKES)[mistake]
    config, n, k = HopperConfig(128, 80), 200, 136
    if mistake in SHARED_MISTAKES:
        config, n, k = HopperConfig(64, 16, cluster=2), 64, 712  # more steps of K than stages
    product = make_product(np.random.default_rng(2), 140, n, k)
    want = rounded(product.sums(), "bfloat16")

    def right(seed, **how):
        try:
            return same_bits(product_of(product, config, real=99, seed=seed, **how), want[:99])
        except (AssertionError, IndexError, RuntimeError):
            return False

    def change(name, text):
        if not name.endswith(f".{part}"):
            return text
        assert old in text
        return text.replace(old, new)

    assert all(right(seed) for seed in range(2))
    assert not all(right(seed, change=change) for seed in range(2))


@pytest.mark.parametrize(("rows", "tile", "parts", "want"), [
    (1, 64, 1, (1, 1)), (64, 64, 1, (64, 64)), (65, 64, 1, (64, 1)), (200, 128, 1, (128, 72)),
    (3584, 96, 1, (96, 32)), (65, 64, 4, (16, 1)), (77, 64, 4, (16, 4)), (50, 64, 4, (13, 13)),
])  # fmt: skip
def test_boxes_end_where_the_matrix_does(rows, tile, parts, want):
    assert heights(rows, tile, parts) == want
    whole, last = want
    assert (rows - 1) // tile * tile + last <= rows  # no row that is not there
    assert parts * whole >= min(rows, tile)
    assert parts * last >= (rows % tile or min(rows, tile))
