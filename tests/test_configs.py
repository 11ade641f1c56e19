"""What config.json and GGUF metadata say about a model, in every spelling, and what a wrong one is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_checks import CONFIGS, write_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import copy_tiny, write_gguf

from sharp.gguf_config import config_from_gguf, rope_from_gguf
from sharp.hf_config import config_from_hf, rope_from_hf
from sharp.model_config import ModelConfig, ModelFileError
from sharp.rope import RopeScaling, inv_freq, yarn_attention_factor
from sharp.weights import open_checkpoint

ROPE_KEYS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    """The config of weights/tiny with entries of config.json changed (None removes one)."""
    return open_checkpoint(copy_tiny(folder / str(len(list(folder.iterdir()))), **changes)).config


def family_config(folder: Path, name: str, **changes: Any) -> ModelConfig:
    """The config of a tiny model of golden/family_models.py with entries changed (None writes null)."""
    target = write_directory(folder / str(len(list(folder.iterdir()))), name)
    (target / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    return open_checkpoint(target).config


# ---- spellings


def test_dtype_spellings(tmp_path: Path) -> None:
    for changes in (
        {"torch_dtype": "bfloat16", "dtype": None},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"torch_dtype": "torch.float16", "dtype": None},
        {"torch_dtype": None, "dtype": None},
    ):
        assert config_of(tmp_path, **changes) == config_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [("default", {}), ("linear", {"factor": 2.0}), ("llama3", LLAMA3), ("yarn", YARN)],
)
def test_rope_spellings(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    """Old and older: rope_theta at the top, rope_scaling with type or rope_type; new: rope_parameters."""
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **values}}
    each = {"full_attention": new["rope_parameters"], "sliding_attention": new["rope_parameters"]}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": {"type": kind, **values}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, "type": "ignored", **values}},
        {"rope_theta": 1e4, **new},
        {"rope_theta": None, **new},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": kind, **values}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": kind, **values},
            "rope_parameters": {"rope_type": "linear"},
        },
        {"rope_theta": None, "rope_parameters": each},
    ]
    configs = [config_of(tmp_path, **spelling) for spelling in spellings]
    assert configs == configs[:1] * len(configs)
    assert configs[0].rope_theta == 5e5
    assert configs[0].rope.kind == kind


def test_rope_defaults() -> None:
    theta, rope = rope_from_hf({}, 2048)
    assert (theta, rope) == (10000.0, RopeScaling())
    _, rope = rope_from_hf({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 2048)
    assert rope.original_positions == 2048  # as in transformers, where the object has none
    raw = {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 512}
    assert rope_from_hf(raw, 2048)[1].original_positions == 512  # the top level goes first, as there
    _, rope = rope_from_hf({"rope_scaling": {"type": "yarn", **YARN}}, 2048)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32, 1, True)
    assert rope.attention_factor == 0.1 * math.log(4) + 1
    given = {"type": "yarn", **YARN, "attention_factor": 0.7, "mscale": 2, "beta_fast": 16, "beta_slow": 2}
    _, rope = rope_from_hf({"rope_scaling": given}, 2048)
    assert (rope.attention_factor, rope.beta_fast, rope.beta_slow) == (0.7, 16, 2)
    assert yarn_attention_factor(1.0) == yarn_attention_factor(0.5) == 1
    assert yarn_attention_factor(4, 1.0, 1.0) == 1
    assert yarn_attention_factor(4, 2.0, 0.0) == yarn_attention_factor(4)


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    stretched = config_of(tmp_path, rope_scaling={"type": "yarn", **YARN})
    assert stretched.max_position_embeddings == 4096
    already = config_of(tmp_path, rope_scaling={"type": "yarn", **YARN}, max_position_embeddings=5000)
    assert already.max_position_embeddings == 5000
    llama3 = config_of(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert llama3.max_position_embeddings == 2048


def test_eos_ids(tmp_path: Path) -> None:
    """generation_config.json goes first; one id or several; null there says nothing."""
    for in_config, in_generation, expected in (
        (2, None, (2,)),
        ([2, 0], None, (2, 0)),
        (2, {"eos_token_id": [5, 2]}, (5, 2)),
        ([2, 0], {"eos_token_id": 7}, (7,)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {}, (2,)),
        (None, None, ()),
    ):
        folder = copy_tiny(tmp_path / str(len(list(tmp_path.iterdir()))), eos_token_id=in_config)
        (folder / "generation_config.json").unlink()
        if in_generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(in_generation))
        assert open_checkpoint(folder).config.eos_token_ids == expected


def test_architectures(tmp_path: Path) -> None:
    for named in (["LlamaForCausalLM"], ["LLaMAForCausalLM"], "LlamaForCausalLM", None):
        assert config_of(tmp_path, architectures=named).architecture == "llama"


def test_windows(tmp_path: Path) -> None:
    """Which layers have which window, as transformers' configuration classes work it out."""

    def windows(name: str, **changes: Any) -> list[int | None]:
        config = family_config(tmp_path, name, **changes)
        return [config.window(layer) for layer in range(config.num_layers)]

    assert windows("mistral_window") == [12, 12]
    assert windows("mistral_head_dim") == [None, None]
    assert windows("mistral_window", layer_types=["sliding_attention"] * 2) == [12, 12]
    assert windows("qwen2") == [None, None]
    assert windows("qwen2_window") == [None, 10, 10]
    assert windows("qwen2_window", max_window_layers=0) == [10, 10, 10]
    assert windows("qwen2_window", max_window_layers=28) == [None, None, None]
    with pytest.raises(ModelFileError, match="has 2147483647 layers"):  # and not a set of that many layers
        windows("qwen2_window", max_window_layers=2**31, num_hidden_layers=2**31 - 1)
    assert windows("qwen2_window", use_sliding_window=False) == [None, None, None]
    assert windows("qwen3_window") == [9, None, 9]
    config = {key: value for key, value in CONFIGS["mistral_window"].items() if key != "sliding_window"}
    folder = write_directory(tmp_path / "mistral", "mistral_window")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).config.sliding_window == 4096  # transformers' default for Mistral


