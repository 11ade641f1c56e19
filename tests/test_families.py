"""Every family and switch against Hugging Face transformers (golden/make_families.py), and what a family is.

The tolerance is 1e-4 of a logit in float32. Each switch is also turned off: the logits must then leave the
tolerance by far, or the golden file would say nothing about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_checks import (
    CONFIGS,
    MAX_ERROR,
    NUM_PROMPT,
    ROPES,
    ROWS,
    checksum,
    golden,
    in_pieces,
    load_model,
    make_weights,
    open_tiny,
    step,
    ways,
    write_directory,
    write_gguf,
)

from sharp.__main__ import main
from sharp.families import FAMILIES, GGUF_NAMES, HF_NAMES, Family, Names, register
from sharp.hf_config import rope_from_hf
from sharp.model import Model
from sharp.model_config import ModelFileError
from sharp.rope import DEFAULT_ROPE, inv_freq, rope_table
from sharp.weights import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FILE, LOGITS = golden()
PROMPTS = {row["name"]: row["prompt_token_ids"] for row in FILE["models"]}


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Model]:
    """The model named by the test's parameter, on the reference in float32."""
    model = load_model(open_tiny(tmp_path, request.param))
    yield model
    model.close()


def error_of(model: Model, name: str, bounds: list[int] | None = None) -> float:
    """The largest difference to transformers' logits at the golden rows."""
    logits = in_pieces(model, PROMPTS[name], bounds or [])[list(ROWS)]
    return float(np.abs(logits - LOGITS[name]).max())


# ---- the golden files


def test_golden_files_belong_to_these_models() -> None:
    assert set(PROMPTS) == set(LOGITS) == set(CONFIGS)
    for row in FILE["models"]:
        assert row["checksum"] == checksum(make_weights(row["name"])), f"{row['name']}: other weights"
        assert len(row["prompt_token_ids"]) == NUM_PROMPT
        scale = LOGITS[row["name"]].std()
        assert 1 < scale < 4, f"{row['name']}: logits of standard deviation {scale}"
    ratios = {c["num_attention_heads"] // c["num_key_value_heads"] for c in CONFIGS.values()}
    assert ratios >= {1, 3, 7, 8, 9}


@pytest.mark.parametrize("name", CONFIGS)
def test_directory_gives_transformers_logits(tmp_path: Path, name: str) -> None:
    """The whole prompt, cut into chunks, and token by token; alone, and packed with a stranger."""
    model, ids = load_model(open_tiny(tmp_path, name)), PROMPTS[name]
    for way, bounds in ways(NUM_PROMPT).items():
        error = error_of(model, name, bounds)
        assert error < MAX_ERROR, f"{way}: {error}"
    stranger = ids[::-1][:37]
    packed = step(model, [(stranger, 0, 37, [3, 1, 0]), (ids, 0, NUM_PROMPT, [11, 4, 8, 6])])[37:]
    assert np.abs(packed[list(ROWS)] - LOGITS[name]).max() < MAX_ERROR
    model.close()


GGUF_LACKS = {  # what the format has no key for
    "llama_yarn_mscale": "mscale is only in config.json",
    "qwen2_window": "no key for windows of some layers",
    "qwen3_window": "no key for windows of some layers",
    "qwen3_yarn": "truncate is only in config.json",
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in GGUF_LACKS])
def test_gguf_gives_transformers_logits(tmp_path: Path, name: str) -> None:
    checkpoint, directory = open_checkpoint(write_gguf(tmp_path / "m.gguf", name)), open_tiny(tmp_path, name)
    assert checkpoint.names == directory.names
    ours, theirs = checkpoint.config, directory.config
    if name == "llama_llama3":  # the same angles, spelled as divisors
        assert ours.rope.kind == "factors"
        ours = replace(ours, rope=theirs.rope, max_position_embeddings=theirs.max_position_embeddings)
    if name == "mistral_head_dim":  # without a window a GGUF file cannot tell Mistral from Llama
        assert ours.architecture == "llama"
        ours = replace(ours, architecture="mistral")
    assert ours == theirs
    model = load_model(checkpoint)
    for way in ("whole", "cut"):
        assert error_of(model, name, ways(NUM_PROMPT)[way]) < MAX_ERROR, way
    model.close()


# ---- every switch, turned off or wrong


def _without_biases(model: Model) -> None:
    for layer in model.weights.layers:
        layer.qkv_bias[:] = 0


def _without_qk_norm(model: Model) -> None:
    model.config = replace(model.config, qk_norm=False)


def _qk_norms_swapped(model: Model) -> None:
    for layer in model.weights.layers:
        layer.q_norm, layer.k_norm = layer.k_norm, layer.q_norm


def _without_window(model: Model) -> None:
    model.config = replace(model.config, sliding_window=None)


def _wider_window(model: Model) -> None:
    model.config = replace(model.config, sliding_window=model.config.sliding_window + 1)


