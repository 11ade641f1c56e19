"""GGUF files: metadata and tensors under our names, through the `gguf` library.

Knows the layout of GGUF's tensors; refuses other quantisations. The names are the family's (families.py). The
file stays memory-mapped, and a tensor is dequantised only when it is read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, ReaderTensor

from sharp.families import FAMILIES
from sharp.gguf_config import config_from_gguf
from sharp.gguf_reader import read_gguf
from sharp.gguf_types import SUPPORTED, dequantize
from sharp.model_config import ModelConfig, ModelFileError

FloatArray = npt.NDArray[np.float32]

_ROPE_FACTORS = "rope_freqs.weight"  # not a weight of the forward, but a part of the configuration
_MAX_ROPE_FACTORS = 4096


class GGUFFile:
    """One GGUF file.

    Attributes: path; metadata (key -> number, string, bool or list); config; shapes (our name -> HF shape);
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
        stored: dict[str, ReaderTensor] = {}
        for tensor in tensors:
            if tensor.tensor_type not in SUPPORTED:
                raise ModelFileError(
                    f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which is not "
                    f"supported; supported: {', '.join(kind.name for kind in SUPPORTED)}"
                )
            stored[tensor.name] = tensor
        self.num_bytes = sum(tensor.n_bytes for tensor in tensors)
        shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in stored.items()}
        factors = _rope_factors(stored.pop(_ROPE_FACTORS, None), path)
        self.config: ModelConfig = config_from_gguf(self.metadata, shapes, path, factors)
        self._family = FAMILIES[self.config.architecture]
        self._tensors = {self._family.gguf_names.ours(name): tensor for name, tensor in stored.items()}
        self.shapes = {name: shapes[tensor.name] for name, tensor in self._tensors.items()}

    def where(self, name: str) -> str:
        """A tensor for a message: the file and its name there."""
        return f"{self.path}: tensor {self._family.gguf_names.stored(name)}"

    def read(self, name: str) -> FloatArray:
        """The tensor of our name: float32, HF shape, contiguous, q/k rows in rotate-half order."""
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows [start, stop) of what read() gives; nothing else is dequantised, but all of a vector.

        Safe to call from several threads.
        """
        tensor, shape = self._tensors[name], self.shapes[name]
        stored = np.asarray(tensor.data)
        order: slice | npt.NDArray[np.intp] = slice(start, stop)
        for part, num_heads in (("q_proj.", self.config.num_q_heads), ("k_proj.", self.config.num_kv_heads)):
            if part in name and self._family.gguf_interleaved:
                # Whole rows move, so they are moved while they are still quantised, and small.
                order = _rotate_half_rows(num_heads, shape[0] // num_heads)[start:stop]
        if len(shape) == 1:  # of blocks that hold several elements
            return dequantize(stored, tensor.tensor_type, shape)[order]
        return dequantize(stored[order], tensor.tensor_type, (stop - start, *shape[1:]))


def _rope_factors(tensor: ReaderTensor | None, path: Path) -> tuple[float, ...]:
    """The values of rope_freqs.weight: a divisor of each rotary frequency; empty without the tensor."""
    if tensor is None:
        return ()
    if tensor.tensor_type != GGMLQuantizationType.F32 or tensor.n_elements > _MAX_ROPE_FACTORS:
        raise ModelFileError(
            f"{path}: tensor {tensor.name} has {tensor.n_elements} values of type {tensor.tensor_type.name}; "
            f"F32 and at most {_MAX_ROPE_FACTORS} are supported"
        )
    return tuple(np.asarray(tensor.data, dtype=np.float32).reshape(-1).tolist())


def _rotate_half_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Row indices that take q/k rows from GGUF's order to HF's.

    GGUF files of architecture llama (not those of qwen2 and qwen3) store the rows of a head for interleaved
    rotary pairs (2i, 2i+1); HF's order rotates the pairs (i, i + head_dim/2). So HF row i is GGUF row 2i, and
    HF row i + head_dim/2 is row 2i + 1.
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
