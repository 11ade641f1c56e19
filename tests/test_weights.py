"""Model files: what a Llama-shaped checkpoint gives, bit by bit, and what every wrong file says."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import TINY, MemorySource, change_tensors, copy_tiny, tiny_tensors, to_gguf_rows, write_gguf
from safetensors.numpy import load_file, save_file

from sharp.model_config import ModelConfig, ModelFileError
from sharp.weights import Checkpoint, load_weights, open_checkpoint


def keep(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    return array


# ---- what right files give


def test_tiny_config() -> None:
    config = open_checkpoint(TINY).config
    assert config == ModelConfig(
        architecture="llama",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert config.num_parameters == sum(tensor.size for tensor in tiny_tensors().values())
    assert config.kv_bytes_per_token("float32") == 2 * 2 * 2 * 16 * 4
    assert config.kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 16 * 2
    with pytest.raises(ValueError, match="float64"):
        config.kv_bytes_per_token("float64")


def test_tied_parameters_count_once(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m", tie_word_embeddings=True)
    tied = open_checkpoint(folder)  # the file still has lm_head.weight, which a tied model ignores
    assert tied.config.num_parameters == open_checkpoint(TINY).config.num_parameters - 300 * 32
    assert "lm_head.weight" not in tied.names
    weights = load_weights(tied, keep, progress=False)
    assert weights.lm_head is weights.embed


def test_hf_tensors_are_the_files() -> None:
    checkpoint, expected = open_checkpoint(TINY), tiny_tensors()
    assert set(checkpoint.names) == set(expected)
    assert checkpoint.num_bytes == 2 * sum(tensor.size for tensor in expected.values())
    for name, tensor in expected.items():
        assert np.array_equal(keep(checkpoint.read(name)), tensor), name
    with pytest.raises(KeyError, match="nonsense"):
        checkpoint.read("nonsense")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_hf_dtypes_and_shards(tmp_path: Path, dtype: Any) -> None:
    folder = copy_tiny(tmp_path / "m")
    tensors = {name: tensor.astype(dtype) for name, tensor in tiny_tensors().items()}
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    checkpoint = open_checkpoint(folder)
    for name, tensor in tensors.items():
        assert np.array_equal(keep(checkpoint.read(name)), tensor.astype(np.float32)), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
def test_gguf_gives_hf_names_rows_and_the_librarys_numbers(tmp_path: Path, kind: Kind) -> None:
    checkpoint, source = open_checkpoint(write_gguf(tmp_path / "m.gguf", kind)), open_checkpoint(TINY)
    assert checkpoint.config == source.config
    assert checkpoint.names == source.names
    for name in source.names:
        original = source.read(name)
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        rows = to_gguf_rows(original, heads) if heads else original
        if original.ndim == 2:
            rows = gguf.dequantize(gguf.quantize(rows, kind), kind)
        found = keep(checkpoint.read(name))
        assert np.array_equal(to_gguf_rows(found, heads) if heads else found, rows), name
        if kind == Kind.F32:
            assert np.array_equal(found, original), name


def test_gguf_without_output_is_tied(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", change=lambda tensors: tensors.pop("output.weight"))
    assert open_checkpoint(path).config.tie_word_embeddings


def test_load_weights_fuses() -> None:
    checkpoint, raw, sizes = open_checkpoint(TINY), tiny_tensors(), []

    def upload(array: np.ndarray) -> np.ndarray:
        sizes.append(array.size)
        return keep(array)

    weights = load_weights(checkpoint, upload, progress=False)
    assert sum(sizes) == checkpoint.config.num_parameters
    assert np.array_equal(weights.embed, raw["model.embed_tokens.weight"])
    assert np.array_equal(weights.final_norm, raw["model.norm.weight"])
    assert np.array_equal(weights.lm_head, raw["lm_head.weight"])
    assert len(weights.layers) == 2
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        assert np.array_equal(layer.input_norm, raw[prefix + "input_layernorm.weight"])
        assert np.array_equal(layer.post_norm, raw[prefix + "post_attention_layernorm.weight"])
        assert np.array_equal(layer.o, raw[prefix + "self_attn.o_proj.weight"])
        assert np.array_equal(layer.down, raw[prefix + "mlp.down_proj.weight"])
        assert layer.qkv_bias is None
        for name, start, stop in (("q", 0, 64), ("k", 64, 96), ("v", 96, 128)):
            assert np.array_equal(layer.qkv[start:stop], raw[f"{prefix}self_attn.{name}_proj.weight"])
        assert layer.gate_up.shape == (128, 32)
        for neuron in range(64):
            row = 16 * (neuron // 8) + neuron % 8
            assert np.array_equal(layer.gate_up[row], raw[prefix + "mlp.gate_proj.weight"][neuron])
            assert np.array_equal(layer.gate_up[row + 8], raw[prefix + "mlp.up_proj.weight"][neuron])


def test_load_weights_fuses_biases() -> None:
    source = MemorySource(replace(open_checkpoint(TINY).config, qkv_bias=True))
    assert source.config.num_parameters == sum(tensor.size for tensor in source.tensors.values())
    layer = load_weights(Checkpoint(source), keep, progress=False).layers[1]
    prefix = "model.layers.1.self_attn."
    expected = np.concatenate([source.tensors[f"{prefix}{name}_proj.bias"] for name in "qkv"])
    assert np.array_equal(layer.qkv_bias, expected)


def test_intermediate_size_must_be_a_multiple_of_8() -> None:
    source = MemorySource(replace(open_checkpoint(TINY).config, intermediate_size=60))
    with pytest.raises(ModelFileError, match="intermediate_size 60 is not a multiple of 8"):
        load_weights(Checkpoint(source), keep, progress=False)


# ---- wrong HF directories


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt_bigcode"},
            "model_type 'gpt_bigcode' is not supported; supported: llama, mistral, qwen2, qwen3$",
        ),
        ({"model_type": None}, "model_type None"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, not '32'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a whole number, not None"),
        ({"num_hidden_layers": 0}, "num_layers must be a whole number from 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "not a multiple of num_attention_heads 0"),
        ({"num_key_value_heads": 3}, "num_q_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a positive number"),
        ({"bos_token_id": 300}, r"token id 300 \(bos or eos\) is outside \[0, 300\)"),
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \[64, 32\].*needs \[96, 32\]"),
        ({"num_hidden_layers": 2**31 - 1}, "has 2147483647 layers, but there are only 21 tensors"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* is not part of a llama model with 1 layers"),
    ],
)
def test_wrong_config(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = copy_tiny(tmp_path / "m", **config)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.safetensors: tensor model\.norm\.weight is missing"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"model\.norm\.weight has shape \[31\], the configuration needs \[32\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}),
            r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is not part of a llama model",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.int64)}),
            r"model\.norm\.weight has dtype I64, which is not supported; supported: F32, F16, BF16",
        ),
    ],
)
def test_wrong_tensors(tmp_path: Path, change: Any, message: str) -> None:
    folder = change_tensors(copy_tiny(tmp_path / "m"), change)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)


def shard(folder: Path) -> dict[str, str]:
    """Split a directory's tensors over two files with an index; returns the index."""
    tensors = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{1 + ('.1.' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_errors_name_the_shard(tmp_path: Path) -> None:
    """A wrong shape names the file that has it; a tensor in the other shard, the file that should."""
    folder = copy_tiny(tmp_path / "m")
    index = shard(folder)
    assert open_checkpoint(folder).names == open_checkpoint(TINY).names
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / index[name]
    tensors = dict(load_file(file))
    listing = folder / "model.safetensors.index.json"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    listing.write_text(json.dumps({"weight_map": {key: at for key, at in index.items() if key != name}}))
    with pytest.raises(ModelFileError) as error:
        open_checkpoint(folder)
    assert str(error.value) == f"{listing}: tensor {name} is missing"
    listing.write_text(json.dumps({"weight_map": index}))
    save_file(tensors | {name: np.zeros((8, 32), np.float32)}, file)
    with pytest.raises(ModelFileError) as error:
        open_checkpoint(folder)
    assert str(error.value) == (f"{file}: tensor {name} has shape [8, 32], the configuration needs [64, 32]")
    save_file(tensors, file)
    moved = index | {name: index["model.norm.weight"]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ModelFileError) as error:
        open_checkpoint(folder)
    assert str(error.value) == (
        f"{folder / moved[name]}: tensor {name} is in model.safetensors.index.json but not in this file"
    )
    file.unlink()
    with pytest.raises(ModelFileError, match=rf"{file} does not exist"):
        open_checkpoint(folder)


def test_many_wrong_tensors_are_counted(tmp_path: Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            tensors[name.replace("mlp", "experts")] = tensors[name]

    folder = change_tensors(copy_tiny(tmp_path / "m"), rename)
    with pytest.raises(ModelFileError, match=r"experts.* is not part of a llama model") as error:
        open_checkpoint(folder)
    assert str(folder / "model.safetensors: tensor model.layers.0.experts.down_proj.weight") in str(
        error.value
    )
    assert str(error.value).endswith("3 more)")


def test_old_files_with_inv_freq(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    folder = change_tensors(copy_tiny(tmp_path / "m"), lambda tensors: tensors.update(extra))
    assert open_checkpoint(folder).names == open_checkpoint(TINY).names


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: data[:8] + b"{" * 50 + data[58:],
        lambda data: data[:20] + b"\xff\xfe" + data[22:],
    ],
)
def test_damaged_safetensors(tmp_path: Path, damage: Any) -> None:
    folder = copy_tiny(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFileError, match="not a readable safetensors file") as error:
        open_checkpoint(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a JSON list, not an object"),
        ("\udcff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "cannot be read as JSON"),
        (None, "does not exist"),
    ],
)
def test_broken_config_json(tmp_path: Path, text: str | None, message: str) -> None:
    folder = copy_tiny(tmp_path / "m")
    path = folder / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map must be a non-empty object"),
        (["a"], "weight_map must be a non-empty object"),
        ({"model.norm.weight": "../tiny/model.safetensors"}, "is not a plain file name"),
        ({"model.norm.weight": "/etc/passwd"}, "is not a plain file name"),
        ({"model.norm.weight": ".."}, "is not a plain file name"),
        ({"model.norm.weight": 3}, "is not a plain file name"),
        ({"model.norm.weight": {"a": "b" * 9000}}, r"in \{.{79}, which is not a plain file name"),
        ({"model.norm.weight": "gone.safetensors"}, "gone.safetensors does not exist"),
        (
            {"extra": "part.safetensors"},
            "tensor extra is in model.safetensors.index.json but not in this file",
        ),
    ],
)
def test_wrong_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = copy_tiny(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m")
    tensors = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    index = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ModelFileError, match=r"b\.safetensors: tensor model\.norm\.weight is also in a\."):
        open_checkpoint(folder)


