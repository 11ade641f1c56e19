"""GGUF metadata -> ModelConfig.

Knows the keys that llama.cpp's converter writes and how llama.cpp reads them. Refuses what the forward pass
does not compute, by name, with a list of what is supported. Knows nothing of tensors but their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharp.families import family_of_gguf
from sharp.model_config import ModelConfig, ModelFileError, model_config, whole_number
from sharp.rope import DEFAULT_ROPE, RopeScaling, positive, yarn_attention_factor


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
    hidden, heads = whole_number(raw, "embedding_length"), whole_number(raw, "attention.head_count")
    head_dim = raw.get("attention.key_length", hidden // max(heads, 1))
    for key, wanted in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if raw.get(key, wanted) != wanted:
            raise ValueError(f"{kind}.{key} {raw[key]!r} is not the head dimension {head_dim!r}")
    positions = whole_number(raw, "context_length")
    theta, rope = rope_from_gguf(raw, positions, rope_factors)
    # eot and eom end a turn in chat models whose eos ends a document.
    stops: list[Any] = []
    for name in ("eos", "eot", "eom"):
        stop = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if stop is not None and stop not in stops:
            stops.append(stop)
    return model_config(
        family,
        vocab_size=raw.get("vocab_size", shapes[embed][0]),
        hidden_size=hidden,
        intermediate_size=whole_number(raw, "feed_forward_length"),
        num_layers=whole_number(raw, "block_count"),
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
        eos_token_ids=tuple(stops),
    )


def _shortest_float32(value: Any) -> float:
    if not isinstance(value, float):
        raise ValueError(f"attention.layer_norm_rms_epsilon must be a number, not {value!r}")
    return float(f"{value:.7g}")


def rope_from_gguf(
    raw: Mapping[str, Any], max_positions: int, factors: tuple[float, ...]
) -> tuple[float, RopeScaling]:
    """(rope_theta, scaling) of a GGUF file: raw holds its metadata without the architecture before the key.

    factors: the tensor rope_freqs.weight, by which llama.cpp divides the frequencies: llama3 scaling, worked
    out by the converter. attention factor of yarn: llama.cpp multiplies 0.1 ln(factor) + 1 with
    rope.scaling.attn_factor; rope.scaling.yarn_attn_factor is config.json's attention_factor, which the
    converter copies there.
    """

    def number(name: str, default: float) -> float:
        value = raw.get(f"rope.scaling.{name}", default)
        if not positive(value) and value != 0:
            raise ValueError(f"rope.scaling.{name} must be a number of at least 0, not {value!r}")
        return float(value)

    theta = raw.get("rope.freq_base", 10000.0)
    # scale_linear is the key from before there were several kinds; llama.cpp reads it as the same.
    factor = number("factor", raw.get("rope.scale_linear", 0.0))
    kind = raw.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
    stretched = kind != "none" and factor not in (0, 1)
    if factors:
        if stretched:
            raise ValueError(f"rope_freqs.weight beside rope.scaling.type {kind!r} is not supported")
        return theta, RopeScaling(kind="factors", factors=factors)
    if not stretched:
        return theta, DEFAULT_ROPE
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    for name, harmless in (("yarn_ext_factor", 1), ("yarn_log_multiplier", 0)):
        if number(name, harmless) != harmless:
            raise ValueError(
                f"rope.scaling.{name} = {number(name, 0)} is not supported; supported: {harmless}"
            )
    whole = number("yarn_attn_factor", yarn_attention_factor(factor))
    return theta, RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=raw.get("rope.scaling.original_context_length", max_positions),
        beta_fast=number("yarn_beta_fast", 32.0),
        beta_slow=number("yarn_beta_slow", 1.0),
        attention_factor=whole * number("attn_factor", 1.0),
    )
