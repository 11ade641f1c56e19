"""GGUF files: metadata and tensors under our names, through the `gguf` library.

Knows the layout of GGUF's tensors; refuses other quantisations. The names are the family's (families.py). The
file stays memory-mapped, and a tensor is dequantised only when it is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, quants

from sharp.families import FAMILIES
from sharp.gguf_config import config_from_gguf
from sharp.model_config import ModelConfig, ModelFileError

FloatArray = npt.NDArray[np.float32]

_ROPE_FACTORS = "rope_freqs.weight"  # not a weight of the forward, but a part of the configuration
_MAX_ROPE_FACTORS = 4096
# The library's own block decoders. Its `gguf.dequantize` calls them on 16 rows at a time and concatenates the
# pieces: 6 times slower on the demo model (1.45 s against 0.24 s) and with a second copy of the tensor.
_DECODERS: dict[GGMLQuantizationType, Callable[[npt.NDArray[np.uint8]], FloatArray]] = {
    GGMLQuantizationType.Q4_1: quants.Q4_1.dequantize_blocks,
    GGMLQuantizationType.Q8_0: quants.Q8_0.dequantize_blocks,
}
_CHUNK_BLOCKS = 1 << 14  # 2 MB of float32 at 32 weights a block: temporaries stay in the cache


class _Reader(GGUFReader):
    """The library's reader, with arrays of metadata read at once and bounds checked.

    The library makes several numpy objects per array element: 3.0 s for the 100,000 strings of a tokenizer,
    where this takes 0.05 s. It also trusts an array's length, so that a damaged count loops for ever.
    """

    def __init__(self, path: Path) -> None:
        self.arrays: dict[int, list[Any]] = {}  # by the file offset where the array's value starts
        super().__init__(path)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        if self.byte_order != "I":
            raise ValueError("big-endian files are not supported")
        header = self._get(orig_offs, np.uint8, 12).tobytes()
        element_type, count = struct.unpack("<IQ", header)
        start = orig_offs + len(header)
        kind = GGUFValueType(element_type)
        if kind == GGUFValueType.STRING:
            self.arrays[orig_offs], end = self._strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            dtype = np.dtype(self.gguf_scalar_to_np[kind])
            end = start + count * dtype.itemsize
            if end > self.data.size:
                raise ValueError(
                    f"an array of {count} values at byte {orig_offs} runs past the end of the file"
                )
            self.arrays[orig_offs] = self._get(start, dtype, count).tolist()
        else:
            raise ValueError(f"an array of {kind.name} at byte {orig_offs} is not supported")
        # The parts are what the base class sums to find the next field; the values live in `arrays`.
        return end - orig_offs, [self.data[orig_offs:end]], [0], [GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[str], int]:
        unpack, size = struct.Struct("<Q").unpack_from, self.data.size
        if start + 8 * count > size:
            raise ValueError(f"an array of {count} strings at byte {start} runs past the end of the file")
        buffer: memoryview = self.data.data
        out = []
        for _ in range(count):
            if start + 8 > size:
                raise ValueError(f"the string at byte {start} runs past the end of the file")
            end = start + 8 + unpack(buffer, start)[0]
            if end > size:
                raise ValueError(f"the string at byte {start} runs past the end of the file")
            out.append(str(buffer[start + 8 : end], "utf-8"))
            start = end
        return out, start

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, name, _, dims, raw_type, offset = field.parts
            tensor, kind = str(bytes(name), "utf-8"), GGMLQuantizationType(int(raw_type[0]))
            num_weights = 1
            for dim in dims.tolist():  # Python integers: the library's product wraps at 2**64
                num_weights *= dim
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if dims.size == 0 or num_weights == 0 or int(dims[0]) % block:
                raise ValueError(f"tensor {tensor} has shape {dims.tolist()}, which {kind.name} cannot store")
            end = start_offs + int(offset[0]) + num_weights // block * block_bytes
            if end > self.data.size:
                raise ValueError(
                    f"tensor {tensor} ends at byte {end} of a file of {self.data.size}: the file is truncated"
                )
        super()._build_tensors(start_offs, fields)


class GGUFFile:
    """One GGUF file.

    Attributes: path; metadata (key -> number, string, bool or list); config; shapes (our name -> HF shape);
    num_bytes (of all tensors, as stored).
    Raises ModelFileError when the file is damaged, or of an unsupported architecture or tensor type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _Reader(path)
        except FileNotFoundError:
            raise ModelFileError(f"{path} does not exist") from None
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, struct.error) as error:
            raise ModelFileError(
                f"{path} is not a readable GGUF file (damaged or truncated): {error}"
            ) from None
        self.metadata = {key: _value(reader, key) for key in reader.fields}
        stored: dict[str, gguf.ReaderTensor] = {}
        for tensor in reader.tensors:
            kind = tensor.tensor_type
            if kind not in _DECODERS and kind != GGMLQuantizationType.F32:
                known = ", ".join(["F32", *(known.name for known in _DECODERS)])
                raise ModelFileError(
                    f"{path}: tensor {tensor.name} has type {kind.name}, which is not supported; "
                    f"supported: {known}"
                )
            stored[tensor.name] = tensor
        self.num_bytes = sum(tensor.n_bytes for tensor in reader.tensors)
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
        tensor, shape = self._tensors[name], self.shapes[name]
        rows = np.asarray(tensor.data)
        for part, num_heads in (("q_proj.", self.config.num_q_heads), ("k_proj.", self.config.num_kv_heads)):
            if part in name and self._family.gguf_interleaved:
                # Whole rows move, so they are moved while they are still quantised, and small.
                rows = rows[_rotate_half_rows(num_heads, shape[0] // num_heads)]
        if tensor.tensor_type == GGMLQuantizationType.F32:
            return np.array(rows, dtype=np.float32)
        decode = _DECODERS[tensor.tensor_type]
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        blocks = rows.reshape(-1, block_bytes)
        out = np.empty((blocks.shape[0], block), dtype=np.float32)
        for start in range(0, blocks.shape[0], _CHUNK_BLOCKS):
            out[start : start + _CHUNK_BLOCKS] = decode(blocks[start : start + _CHUNK_BLOCKS])
        return out.reshape(shape)


def _value(reader: _Reader, key: str) -> Any:
    field = reader.fields[key]
    if field.types[0] == GGUFValueType.ARRAY:
        # The value starts after the key (u64 length, bytes) and the u32 type.
        return reader.arrays[field.offset + 8 + int(field.parts[0][0]) + 4]
    try:
        return field.contents()
    except (UnicodeDecodeError, IndexError) as error:
        raise ModelFileError(f"{reader.data.filename}: metadata {key} cannot be read: {error}") from None


def _rope_factors(tensor: gguf.ReaderTensor | None, path: Path) -> tuple[float, ...]:
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
