"""What a model keeps on a device: the fused weights with the tensors they are made of, and a step's buffers.

Knows shapes and how rows are put together. Refuses to know files, devices and dtypes: an element is the
engine's, unless a name of a numpy dtype says otherwise. The budget adds these up, the model allocates them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from sharp.model_config import ModelConfig

# Gate and up rows of neurons 8j..8j+7 sit together, so that one thread of a kernel holds both (see
# gemm_silu_mul).
GATE_UP_BLOCK = 8
ALIGNMENT = 256  # bytes: what the driver's own allocations start on, and more than any kernel asks for


def aligned(num_bytes: int) -> int:
    """Bytes that an array takes of an arena: whole units of 256, one at least, so that an empty array has an
    address too."""
    return max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True)
class Recipe:
    """A weight as the forward reads it. tensors: under Llama's Hugging Face names, with equal columns; their
    rows follow each other, or with `interleaved` take turns in blocks of 8 (two tensors of equal shape)."""

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    rows: tuple[int, ...]  # of each tensor
    interleaved: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a fused weight, and the (tensor, first row, last row + 1) that they are made of:
    one, or two that take turns."""

    weight: str
    start: int
    stop: int
    sources: tuple[tuple[str, int, int], ...]


def _stack(names: tuple[str, ...], rows: tuple[int, ...], *columns: int) -> Recipe:
    return Recipe((sum(rows), *columns), names, rows)


def recipes(model: ModelConfig) -> dict[str, Recipe]:
    """Every weight by name: "embed", "final_norm", "lm_head" (not where it is tied), and "0.qkv" and so on
    with the names of weights.LayerWeights."""
    hidden, inner, head = model.hidden_size, model.intermediate_size, model.head_dim
    q, kv = model.num_q_heads * head, model.num_kv_heads * head
    found = {
        "embed": _stack(("model.embed_tokens.weight",), (model.vocab_size,), hidden),
        "final_norm": _stack(("model.norm.weight",), (hidden,)),
    }
    if not model.tie_word_embeddings:
        found["lm_head"] = _stack(("lm_head.weight",), (model.vocab_size,), hidden)
    for layer in range(model.num_layers):
        of = f"model.layers.{layer}."
        parts = {"input_norm": _stack((f"{of}input_layernorm.weight",), (hidden,))}
        projections = tuple(f"{of}self_attn.{name}_proj" for name in "qkv")
        parts["qkv"] = _stack(tuple(f"{name}.weight" for name in projections), (q, kv, kv), hidden)
        if model.qkv_bias:
            parts["qkv_bias"] = _stack(tuple(f"{name}.bias" for name in projections), (q, kv, kv))
        if model.qk_norm:
            parts["q_norm"] = _stack((f"{of}self_attn.q_norm.weight",), (head,))
            parts["k_norm"] = _stack((f"{of}self_attn.k_norm.weight",), (head,))
        parts["o"] = _stack((f"{of}self_attn.o_proj.weight",), (hidden,), q)
        parts["post_norm"] = _stack((f"{of}post_attention_layernorm.weight",), (hidden,))
        both = (f"{of}mlp.gate_proj.weight", f"{of}mlp.up_proj.weight")
        parts["gate_up"] = Recipe((2 * inner, hidden), both, (inner, inner), interleaved=True)
        parts["down"] = _stack((f"{of}mlp.down_proj.weight",), (hidden,), inner)
        found |= {f"{layer}.{name}": recipe for name, recipe in parts.items()}
    return found


def pieces(weight: str, recipe: Recipe, most_elements: int) -> Iterator[Piece]:
    """A weight cut into pieces of at most most_elements (or one row, or 16 where rows take turns): every row
    once, in order."""
    columns = prod(recipe.shape[1:])
    if recipe.interleaved:
        step = max(1, most_elements // (2 * GATE_UP_BLOCK * columns)) * GATE_UP_BLOCK
        for row in range(0, recipe.rows[0], step):
            end = min(row + step, recipe.rows[0])
            yield Piece(weight, 2 * row, 2 * end, tuple((name, row, end) for name in recipe.tensors))
        return
    step, at = max(1, most_elements // columns), 0
    for name, rows in zip(recipe.tensors, recipe.rows, strict=True):
        for row in range(0, rows, step):
            end = min(row + step, rows)
            yield Piece(weight, at + row, at + end, ((name, row, end),))
        at += rows


def workspace(
    model: ModelConfig, num_tokens: int, num_rows: int
) -> dict[str, tuple[str, tuple[int, ...], str | None]]:
    """Name -> (term of the budget, shape, dtype or None for the engine's) of the buffers of a step with up to
    num_tokens tokens and num_rows rows of logits; see model.Workspace for what they are."""
    heads = model.num_q_heads + 2 * model.num_kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "residual": (num_tokens, model.hidden_size),
        "x": (num_tokens, model.hidden_size),
        "qkv": (num_tokens, heads, model.head_dim),
        "attention": (num_tokens, model.num_q_heads, model.head_dim),
        "gate_up": (num_tokens, 2 * model.intermediate_size),
        "act": (num_tokens, model.intermediate_size),
        "x_rows": (num_rows, model.hidden_size),
    }
    found: dict[str, tuple[str, tuple[int, ...], str | None]] = {
        name: ("activations", shape, None) for name, shape in shapes.items()
    }
    found["logits"] = ("logits", (num_rows, model.vocab_size), "float32")
    found["sampled"] = ("staging", (num_rows,), "int32")
    return found
