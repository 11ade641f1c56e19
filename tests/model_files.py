"""Model files made on the fly for tests: variants of weights/tiny as HF directories and as GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, in which the tiny model is stored)
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file, save_file

from sharp.model_config import ModelConfig
from sharp.weights import expected_shapes

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class MemorySource:
    """Tensors in memory, random, for shapes that no file has."""

    path = Path("memory")
    num_bytes = 0

    def __init__(self, config: ModelConfig) -> None:
        self.config, rng = config, np.random.default_rng(0)
        self.tensors = {
            name: rng.standard_normal(shape, dtype=np.float32)
            for name, shape in expected_shapes(config).items()
        }
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def where(self, name: str) -> str:
        return f"memory: tensor {name}"

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.tensors[name][start:stop]


def tiny_tensors() -> dict[str, np.ndarray]:
    """The tiny model's tensors in float32, read by the safetensors library alone."""
    return {name: tensor.astype(np.float32) for name, tensor in load_file(TINY / "model.safetensors").items()}


def copy_tiny(folder: Path, **config: Any) -> Path:
    """A copy of weights/tiny with entries of config.json replaced (None removes one)."""
    shutil.copytree(TINY, folder)
    if config:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Let `change` edit the tensors of an HF directory in place."""
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def to_gguf_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """HF q/k rows -> GGUF rows of the llama architecture: in each head i -> 2i, i + D/2 -> 2i + 1."""
    head_dim, out = weight.shape[0] // num_heads, np.empty_like(weight)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = weight[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = weight[head * head_dim + head_dim // 2 + i]
    return out


def gguf_tensors() -> dict[str, np.ndarray]:
    """The tiny model's float32 tensors under GGUF names and in GGUF row order."""
    out = {}
    for name, tensor in tiny_tensors().items():
        if name.endswith("q_proj.weight"):
            tensor = to_gguf_rows(tensor, Q_HEADS)
        if name.endswith("k_proj.weight"):
            tensor = to_gguf_rows(tensor, KV_HEADS)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            out[f"blk.{layer}.{_NAMES[part]}.weight"] = tensor
        else:
            out[_NAMES[stem] + ".weight"] = tensor
    return out


def write_gguf(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    change: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: None,
    metadata: Callable[[GGUFWriter], Any] = lambda writer: None,
    pre: str = "gpt2",
    add_bos: bool = False,
    inner: int = 64,
) -> Path:
    """The tiny model as a GGUF file: matrices stored as `kind`, norms as F32."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(Q_HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(config["chat_template"])
    metadata(writer)
    tensors = gguf_tensors()
    change(tensors)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
