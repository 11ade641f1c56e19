"""GGUF files: metadata and tensors under Hugging Face names, through the `gguf` library.

Knows the GGUF naming and layout of Llama-shaped models; refuses other quantisations and architectures. The
file stays memory-mapped, and a tensor is dequantised only when it is read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import ReaderTensor

from sharp.gguf_reader import read_gguf
from sharp.gguf_types import SUPPORTED, dequantize
from sharp.model_config import ModelConfig, ModelFileError, config_from_gguf

FloatArray = npt.NDArray[np.float32]

_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """One GGUF file of Llama shape.

    Attributes: path; metadata (key -> number, string, bool or list); config; shapes (HF name -> HF shape);
    num_bytes (of all tensors, as stored).
    Raises ModelFileError when the file is damaged, or of an unsupported architecture or tensor type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, tensors = read_gguf(path)
        if self.metadata.get("split.count", 1) != 1:
            raise ModelFileError(
                f"{path} is one part of {self.metadata['split.count']}: a model in several GGUF files is not "
                f"supported; merge them (llama.cpp's gguf-split --merge does)"
            )
        self._tensors: dict[str, ReaderTensor] = {}
        for tensor in tensors:
            if tensor.tensor_type not in SUPPORTED:
                raise ModelFileError(
                    f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which is not "
                    f"supported; supported: {', '.join(kind.name for kind in SUPPORTED)}"
                )
            self._tensors[_hf_name(tensor.name)] = tensor
        self.num_bytes = sum(tensor.n_bytes for tensor in tensors)
        self.shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}
        embed = self.shapes.get(_MODEL_NAMES["token_embd.weight"])
        if embed is None:
            raise ModelFileError(f"{path}: tensor token_embd.weight is missing")
        tied = _MODEL_NAMES["output.weight"] not in self.shapes
        self.config: ModelConfig = config_from_gguf(self.metadata, embed[0], tied, path)

    def stored_name(self, name: str) -> str:
        """The file's own name of the tensor with HF name `name`."""
        return self._tensors[name].name if name in self._tensors else _gguf_name(name)

    def read(self, name: str) -> FloatArray:
        """The tensor with HF name `name`: float32, HF shape, contiguous, q/k rows in rotate-half order."""
        tensor, shape = self._tensors[name], self.shapes[name]
        rows = np.asarray(tensor.data)
        for part, num_heads in (("q_proj.", self.config.num_q_heads), ("k_proj.", self.config.num_kv_heads)):
            if part in name:
                # Whole rows move, so they are moved while they are still quantised, and small.
                rows = rows[_rotate_half_rows(num_heads, shape[0] // num_heads)]
        return dequantize(rows, tensor.tensor_type, shape)


def _hf_name(name: str) -> str:
    """HF name of a GGUF tensor; an unknown name stays as it is, and is refused later."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _gguf_name(name: str) -> str:
    for ours, theirs in _MODEL_NAMES.items():
        if name == theirs:
            return ours
    for ours, theirs in _LAYER_NAMES.items():
        if f".{theirs}." in name:
            _, _, layer, *_, suffix = name.split(".")
            return f"blk.{layer}.{ours}.{suffix}"
    return name


def _rotate_half_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Row indices that take q/k rows from GGUF's order to HF's.

    Llama-architecture GGUF files store the rows of a head for interleaved rotary pairs (2i, 2i+1); HF's order
    rotates the pairs (i, i + head_dim/2). So HF row i is GGUF row 2i, and HF row i + head_dim/2 is row 2i +
    1.
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
