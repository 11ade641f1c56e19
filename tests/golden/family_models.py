"""Tiny random models of every family and switch, as directories that transformers and sharp both read.

Imports neither of the two. Weights are not stored: they come from numpy's RandomState, whose stream numpy
keeps frozen for ever, and families.json holds a checksum of them.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 96
NUM_PROMPT = 52
ROWS = (
    0,
    1,
    5,
    8,
    9,
    10,
    11,
    12,
    13,
    30,
    50,
    51,
)  # positions whose logits are kept; windows are 9 to 12 wide

_SIZES = {"vocab_size": VOCAB, "intermediate_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
_COMMON = {**_SIZES, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False}
_MISTRAL = {**_COMMON, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {**_COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_QWEN3 = {**_COMMON, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False}


def _heads(hidden: int, q: int, kv: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_attention_heads": q, "num_key_value_heads": kv}
    return sizes if head_dim is None else {**sizes, "head_dim": head_dim}


# Each is a config.json as users have them: some in the spelling before transformers 5 (torch_dtype,
# rope_theta, rope_scaling), some in the newer one (dtype, rope_parameters).
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **_LLAMA, **_heads(32, 4, 4), "torch_dtype": "float32", "rope_theta": 10000.0, "rope_scaling": None,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "pretraining_tp": 1,
    },
    "llama_tied": {
        **_LLAMA, **_heads(72, 9, 3), "dtype": "float32", "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True,
    },
    "llama_linear": {
        **_LLAMA, **_heads(32, 4, 2), "torch_dtype": "float32", "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 64,
    },
    "llama_llama3": {
        **_LLAMA, **_heads(64, 8, 1, 16), "torch_dtype": "float32", "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
    "llama_yarn": {
        **_LLAMA, **_heads(48, 6, 2, 16), "dtype": "float32", "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "llama_yarn_mscale": {
        **_LLAMA, **_heads(32, 2, 1, 16), "torch_dtype": "float32", "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.8,
            "mscale_all_dim": 0.3,
        },
        "max_position_embeddings": 256,
    },
    "mistral_window": {
        **_MISTRAL, **_heads(64, 8, 1), "torch_dtype": "float32", "rope_theta": 10000.0, "sliding_window": 12,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
    "mistral_head_dim": {
        **_MISTRAL, **_heads(40, 4, 1, 16), "dtype": "float32", "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "max_position_embeddings": 64,
    },
    "qwen2": {
        **_QWEN2, **_heads(56, 7, 1), "torch_dtype": "float32", "rope_theta": 1000000.0, "sliding_window": 8,
        "use_sliding_window": False, "max_window_layers": 1, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "qwen2_window": {
        **_QWEN2, **_heads(32, 4, 2), "num_hidden_layers": 3, "torch_dtype": "float32", "rope_theta": 10000.0,
        "sliding_window": 10, "use_sliding_window": True, "max_window_layers": 1,
        "max_position_embeddings": 64,
    },
    "qwen2_yarn": {
        **_QWEN2, **_heads(112, 14, 2), "torch_dtype": "float32", "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        "max_position_embeddings": 64,
    },
    "qwen3": {
        **_QWEN3, **_heads(48, 9, 1, 16), "torch_dtype": "float32", "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": None, "max_position_embeddings": 64,
    },
    "qwen3_window": {
        **_QWEN3, **_heads(32, 4, 2, 16), "num_hidden_layers": 3, "dtype": "float32", "sliding_window": 9,
        "use_sliding_window": True, "max_window_layers": 0, "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
    },
    "qwen3_yarn": {
        **_QWEN3, **_heads(32, 4, 1, 16), "dtype": "float32", "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": 64,
            "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
        },
    },
}  # fmt: skip

# The angles of models at their real size: rope_theta, head_dim, positions and scaling of published configs.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"rope_theta": 10000.0, "head_dim": 128, "max_position_embeddings": 4096},
    "smollm2-135m": {"rope_theta": 100000.0, "head_dim": 64, "max_position_embeddings": 8192},
    "llama-3.1-8b": {
        "rope_theta": 500000.0, "head_dim": 128, "max_position_embeddings": 131072,
        "rope_scaling": {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    },
    "llama-3.2-1b": {
        "rope_theta": 500000.0, "head_dim": 64, "max_position_embeddings": 131072,
        "rope_scaling": {**_LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "qwen2.5-7b with yarn": {
        "rope_theta": 1000000.0, "head_dim": 128, "max_position_embeddings": 32768,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn-llama-2-7b-64k": {
        "rope_theta": 10000.0, "head_dim": 128, "max_position_embeddings": 65536,
        "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
                         "finetuned": True},
    },
    "vicuna-7b-16k": {
        "rope_theta": 10000.0, "head_dim": 128, "max_position_embeddings": 4096,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
}  # fmt: skip


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


def prompt(name: str) -> list[int]:
    """Token ids of a model's prompt, longer than any window."""
    return np.random.RandomState(seed_of(name) ^ 1).randint(3, VOCAB, NUM_PROMPT).tolist()


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes, written down from transformers' modelling files."""
    hidden, inner, q, kv = (
        config[key]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim, family = config.get("head_dim", hidden // q), config["model_type"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for layer in range(config["num_hidden_layers"]):
        part = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q * head_dim, hidden),
            "self_attn.k_proj.weight": (kv * head_dim, hidden),
            "self_attn.v_proj.weight": (kv * head_dim, hidden),
            "self_attn.o_proj.weight": (hidden, q * head_dim),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if family == "qwen2":
            part |= {
                f"self_attn.{name}_proj.bias": part[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"
            }
        if family == "qwen3":
            part |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        out |= {f"model.layers.{layer}.{name}": shape for name, shape in part.items()}
    out["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = (VOCAB, hidden)
    return out


def make_weights(name: str) -> dict[str, np.ndarray]:
    """The model's float32 tensors under Hugging Face names.

    q and k are large enough for sharp attention, so that a wrong angle, mask or head shows in the logits.
    """
    config, random, out = CONFIGS[name], np.random.RandomState(seed_of(name)), {}
    for tensor, shape in shapes(config).items():
        # Nearly normal, from additions alone: no logarithm whose last bit depends on the machine.
        values = sum(random.random_sample(shape) for _ in range(12)) - 6.0
        if tensor.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif tensor == "model.embed_tokens.weight":
            values *= 0.3 if config.get("tie_word_embeddings") else 1.0
        elif not tensor.endswith(".bias"):
            gain = 2.0 if ".q_proj" in tensor or ".k_proj" in tensor or tensor.startswith("lm_head") else 1.2
            values *= gain / math.sqrt(shape[1])
        out[tensor] = values.astype(np.float32)
    return out


def checksum(weights: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def write_directory(folder: Path, name: str, *, weights: dict[str, np.ndarray] | None = None) -> Path:
    """The model `name` as a Hugging Face directory (with other weights, if they are given)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    save_file(make_weights(name) if weights is None else weights, folder / "model.safetensors")
    special = ["<unk>", "<s>", "</s>"]
    letters = [chr(code) for code in range(33, 33 + VOCAB - len(special))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, text in enumerate(special)
        ],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "vocab": {text: i for i, text in enumerate([*special, *letters])}, "merges": [],
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
