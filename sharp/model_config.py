"""ModelConfig: the shape of a model, read from an HF `config.json` or from GGUF metadata.

Knows what a Llama-shaped model's files say about its shape, and refuses what the forward pass cannot compute.
Knows nothing of tensors, devices or engine options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = ("llama",)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class ModelFileError(ValueError):
    """A model file is missing, damaged or of an unsupported kind; the message names file and field."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one decoder-only transformer.

    Raises ModelFileError on construction when the sizes contradict each other.
    """

    architecture: str
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
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise ModelFileError(f"{name} must be a whole number from 1 to 2**31 - 1, not {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ModelFileError(f"{name} must be a positive number, not {value!r}")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelFileError(
                f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
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
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * hidden + self.num_layers * layer + hidden

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


def config_from_hf(directory: Path) -> ModelConfig:
    """ModelConfig from `config.json` and, where it exists, `generation_config.json` (for the eos ids).

    Raises ModelFileError for unknown architectures, for a rope other than the default one, and for switches
    that the Llama forward pass does not have.
    """
    path = directory / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in SUPPORTED_ARCHITECTURES:
        raise ModelFileError(
            f"{path}: model_type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    refused = {
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "sliding_window": raw.get("sliding_window"),
        "quantization_config": raw.get("quantization_config"),
    }
    for name, value in refused.items():
        if value:
            raise ModelFileError(f"{path}: {name} = {value!r} is not supported (only absent or false)")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelFileError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelFileError(
            f"{path}: partial_rotary_factor {raw['partial_rotary_factor']!r} is not supported"
        )
    hidden, heads = _integer(raw, "hidden_size", path), _integer(raw, "num_attention_heads", path)
    if raw.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise ModelFileError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    bos = raw.get("bos_token_id")
    return _checked(
        path,
        architecture="llama",
        vocab_size=_integer(raw, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size", path),
        num_layers=_integer(raw, "num_hidden_layers", path),
        num_q_heads=heads,
        num_kv_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
        head_dim=hidden // heads if raw.get("head_dim") is None else raw["head_dim"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=_hf_rope_theta(raw, path),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=bos[0] if isinstance(bos, list) and bos else bos,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def config_from_gguf(metadata: Mapping[str, Any], num_vocab_rows: int, tied: bool, path: Path) -> ModelConfig:
    """ModelConfig from a GGUF file's key/value metadata.

    num_vocab_rows: rows of the embedding (`llama.vocab_size` is optional in the format); tied: the file has
    no tensor `output.weight`, which is how GGUF says that the head is the embedding.
    """
    kind = metadata.get("general.architecture")
    if kind not in SUPPORTED_ARCHITECTURES:
        raise ModelFileError(
            f"{path}: general.architecture {kind!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or f"{kind}.rope.scale_linear" in metadata:
        raise ModelFileError(f"{path}: rope scaling {scaling!r} is not supported; supported: none")
    if f"{kind}.attention.sliding_window" in metadata:
        raise ModelFileError(f"{path}: sliding-window attention is not supported")
    if metadata.get(f"{kind}.expert_count"):
        raise ModelFileError(
            f"{path}: {kind}.expert_count {metadata[f'{kind}.expert_count']} is not supported"
        )
    raw = {
        key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")
    }
    hidden, heads = _integer(raw, "embedding_length", path), _integer(raw, "attention.head_count", path)
    head_dim = raw.get("attention.key_length", hidden // max(heads, 1))
    for key, wanted in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if raw.get(key, wanted) != wanted:
            raise ModelFileError(f"{path}: {kind}.{key} {raw[key]!r} is not the head dimension {head_dim!r}")
    # eot and eom end a turn in chat models whose eos ends a document.
    stops = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return _checked(
        path,
        architecture="llama",
        vocab_size=raw.get("vocab_size", num_vocab_rows),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "feed_forward_length", path),
        num_layers=_integer(raw, "block_count", path),
        num_q_heads=heads,
        num_kv_heads=raw.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        # GGUF stores float32; the shortest decimal that rounds to it is what config.json said (1e-05).
        rms_norm_eps=_shortest_float32(raw.get("attention.layer_norm_rms_epsilon"), path),
        rope_theta=raw.get("rope.freq_base", 10000.0),
        max_position_embeddings=_integer(raw, "context_length", path),
        tie_word_embeddings=tied,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
    )


def _checked(path: Path, **fields: Any) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _integer(raw: Mapping[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFileError(f"{path}: {key} must be a whole number, not {value!r}")
    return value


def _hf_rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """rope_theta in the old spelling (top level) or the new one (rope_parameters); refuses any scaling."""
    theta = raw.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ModelFileError(f"{path}: {key} must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelFileError(f"{path}: {key} of type {kind!r} is not supported; supported: default")
        theta = rope.get("rope_theta", theta)
    value: float = 10000.0 if theta is None else theta
    return value


def _shortest_float32(value: Any, path: Path) -> float:
    if not isinstance(value, float):
        raise ModelFileError(f"{path}: attention.layer_norm_rms_epsilon must be a number, not {value!r}")
    return float(f"{value:.7g}")
