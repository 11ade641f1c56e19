"""A plan as words for the op apply_step, and the fixed device buffers that it fills: a step's only way to a
captured graph.

Knows: which numbers of a plan the launches read, and what the device's block table holds already. Refuses to
know: how words travel, when a step runs, requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_numba.ops.apply_step import HEADER, ROW_COLUMNS, StepLayout, packed_words
from sharp.buckets import Bucket
from sharp.device import Array, Device
from sharp.plan import BatchPlan, Int32
from sharp.staging import StepArrays

TERM = "staging"  # of the budget
UNKNOWN = -2  # an entry that may hold anything: no page, and not the -1 of none


def _words(column: npt.NDArray[Any]) -> Int32:
    """A column of a plan as the words that it consists of."""
    return np.ascontiguousarray(column).view(np.int32)


class StepPacker:
    """Plans as words, in the order of their steps: of the block table, only what changed since the last one.

    The block table on the device is in batch order, as the attention kernels read it: sequence b of a step is
    row b. Where sequences leave, those behind them move up, and a few hundred entries change; a step of
    decodes alone changes one entry a sequence every block_size steps.
    """

    def __init__(self, layout: StepLayout) -> None:
        self.layout = layout
        self._table = np.full((layout.max_seqs, layout.max_pages), UNKNOWN, np.int32)
        self._packed: BatchPlan | None = None  # packed, and not launched yet
        self._rows = 0  # logits rows of the step launched last

    def pack(self, plan: BatchPlan, bucket: Bucket, out: Int32) -> int:
        """Write the plan's words to the front of out i32[layout.packed_words]; returns how many.

        The caller says launched() once the whole step is queued behind the one before. Where it does not, the
        step was interrupted: what the device holds is not known then, and the next one sends its whole block
        table. ValueError for a plan that is larger than its bucket or the layout, or asks for an id of a row
        that the step before did not have.
        """
        seqs, rows, changed = plan.num_seqs, len(plan.logits_rows), plan.block_table
        if not (plan.num_tokens <= bucket.tokens <= self.layout.max_tokens) or not (
            rows <= seqs <= bucket.seqs <= self.layout.max_seqs
        ):
            raise ValueError(
                f"step {plan.step}: {plan.num_tokens} tokens and {rows} logits rows of {seqs} sequences do "
                f"not fit the bucket {bucket}"
            )
        if plan.block_table.shape[1] > self.layout.max_pages:
            raise ValueError(
                f"step {plan.step}: {plan.block_table.shape[1]} pages a sequence; at most "
                f"{self.layout.max_pages} are possible"
            )
        lowest = int(plan.token_ids.min(initial=0))
        if ~lowest >= self._rows:
            raise ValueError(
                f"step {plan.step} takes a token from row {~lowest} of the step before, "
                f"which had {self._rows}"
            )
        if self._packed is not None:
            self._table.fill(UNKNOWN)
        known = self._table[:seqs, : changed.shape[1]]
        row, column = np.nonzero(known != changed)
        decodes = plan.num_decodes if bucket.decodes else 0  # else they are chunks of one token
        header = (plan.num_tokens, rows, decodes, seqs, bucket.tokens, bucket.seqs, len(row), 0)
        assert len(header) == HEADER
        columns = [_words(getattr(plan, name)) for name in (*ROW_COLUMNS, "seeds")]
        total = packed_words(plan.num_tokens, seqs, rows, len(row))
        np.concatenate(
            [
                np.array(header, np.int32), plan.token_ids, plan.positions, plan.slot_mapping,
                plan.context_lens, plan.cu_seqlens_q, *columns,
                (row * self.layout.max_pages + column).astype(np.int32), changed[row, column],
            ],
            out=out[:total],
        )  # fmt: skip
        self._packed = plan
        return total

    def launched(self) -> None:
        """The packed step is queued: behind it the block table is its plan's, and its ids are sampled."""
        plan, self._packed = self._packed, None
        assert plan is not None, "no step is packed"
        self._table[: plan.num_seqs, : plan.block_table.shape[1]] = plan.block_table
        self._rows = len(plan.logits_rows)


class StepBuffers:
    """The fixed buffers on a device, and the views of them that the launches of a bucket read."""

    def __init__(self, device: Device, layout: StepLayout) -> None:
        self.layout = layout
        self.state: Array = device.empty((layout.words,), np.int32, term=TERM)
        self.counts: Array = self.state[:4]

    @property
    def num_tokens(self) -> Array:
        """i32[1]: the real number of tokens of the step."""
        return self.state[:1]

    @property
    def num_rows(self) -> Array:
        """i32[1]: the real number of logits rows."""
        return self.state[1:2]

    def section(self, name: str, length: int, dtype: npt.DTypeLike = np.int32) -> Array:
        """The first `length` elements of a section of the layout."""
        start = self.layout.offset(name)
        words = length * np.dtype(dtype).itemsize // 4
        view = self.state[start : start + words]
        return view if dtype is np.int32 else view.view(np.dtype(dtype))

    def arrays(self, bucket: Bucket) -> StepArrays:
        """What the launches of a bucket read: always the same addresses. Where decodes have a launch of their
        own, all sequences are in the arrays of both launches, without rows in one and without keys in the
        other: so sequence b has row b of one block table, wherever the decodes end."""
        tokens, seqs, alone, several = bucket.tokens, bucket.seqs, bucket.decodes, bucket.chunks
        pages = self.layout.max_pages
        table = self.section("block_table", seqs * pages).reshape(seqs, pages)
        return StepArrays(
            token_ids=self.section("token_ids", tokens),
            positions=self.section("positions", tokens),
            slot_mapping=self.section("slot_mapping", tokens),
            decode_context_lens=self.section("decode_context_lens", alone),
            decode_block_table=table[:alone],
            prefill_cu_seqlens_q=self.section("cu_seqlens_q", several + 1),
            prefill_context_lens=self.section("context_lens", several),
            prefill_block_table=table[:several],
            logits_rows=self.section("logits_rows", seqs),
            temperatures=self.section("temperatures", seqs, np.float32),
            top_ks=self.section("top_ks", seqs),
            top_ps=self.section("top_ps", seqs, np.float32),
            seeds=self.section("seeds", seqs, np.uint64),
            output_indices=self.section("output_indices", seqs),
        )
