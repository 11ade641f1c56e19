"""Checkpoints on disk -> the arrays the forward pass uses.

Knows the tensor list of a model, under Llama's Hugging Face names (families.py translates), and how the
engine wants it fused: q, k and v in one matrix, gate and up rows interleaved in blocks of 8. Knows nothing of
file formats (gguf_file.py, hf_dir.py) or of devices: `upload` decides what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from sharp.layout import GATE_UP_BLOCK
from sharp.model_config import ModelConfig, ModelFileError
from sharp.pull import resolve

if TYPE_CHECKING:
    from sharp.tokenizer import Tokenizer

FloatArray = npt.NDArray[np.float32]


class TensorSource(Protocol):
    """What a file format gives: see GGUFFile and HFDirectory."""

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    num_bytes: int

    def where(self, name: str) -> str: ...
    def read(self, name: str) -> FloatArray: ...
    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]: ...


@dataclass
class LayerWeights:
    """One layer. H hidden, I intermediate, D head_dim; a field is what `upload` returned for its array."""

    input_norm: Any  # [H]
    qkv: Any  # [(Hq + 2 Hkv) * D, H]: rows of q, then k, then v
    qkv_bias: Any | None  # [(Hq + 2 Hkv) * D]
    q_norm: Any | None  # [D], for all heads
    k_norm: Any | None  # [D]
    o: Any  # [H, Hq * D]
    post_norm: Any  # [H]
    gate_up: Any  # [2 I, H]: 8 gate rows, 8 up rows, and so on
    down: Any  # [H, I]


@dataclass
class ModelWeights:
    """All weights of a model. lm_head is the same object as embed when the two are tied."""

    embed: Any  # [V, H]
    layers: list[LayerWeights]
    final_norm: Any  # [H]
    lm_head: Any  # [V, H]


class Checkpoint:
    """A model on disk whose tensor names and shapes have been checked; no tensor is read before `read`.

    Attributes: path; config; names (HF names); num_bytes (of the tensors, as stored).
    Raises ModelFileError on construction for a missing, extra or wrong-shaped tensor.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.path = source.path
        self.config = source.config
        self.num_bytes = source.num_bytes
        if source.config.num_layers > len(source.shapes):  # before a damaged count makes billions of names
            raise ModelFileError(
                f"{self.path}: the configuration has {source.config.num_layers} layers, "
                f"but there are only {len(source.shapes)} tensors"
            )
        expected = expected_shapes(source.config)
        missing = [name for name in expected if name not in source.shapes]
        if missing:
            raise ModelFileError(f"{source.where(missing[0])} is missing{_and_more(source, missing)}")
        for name, shape in expected.items():
            if source.shapes[name] != shape:
                raise ModelFileError(
                    f"{source.where(name)} has shape {list(source.shapes[name])}, "
                    f"the configuration needs {list(shape)}"
                )
        extra = [name for name in source.shapes if name not in expected]
        if extra:
            raise ModelFileError(
                f"{source.where(extra[0])} is not part of a {self.config.architecture} model with "
                f"{self.config.num_layers} layers{_and_more(source, extra)}"
            )
        self.names = tuple(expected)

    def read(self, name: str) -> FloatArray:
        """One tensor by HF name: float32, HF shape, contiguous; q/k rows in rotate-half order."""
        if name not in self.names:
            raise KeyError(f"{self.path} has no tensor {name}")
        return self._source.read(name)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of a tensor (elements of a vector), as `read` orders them: float32, or as they
        are stored where the file is mapped (bfloat16, float16), without a copy."""
        if name not in self.names:
            raise KeyError(f"{self.path} has no tensor {name}")
        return self._source.rows(name, start, stop)

    def check_fusable(self) -> None:
        """ModelFileError when intermediate_size is not a multiple of 8, the rows that gate and up take turns
        in."""
        if self.config.intermediate_size % GATE_UP_BLOCK:
            raise ModelFileError(
                f"{self.path}: intermediate_size {self.config.intermediate_size} is not a multiple "
                f"of {GATE_UP_BLOCK}"
            )

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises ModelFileError when it is absent, unsupported or too large."""
        from sharp.gguf_file import GGUFFile
        from sharp.tokenizer import Tokenizer

        if isinstance(self._source, GGUFFile):
            tokenizer = Tokenizer.from_gguf(self._source.metadata, self.path, self.config.eos_token_ids)
        else:
            tokenizer = Tokenizer.from_hf(self.path, self.config.eos_token_ids)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ModelFileError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the model's vocabulary only {self.config.vocab_size}: "
                f"{tokenizer.last_token!r:.80} has no row in the embedding"
            )
        return tokenizer


