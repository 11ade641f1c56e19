"""The container of a GGUF file: metadata and where each tensor lies, checked against the file before use.

Knows the layout of the file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) through the `gguf`
library's reader, which trusts its input: here every count, length, type and offset is held against the file's
size or a limit before anything is allocated for it. Knows nothing of models. The file stays memory-mapped.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor

from sharp.model_config import ModelFileError

# Far over what models have (a few hundred keys, a few thousand tensors, 262,144 tokens). A key or a tensor
# costs a kilobyte of Python objects for a dozen bytes of file, hence limits apart from the file's size.
MAX_KEYS, MAX_TENSORS = 1 << 14, 1 << 16
MAX_ARRAY_VALUES = 1 << 22  # over all arrays of the file
MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = 1 << 10  # of a key or a tensor
MAX_DIMS = 4  # the format's own


class CheckedReader(GGUFReader):
    """The library's reader, with arrays of metadata read at once and everything checked.

    The library makes several numpy objects per array element: 3.0 s for the 100,000 strings of a tokenizer,
    where this takes 0.05 s. Raises ValueError and its like for what is wrong; see `read_gguf`.
    """

    def __init__(self, path: Path) -> None:
        self.arrays: dict[int, list[Any]] = {}  # by the file offset where the array's value starts
        self._num_array_values = 0
        super().__init__(path)

    def metadata(self) -> dict[str, Any]:
        """key -> number, string, bool or list."""
        return {key: self._value(key, field) for key, field in self.fields.items()}

    def _value(self, key: str, field: gguf.ReaderField) -> Any:
        if field.types[0] == GGUFValueType.ARRAY:
            # The value starts after the key (u64 length, bytes) and the u32 type.
            return self.arrays[field.offset + 8 + int(field.parts[0][0]) + 4]
        try:
            return field.contents()
        except UnicodeDecodeError as error:
            raise ValueError(f"metadata {key} is not UTF-8: {error}") from None

    def _build_fields(self, offs: int, count: int) -> int:
        if self.byte_order != "I":
            raise ValueError("big-endian files are not supported")
        if count > MAX_KEYS:
            raise ValueError(f"{count} metadata keys are over the limit of {MAX_KEYS}")
        return int(super()._build_fields(offs, count))

    def _get_str(self, offset: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        self._need(offset, 8, "a string")
        length = int(self._get(offset, np.uint64)[0])
        self._need(offset + 8, length, f"a string of {length} bytes")
        if length > MAX_STRING_BYTES:
            raise ValueError(f"the string of {length} bytes at {offset} is over the limit {MAX_STRING_BYTES}")
        text: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]] = super()._get_str(offset)
        return text

    def _need(self, offset: int, num_bytes: int, what: str) -> None:
        if offset + num_bytes > self.data.size:
            raise ValueError(f"{what} at byte {offset} runs past the end of the file")

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            parts: tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]
            parts = super()._get_field_parts(orig_offs, raw_type)
            return parts
        self._need(orig_offs, 12, "an array")
        element_type, count = struct.unpack("<IQ", self._get(orig_offs, np.uint8, 12).tobytes())
        start = orig_offs + 12
        kind = GGUFValueType(element_type)
        if kind != GGUFValueType.STRING and kind not in self.gguf_scalar_to_np:
            raise ValueError(f"an array of {kind.name} at byte {orig_offs} is not supported")
        dtype = np.dtype(self.gguf_scalar_to_np.get(kind, np.uint64))  # a string has at least its length
        self._need(start, count * dtype.itemsize, f"an array of {count} values")
        self._num_array_values += count
        if self._num_array_values > MAX_ARRAY_VALUES:
            raise ValueError(f"the arrays have more than {MAX_ARRAY_VALUES} values together")
        if kind == GGUFValueType.STRING:
            self.arrays[orig_offs], end = self._strings(start, count)
        else:
            self.arrays[orig_offs] = self._get(start, dtype, count).tolist()
            end = start + count * dtype.itemsize
        # The parts are what the base class sums to find the next field; the values live in `arrays`.
        return end - orig_offs, [self.data[orig_offs:end]], [0], [GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[str], int]:
        unpack, size = struct.Struct("<Q").unpack_from, self.data.size
        buffer: memoryview = self.data.data
        out = []
        for _ in range(count):
            end = start + 8 + (unpack(buffer, start)[0] if start + 8 <= size else 0)
            if end > size:
                raise ValueError(f"a string at byte {start} runs past the end of the file")
            if end - start > MAX_STRING_BYTES:
                raise ValueError(f"the string of {end - start} bytes at {start} is over the limit")
            out.append(str(buffer[start + 8 : end], "utf-8"))
            start = end
        return out, start

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[gguf.ReaderField]]:
        if count > MAX_TENSORS:
            raise ValueError(f"{count} tensors are over the limit of {MAX_TENSORS}")
        infos: tuple[int, list[gguf.ReaderField]] = super()._build_tensor_info(offs, count)
        return infos

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        spans = []
        for field in fields:
            _, name, num_dims, dims, raw_type, offset = field.parts
            if len(name) > MAX_NAME_BYTES:
                raise ValueError(f"a tensor's name has {len(name)} bytes, over the limit of {MAX_NAME_BYTES}")
            tensor = str(bytes(name), "utf-8")
            if not 1 <= int(num_dims[0]) <= MAX_DIMS:
                raise ValueError(f"tensor {tensor} has {num_dims[0]} dimensions; 1 to {MAX_DIMS} are allowed")
            if int(raw_type[0]) not in set(GGMLQuantizationType):
                raise ValueError(f"tensor {tensor} has the unknown type {raw_type[0]}")
            kind = GGMLQuantizationType(int(raw_type[0]))
            num_weights = 1
            for dim in dims.tolist():  # Python integers: the library's product wraps at 2**64
                num_weights *= dim
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if dims.size == 0 or num_weights == 0 or int(dims[0]) % block:
                raise ValueError(f"tensor {tensor} has shape {dims.tolist()}, which {kind.name} cannot store")
            if int(offset[0]) % int(self.alignment):
                raise ValueError(
                    f"tensor {tensor} starts at {offset[0]}, no multiple of the alignment {self.alignment}"
                )
            start = int(start_offs) + int(offset[0])
            end = start + num_weights // block * block_bytes
            if end > self.data.size:
                raise ValueError(
                    f"tensor {tensor} ends at byte {end} of a file of {self.data.size}: the file is truncated"
                )
            spans.append((start, end, tensor))
        spans.sort()
        for (_, end, tensor), (start, _, other) in pairwise(spans):
            if start < end:
                raise ValueError(f"tensors {tensor} and {other} overlap at byte {start}")
        super()._build_tensors(start_offs, fields)


def read_gguf(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """Metadata (key -> number, string, bool or list) and tensors (mapped, not read) of a GGUF file.

    Raises ModelFileError, naming file, tensor or byte, for a file that is absent, damaged or truncated.
    """
    if not path.exists():
        raise ModelFileError(f"{path} does not exist")
    if not path.is_file():
        raise ModelFileError(f"{path} is not a regular file")
    try:
        reader = CheckedReader(path)
        return reader.metadata(), reader.tensors
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, struct.error) as error:
        raise ModelFileError(f"{path} is not a readable GGUF file (damaged or truncated): {error}") from None
