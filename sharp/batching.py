"""(request, number of tokens) pairs -> BatchPlan. Reads requests; refuses to change one or to choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharp.config import EngineConfig
from sharp.plan import BatchPlan
from sharp.request import Request


def build_plan(step: int, work: Sequence[tuple[Request, int]], config: EngineConfig) -> BatchPlan:
    """The plan of a step: the next `count` tokens of each request, one-token sequences first (BatchPlan says
    why)."""
    block_size = config.block_size
    counts = np.array([count for _, count in work], np.int32)
    starts = np.array([request.num_computed_tokens for request, _ in work], np.int32)
    cu_seqlens_q = np.zeros(len(work) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens_q[1:])
    context_lens = starts + counts
    page_counts = -(-context_lens // block_size)
    num_pages = page_counts.tolist()
    pages: list[int] = []
    token_ids: list[int] = []
    rows: list[int] = []
    sampled: list[Request] = []
    for seq, (request, count) in enumerate(work):
        first = request.num_computed_tokens
        pages += request.block_ids[: num_pages[seq]]
        last = first + count == request.num_tokens
        if last and count == 1 and request.output_token_ids:  # a decode: no slices
            token_ids.append(request.output_token_ids[-1])
        else:
            token_ids += request.known_tokens(first, first + count)
        if last:
            rows.append(len(token_ids) - 1)
            sampled.append(request)
    # For all at once: a decode has one token and few pages, and a call of numpy costs microseconds.
    block_table = np.full((len(work), max(num_pages)), -1, np.int32)
    block_table[np.arange(block_table.shape[1]) < page_counts[:, None]] = pages
    owner = np.repeat(np.arange(len(work), dtype=np.int32), counts)
    positions = np.arange(len(token_ids), dtype=np.int32) + (starts - cu_seqlens_q[:-1])[owner]
    slot_mapping = block_table[owner, positions // block_size] * block_size + positions % block_size
    return BatchPlan(
        step=step,
        request_ids=tuple(request.request_id for request, _ in work),
        num_decodes=int((counts == 1).sum()),
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_table=block_table,
        slot_mapping=slot_mapping,
        logits_rows=np.array(rows, np.int32),
        temperatures=np.array([r.params.temperature for r in sampled], np.float32),
        seeds=np.array([r.seed for r in sampled], np.uint64),
        output_indices=np.array([len(r.output_token_ids) for r in sampled], np.int32),
        num_logprobs=np.array(
            [-1 if r.params.logprobs is None else r.params.logprobs for r in sampled], np.int32
        ),
        token_budget=config.max_num_batched_tokens,
    )
