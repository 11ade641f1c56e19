"""Memory as arithmetic: named terms in bytes, and the number of KV pages that what remains can hold.

Knows shapes and element sizes. Refuses to measure anything: the free bytes come in as an argument, and the
probe's readings (probe.py) to be shown beside what was predicted.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from sharp.config import EngineConfig, ModelConfig
from sharp.layout import aligned, recipes, workspace
from sharp.model_config import DTYPE_BYTES

HOST_PAGES_LIMIT = 1 << 30  # default bytes of KV pages in host memory: a laptop has other things to do
HOST_PAGES_FRACTION = 0.25  # and at most this share of what is free
CUDA_RESERVE = 1 << 30  # left free on a GPU: modules, local memory of kernels, other processes' growth
CUDA_CONTEXT = 512 << 20  # an estimate of what a CUDA context takes, counted under memory_limit alone

COMMENTS = {
    "context": "of CUDA itself; free memory has lost it already, a simulated card (memory_limit) has not",
    "weights": "all parameters at the engine's element size",
    "activations": "the workspace of the largest step: residual, x, qkv, attention, gate_up, act, x_rows",
    "logits": "float32 logits of the most rows that a step can want",
    "rope_table": "cosines and sines of every position",
    "workspaces": "what attention and sampling keep beside their operands: partial results, counters",
    "staging": "a step's indices on the device, twice, and the ids that it samples",
    "graphs": "of the driver, for captured steps; measured: by how much free memory fell meanwhile",
    "reserve": "left free; measured: how far memory rose over all buffers, at its peak during the steps",
    "kv_pages": "keys and values; the pages that remain",
    "buffers": "all buffers beside the weights together, as they can only be measured",
    "arena": "weights and all buffers: one allocation, as the device sees it",
}
PARTS = ("activations", "logits", "rope_table", "workspaces", "staging", "kv_pages")  # the buffers


@dataclass(frozen=True)
class Term:
    """A named part of memory in bytes. measured: None where nothing measures it."""

    name: str
    predicted: int
    measured: int | None
    comment: str

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured; None without a measurement."""
        return None if not self.measured else (self.predicted - self.measured) / self.measured