def test_neither_file_nor_name(tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError, match="neither a file or directory nor a known model; known models: smol"
    ):
        open_checkpoint("no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path / "empty")
    copy_tiny(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(tmp_path / "m")


# ---- wrong GGUF files


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda w: w.add_expert_count(8), "expert_count 8"),
        (
            lambda w: w.add_uint32("llama.vocab_size", 299),
            r"token_embd\.weight has shape \[300, 32\].*\[299, 32\]",
        ),
    ],
)
def test_wrong_gguf_metadata(tmp_path: Path, metadata: Any, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"tensor blk\.1\.ffn_up\.weight is missing"),
        (lambda t: t.pop("token_embd.weight"), r"tensor token_embd\.weight is missing"),
        (
            lambda t: t.update({"blk.0.ffn_up.weight": np.zeros((63, 32), np.float32)}),
            r"tensor blk\.0\.ffn_up\.weight has shape \[63, 32\], the configuration needs \[64, 32\]",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": np.ones(7, np.float32)}),
            r"there are 7 rope factors, head_dim 16 needs 8",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": np.zeros(8, np.float32)}),
            r"rope factors must be positive numbers",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": np.ones(5000, np.float32)}),
            r"tensor rope_freqs\.weight has 5000 values of type F32; F32 and at most 4096 are supported",
        ),
        (
            lambda t: t.update({"blk.0.attn_q.bias": np.zeros(64, np.float32)}),
            r"tensor blk\.0\.attn_q\.bias is not part of a llama model with 2 layers$",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "ffn_" in name],
            r"tensor blk\.0\.ffn_norm\.weight is missing \(also blk\.0\.ffn_gate\.weight, "
            r"blk\.0\.ffn_up\.weight, 5 more\)$",
        ),
    ],
)
def test_wrong_gguf_tensors(tmp_path: Path, change: Any, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", change=change)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_unsupported_gguf_types_and_architectures(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", Kind.MXFP4)
    types = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K"
    with pytest.raises(ModelFileError, match=rf"tensor \S+ has type MXFP4.*supported: {types}$"):
        open_checkpoint(path)
    data = write_gguf(tmp_path / "n.gguf").read_bytes()
    (tmp_path / "n.gguf").write_bytes(data.replace(b"llama", b"gptxx"))
    with pytest.raises(
        ModelFileError, match=r"architecture 'gptxx' is not supported; supported: llama, qwen2, qwen3$"
    ):
        open_checkpoint(tmp_path / "n.gguf")


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", Kind.Q8_0).read_bytes()