def test_head_dim(tmp_path: Path) -> None:
    assert family_config(tmp_path, "mistral_head_dim").head_dim == 16
    assert family_config(tmp_path, "llama", head_dim=None).head_dim == 8
    with pytest.raises(ModelFileError, match=r"q_proj.* has shape \[144, 48\].* needs \[1152, 48\]"):
        family_config(tmp_path, "qwen3", head_dim=None)  # transformers' default for Qwen3 is 128


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "supported for model_type 'llama': LlamaFor"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number up to"),
        ({"architectures": 7}, "architectures 7 is not supported"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'.*supported: float32, float16, bfloat16"),
        ({"torch_dtype": "int8"}, "torch_dtype 'int8'"),
        ({"rope_scaling": 3}, "rope_scaling must be an object, not 3"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "rope_scaling of type 'longrope' is not supported; supported: default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_parameters of type \['yarn'\]"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope factor must be a positive number .*not 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "rope factor must be a positive number .*not '2'",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": True}}, "factor must be a positive .*not True"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": "x"}}, "mscale must be a positive .*not 'x'"),
        ({"rope_scaling": {"type": "yarn", **YARN, "truncate": 1}}, "truncate must be true or false, not 1"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": -1}},
            "rope attention_factor must be a positive number .*not -1",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings must be a whole number .*not 0.5",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "extrapolation_factor": 2}},
            "type 'yarn' has extrapolation_factor = 2; supported: factor, original_max",
        ),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "has mrope_section"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' has no low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor 1.0 must be over low_freq_factor 1.0",
        ),
        (
            {"rope_parameters": {"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e6}}},
            r"rope_parameters differs between layer types \(a, b\)",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", **YARN}},
            "rope_theta 1.0 is too small for yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor 0.25 is not supported",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"attention_bias": True}, "attention_bias = True is not supported for llama"),
    ],
)
def test_wrong_llama_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = copy_tiny(tmp_path / "m", **changes)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported for qwen3"),
        ("mistral_window", {"sliding_window": 0}, "sliding_window must be a whole number from 1"),
        ("mistral_window", {"sliding_window": "12"}, "sliding_window must be a whole number"),
        (
            "mistral_window",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types that differ are not supported for mistral",
        ),
        ("qwen3_window", {"layer_types": ["full_attention"]}, "layer_types must give one of .* 3 layers"),
        ("qwen3_window", {"layer_types": ["chunked"] * 3}, "layer_types must give one of full_attention, sl"),
        (
            "qwen3_window",
            {"use_sliding_window": False},
            "has sliding_attention, but there is no sliding_window",
        ),
        ("qwen2_window", {"max_window_layers": "1"}, "max_window_layers must be a whole number, not '1'"),
    ],
)
def test_wrong_family_config(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        family_config(tmp_path, name, **changes)


WORDS = st.sampled_from(["default", "linear", "llama3", "yarn", "full_attention"]) | st.text(max_size=3)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 2**31 - 1, 0, 1, 2.0])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=5)
    ),
    max_leaves=8,
)


