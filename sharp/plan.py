"""BatchPlan: one step as a ragged list of (sequence, number of new tokens), in numpy and nothing else.

Knows index arithmetic; refuses to know requests (only their ids, for people), devices and kernels.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sharp.config import ModelConfig

Int32 = npt.NDArray[np.int32]
DTYPES: dict[str, Any] = {"temperatures": np.float32, "top_ps": np.float32, "seeds": np.uint64}  # else int32


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """T tokens of B sequences; R of them need logits. Sequences of exactly one token come first.

    So token row b belongs to sequence b for b < num_decodes, and `cu_seqlens_q[num_decodes] == num_decodes`.
    page_copies are (source, destination) pages, to be copied before anything else of the step. A token id ~r,
    which is negative, is one that the host does not know yet: the id sampled in logits row r of the plan
    right before this one.
    """

    step: int
    request_ids: tuple[str, ...]  # B
    num_decodes: int  # sequences [0, num_decodes) have one new token each
    token_ids: Int32  # [T]
    positions: Int32  # [T] position of each token in its own sequence
    cu_seqlens_q: Int32  # [B + 1] prefix sums of new tokens
    context_lens: Int32  # [B] keys visible after this step's tokens are stored
    block_table: Int32  # [B, P] pages of each sequence (booked ones past its context too), -1 padded
    slot_mapping: Int32  # [T] page * block_size + offset: where each token's K and V go
    logits_rows: Int32  # [R] token rows whose next token is wanted, one per sequence at most
    temperatures: npt.NDArray[np.float32]  # [R]
    top_ks: Int32  # [R], 0: all
    top_ps: npt.NDArray[np.float32]  # [R], 1: all
    seeds: npt.NDArray[np.uint64]  # [R]
    output_indices: Int32  # [R] index of the sampled token in its answer
    num_logprobs: Int32  # [R], -1: none
    page_copies: Int32 = field(default_factory=lambda: np.empty((0, 2), np.int32))  # [C, 2] see below
    token_budget: int = 0  # max_num_batched_tokens, for the picture

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.setflags(write=False)  # frozen all the way down

    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return (
            self.token_ids, self.positions, self.cu_seqlens_q, self.context_lens, self.block_table,
            self.slot_mapping, self.logits_rows, self.temperatures, self.top_ks, self.top_ps, self.seeds,
            self.output_indices, self.num_logprobs, self.page_copies,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.request_ids)

    @property
    def counts(self) -> Int32:
        """[B] new tokens of each sequence."""
        return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]

    @property
    def padded_tokens(self) -> int:
        """Tokens of the rectangle that a padded batch would have computed: B x the longest sequence's new
        tokens."""
        return self.num_seqs * int(self.counts.max(initial=0))

    @property
    def logits_seqs(self) -> Int32:
        """[R] the sequence of each logits row."""
        return (np.searchsorted(self.cu_seqlens_q, self.logits_rows, side="right") - 1).astype(np.int32)

    def with_ids(self, sampled: Int32) -> BatchPlan:
        """This plan with its unknown ids filled in. sampled: [R] of the plan right before it. Raises
        ValueError for a row that it does not have."""
        unknown = self.token_ids < 0
        if not unknown.any():
            return self
        rows = ~self.token_ids[unknown]
        if rows.max() >= len(sampled):
            raise ValueError(
                f"step {self.step} goes on from logits row {rows.max()} of the step before, which sampled "
                f"{len(sampled)} rows"
            )
        token_ids = self.token_ids.copy()
        token_ids[unknown] = sampled[rows]
        return replace(self, token_ids=token_ids)

    def check(self, block_size: int) -> None:
        """Raise AssertionError naming the first array that contradicts another."""
        counts = self.counts
        num_seqs, num_rows = self.num_seqs, len(self.logits_rows)
        for name in ("token_ids", "positions", "slot_mapping"):
            assert len(getattr(self, name)) == self.cu_seqlens_q[-1], name
        for name in ("temperatures", "top_ks", "top_ps", "seeds", "output_indices", "num_logprobs"):
            assert len(getattr(self, name)) == num_rows, name
        for name, array in vars(self).items():
            wanted = DTYPES.get(name, np.int32)
            assert not isinstance(array, np.ndarray) or array.dtype == wanted, f"{name} is {array.dtype}"
        assert self.page_copies.ndim == 2, "page_copies"
        assert self.page_copies.shape[1] == 2, "page_copies"
        assert not np.isin(self.page_copies[:, 1], self.page_copies[:, 0]).any(), "page_copies: a chain"
        ends = self.cu_seqlens_q[1:] - 1
        assert np.isin(self.logits_rows, ends).all(), "logits_rows: a row that ends no sequence"
        assert (np.diff(self.logits_rows) > 0).all(), "logits_rows do not ascend"
        assert len(set(self.request_ids)) == num_seqs, "request_ids"
        assert self.cu_seqlens_q[0] == 0, "cu_seqlens_q does not begin with 0"
        assert len(counts) == num_seqs, "cu_seqlens_q and request_ids differ in length"
        assert (counts > 0).all(), "cu_seqlens_q: a sequence without a token"
        assert (counts[: self.num_decodes] == 1).all(), "num_decodes: more than one token in a decode"
        assert (counts[self.num_decodes :] > 1).all(), "num_decodes: a one-token sequence behind the decodes"
        assert len(np.unique(self.slot_mapping)) == self.num_tokens, "slot_mapping: a slot is written twice"
        for seq in range(num_seqs):
            start, stop = self.cu_seqlens_q[seq], self.cu_seqlens_q[seq + 1]
            context = int(self.context_lens[seq])
            expected = np.arange(context - (stop - start), context)
            assert (self.positions[start:stop] == expected).all(), f"positions of sequence {seq}"
            pages = self.block_table[seq, expected // block_size]
            assert (self.block_table[seq, : -(-context // block_size)] >= 0).all(), (
                f"block_table of sequence {seq}"
            )
            slots = pages * block_size + expected % block_size
            assert (self.slot_mapping[start:stop] == slots).all(), f"slot_mapping of sequence {seq}"

    def _repr_html_(self) -> str:
        """The ragged step against its budget: a bar a sequence, decodes green, prompt chunks blue."""
        budget = max(self.token_budget, self.num_tokens, 1)
        rows = []
        for seq, name in enumerate(self.request_ids):
            count = int(self.cu_seqlens_q[seq + 1] - self.cu_seqlens_q[seq])
            kind, colour = ("decode", "#2a9d4b") if seq < self.num_decodes else ("prompt chunk", "#2b6cb0")
            width = max(0.5, 100 * count / budget)
            rows.append(
                f"<tr><td>{html.escape(name)}</td><td>{kind}</td><td style='text-align:right'>{count}</td>"
                f"<td style='text-align:right'>{int(self.context_lens[seq])}</td><td style='width:24em'>"
                f"<div style='background:{colour};height:0.8em;width:{width:.1f}%'></div></td></tr>"
            )
        return (
            f"<b>step {self.step}</b>: {self.num_tokens} of {budget} tokens, {self.num_seqs} sequences "
            f"({self.num_decodes} decodes); a padded rectangle would compute {self.padded_tokens} tokens"
            "<table><tr><th>request</th><th>kind</th><th>tokens</th><th>context</th>"
            "<th>share of the budget</th></tr>" + "".join(rows) + "</table>"
        )


@dataclass(frozen=True)
class SampleOutput:
    """What a step's sampling gave: one id per logits row, and log-probabilities (natural log) where asked
    for."""

    token_ids: Int32  # [R]
    logprobs: tuple[dict[int, float] | None, ...]  # R


@dataclass
class Launched:
    """A step that a model has queued. state: what the model needs to land it; gpu_s: seconds from the step's
    start to its end on the device, filled in by land() where the model measures it; so are streams, what the
    device did for it: (row, name, start, end), a row of trace_events.ROWS, seconds of time.perf_counter."""

    plan: BatchPlan
    state: Any = None
    gpu_s: float | None = None
    streams: tuple[tuple[str, str, float, float], ...] = ()


class StepModel(Protocol):
    """What the engine asks of a model: it answers a BatchPlan in two calls. See sharp/model.py.

    launch() queues a step behind those launched before and does not wait for it; land() waits and returns its
    ids, in the order of launching. What is launched need not be landed: an interrupted step is forgotten, and
    the next launch goes on as if it were the first. stage, forward and sample are the same step one by one,
    to be looked at and timed. A model whose device runs beside the host says so by an attribute `overlaps`,
    True.
    """

    config: ModelConfig
    num_blocks: int
    block_size: int

    def launch(self, plan: BatchPlan) -> Launched: ...

    def land(self, launched: Launched) -> SampleOutput: ...

    def stage(self, plan: BatchPlan) -> Any: ...

    def forward(self, batch: Any) -> Any: ...

    def sample(self, logits: Any, batch: Any) -> SampleOutput: ...

    def close(self) -> None: ...