@pytest.fixture(scope="module")
def header_size(tmp_path_factory: pytest.TempPathFactory, gguf_bytes: bytes) -> int:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(gguf_bytes)
    return int(gguf.GGUFReader(path).data_offset)


def test_truncated_gguf(tmp_path: Path, gguf_bytes: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in (0, 3, 4, 8, 20, 24, 100, 1000, 5000, len(gguf_bytes) // 2, len(gguf_bytes) - 64):
        path.write_bytes(gguf_bytes[:length])
        with pytest.raises(ModelFileError, match=r"m\.gguf is not a readable GGUF file"):
            open_checkpoint(path)
    with pytest.raises(ModelFileError, match=r"tensor \S+ ends at byte \d+ of a file of \d+: .* truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize("count", [2**20, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("key", [b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"])
def test_huge_array_counts(tmp_path: Path, gguf_bytes: bytes, key: bytes, count: int) -> None:
    """A count of elements that the file cannot hold must not cost time or memory."""
    start = gguf_bytes.index(key) + len(key) + 8  # u32 type, u32 element type, then the u64 count
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes[:start] + struct.pack("<Q", count) + gguf_bytes[start + 8 :])
    with pytest.raises(ModelFileError, match="past the end of the file"):
        open_checkpoint(path)


@settings(max_examples=300, deadline=2000)
@given(data=st.data())
def test_mutated_gguf_ends_in_a_clean_error(
    tmp_path_factory: pytest.TempPathFactory, gguf_bytes: bytes, header_size: int, data: st.DataObject
) -> None:
    """Any bytes of the header changed: the file opens, or one clear error says that it does not."""
    mutated = bytearray(gguf_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_size - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8))
        mutated[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(bytes(mutated))
    message = ""
    try:
        open_checkpoint(path).tokenizer()
    except ModelFileError as error:
        message = str(error)
    assert "mutated.gguf" in message or not message


# ---- the demo model


def test_demo_model_tensors(demo_model: Path) -> None:
    """Every kind of tensor of two layers, and the embedding, against the library's dequantiser."""
    checkpoint = open_checkpoint(demo_model)
    assert checkpoint.config.num_parameters == 134_515_008
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_model).tensors}

    def stored(name: str) -> np.ndarray:
        return gguf.dequantize(reader[name].data, reader[name].tensor_type)

    assert np.array_equal(checkpoint.read("model.embed_tokens.weight"), stored("token_embd.weight"))
    for layer in (0, 29):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, other in (
            ("input_layernorm", "attn_norm"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ):
            assert np.array_equal(checkpoint.read(f"{ours}{name}.weight"), stored(f"{theirs}{other}.weight"))
        for name, other, heads in (("q", "attn_q", 9), ("k", "attn_k", 3)):
            rows = to_gguf_rows(checkpoint.read(f"{ours}self_attn.{name}_proj.weight"), heads)
            assert np.array_equal(rows, stored(f"{theirs}{other}.weight"))


def test_demo_model_memory(demo_model: Path) -> None:
    """Loading keeps one float32 copy (538 MB) and the mapped file (98 MB); a second copy is over 1.1 GB."""
    # On Linux ru_maxrss starts at the size of the process that forked this one; VmHWM does not.
    code = (
        "import pathlib, re, resource, sys\n"
        "from sharp.weights import load_weights, open_checkpoint\n"
        "weights = load_weights(open_checkpoint(sys.argv[1]), lambda array: array, progress=False)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "if status.exists():\n"
        "    peak = int(re.search(r'VmHWM:\\s+(\\d+) kB', status.read_text())[1])\n"
        "print(peak // 1024 if sys.platform == 'darwin' else peak)\n"
    )
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code, str(demo_model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 900_000, f"peak of {int(done.stdout)} KB"
