"""ModelConfig: the shape of a model, read from an HF `config.json` or from GGUF metadata.

Knows what a model's files say about its shape and switches, and refuses what the forward pass cannot compute.
Knows nothing of tensors, devices or engine options; what sets the families apart is in families.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharp.families import Family, family_of_gguf, family_of_hf
from sharp.rope import DEFAULT_ROPE, RopeScaling, rope_from_gguf, rope_from_hf

STORED_DTYPES = ("float32", "float16", "bfloat16")
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
    full_layers: frozenset[int] = frozenset()
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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ModelFileError(f"{name} must be a positive number, not {value!r}")
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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def config_from_hf(directory: Path) -> ModelConfig:
    """ModelConfig from `config.json` and, where it exists, `generation_config.json` (for the eos ids).

    Raises ModelFileError for unknown families and rope types, and for switches that the forward pass does not
    have; the message names what is supported.
    """
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    raw = read_json(path)
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        return _config_from_hf(raw, generation)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    family = family_of_hf(raw.get("model_type"), raw.get("architectures"))
    _refuse_unsupported(raw, family)
    hidden, heads = _integer(raw, "hidden_size"), _integer(raw, "num_attention_heads")
    head_dim = family.head_dim if raw.get("head_dim") is None else raw["head_dim"]
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    positions, layers = raw.get("max_position_embeddings", 2048), _integer(raw, "num_hidden_layers")
    theta, rope = rope_from_hf(raw, positions)
    window, full_layers = _windows(raw, family, layers)
    # generation_config.json knows the ends of turns that config.json often lacks.
    eos = raw.get("eos_token_id") if generation.get("eos_token_id") is None else generation["eos_token_id"]
    bos = raw.get("bos_token_id")
    return _model_config(
        family,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope=rope,
        max_position_embeddings=positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", family.tied)),
        sliding_window=window,
        full_layers=full_layers,
        bos_token_id=bos[0] if isinstance(bos, list) and bos else bos,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: Family) -> None:
    """Switches of config.json that would change the numbers. ValueError names the first."""
    refused = {"mlp_bias": raw.get("mlp_bias"), "quantization_config": raw.get("quantization_config")}
    if not family.qkv_bias:
        refused["attention_bias"] = raw.get("attention_bias")
    if family.window == "none":
        refused["sliding_window"] = raw.get("sliding_window")
    for name, value in refused.items():
        if value:
            raise ValueError(f"{name} = {value!r} is not supported for {family.name} (only absent or false)")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for place in (raw, nested if isinstance(nested, dict) else {}):
        if place.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor {place['partial_rotary_factor']!r} is not supported")
    for name in ("dtype", "torch_dtype"):  # the new spelling and the old one
        value = raw.get(name)
        if value is not None and str(value).removeprefix("torch.") not in STORED_DTYPES:
            raise ValueError(f"{name} {value!r} is not supported; supported: {', '.join(STORED_DTYPES)}")


def _windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[Any, frozenset[int]]:
    """(sliding window or None, layers that see everything all the same), as transformers reads them."""
    window = raw.get("sliding_window", family.sliding_window)
    types = raw.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
            raise ValueError(f"layer_types must give one of {', '.join(known)} for each of {layers} layers")
    if family.window == "all" and types and len(set(types)) > 1:
        raise ValueError(f"layer_types that differ are not supported for {family.name}")
    if family.window == "some" and not raw.get("use_sliding_window", False):
        window = None
    if window is None:
        if types and "sliding_attention" in types:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window in use")
        return None, frozenset()
    if family.window != "some":
        return window, frozenset()
    if types is None:
        first = raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ValueError(f"max_window_layers must be a whole number, not {first!r}")
        return window, frozenset(range(min(max(first, 0), layers)))
    return window, frozenset(i for i, kind in enumerate(types) if kind == "full_attention")


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    rope_factors: tuple[float, ...] = (),
) -> ModelConfig:
    """ModelConfig from a GGUF file's key/value metadata.

    shapes: of its tensors, under the file's names: `vocab_size` is optional in the format, so the embedding's
    rows stand in; and no `output.weight` is how GGUF says that the head is the embedding. rope_factors: the
    values of `rope_freqs.weight`. Raises ModelFileError as config_from_hf does.
    """
    try:
        return _config_from_gguf(metadata, shapes, rope_factors)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: tuple[float, ...]
) -> ModelConfig:
    kind = metadata.get("general.architecture")
    raw = {
        key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")
    }
    window = raw.get("attention.sliding_window") or None  # some writers say 0 for none
    family = family_of_gguf(kind, window is not None)
    embed = family.gguf_names.stored("model.embed_tokens.weight")
    if not shapes.get(embed):
        raise ValueError(f"tensor {embed} is missing")
    for key in ("expert_count", "attention.sliding_window_pattern"):
        if raw.get(key):
            raise ValueError(f"{kind}.{key} {raw[key]} is not supported")
    hidden, heads = _integer(raw, "embedding_length"), _integer(raw, "attention.head_count")
    head_dim = raw.get("attention.key_length", hidden // max(heads, 1))
    for key, wanted in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if raw.get(key, wanted) != wanted:
            raise ValueError(f"{kind}.{key} {raw[key]!r} is not the head dimension {head_dim!r}")
    positions = _integer(raw, "context_length")
    theta, rope = rope_from_gguf(raw, positions, rope_factors)
    # eot and eom end a turn in chat models whose eos ends a document.
    stops = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return _model_config(
        family,
        vocab_size=raw.get("vocab_size", shapes[embed][0]),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "feed_forward_length"),
        num_layers=_integer(raw, "block_count"),
        num_q_heads=heads,
        num_kv_heads=raw.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        # GGUF stores float32; the shortest decimal that rounds to it is what config.json said (1e-05).
        rms_norm_eps=_shortest_float32(raw.get("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope=rope,
        max_position_embeddings=positions,
        tie_word_embeddings=family.gguf_names.stored("lm_head.weight") not in shapes,
        sliding_window=window,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
    )


def _model_config(family: Family, *, rope: RopeScaling, **fields: Any) -> ModelConfig:
    """What both formats have in common: the family's switches, and how far yarn stretches the context."""
    if rope.kind != "factors" and rope.kind not in family.rope_kinds:
        raise ValueError(
            f"rope type {rope.kind!r} is not supported for {family.name}; "
            f"supported: {', '.join(family.rope_kinds)}"
        )
    if rope.kind == "yarn" and isinstance(fields["max_position_embeddings"], int):
        stretched = min(int(rope.original_positions * rope.factor), 2**31 - 1)
        fields["max_position_embeddings"] = max(fields["max_position_embeddings"], stretched)
    return ModelConfig(
        architecture=family.name, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm, rope=rope, **fields
    )


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be a whole number, not {value!r}")
    return value


def _shortest_float32(value: Any) -> float:
    if not isinstance(value, float):
        raise ValueError(f"attention.layer_norm_rms_epsilon must be a number, not {value!r}")
    return float(f"{value:.7g}")
