"""Every GGUF tensor type, bit for bit against the library; every damaged header by its message."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from model_files import to_gguf_rows, write_gguf

from sharp import gguf_reader
from sharp.gguf_reader import read_gguf
from sharp.gguf_types import SUPPORTED, dequantize
from sharp.model_config import ModelFileError
from sharp.weights import open_checkpoint

WANTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")


def random_blocks(kind: Kind, rows: int, columns: int, seed: int) -> np.ndarray:
    """Any bytes at all as the blocks of a matrix: infinite, subnormal and no-number scales included."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, (rows, columns // block * block_bytes), dtype=np.uint8)
    return stored.view({Kind.F32: np.float32, Kind.F16: np.float16}.get(kind, np.uint8))


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.dtype == np.float32 and np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def library(stored: np.ndarray, kind: Kind) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(stored, kind).astype(np.float32)


def test_what_is_supported() -> None:
    assert {kind.name for kind in SUPPORTED} == {*WANTED, "Q5_1"}


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 256), (37, 512), (4100, 256)])  # the last: more than one chunk
def test_random_blocks_equal_the_librarys(kind: Kind, shape: tuple[int, int]) -> None:
    stored = random_blocks(kind, *shape, seed=shape[0])
    found = dequantize(stored, kind, shape)
    assert found.shape == shape
    assert found.flags.c_contiguous
    assert same_bits(found, library(stored, kind))


def write_model(path: Path, kind: Kind) -> dict[str, np.ndarray]:
    """One llama layer wide enough for blocks of 256, matrices of random blocks; returns what is stored."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (48, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256)}
    shapes |= {"blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256)}
    shapes |= {"blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512)}
    stored = {name: random_blocks(kind, *shape, seed=len(name)) for name, shape in shapes.items()}
    for name, matrix in stored.items():
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_a_whole_file_equals_the_librarys(tmp_path: Path, kind: Kind) -> None:
    stored = write_model(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    names = {"token_embd": "model.embed_tokens", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    names |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for source, matrix in stored.items():
        prefix, _, part = source.rpartition(".")
        name = f"{prefix.replace('blk', 'model.layers')}.{names[part]}.weight".removeprefix(".")
        heads = {"attn_q": 4, "attn_k": 2}.get(part, 0)
        found = checkpoint.read(name)
        found = to_gguf_rows(found, heads) if heads else found
        assert same_bits(found, library(matrix, kind)), name


# ---- damaged headers: one thing wrong at a time


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", Kind.Q8_0).read_bytes()


def patch(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


def after(key: bytes, skip: int, value: bytes) -> Callable[[bytes], bytes]:
    """`value` in place of what stands `skip` bytes behind the first occurrence of `key`."""
    return lambda data: patch(data.index(key) + len(key) + skip, value)(data)


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
NORM = b"output_norm.weight"  # then u32 dimensions, u64 each, u32 type, u64 offset


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (patch(0, b"GGML"), "GGUF magic invalid"),
        (patch(4, U32(99)), "version 99"),
        (patch(4, struct.pack(">I", 3)), "big-endian files are not supported"),
        (patch(8, U64(2**40)), "1099511627776 tensors are over the limit of 65536"),
        (patch(16, U64(2**63)), "metadata keys are over the limit of 16384"),
        (patch(24, U64(2**62)), r"a string of \d+ bytes at byte 32 runs past the end"),
        (after(b"general.architecture", 0, U32(77)), "77"),
        (after(b"general.architecture", 4, U64(2**33)), "string of 8589934592 bytes"),
        (after(b"tokenizer.ggml.tokens", 4, U32(9)), "an array of ARRAY"),
        (after(b"tokenizer.ggml.tokens", 4, U32(55)), "55"),
        (after(b"tokenizer.ggml.tokens", 12, U64(2**50)), "string at byte"),
        (after(NORM, 0, U32(5)), r"tensor output_norm\.weight has 5 dimensions; 1 to 4"),
        (after(NORM, 0, U32(0)), r"has 0 dimensions"),
        (after(NORM, 4, U64(0)), r"has shape \[0\]"),
        (after(NORM, 4, U64(2**63)), r"tensor output_norm\.weight ends at byte \d+"),
        (after(NORM, 12, U32(4)), r"tensor output_norm\.weight has the unknown type 4$"),
        (after(NORM, 12, U32(12)), r"has shape \[32\], which Q4_K cannot store"),
        (after(NORM, 16, U64(2**50)), "the file is truncated"),
        (after(NORM, 16, U64(8)), "no multiple of the alignment 32"),
        (after(NORM, 16, U64(0)), r"tensors \S+ and \S+ overlap at byte"),
        (lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "duplicated tensor"),
        (lambda data: data.replace(b"llama.block_count", b"llama.head_count_"), "not a readable|block_count"),
        (lambda data: data.replace(b"hello", b"he\xffll"), "utf-8"),
    ],
)
def test_damaged_headers(tmp_path: Path, good: bytes, damage: Any, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(good))
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_limits_of_counts(tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file could hold, but no model has."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    for limit, message in (
        ("MAX_KEYS", r"metadata keys are over the limit of 3"),
        ("MAX_TENSORS", r"21 tensors are over the limit of 3"),
        ("MAX_ARRAY_VALUES", r"the arrays have more than 3 values"),
        ("MAX_STRING_BYTES", r"over the limit"),
        ("MAX_NAME_BYTES", r"a tensor's name has \d+ bytes, over the limit of 3"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(gguf_reader, limit, 3)
            with pytest.raises(ModelFileError, match=message):
                read_gguf(path)


def test_not_one_whole_regular_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is not a regular file"):
        read_gguf(tmp_path)
    with pytest.raises(ModelFileError, match="does not exist"):
        read_gguf(tmp_path / "m.gguf")
    path = write_gguf(tmp_path / "m.gguf", metadata=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelFileError, match=r"is one part of 3: .* merge them"):
        open_checkpoint(path)
