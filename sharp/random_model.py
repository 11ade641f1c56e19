"""Models of real shapes with random weights: step times and stalls need no trained ones, and no file.

Knows shapes and a random generator. Refuses to know text: such a model speaks in token ids alone.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sharp.config import ModelConfig
from sharp.weights import Checkpoint, FloatArray, expected_shapes

# From the models' own config.json.
SHAPES = {
    "smollm2-135m": ModelConfig(
        architecture="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
        num_q_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "llama-3.2-1b": ModelConfig(
        architecture="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
        num_q_heads=32, num_kv_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=5e5,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": ModelConfig(
        architecture="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28,
        num_q_heads=28, num_kv_heads=4, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        max_position_embeddings=131072, tie_word_embeddings=False, qkv_bias=True,
    ),
}  # fmt: skip
# Normal numbers, drawn once; every tensor is a stretch of them from a place of its own. A prime: rows of a
# matrix begin at different places of the pool.
POOL = 4_194_301
BIAS = 0.1  # standard deviation of a bias, beside products near 1


class RandomSource:
    """Tensors made when they are read, each from its name and the seed: a TensorSource (weights.py) without a
    file. Stored, so to speak, in bfloat16: rows of them come as fast as memory is copied, from any number of
    threads, and no tensor is held."""

    def __init__(self, name: str, config: ModelConfig, seed: int = 0) -> None:
        self.path, self.config, self.seed = Path(f"random-{name}"), config, seed
        self.shapes = expected_shapes(config)
        self.num_bytes = 2 * sum(math.prod(shape) for shape in self.shapes.values())
        self._normal = np.random.default_rng(seed).standard_normal(POOL, np.float32)
        self._pools: dict[float, npt.NDArray[Any]] = {}  # by standard deviation: a few for all tensors

    def where(self, name: str) -> str:
        return f"{self.path}: tensor {name}"

    def read(self, name: str) -> FloatArray:
        return self.rows(name, 0, self.shapes[name][0]).astype(np.float32)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of a tensor, or elements of a vector, in bfloat16."""
        rest = self.shapes[name][1:]
        width = math.prod(rest)
        if not rest and not name.endswith(".bias"):
            return np.ones(stop - start, ml_dtypes.bfloat16)
        # Rows of unit length keep activations near 1 through all layers.
        pool = self._pool(BIAS if not rest else 1 / math.sqrt(width))
        out = np.empty((stop - start) * width, ml_dtypes.bfloat16)
        bits = out.view(np.uint16)  # integers are copied without the interpreter's lock
        at, place = 0, (zlib.crc32(name.encode()) + start * width) % POOL
        while at < len(bits):
            part = pool[place : place + len(bits) - at]
            bits[at : at + len(part)] = part
            at, place = at + len(part), 0
        return out.reshape(stop - start, *rest)

    def _pool(self, deviation: float) -> npt.NDArray[Any]:
        found = self._pools.get(deviation)
        if found is None:  # two threads may both make it: they make the same
            found = (self._normal * np.float32(deviation)).astype(ml_dtypes.bfloat16).view(np.uint16)
            self._pools[deviation] = found
        return found


class IdTokenizer:
    """For a model that speaks in ids: no text goes in, none comes out. A tokenizer to the engine."""

    eos_token_ids: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise ValueError("a random model has no vocabulary: prompts are token ids")

    def detokenizer(self) -> IdTokenizer:
        return self

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class RandomCheckpoint(Checkpoint):
    """A checkpoint of a shape of SHAPES, the same for a seed. Raises ValueError for another name."""

    def __init__(self, name: str, seed: int = 0) -> None:
        if name not in SHAPES:
            raise ValueError(f"a random model's shape must be one of {', '.join(SHAPES)}, not {name!r}")
        super().__init__(RandomSource(name, SHAPES[name], seed))

    def tokenizer(self) -> Any:
        return IdTokenizer()