def _window_everywhere(model: Model) -> None:
    model.config = replace(model.config, full_layers=())


def _with_rope(model: Model, **changes: Any) -> None:
    config = model.config
    rope = replace(config.rope, **changes) if changes else DEFAULT_ROPE
    model.cos_sin[:] = rope_table(rope, config.rope_theta, config.head_dim, len(model.cos_sin))


def _without_attention_factor(model: Model) -> None:
    _with_rope(model, attention_factor=1.0)


def _yarn_truncated(model: Model) -> None:
    _with_rope(model, truncate=True)


def _yarn_betas(model: Model) -> None:
    _with_rope(model, beta_fast=32.0, beta_slow=1.0)


def _other_original(model: Model) -> None:
    _with_rope(model, original_positions=model.config.rope.original_positions // 2)


def _other_high_freq_factor(model: Model) -> None:
    _with_rope(model, high_freq_factor=2.0)


def _other_head(model: Model) -> None:
    model.weights.lm_head = np.roll(model.weights.embed, 1, axis=0)


def _tied(model: Model) -> None:
    model.weights.lm_head = model.weights.embed


def _heads_in_turns(model: Model) -> None:
    """q head h reads kv head h mod Hkv instead of h // group."""
    hq, hkv, d = model.config.num_q_heads, model.config.num_kv_heads, model.config.head_dim
    order = np.arange(hq).reshape(hkv, hq // hkv).T.ravel()
    for layer in model.weights.layers:
        q = layer.qkv[: hq * d].reshape(hq, d, -1)
        o = layer.o.reshape(-1, hq, d)
        q[:], o[:] = q[order].copy(), o[:, order].copy()
        # and kv heads the other way round, so that heads pair up anew
        k = layer.qkv[hq * d : (hq + hkv) * d].reshape(hkv, d, -1)
        k[:] = k[::-1].copy()


WRONG = [
    ("qwen2", _without_biases),
    ("qwen2_window", _without_biases),
    ("qwen3", _without_qk_norm),
    ("qwen3", _qk_norms_swapped),
    ("mistral_window", _without_window),
    ("mistral_window", _wider_window),
    ("qwen2_window", _without_window),
    ("qwen2_window", _wider_window),
    ("qwen2_window", _window_everywhere),
    ("qwen3_window", _without_window),
    ("qwen3_window", _window_everywhere),
    ("llama_linear", _with_rope),
    ("llama_llama3", _with_rope),
    ("llama_llama3", _other_original),
    ("llama_llama3", _other_high_freq_factor),
    ("llama_yarn", _with_rope),
    ("llama_yarn", _without_attention_factor),
    ("llama_yarn", _other_original),
    ("llama_yarn_mscale", _with_rope),
    ("llama_yarn_mscale", _without_attention_factor),
    ("qwen2_yarn", _with_rope),
    ("qwen3_yarn", _without_attention_factor),
    ("qwen3_yarn", _yarn_truncated),
    ("qwen3_yarn", _yarn_betas),
    ("llama_tied", _other_head),
    ("llama", _tied),
    ("llama_tied", _heads_in_turns),
    ("llama_yarn", _heads_in_turns),
]


@pytest.mark.parametrize(
    ("tiny", "name", "spoil"),
    [pytest.param(name, name, spoil, id=f"{name}-{spoil.__name__.strip('_')}") for name, spoil in WRONG],
    indirect=["tiny"],
)
def test_a_wrong_switch_shows(tiny: Model, name: str, spoil: Any) -> None:
    assert error_of(tiny, name) < MAX_ERROR
    spoil(tiny)
    for way, bounds in ways(NUM_PROMPT).items():
        assert error_of(tiny, name, bounds) > 100 * MAX_ERROR, way


# ---- angles of real models


@pytest.mark.parametrize("name", ROPES)
def test_angles_of_real_models(name: str) -> None:
    """inv_freq to the last bit but one, which at position 100,000 is a hundredth of a radian at most."""
    raw, expected = ROPES[name], FILE["ropes"][name]
    theta, rope = rope_from_hf(raw, raw["max_position_embeddings"])
    frequencies = inv_freq(rope, theta, raw["head_dim"])
    theirs = np.array(expected["inv_freq"], np.float32)
    assert frequencies.dtype == np.float32
    ulps = np.abs(frequencies.view(np.int32) - theirs.view(np.int32))
    assert ulps.max() <= 2, ulps
    assert (ulps > 0).mean() < 0.3, ulps
    assert rope.attention_factor == pytest.approx(expected["attention_factor"], rel=1e-12)
    table = rope_table(rope, theta, raw["head_dim"], 3)
    angle = 2 * theirs
    np.testing.assert_allclose(
        table[2], np.r_[np.cos(angle), np.sin(angle)] * expected["attention_factor"], atol=1e-6
    )


# ---- what `sharp info` says


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("llama", ["family llama", "switches none", "rope theta 10000, default"]),
        (
            "llama_llama3",
            [
                "family llama", "switches lm_head tied", "context 512 tokens",
                "rope theta 500000, llama3, factor 8, over 64 positions, low and high frequency factors 1, 4",
            ],
        ),
        (
            "mistral_window",
            ["family mistral", "switches window of 12 tokens in all layers", "rope theta 10000, default"],
        ),
        (
            "qwen2_window",
            ["family qwen2", "switches bias on q, k and v, window of 10 tokens in 2 of 3 layers"],
        ),
        (
            "qwen2_yarn",
            [
                "family qwen2", "context 128 tokens",
                "rope theta 10000, yarn, factor 2, over 64 positions, beta 32 to 1, attention factor 1.06931",
            ],
        ),
        ("qwen3", ["family qwen3", "switches norm of q and k heads", "head dimension 16"]),
    ],
)  # fmt: skip
def test_info_of_each_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, lines: list[str]
) -> None:
    assert main(["info", str(write_directory(tmp_path / name, name))]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        assert line in shown
    weights = make_weights(name)
    assert f"parameters {sum(tensor.size for tensor in weights.values()):,}" in shown
    for tensor, values in weights.items():
        grouped = tensor.replace(".layers.0.", f".layers.0-{CONFIGS[name]['num_hidden_layers'] - 1}.")
        if ".layers." not in tensor or ".layers.0." in tensor:
            assert f"{grouped} [{', '.join(map(str, values.shape))}]" in shown


# ---- the README's recipe


@pytest.fixture
def kelp() -> Iterator[Family]:
    """The family that the README's recipe adds, by running the recipe's code."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = text.partition("### Add a model family")[2].partition("\n#")[0]
    code = recipe.partition("```python\n")[2].partition("```")[0]
    assert "register(" in code
    exec(code, {})
    yield FAMILIES["kelp"]
    del FAMILIES["kelp"]


def kelp_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A tiny Qwen3's tensors under the names that the README invents, replaced by hand."""
    out = {}
    for name, values in weights.items():
        for ours, theirs in (
            ("model.layers.", "transformer.h."), ("model.embed_tokens", "transformer.wte"),
            ("self_attn.q_norm", "attn.query_norm"), ("self_attn.k_norm", "attn.key_norm"),
            ("self_attn.", "attn."), ("model.norm", "transformer.ln_f"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        out[name] = values
    return out


def test_the_recipe_adds_a_family(tmp_path: Path, kelp: Family) -> None:
    """Qwen3's mathematics under other names: transformers' logits of the tiny Qwen3."""
    folder = write_directory(tmp_path / "kelp", "qwen3", weights=kelp_names(make_weights("qwen3")))
    config = CONFIGS["qwen3"] | {"model_type": "kelp", "architectures": ["KelpForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.architecture == "kelp"
    model = load_model(checkpoint)
    for way, bounds in ways(NUM_PROMPT).items():
        assert error_of(model, "qwen3", bounds) < MAX_ERROR, way
    model.close()
    weights = kelp_names(make_weights("qwen3"))
    weights["transformer.h.1.attn.rotten"] = weights.pop("transformer.h.1.attn.query_norm.weight")
    broken = write_directory(tmp_path / "broken", "qwen3", weights=weights)
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelFileError, match=r"tensor transformer\.h\.1\.attn\.query_norm\.weight is missing"
    ):
        open_checkpoint(broken)


def test_the_recipe_adds_its_gguf_files(tmp_path: Path, kelp: Family) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen3", arch="kelp")
    assert open_checkpoint(path).config.architecture == kelp.name
    model = load_model(open_checkpoint(path))
    assert error_of(model, "qwen3") < MAX_ERROR
    model.close()


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a family is a sharp\.families\.Family, not a str"):
        register("kelp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"there is no tensor attention; tensors: model\.embed_tokens, "):
        HF_NAMES.renamed("h.{}.", {"attention": "attn"})
    with pytest.raises(ValueError, match=r"layer 'h\.' needs one \{\}"):
        HF_NAMES.renamed("h.", {})


@pytest.mark.parametrize("names", [HF_NAMES, GGUF_NAMES, HF_NAMES.renamed("h.{}.x.", {"lm_head": "head"})])
def test_names_there_and_back(names: Names) -> None:
    for stem in names.stems:
        layered = not stem.startswith(("model.", "lm_head"))
        for kind in ("weight", "bias"):
            ours = f"model.layers.17.{stem}.{kind}" if layered else f"{stem}.{kind}"
            assert names.ours(names.stored(ours)) == ours
    for strange in ("blk.x.attn_q.weight", "output.weight.extra", "", "weight", "h.3.", "model.layers.1"):
        assert names.ours(strange) == strange