def check_clean(read: Callable[[], ModelConfig], start: str) -> None:
    """A config whose angles can be computed, or one error whose message begins with `start`."""
    message = start
    try:
        config = read()
        if config.head_dim <= 256 or config.rope.kind == "factors":
            inv_freq(config.rope, config.rope_theta, config.head_dim)
    except ModelFileError as error:
        message = str(error)
    assert message.startswith(start)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_any_config_json_ends_in_a_clean_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Any value under any key: a config whose angles can be computed, or one error that names the file."""
    keys = st.sampled_from([*CONFIGS[name], "rope_scaling", "rope_parameters", "rope_theta", "layer_types"])
    changes = data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=3))
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    check_clean(lambda: config_from_hf(folder), f"{folder / 'config.json'}: ")


# ---- GGUF metadata

GGUF_KEYS = (
    "general.architecture", "llama.attention.sliding_window", "llama.attention.key_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.freq_base",
    "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear",
    "llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor", "llama.context_length",
    "llama.rope.scaling.yarn_beta_fast", "llama.rope.scaling.yarn_attn_factor", "llama.expert_count",
    "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.eos_token_id", "llama.vocab_size",
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_any_gguf_metadata_ends_in_a_clean_error(data: st.DataObject) -> None:
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 32, "llama.attention.head_count": 4,
        "llama.context_length": 64, "llama.feed_forward_length": 64, "llama.block_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (96, 32)}
    assert config_from_gguf(metadata, shapes, Path("m.gguf")).head_dim == 8
    metadata |= data.draw(st.dictionaries(st.sampled_from(GGUF_KEYS), JSON, min_size=1, max_size=4))
    factors = data.draw(st.just(()) | st.tuples(*[st.floats(width=32)] * 4))
    check_clean(lambda: config_from_gguf(metadata, shapes, Path("m.gguf"), factors), "m.gguf: ")


def test_gguf_rope_keys() -> None:
    """The keys of llama.cpp's converter, newest and older, and what stands for no scaling at all."""
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert rope_from_gguf(scaled, 2048, ())[1] == RopeScaling("linear", factor=4.0)
    assert rope_from_gguf({"rope.scaling.factor": 4.0}, 2048, ())[1] == RopeScaling("linear", factor=4.0)
    assert rope_from_gguf({"rope.scale_linear": 2.0}, 2048, ())[1] == RopeScaling("linear", factor=2.0)
    for nothing in (
        {},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 1.0},
    ):
        assert rope_from_gguf({"rope.freq_base": 5e5, **nothing}, 2048, ()) == (5e5, RopeScaling())
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 512,
    }
    _, rope = rope_from_gguf({**yarn, "rope.scaling.attn_factor": 1.5}, 2048, ())
    assert (rope.kind, rope.factor, rope.original_positions) == ("yarn", 4.0, 512)
    assert rope.attention_factor == yarn_attention_factor(4.0) * 1.5
    _, rope = rope_from_gguf({**yarn, "rope.scaling.yarn_attn_factor": 1.25}, 2048, ())
    assert rope.attention_factor == 1.25
    assert rope_from_gguf({}, 2048, (1.0, 2.0))[1] == RopeScaling("factors", factors=(1.0, 2.0))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            lambda w: w.add_string("llama.rope.scaling.type", "longrope"),
            "rope.scaling.type 'longrope' is not supported; supported: none, linear, yarn",
        ),
        (lambda w: w.add_string("llama.rope.scaling.factor", "4"), "factor must be a number .*not '4'"),
        (lambda w: w.add_rope_scaling_factor(float("nan")), "factor must be a number .*not nan"),
        (
            lambda w: w.add_string("llama.attention.sliding_window_pattern", "x"),
            "sliding_window_pattern x is",
        ),
        (lambda w: w.add_sliding_window(2**31), "sliding_window must be a whole number from 1"),
    ],
)
def test_wrong_gguf_metadata(tmp_path: Path, metadata: Any, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


def test_wrong_yarn_in_gguf() -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    for name, value in (("yarn_ext_factor", 0.5), ("yarn_log_multiplier", 0.1)):
        with pytest.raises(ValueError, match=rf"rope.scaling.{name} = {value} is not supported"):
            rope_from_gguf({**yarn, f"rope.scaling.{name}": value}, 2048, ())
    with pytest.raises(ValueError, match=r"rope_freqs\.weight beside rope.scaling.type 'yarn'"):
        rope_from_gguf(yarn, 2048, (1.0, 2.0))


def test_a_gguf_window_makes_a_mistral(tmp_path: Path) -> None:
    """GGUF files of Mistral say llama."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=lambda w: w.add_sliding_window(64)))
    assert checkpoint.config.architecture == "mistral"
    assert checkpoint.config.window(1) == 64
    none = open_checkpoint(write_gguf(tmp_path / "n.gguf", metadata=lambda w: w.add_sliding_window(0)))
    assert none.config.architecture == "llama"
    assert none.config.window(1) is None
