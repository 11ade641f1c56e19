"""Rows of the running table and chunks of prompts -> BatchPlan. Refuses to change a request or to choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sharp.config import EngineConfig
from sharp.plan import BatchPlan
from sharp.request import Request
from sharp.running import RunningTable

Rows = npt.NDArray[np.int32]


def build_plan(
    step: int,
    table: RunningTable,
    decodes: Rows,
    chunks: Sequence[tuple[Request, int]],
    page_copies: npt.NDArray[np.int32],
    config: EngineConfig,
) -> tuple[BatchPlan, Rows, Rows]:
    """The plan of a step, the table row of each of its sequences, and the sequence of each of its logits
    rows.

    decodes: rows that compute their last token, known or coming. chunks: (running request, number of its next
    tokens). One-token sequences come first (BatchPlan says why).
    """
    block_size, alone = config.block_size, len(decodes)
    chunks = sorted(chunks, key=lambda chunk: chunk[1] > 1)  # stable
    rows, num_decodes = decodes, alone
    if chunks:
        rows = np.concatenate([decodes, np.array([request.row for request, _ in chunks], np.int32)])
        num_decodes += sum(count == 1 for _, count in chunks)
    starts = table.computed[rows]
    cu_seqlens_q = np.arange(len(rows) + 1, dtype=np.int32)
    if chunks:
        np.cumsum([count for _, count in chunks], out=cu_seqlens_q[alone + 1 :])
        cu_seqlens_q[alone + 1 :] += np.int32(alone)
    counts = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    context_lens = starts + counts
    token_ids = np.empty(cu_seqlens_q[-1], np.int32)
    coming = table.coming[decodes] > 0  # the value is known to the device alone: ~(where it will be)
    token_ids[:alone] = np.where(coming, ~table.logits_row[decodes], table.last_token[decodes])
    at = alone
    for request, count in chunks:
        first = request.num_computed_tokens
        token_ids[at : at + count] = request.known_array(first, first + count)
        at += count
    block_table = table.pages[rows, : -(-int(context_lens.max()) // block_size)]
    ends = table.known[rows] + table.coming[rows]
    if chunks:
        owner = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        positions = np.arange(at, dtype=np.int32) + (starts - cu_seqlens_q[:-1])[owner]
        complete = (context_lens == ends).nonzero()[0].astype(np.int32)
    else:  # as in most steps: a token of each, and each gets the next one
        owner, positions, complete = cu_seqlens_q[:-1], starts, cu_seqlens_q[:-1].copy()
    slot_mapping = block_table[owner, positions // block_size] * block_size + positions % block_size
    sampled = rows[complete]
    plan = BatchPlan(
        step=step,
        request_ids=tuple(table.name[rows].tolist()),
        num_decodes=num_decodes,
        token_ids=token_ids,
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_table=block_table,
        slot_mapping=slot_mapping,
        logits_rows=cu_seqlens_q[1:][complete] - np.int32(1),
        temperatures=table.temperature[sampled],
        top_ks=table.top_k[sampled],
        top_ps=table.top_p[sampled],
        seeds=table.seed[sampled],
        output_indices=ends[complete] - table.prompt[sampled],
        num_logprobs=table.num_logprobs[sampled],
        page_copies=page_copies,
        token_budget=config.max_num_batched_tokens,
    )
    return plan, rows, complete
