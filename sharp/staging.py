"""BatchPlan (numpy) -> DeviceBatch: the one place where a step's indices cross to the device.

Knows which arrays of a plan the forward reads, and splits the sequences into the one-token ones (decode
attention) and the rest (prefill attention). Refuses to know requests, and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sharp.device import Array, Device
from sharp.plan import BatchPlan


@dataclass(frozen=True)
class StepArrays:
    """A step's indices where the kernels can read them; T tokens, D decodes, E sequences of more tokens, R
    logits rows: those of a plan, or those of a bucket (step_buffers.py), whose real numbers are less.
    """

    token_ids: Array  # i32[T]
    positions: Array  # i32[T]
    slot_mapping: Array  # i32[T]
    decode_context_lens: Array  # i32[D]
    decode_block_table: Array  # i32[D, P]
    prefill_cu_seqlens_q: Array  # i32[E + 1], absolute token rows
    prefill_context_lens: Array  # i32[E]
    prefill_block_table: Array  # i32[E, P]
    logits_rows: Array  # i32[R]
    temperatures: Array  # f32[R]
    top_ks: Array  # i32[R]
    top_ps: Array  # f32[R]
    seeds: Array  # u64[R]
    output_indices: Array  # i32[R]

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_rows(self) -> int:
        return int(self.logits_rows.shape[0])

    @property
    def num_decodes(self) -> int:
        return int(self.decode_context_lens.shape[0])

    @property
    def num_prefills(self) -> int:
        return int(self.prefill_context_lens.shape[0])


@dataclass(frozen=True)
class DeviceBatch(StepArrays):
    """The arrays of one plan, each as long as the step."""

    plan: BatchPlan


def staging_bytes(num_tokens: int, num_seqs: int, num_pages: int) -> int:
    """Bytes that stage() brings over at most: of tokens, of sequences (a logits row each), of their pages."""
    per_token = 3 * 4  # token_ids, positions, slot_mapping
    per_seq = (
        3 * 4 + 4 * num_pages + 6 * 4 + 8
    )  # lengths, pages; the row's number and its sampling parameters
    return num_tokens * per_token + num_seqs * per_seq + 16 * len(fields(DeviceBatch)) + 4


def stage(plan: BatchPlan, device: Device) -> DeviceBatch:
    """Bring a plan's arrays to the device (one pinned, asynchronous copy on CUDA; nothing moves on the
    host).
    """
    decodes = plan.num_decodes
    arrays = device.stage(
        {
            "token_ids": plan.token_ids,
            "positions": plan.positions,
            "slot_mapping": plan.slot_mapping,
            "decode_context_lens": plan.context_lens[:decodes],
            "decode_block_table": plan.block_table[:decodes],
            "prefill_cu_seqlens_q": plan.cu_seqlens_q[decodes:],
            "prefill_context_lens": plan.context_lens[decodes:],
            "prefill_block_table": plan.block_table[decodes:],
            "logits_rows": plan.logits_rows,
            "temperatures": plan.temperatures,
            "top_ks": plan.top_ks,
            "top_ps": plan.top_ps,
            "seeds": plan.seeds,
            "output_indices": plan.output_indices,
        }
    )
    return DeviceBatch(plan=plan, **arrays)
