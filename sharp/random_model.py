"""Models of real shapes with random weights: step times and stalls need no trained ones, and no file.

Knows shapes and a random generator. Refuses to know text: such a model speaks in token ids alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

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
}  # fmt: skip


class RandomSource:
    """Tensors drawn when they are read, each from its name: a TensorSource (weights.py) without a file."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.path, self.config = Path(f"random-{name}"), config
        self.shapes = expected_shapes(config)
        self.num_bytes = 4 * sum(math.prod(shape) for shape in self.shapes.values())

    def where(self, name: str) -> str:
        return f"{self.path}: tensor {name}"

    def read(self, name: str) -> FloatArray:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        rng = np.random.default_rng(list(name.encode()))
        # Rows of unit length keep activations near 1 through all layers.
        return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1]))


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
    """A checkpoint of a shape of SHAPES. Raises ValueError for another name."""

    def __init__(self, name: str) -> None:
        if name not in SHAPES:
            raise ValueError(f"a random model's shape must be one of {', '.join(SHAPES)}, not {name!r}")
        super().__init__(RandomSource(name, SHAPES[name]))

    def tokenizer(self) -> Any:
        return IdTokenizer()
