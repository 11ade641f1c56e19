"""The header of a safetensors file, checked against the file's size before the file is used.

Knows the format (https://github.com/huggingface/safetensors): u64 length of the header, the header as JSON
(name -> dtype, shape, data_offsets), then the data, which the tensors cover without gap or overlap. Reads
no tensor.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path

import msgspec

from sharp.model_config import ModelFileError

MAX_HEADER_BYTES = 25_000_000  # as huggingface_hub has it; a model of 1,000 layers needs about two million
MAX_DIMS = 8
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Known to the format, and refused here by name only when a model uses one.
_OTHER_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
_OTHER_DTYPE_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


class TensorInfo(msgspec.Struct):
    """One entry of the header; data_offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of a safetensors file. Raises ModelFileError naming file and tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(
                    f"a header of {length} bytes; the file has {size}, the limit is {MAX_HEADER_BYTES}"
                )
            entries = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        infos = {}
        for name, raw in entries.items():
            try:
                infos[name] = msgspec.json.decode(raw, type=TensorInfo)
            except msgspec.MsgspecError as error:
                raise ValueError(f"tensor {name:.200}: {error}") from None
        _check(infos, size - 8 - length)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError, struct.error, msgspec.MsgspecError) as error:
        raise ModelFileError(f"{path} is not a readable safetensors file: {error}") from None
    return infos


def data_start(path: Path) -> int:
    """The byte of a file that passed read_header at which its data begin."""
    with path.open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def _check(infos: dict[str, TensorInfo], num_data_bytes: int) -> None:
    covered = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].data_offsets):
        start, end = info.data_offsets
        width = DTYPE_BYTES.get(info.dtype) or _OTHER_DTYPE_BYTES.get(info.dtype)
        if width is None:
            raise ValueError(f"tensor {name} has the unknown dtype {info.dtype!r:.40}")
        if len(info.shape) > MAX_DIMS or not all(0 <= dim < 2**63 for dim in info.shape):
            raise ValueError(f"tensor {name} has the impossible shape {info.shape!r:.80}")
        if not 0 <= start <= end <= num_data_bytes:
            raise ValueError(
                f"tensor {name} lies at bytes {start} to {end} of {num_data_bytes}: damaged or truncated"
            )
        if end - start != prod(info.shape) * width:
            raise ValueError(
                f"tensor {name} of shape {info.shape} and dtype {info.dtype} has {end - start} bytes"
            )
        if start != covered:
            what = "overlaps its neighbour" if start < covered else "leaves a gap before it"
            raise ValueError(f"tensor {name} at byte {start} {what} (expected at {covered})")
        covered = end
    if covered != num_data_bytes:
        raise ValueError(
            f"the tensors end at byte {covered} of {num_data_bytes}: a name twice, or data without a name"
        )