def _and_more(source: TensorSource, names: list[str]) -> str:
    """The second and third of `names` written out, the rest counted; empty for one name."""
    shown = [source.where(name).rpartition(" ")[2] for name in names[1:3]]
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    return f" (also {', '.join(shown + more)})" if shown else ""


def open_checkpoint(path_or_name: str | Path) -> Checkpoint:
    """Open a GGUF file, an HF directory, or a model of weights/MANIFEST.toml that was pulled.

    Raises ModelFileError when there is no such model, or for what is wrong in its files.
    """
    path = resolve(path_or_name)
    if path.is_dir():
        from sharp.hf_dir import HFDirectory

        return Checkpoint(HFDirectory(path))
    from sharp.gguf_file import GGUFFile

    return Checkpoint(GGUFFile(path))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> shape for every tensor of the model, in the order in which they are used."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
            if config.qk_norm and name != "v":
                shapes[f"{prefix}self_attn.{name}_norm.weight"] = (config.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q_rows)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def interleave_gate_up(
    read_gate: Callable[[], FloatArray], read_up: Callable[[], FloatArray], inner: int, hidden: int
) -> FloatArray:
    """[I, H] and [I, H] -> [2I, H]: rows 16j..16j+7 are gate rows 8j..8j+7, rows 16j+8..16j+15 up rows.

    They are read one after the other: of a model of 70 B parameters both together are its largest arrays.
    """
    out = np.empty((inner // GATE_UP_BLOCK, 2, GATE_UP_BLOCK, hidden), dtype=np.float32)
    out[:, 0] = read_gate().reshape(-1, GATE_UP_BLOCK, hidden)
    out[:, 1] = read_up().reshape(-1, GATE_UP_BLOCK, hidden)
    return out.reshape(2 * inner, hidden)


def load_weights(
    checkpoint: Checkpoint, upload: Callable[[FloatArray], Any], *, progress: bool = True
) -> ModelWeights:
    """Read, fuse and hand every weight to `upload`, one layer's float32 at a time.

    upload: called with each fused float32 array; what it returns is kept (the array itself, a bfloat16 copy,
    a device array). progress: show a bar.
    Raises ModelFileError when intermediate_size is not a multiple of 8.
    """
    config = checkpoint.config
    checkpoint.check_fusable()
    with tqdm(total=config.num_layers + 1, desc="loading", unit="layer", disable=not progress) as bar:
        embed = upload(checkpoint.read("model.embed_tokens.weight"))
        final_norm = upload(checkpoint.read("model.norm.weight"))
        tied = config.tie_word_embeddings
        lm_head = embed if tied else upload(checkpoint.read("lm_head.weight"))
        bar.update()
        layers = []
        for layer in _layers(checkpoint, upload):
            layers.append(layer)
            bar.update()
    return ModelWeights(embed=embed, layers=layers, final_norm=final_norm, lm_head=lm_head)


def _layers(checkpoint: Checkpoint, upload: Callable[[FloatArray], Any]) -> Iterator[LayerWeights]:
    for layer in range(checkpoint.config.num_layers):

        def read(name: str, prefix: str = f"model.layers.{layer}.") -> FloatArray:
            return checkpoint.read(prefix + name)

        bias = None
        if checkpoint.config.qkv_bias:
            bias = upload(np.concatenate([read(f"self_attn.{name}_proj.bias") for name in "qkv"]))
        yield LayerWeights(
            input_norm=upload(read("input_layernorm.weight")),
            qkv=upload(np.concatenate([read(f"self_attn.{name}_proj.weight") for name in "qkv"])),
            qkv_bias=bias,
            q_norm=upload(read("self_attn.q_norm.weight")) if checkpoint.config.qk_norm else None,
            k_norm=upload(read("self_attn.k_norm.weight")) if checkpoint.config.qk_norm else None,
            o=upload(read("self_attn.o_proj.weight")),
            post_norm=upload(read("post_attention_layernorm.weight")),
            gate_up=upload(
                interleave_gate_up(
                    partial(read, "mlp.gate_proj.weight"),
                    partial(read, "mlp.up_proj.weight"),
                    checkpoint.config.intermediate_size,
                    checkpoint.config.hidden_size,
                )
            ),
            down=upload(read("mlp.down_proj.weight")),
        )
