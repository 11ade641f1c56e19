"""Memory as arithmetic: named terms in bytes, and the number of KV pages that what remains can hold.

Knows shapes and element sizes. Refuses to measure anything: the free bytes come in as an argument. (The
Phase-0 probe that measures step times and checks these predictions is to build on this table.)
"""

from __future__ import annotations

from dataclasses import dataclass

from sharp.config import EngineConfig, ModelConfig
from sharp.model_config import DTYPE_BYTES

HOST_PAGES_LIMIT = 1 << 30  # default bytes of KV pages in host memory: a laptop has other things to do
HOST_PAGES_FRACTION = 0.25  # and at most this share of what is free
CUDA_RESERVE = 1 << 30  # left free on a GPU: modules, local memory of kernels, other processes' growth


@dataclass(frozen=True)
class Budget:
    """Bytes by name, after the weights are loaded. `num_blocks` pages of `page_bytes` each fit in
    `kv_pages`.
    """

    free: int
    activations: int
    logits: int
    rope_table: int
    reserve: int
    page_bytes: int
    num_blocks: int

    @property
    def kv_pages(self) -> int:
        return self.num_blocks * self.page_bytes

    def terms(self) -> dict[str, int]:
        """The table that notebooks print, in bytes."""
        return {
            "free": self.free,
            "activations": self.activations,
            "logits": self.logits,
            "rope_table": self.rope_table,
            "reserve": self.reserve,
            "kv_pages": self.kv_pages,
        }


def activation_columns(model: ModelConfig) -> int:
    """Elements per token of the workspace: residual, x, delta, packed qkv, attention output, gate_up, act."""
    heads = model.num_q_heads + 2 * model.num_kv_heads
    return (
        3 * model.hidden_size
        + heads * model.head_dim
        + model.num_q_heads * model.head_dim
        + 3 * model.intermediate_size
    )


def plan_memory(
    model: ModelConfig, config: EngineConfig, *, free: int, dtype: str, kind: str, max_model_len: int
) -> Budget:
    """Divide `free` bytes (measured, weights already loaded) into named terms.

    Pages never exceed what max_num_seqs sequences of max_model_len tokens could use. `config.num_blocks` or
    `config.memory_limit` (bytes of pages) override the share taken by default.
    Raises MemoryError naming needed and available bytes if not even one page fits.
    """
    element = DTYPE_BYTES[dtype]
    activations = config.max_num_batched_tokens * activation_columns(model) * element
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    logits = rows * model.vocab_size * 4
    rope_table = max_model_len * model.head_dim * 4
    reserve = CUDA_RESERVE if kind == "cuda" else 0
    page_bytes = 2 * model.num_layers * model.num_kv_heads * config.block_size * model.head_dim * element
    available = free - activations - logits - rope_table - reserve
    most_useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    else:
        share = available
        if config.memory_limit is not None:
            share = config.memory_limit
        elif kind == "cpu":
            share = min(HOST_PAGES_LIMIT, int(available * HOST_PAGES_FRACTION))
        num_blocks = min(share // page_bytes, most_useful)
    if num_blocks < 1 or num_blocks * page_bytes > available:
        raise MemoryError(
            f"{max(num_blocks, 1)} KV pages need {max(num_blocks, 1) * page_bytes:,} bytes, "
            f"but {max(available, 0):,} remain of {free:,} free after "
            f"activations ({activations:,}), logits ({logits:,}) and reserve ({reserve:,}); lower "
            f"max_num_batched_tokens, max_num_seqs or num_blocks, or raise memory_limit"
        )
    return Budget(
        free=free,
        activations=activations,
        logits=logits,
        rope_table=rope_table,
        reserve=reserve,
        page_bytes=page_bytes,
        num_blocks=num_blocks,
    )
