"""Shapes for which a measured tile beats the one that the cost model picks by more than 1 %.

(row tiles of 128, N, K): tile. `just tune gemm` rewrites this file; what it measured stands in
notebooks/LOG.md.
"""

TUNED = {
    (1, 2048, 2048): "64x64deep",
    (1, 2048, 8192): "64x64deep",
    (2, 3584, 18944): "128x64c4",
    (3, 3584, 18944): "128x128",
    (8, 3072, 576): "128x96",
    (16, 576, 1536): "128x96",
    (16, 3072, 576): "128x128",
    (32, 960, 576): "128x128",
    (64, 960, 576): "128x160",
    (128, 960, 576): "128x160",
}
