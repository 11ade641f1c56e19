"""ModelConfig: the shape of a model, whichever file it came from (hf_config.py, gguf_config.py).

Knows sizes and switches, and that they fit each other; refuses to know file formats, tensors, devices and
engine options. What sets the families apart is in families.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharp.families import Family
from sharp.rope import DEFAULT_ROPE, MAX_NUMBER, RopeScaling, positive

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class ModelFileError(ValueError):
    """A model file is missing, damaged or of an unsupported kind; the message names file and field."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, constants and switches of one decoder-only transformer.

    sliding_window: a query sees the last that many keys, itself included, in every layer that is not one of
    full_layers; None: all keys. max_position_embeddings: positions that the engine may use, which is more
    than config.json says where yarn stretches fewer.
    Raises ModelFileError on construction when the sizes contradict each other.
    """

    architecture: str  # the family's name
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rope: RopeScaling = DEFAULT_ROPE
    sliding_window: int | None = None
    full_layers: Sequence[int] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        ):
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise ModelFileError(f"{name} must be a whole number from 1 to 2**31 - 1, not {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not positive(value):
                raise ModelFileError(f"{name} must be a positive number up to {MAX_NUMBER:g}, not {value!r}")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelFileError(
                f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if self.rope.kind == "yarn" and self.rope_theta <= 1:
            raise ModelFileError(f"rope_theta {self.rope_theta} is too small for yarn; over 1 is required")
        if self.rope.kind == "factors" and len(self.rope.factors) != self.head_dim // 2:
            raise ModelFileError(
                f"there are {len(self.rope.factors)} rope factors, head_dim {self.head_dim} "
                f"needs {self.head_dim // 2}"
            )
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for token_id in (*self.eos_token_ids, *bos):
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ModelFileError(f"token id {token_id!r} (bos or eos) is not a whole number")
            if not 0 <= token_id < self.vocab_size:
                raise ModelFileError(f"token id {token_id} (bos or eos) is outside [0, {self.vocab_size})")

    @property
    def num_parameters(self) -> int:
        """Unique parameters; a tied lm_head is the embedding and counts once."""
        hidden, qkv_rows = self.hidden_size, (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = qkv_rows * hidden + hidden * self.num_q_heads * self.head_dim
        layer += 3 * self.intermediate_size * hidden + 2 * hidden
        layer += qkv_rows if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * hidden + self.num_layers * layer + hidden

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None where it sees all keys."""
        return None if layer in self.full_layers else self.sliding_window

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V that one token takes over all layers, for dtype "float32" or "bfloat16"."""
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelFileError naming the file when it is absent or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise ModelFileError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def model_config(family: Family, *, rope: RopeScaling, **fields: Any) -> ModelConfig:
    """A config from what a file says, of either format: adds the family's switches and yarn's longer context.

    ValueError for a rope type that the family does not have, and as ModelConfig.
    """
    if rope.kind != "factors" and rope.kind not in family.rope_kinds:
        raise ValueError(
            f"rope type {rope.kind!r} is not supported for {family.name}; "
            f"supported: {', '.join(family.rope_kinds)}"
        )
    if rope.kind == "yarn" and isinstance(fields["max_position_embeddings"], int):
        stretched = int(min(rope.original_positions * rope.factor, 2**31 - 1))
        fields["max_position_embeddings"] = max(fields["max_position_embeddings"], stretched)
    return ModelConfig(
        architecture=family.name, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm, rope=rope, **fields
    )


def whole_number(raw: Mapping[str, Any], key: str) -> int:
    """raw[key], which must be there and a whole number: ValueError otherwise."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be a whole number, not {value!r}")
    return value
