"""The tensor types of GGUF files that can be read, and how their blocks become float32.

Knows block sizes and the `gguf` library's decoders, one for each type. Knows nothing of names and files.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import quants

FloatArray = npt.NDArray[np.float32]

# The library's own block decoders. Its `gguf.dequantize` calls them on 16 rows at a time and concatenates the
# pieces: 6 times slower on the demo model (1.45 s against 0.24 s) and with a second copy of the tensor.
# Q5_1 is what writers of Q5_K files fall back to for a row that is no multiple of 256.
DECODERS: dict[Kind, Callable[[npt.NDArray[np.uint8]], FloatArray]] = {
    Kind.BF16: quants.BF16.dequantize_blocks,
    Kind.Q8_0: quants.Q8_0.dequantize_blocks,
    Kind.Q4_0: quants.Q4_0.dequantize_blocks,
    Kind.Q4_1: quants.Q4_1.dequantize_blocks,
    Kind.Q5_0: quants.Q5_0.dequantize_blocks,
    Kind.Q5_1: quants.Q5_1.dequantize_blocks,
    Kind.Q4_K: quants.Q4_K.dequantize_blocks,
    Kind.Q5_K: quants.Q5_K.dequantize_blocks,
    Kind.Q6_K: quants.Q6_K.dequantize_blocks,
}
PLAIN = (Kind.F32, Kind.F16)  # numpy reads these itself
SUPPORTED = (*PLAIN, *DECODERS)
_CHUNK_WEIGHTS = 1 << 19  # 2 MB of float32: temporaries stay in the cache


def dequantize(rows: npt.NDArray[np.generic], kind: Kind, shape: tuple[int, ...]) -> FloatArray:
    """float32[shape], contiguous, of a tensor as stored: its numbers (F32, F16) or the bytes of its blocks.

    Bit by bit what `gguf.dequantize` gives. kind: one of SUPPORTED, else KeyError.
    """
    if kind in PLAIN:
        return np.array(rows, dtype=np.float32).reshape(shape)
    decode = DECODERS[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rows.view(np.uint8).reshape(-1, block_bytes)
    out = np.empty((blocks.shape[0], block), dtype=np.float32)
    step = _CHUNK_WEIGHTS // block
    with np.errstate(all="ignore"):  # a scale that is infinite or no number is the file's, not an accident
        for start in range(0, blocks.shape[0], step):
            out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(shape)
