"""The tiny models of golden/family_models.py as files, and their logits row by row through a Model."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from engine_checks import poison
from gguf import GGUFWriter
from model_files import to_gguf_rows

from sharp.config import EngineConfig
from sharp.device import open_device
from sharp.model import Model
from sharp.plan import BatchPlan
from sharp.weights import Checkpoint, open_checkpoint

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))
from family_models import CONFIGS, NUM_PROMPT, ROPES, ROWS, checksum, make_weights, write_directory  # noqa: E402

__all__ = ["CONFIGS", "NUM_PROMPT", "ROPES", "ROWS", "checksum", "make_weights", "write_directory"]

BLOCK = 16  # windows are 9 to 12 wide: they start in the middle of pages and cross them
MAX_ERROR = 1e-4  # of a logit; the largest are about 10


def golden() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """families.json and the logits f32[len(ROWS), V] by model name."""
    with np.load(GOLDEN / "families.npz") as file:
        return json.loads((GOLDEN / "families.json").read_text(encoding="utf-8")), dict(file)


def load_model(checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> Model:
    """A model whose pages are all NaN, so that reading one too many shows."""
    sizes = {"block_size": BLOCK, "num_blocks": 32, "max_num_batched_tokens": 256, "max_num_seqs": 256}
    config = EngineConfig(device=device, dtype=dtype, **sizes)
    model = Model(checkpoint, config, open_device(device, dtype))
    poison(model)
    return model


def plan_of(pieces: list[tuple[list[int], int, int, list[int]]]) -> BatchPlan:
    """A step of (ids, start, stop, pages): tokens [start, stop) of each sequence, logits for all of them.

    One-token pieces that continue a sequence are decodes and must come first.
    """
    counts = np.array([stop - start for _, start, stop, _ in pieces])
    positions = np.concatenate([np.arange(start, stop) for _, start, stop, _ in pieces])
    owner = np.repeat(np.arange(len(pieces)), counts)
    table = np.full((len(pieces), max(len(pages) for *_, pages in pieces)), -1)
    for row, (*_, pages) in enumerate(pieces):
        table[row, : len(pages)] = pages
    total = int(counts.sum())
    return BatchPlan(
        step=0,
        request_ids=tuple(map(str, range(len(pieces)))),
        num_decodes=sum(stop - start == 1 and start > 0 for _, start, stop, _ in pieces),
        token_ids=np.concatenate([ids[start:stop] for ids, start, stop, _ in pieces]).astype(np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens_q=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_lens=np.array([stop for _, _, stop, _ in pieces], np.int32),
        block_table=table.astype(np.int32),
        slot_mapping=(table[owner, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
        logits_rows=np.arange(total, dtype=np.int32),
        temperatures=np.zeros(total, np.float32),
        top_ks=np.zeros(total, np.int32),
        top_ps=np.ones(total, np.float32),
        seeds=np.zeros(total, np.uint64),
        output_indices=np.zeros(total, np.int32),
        num_logprobs=np.full(total, -1, np.int32),
    )


def step(model: Model, pieces: list[tuple[list[int], int, int, list[int]]]) -> np.ndarray:
    """Logits f32[T, V] of one step."""
    logits = model.forward(model.stage(plan_of(pieces)))
    return np.array(model.device.download(logits), copy=True)


def in_pieces(model: Model, ids: list[int], bounds: list[int]) -> np.ndarray:
    """Logits f32[len(ids), V] of a prompt cut at `bounds`, on pages that are not in order."""
    pages = [9, 2, 30, 5, 17][: -(-len(ids) // BLOCK)]
    edges = [0, *bounds, len(ids)]
    return np.concatenate([step(model, [(ids, a, b, pages)]) for a, b in pairwise(edges)])


def check_same_bits(
    model: Model, ids: list[int], ways: dict[str, list[int]], stranger: list[int]
) -> np.ndarray:
    """A prompt whole, cut, decoded token by token and packed with a stranger: the same bits in all logits."""
    whole = in_pieces(model, ids, [])
    assert np.isfinite(whole).all()
    runs = {way: in_pieces(model, ids, bounds) for way, bounds in ways.items()}
    page = -(-len(stranger) // BLOCK)
    pieces = [(stranger, 0, len(stranger), list(range(page))), (ids, 0, len(ids), [31, 20, 28, 10])]
    runs["packed"] = step(model, pieces)[len(stranger) :]
    for way, logits in runs.items():
        wrong = (logits.view(np.uint32) != whole.view(np.uint32)).sum()
        assert wrong == 0, f"{way}: {wrong} of {whole.size} logits differ in bits"
    return whole


def ways(num_tokens: int) -> dict[str, list[int]]:
    """How a prompt is cut: whole, into chunks that end in the middle of windows and pages, token by token."""
    return {"whole": [], "cut": [3, 4, 14, 31], "decoded": list(range(7, num_tokens))}


def write_gguf(path: Path, name: str, arch: str | None = None) -> Path:
    """The model `name` as a GGUF file in float32, as llama.cpp's converter lays it out.

    Tensor names come from the gguf library's own table, not from sharp. arch: another general.architecture.
    """
    config, tensors = CONFIGS[name], make_weights(name)
    known = {"llama": "llama", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    arch = arch or known
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    q, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // q)
    writer = GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(q)
    writer.add_head_count_kv(kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["model_type"] == "mistral" and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    _add_rope(writer, config, head_dim)
    _add_tokenizer(writer, config["vocab_size"])
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == known)
    names = gguf.get_tensor_name_map(kind, layers)
    for tensor, values in tensors.items():
        for part, heads in (("q_proj", q), ("k_proj", kv)):
            if part in tensor and known == "llama":
                values = to_gguf_rows(values, heads)
        stored = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        assert stored is not None, tensor
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope(writer: GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    writer.add_rope_freq_base(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        # The converter works the divisors out and stores them as a tensor.
        low, high, old = (
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
        factors = []
        for pair in range(head_dim // 2):
            wave = 2 * np.pi * theta ** (2 * pair / head_dim)
            if wave < old / high:
                factors.append(1.0)
            elif wave > old / low:
                factors.append(rope["factor"])
            else:
                smooth = (old / wave - low) / (high - low)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    elif kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if key in rope:
                add(rope[key])


def _add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    letters = [chr(code) for code in range(33, 33 + vocab - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_types([3, 3, 3] + [1] * (vocab - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def open_tiny(folder: Path, name: str) -> Checkpoint:
    """The model `name`, written under `folder` and opened."""
    return open_checkpoint(write_directory(folder / name, name))