@dataclass(frozen=True)
class BudgetReport:
    """Predicted beside measured, to be printed, kept as JSON or shown in a notebook."""

    terms: tuple[Term, ...]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(name, predicted, measured, error, comment) of each term, as words."""
        return [
            (
                term.name,
                f"{term.predicted / 2**20:,.1f}",
                "-" if term.measured is None else f"{term.measured / 2**20:,.1f}",
                "-" if term.error is None else f"{term.error:+.1%}",
                term.comment,
            )
            for term in self.terms
        ]

    def as_json(self) -> list[dict[str, Any]]:
        return [{**asdict(term), "error": term.error} for term in self.terms]

    def __str__(self) -> str:
        head = ("MiB", "predicted", "measured", "error", "")
        return "\n".join(
            f"{a:<12}{b:>12}{c:>12}{d:>9}  {e}".rstrip() for a, b, c, d, e in [head, *self.rows()]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        return (
            "<table><tr><th>term, MiB</th><th>predicted</th><th>measured</th><th>error</th><th></th></tr>"
            f"{rows}</table>"
        )


@dataclass(frozen=True)
class Budget:
    """Bytes by name, the weights beside them. `num_blocks` pages of `page_bytes` each fit in `kv_pages`.

    free: what could be taken, after weights and context: measured, or less where memory_limit leaves less.
    arena: on a GPU, weights and buffers in one allocation, each array on a multiple of 256 bytes; else 0.
    """

    free: int
    activations: int
    logits: int
    rope_table: int
    reserve: int
    page_bytes: int
    num_blocks: int
    weights: int = 0
    context: int = 0
    workspaces: int = 0
    staging: int = 0
    graphs: int = 0
    arena: int = 0

    @property
    def kv_pages(self) -> int:
        return self.num_blocks * self.page_bytes

    def terms(self) -> dict[str, int]:
        """How `free` is divided, in bytes."""
        parts = {name: int(getattr(self, name)) for name in PARTS if name != "kv_pages"}
        rest = {"graphs": self.graphs, "reserve": self.reserve, "kv_pages": self.kv_pages}
        return {"free": self.free, **parts, **rest}

    def report(self, measured: Mapping[str, int] | None = None) -> BudgetReport:
        """The terms with comments, and beside them `measured` bytes by name (terms, buffers, arena)."""
        measured = measured or {}
        predicted = {name: int(getattr(self, name)) for name in ("context", "weights", *PARTS)}
        if "buffers" in measured:
            predicted["buffers"] = sum(predicted[name] for name in PARTS)
        if "arena" in measured:
            predicted["arena"] = self.arena
        predicted |= {"graphs": self.graphs, "reserve": self.reserve}
        return BudgetReport(
            tuple(Term(name, size, measured.get(name), COMMENTS[name]) for name, size in predicted.items())
        )

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def weight_bytes(model: ModelConfig, dtype: str, kind: str) -> int:
    """Bytes of all weights on a device of `kind`; the host keeps them in float32 (BLAS takes no less)."""
    if kind == "cpu":
        return 4 * model.num_parameters
    return sum(aligned(prod(recipe.shape) * DTYPE_BYTES[dtype]) for recipe in recipes(model).values())


def _buffer_bytes(
    model: ModelConfig, num_tokens: int, num_rows: int, dtype: str, kind: str
) -> dict[str, int]:
    """Term -> bytes of a step's buffers, with an arena's padding on a GPU."""
    terms: dict[str, int] = {}
    for term, shape, name in workspace(model, num_tokens, num_rows).values():
        size = prod(shape) * (DTYPE_BYTES[dtype] if name is None else 4)
        terms[term] = terms.get(term, 0) + (size if kind == "cpu" else aligned(size))
    return terms


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    *,
    free: int,
    dtype: str,
    kind: str,
    max_model_len: int,
    workspaces: int = 0,
    staging: int = 0,
    graphs: int = 0,
) -> Budget:
    """Divide `free` bytes (measured, and the weights taken off) into named terms.

    workspaces, staging, graphs: bytes that kernels, a step's indices and captured steps take on the device.
    `config.memory_limit` is the memory of a smaller device: weights, context (an estimate, on CUDA),
    reserve, buffers and pages stay within it together, and within `free`. Pages never exceed what
    max_num_seqs sequences of max_model_len tokens could use; `config.num_blocks` sets their number instead.
    Without either, a host gives pages a quarter of what is free, at most 1 GiB.
    Raises MemoryError naming needed and available bytes if not even one page fits, or not num_blocks.
    """
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    buffers = _buffer_bytes(model, config.max_num_batched_tokens, rows, dtype, kind)
    table = max_model_len * model.head_dim * 4
    parts = {
        "activations": buffers["activations"],
        "logits": buffers["logits"],
        "rope_table": table if kind == "cpu" else aligned(table),
        "workspaces": workspaces,
        "staging": staging + buffers["staging"],
        "graphs": graphs,
        "reserve": CUDA_RESERVE if kind == "cuda" else 0,
    }
    context = CUDA_CONTEXT if kind == "cuda" else 0
    weights = weight_bytes(model, dtype, kind)
    cache_bytes = model.num_kv_heads * config.block_size * model.head_dim * DTYPE_BYTES[dtype]
    page_bytes = 2 * model.num_layers * cache_bytes
    where = f"{free:,} free"
    if config.memory_limit is not None and config.memory_limit - weights - context < free:
        free = config.memory_limit - weights - context
        where = f"{free:,} that memory_limit {config.memory_limit:,} leaves beside the weights ({weights:,})"
    available = free - sum(parts.values())
    most_useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    else:
        share = available
        if kind == "cpu" and config.memory_limit is None:
            share = min(HOST_PAGES_LIMIT, int(available * HOST_PAGES_FRACTION))
        num_blocks = min(share // page_bytes, most_useful)
    if num_blocks < 1 or num_blocks * page_bytes > available:
        taken = ", ".join(f"{name.replace('_', ' ')} ({size:,})" for name, size in parts.items() if size)
        raise MemoryError(
            f"{max(num_blocks, 1)} KV pages need {max(num_blocks, 1) * page_bytes:,} bytes, "
            f"but {max(available, 0):,} remain of {where} after {taken}; "
            "lower max_num_batched_tokens, max_num_seqs or num_blocks, or raise memory_limit"
        )
    caches = 2 * model.num_layers * aligned(num_blocks * cache_bytes)
    arena = weights + sum(parts.values()) - graphs - parts["reserve"] + caches
    return Budget(
        free=free,
        page_bytes=page_bytes,
        num_blocks=num_blocks,
        weights=weights,
        context=context,
        arena=arena if kind == "cuda" else 0,
        **parts,
    )
