"""An HF `config.json` -> ModelConfig, in the spelling of transformers 5 and in the older ones.

Knows the file's keys and what transformers takes an absent one for. Refuses what the forward pass does not
compute, by name, with a list of what is supported. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharp.families import Family, family_of_hf
from sharp.model_config import ModelConfig, ModelFileError, model_config, read_json, whole_number
from sharp.rope import DEFAULT_ROPE, MAX_NUMBER, ROPE_KINDS, RopeScaling, positive, yarn_attention_factor

STORED_DTYPES = ("float32", "float16", "bfloat16")


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
    hidden, heads = whole_number(raw, "hidden_size"), whole_number(raw, "num_attention_heads")
    head_dim = family.head_dim if raw.get("head_dim") is None else raw["head_dim"]
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    positions, layers = raw.get("max_position_embeddings", 2048), whole_number(raw, "num_hidden_layers")
    theta, rope = rope_from_hf(raw, positions)
    window, full_layers = _windows(raw, family, layers)
    # generation_config.json knows the ends of turns that config.json often lacks.
    eos = raw.get("eos_token_id") if generation.get("eos_token_id") is None else generation["eos_token_id"]
    bos = raw.get("bos_token_id")
    return model_config(
        family,
        vocab_size=whole_number(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole_number(raw, "intermediate_size"),
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope=rope,
        max_position_embeddings=positions,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", family.tied),
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


def _flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
    return value


def _windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[Any, Sequence[int]]:
    """(sliding window or None, layers that see everything all the same), as transformers reads them."""
    window = raw.get("sliding_window", family.sliding_window)
    types = raw.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
            raise ValueError(f"layer_types must give one of {', '.join(known)} for each of {layers} layers")
    if family.window == "all" and types and len(set(types)) > 1:
        raise ValueError(f"layer_types that differ are not supported for {family.name}")
    if family.window == "some" and not _flag(raw, "use_sliding_window", False):
        window = None
    if window is None:
        if types and "sliding_attention" in types:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window in use")
        return None, ()
    if family.window != "some":
        return window, ()
    if types is None:
        first = raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ValueError(f"max_window_layers must be a whole number, not {first!r}")
        return window, range(min(max(first, 0), layers))
    return window, tuple(i for i, kind in enumerate(types) if kind == "full_attention")


_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
# Keys that say nothing about the angles. transformers does not read "finetuned", which the first yarn
# models carry.
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def _rope_object(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(rope_scaling or rope_parameters, the object under it): empty where there is none."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key)
    if rope is None:
        return key, {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} must be an object, not {rope!r}")
    if rope and all(isinstance(value, dict) for value in rope.values()):
        each = list(rope.values())
        if any(other != each[0] for other in each):
            raise ValueError(
                f"{key} differs between layer types ({', '.join(rope)}); one for all is supported"
            )
        rope = each[0]
    return key, rope


def rope_from_hf(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """(rope_theta, scaling) of a config.json in any of its spellings.

    rope_theta at the top with rope_scaling beside it ("type" or "rope_type"); or all in rope_parameters, the
    spelling of transformers 5, there also once for each layer type. As in transformers, rope_scaling goes
    first, and rope_theta at the top counts where the object has none.
    """
    key, rope = _rope_object(raw)
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    theta = 10000.0 if theta is None else theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"{key} of type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    for name, value in rope.items():
        if name not in (*_KEYS[kind], *_ALWAYS) and value is not None:
            known = ", ".join((*_KEYS[kind], "rope_theta"))
            raise ValueError(f"{key} of type {kind!r} has {name} = {value!r}; supported: {known}")
    if kind == "default":
        return theta, DEFAULT_ROPE
    values = {name: rope[name] for name in _KEYS[kind] if rope.get(name) is not None}
    for name in ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",):
        if name not in values:
            raise ValueError(f"{key} of type {kind!r} has no {name}")
    inside, above = (place.get("original_max_position_embeddings") for place in (values, raw))
    values.pop("original_max_position_embeddings", None)
    if kind != "linear":  # as in transformers, the top level goes first
        values["original_positions"] = next((n for n in (above, inside) if n is not None), max_positions)
    if kind == "yarn":
        mscale: dict[str, Any] = {name: values.pop(name, 0) for name in ("mscale", "mscale_all_dim")}
        for name, value in (("factor", values["factor"]), *mscale.items()):
            if not positive(value) and value != 0:
                raise ValueError(
                    f"{key}: {name} must be a positive number up to {MAX_NUMBER:g}, not {value!r}"
                )
        values.setdefault("attention_factor", yarn_attention_factor(values["factor"], **mscale))
    return theta, RopeScaling(kind=kind, **values)
