"""Hugging Face model directories: config.json and safetensors files, single or sharded with an index.

Knows the directory's layout; refuses other tensor formats. A tensor is read from its file only when asked
for.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # (registers bfloat16 with numpy, in which safetensors hands out BF16 tensors)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sharp.families import FAMILIES
from sharp.hf_config import config_from_hf
from sharp.model_config import ModelConfig, ModelFileError, read_json
from sharp.safetensors_header import DTYPE_BYTES, data_start, read_header
from sharp.untrusted import check_directory, file_inside

FloatArray = npt.NDArray[np.float32]
_INDEX = "model.safetensors.index.json"
_STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class HFDirectory:
    """One HF directory.

    Attributes: path; config; shapes (our name -> shape); num_bytes (of all tensors, as stored).
    Raises ModelFileError when a file is missing, damaged, or holds an unsupported dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_directory(path)
        self.config: ModelConfig = config_from_hf(path)
        self._names = FAMILIES[self.config.architecture].hf_names
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.num_bytes = 0
        self._files: dict[str, Any] = {}  # file name -> open file (memory-mapped by the library)
        self._file_names: dict[str, str] = {}
        self._spans: dict[str, tuple[np.dtype[Any], int]] = {}  # stored dtype, first byte in the file
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}  # file name -> its bytes, mapped when first asked
        index = self._read_index()
        self._listing = _INDEX if index else "model.safetensors"
        for file_name in sorted(set(index.values())) if index else ["model.safetensors"]:
            self._open(file_inside(path, file_name), file_name)
        for stored, file_name in index.items():
            if self._file_names.get(self._names.ours(stored)) != file_name:
                raise ModelFileError(
                    f"{path / file_name}: tensor {stored} is in {_INDEX} but not in this file"
                )
        if self.config.tie_word_embeddings and "lm_head.weight" in self.shapes:
            # Some writers store the tied head a second time; config.json says that it is the embedding.
            del self.shapes["lm_head.weight"]
        for name in [name for name in self.shapes if name.endswith(".rotary_emb.inv_freq")]:
            del self.shapes[name]  # a derived constant that old checkpoints carry

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name; empty for a directory with one file."""
        if (self.path / "model.safetensors").exists():
            return {}
        path = self.path / _INDEX
        if not path.exists():
            raise ModelFileError(f"{self.path} has neither model.safetensors nor {_INDEX}")
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ModelFileError(f"{path}: weight_map must be a non-empty object, not {index!r:.80}")
        for name, file_name in index.items():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise ModelFileError(
                    f"{path}: tensor {name} is in {file_name!r:.80}, which is not a plain file name"
                )
        return index

    def _open(self, path: Path, file_name: str) -> None:
        infos = read_header(path)
        start = data_start(path) if infos else 0
        for stored, info in infos.items():
            name = self._names.ours(stored)
            if info.dtype not in DTYPE_BYTES:
                raise ModelFileError(
                    f"{path}: tensor {stored} has dtype {info.dtype}, which is not supported; "
                    f"supported: {', '.join(DTYPE_BYTES)}"
                )
            if name in self.shapes:
                raise ModelFileError(f"{path}: tensor {stored} is also in {self._file_names[name]}")
            self.shapes[name], self._file_names[name] = tuple(info.shape), file_name
            self._spans[name] = _STORED[info.dtype], start + info.data_offsets[0]
            self.num_bytes += info.data_offsets[1] - info.data_offsets[0]
        try:
            file: Any = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{path} is not a readable safetensors file: {error}") from None
        self._files[file_name] = file

    def where(self, name: str) -> str:
        """A tensor for a message: its file (one that is in none: the file that should know it) and name."""
        file_name = self._file_names.get(name, self._listing)
        return f"{self.path / file_name}: tensor {self._names.stored(name)}"

    def read(self, name: str) -> FloatArray:
        """The tensor `name`: float32, contiguous."""
        try:
            tensor = self._files[self._file_names[name]].get_tensor(self._names.stored(name))
        except SafetensorError as error:
            raise ModelFileError(f"{self.where(name)}: {error}") from None
        return np.ascontiguousarray(tensor, dtype=np.float32)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of the tensor `name` where they lie in the mapped file, in the stored dtype.

        Safe to call from several threads. OSError where the file cannot be mapped any more.
        """
        file_name = self._file_names[name]
        if file_name not in self._maps:  # two threads may map it twice: one of them is dropped
            self._maps[file_name] = np.memmap(self.path / file_name, np.uint8, "r")
        dtype, first = self._spans[name]
        columns = self.shapes[name][1:]
        row_bytes = prod(columns) * dtype.itemsize
        raw = self._maps[file_name][first + start * row_bytes : first + stop * row_bytes]
        return np.frombuffer(raw, dtype).reshape(stop - start, *columns)
