"""Memory as arithmetic: named terms in bytes, and the number of KV pages that what remains can hold.

Knows shapes and element sizes. Refuses to measure anything: the free bytes come in as an argument, and the
probe's readings (probe.py) to be shown beside what was predicted.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sharp.config import EngineConfig, ModelConfig
from sharp.model_config import DTYPE_BYTES

HOST_PAGES_LIMIT = 1 << 30  # default bytes of KV pages in host memory: a laptop has other things to do
HOST_PAGES_FRACTION = 0.25  # and at most this share of what is free
CUDA_RESERVE = 1 << 30  # left free on a GPU: modules, local memory of kernels, other processes' growth
CUDA_CONTEXT = 512 << 20  # an estimate of what a CUDA context takes, counted under memory_limit alone

COMMENTS = {
    "context": "of CUDA itself; free memory has lost it already, a simulated card (memory_limit) has not",
    "weights": "all parameters at the engine's element size",
    "activations": "the workspace of the largest step: residual, x, delta, qkv, attention, gate_up, act",
    "logits": "float32 logits of the most rows that a step can want",
    "rope_table": "cosines and sines of every position",
    "reserve": "left free; measured: how far memory rose over all buffers, at its peak during the steps",
    "kv_pages": "keys and values; the pages that remain",
    "buffers": "activations, logits, rope_table and kv_pages together, as they can only be measured",
}


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
    """Bytes by name, after the weights are loaded. `num_blocks` pages of `page_bytes` each fit in
    `kv_pages`.

    free: what could be taken, after weights and context: measured, or less where memory_limit leaves less.
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

    @property
    def kv_pages(self) -> int:
        return self.num_blocks * self.page_bytes

    def terms(self) -> dict[str, int]:
        """How `free` is divided, in bytes."""
        return {
            "free": self.free,
            "activations": self.activations,
            "logits": self.logits,
            "rope_table": self.rope_table,
            "reserve": self.reserve,
            "kv_pages": self.kv_pages,
        }

    def report(self, measured: Mapping[str, int] | None = None) -> BudgetReport:
        """The terms with comments, and beside them `measured` bytes by name (context, weights, buffers,
        reserve).
        """
        measured = measured or {}
        parts = ("activations", "logits", "rope_table", "kv_pages")
        predicted = {name: int(getattr(self, name)) for name in ("context", "weights", *parts)}
        if "buffers" in measured:
            predicted["buffers"] = sum(predicted[name] for name in parts)
        predicted["reserve"] = self.reserve
        return BudgetReport(
            tuple(Term(name, size, measured.get(name), COMMENTS[name]) for name, size in predicted.items())
        )

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def activation_columns(model: ModelConfig) -> int:
    """Elements per token of the workspace: residual, x, delta, packed qkv, attention output, gate_up, act."""
    heads = model.num_q_heads + 2 * model.num_kv_heads
    return (
        3 * model.hidden_size
        + heads * model.head_dim
        + model.num_q_heads * model.head_dim
        + 3 * model.intermediate_size
    )


def weight_bytes(model: ModelConfig, dtype: str, kind: str) -> int:
    """Bytes of all weights on a device of `kind`; the host keeps them in float32 (BLAS takes no less)."""
    return model.num_parameters * (4 if kind == "cpu" else DTYPE_BYTES[dtype])


def plan_memory(
    model: ModelConfig, config: EngineConfig, *, free: int, dtype: str, kind: str, max_model_len: int
) -> Budget:
    """Divide `free` bytes (measured, weights already loaded) into named terms.

    `config.memory_limit` is the memory of a smaller device: weights, context (an estimate, on CUDA),
    reserve, workspace and pages stay within it together, and within `free`. Pages never exceed what
    max_num_seqs sequences of max_model_len tokens could use; `config.num_blocks` sets their number instead.
    Without either, a host gives pages a quarter of what is free, at most 1 GiB.
    Raises MemoryError naming needed and available bytes if not even one page fits, or not num_blocks.
    """
    element = DTYPE_BYTES[dtype]
    activations = config.max_num_batched_tokens * activation_columns(model) * element
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    logits = rows * model.vocab_size * 4
    rope_table = max_model_len * model.head_dim * 4
    reserve = CUDA_RESERVE if kind == "cuda" else 0
    context = CUDA_CONTEXT if kind == "cuda" else 0
    weights = weight_bytes(model, dtype, kind)
    page_bytes = 2 * model.num_layers * model.num_kv_heads * config.block_size * model.head_dim * element
    where = f"{free:,} free"
    if config.memory_limit is not None and config.memory_limit - weights - context < free:
        free = config.memory_limit - weights - context
        where = f"{free:,} that memory_limit {config.memory_limit:,} leaves beside the weights ({weights:,})"
    available = free - activations - logits - rope_table - reserve
    most_useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    else:
        share = available
        if kind == "cpu" and config.memory_limit is None:
            share = min(HOST_PAGES_LIMIT, int(available * HOST_PAGES_FRACTION))
        num_blocks = min(share // page_bytes, most_useful)
    if num_blocks < 1 or num_blocks * page_bytes > available:
        raise MemoryError(
            f"{max(num_blocks, 1)} KV pages need {max(num_blocks, 1) * page_bytes:,} bytes, "
            f"but {max(available, 0):,} remain of {where} after "
            f"activations ({activations:,}), logits ({logits:,}), rope table ({rope_table:,}) and reserve "
            f"({reserve:,}); lower max_num_batched_tokens, max_num_seqs or num_blocks, or raise memory_limit"
        )
    return Budget(
        free=free,
        activations=activations,
        logits=logits,
        rope_table=rope_table,
        reserve=reserve,
        page_bytes=page_bytes,
        num_blocks=num_blocks,
        weights=weights,
        context=context,
    )
