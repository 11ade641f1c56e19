"""BatchPlan: one step as numpy arrays, and SampleOutput: what a model answers to it.

The only thing that passes from the Scheduler to a model. It knows tokens, positions, pages and sampling
parameters, packed without padding; it knows nothing of queues, text, kernels or devices.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """One ragged step of B sequences with T new tokens, R of which are asked for their next token.

    Sequences [0, num_decodes) have exactly one new token each, so row b belongs to sequence b there.

    token_ids      i32[T]     new tokens, sequence after sequence
    positions      i32[T]     their positions in their sequences
    cu_seqlens_q   i32[B + 1] sequence b owns rows [cu_seqlens_q[b], cu_seqlens_q[b + 1])
    context_lens   i32[B]     keys visible to a sequence's last new token, this step's tokens included
    block_table    i32[B, P]  pages of each sequence, padded with -1
    slot_mapping   i32[T]     where a new token's K and V go: page * block_size + offset
    logits_rows    i32[R]     the row of each sequence whose last known token is in this step, ascending
    temperatures   f32[R]     0 is greedy
    seeds          u64[R]     the request's seed
    output_indices i32[R]     index of the token to sample within the request's output
    num_logprobs   i32[R]     -1: none asked for
    max_num_batched_tokens    the budget this step was planned under (0: unknown; for show only)
    """

    step: int
    request_ids: tuple[str, ...]
    num_decodes: int
    token_ids: Int32Array
    positions: Int32Array
    cu_seqlens_q: Int32Array
    context_lens: Int32Array
    block_table: Int32Array
    slot_mapping: Int32Array
    logits_rows: Int32Array
    temperatures: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]
    output_indices: Int32Array
    num_logprobs: Int32Array
    max_num_batched_tokens: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    @property
    def num_tokens(self) -> int:
        """T: the real number of new tokens."""
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        """B."""
        return len(self.request_ids)

    @property
    def query_lens(self) -> Int32Array:
        """i32[B]: new tokens of each sequence."""
        return np.diff(self.cu_seqlens_q)

    @property
    def padded_tokens(self) -> int:
        """Tokens that a rectangle of B rows, each as long as the longest, would have cost."""
        return self.num_seqs * int(self.query_lens.max(initial=0))

    def check(self, block_size: int, num_blocks: int | None = None) -> None:
        """Raises ValueError naming the first inconsistency, given pages of block_size tokens (num_blocks of them)."""

        def require(condition: object, message: str) -> None:
            if not condition:
                raise ValueError(f"plan of step {self.step}: {message}")

        tokens, seqs, rows = self.num_tokens, self.num_seqs, len(self.logits_rows)
        for name, dtype, shape in (
            ("token_ids", np.int32, (tokens,)),
            ("positions", np.int32, (tokens,)),
            ("cu_seqlens_q", np.int32, (seqs + 1,)),
            ("context_lens", np.int32, (seqs,)),
            ("block_table", np.int32, (seqs, self.block_table.shape[-1])),
            ("slot_mapping", np.int32, (tokens,)),
            ("logits_rows", np.int32, (rows,)),
            ("temperatures", np.float32, (rows,)),
            ("seeds", np.uint64, (rows,)),
            ("output_indices", np.int32, (rows,)),
            ("num_logprobs", np.int32, (rows,)),
        ):
            array = getattr(self, name)
            require(array.dtype == dtype, f"{name} is {array.dtype}, not {np.dtype(dtype)}")
            require(array.shape == shape, f"{name} has shape {array.shape}, not {shape}")
        lens = self.query_lens
        require(len(set(self.request_ids)) == seqs, "a request appears twice")
        require(
            self.cu_seqlens_q[0] == 0 and self.cu_seqlens_q[-1] == tokens,
            "cu_seqlens_q does not span the rows",
        )
        require((lens >= 1).all(), "a sequence without tokens")
        require(0 <= self.num_decodes <= seqs, f"num_decodes {self.num_decodes} is not in [0, {seqs}]")
        require((lens[: self.num_decodes] == 1).all(), "a decode with more than one token")
        require((lens[self.num_decodes :] > 1).all(), "a one-token sequence after the decodes")
        require((self.token_ids >= 0).all(), "a negative token id")
        owner = np.repeat(np.arange(seqs), lens)
        expected = (self.context_lens - lens)[owner] + np.arange(tokens) - self.cu_seqlens_q[:-1][owner]
        require((self.positions == expected).all(), "positions do not end at context_lens - 1")
        require((self.positions >= 0).all(), "a negative position")
        needed = -(-self.context_lens // block_size)
        num_pages = (self.block_table >= 0).sum(axis=1)
        require((num_pages >= needed).all(), "a sequence with fewer pages than its context needs")
        left_packed = np.arange(self.block_table.shape[1]) < num_pages[:, None]
        require(((self.block_table >= 0) == left_packed).all(), "block_table has a hole")
        pages = self.block_table[self.block_table >= 0]
        require(len(np.unique(pages)) == len(pages), "a page belongs to two places")
        require(num_blocks is None or (pages < (num_blocks or 0)).all(), f"a page id past {num_blocks} pages")
        slots = (
            self.block_table[owner, self.positions // block_size] * block_size + self.positions % block_size
        )
        require((self.slot_mapping == slots).all(), "slot_mapping disagrees with block_table and positions")
        require((np.diff(self.logits_rows) > 0).all(), "logits_rows do not ascend")
        require(
            np.isin(self.logits_rows, self.cu_seqlens_q[1:] - 1).all(), "a logits row that ends no sequence"
        )
        require(np.isfinite(self.temperatures).all() and (self.temperatures >= 0).all(), "a bad temperature")
        require((self.output_indices >= 0).all(), "a negative output index")
        require((self.num_logprobs >= -1).all(), "num_logprobs under -1")

    def _repr_html_(self) -> str:
        """The step as bars: who has how many tokens, as a decode or as a chunk, against the token budget."""
        budget = max(self.max_num_batched_tokens, self.num_tokens, 1)
        asked = set(self.logits_rows.tolist())
        bar, rows = [], []
        for index, (name, count) in enumerate(zip(self.request_ids, self.query_lens.tolist(), strict=True)):
            decode = index < self.num_decodes
            colour = "#2a9d8f" if decode else f"hsl({(28 + 47 * (index - self.num_decodes)) % 360}, 70%, 60%)"
            label, end = html.escape(name), int(self.context_lens[index])
            width = 100 * count / budget
            bar.append(
                f'<div title="{label}: {count}" style="width:{width:.3f}%;background:{colour};'
                'box-shadow:inset -1px 0 white"></div>'
            )
            samples = "yes" if int(self.cu_seqlens_q[index + 1]) - 1 in asked else "no"
            rows.append(
                f'<tr><td style="background:{colour}">&nbsp;</td><td>{label}</td>'
                f"<td>{'decode' if decode else 'chunk'}</td><td>{count}</td>"
                f"<td>{end - count}..{end - 1}</td><td>{end}</td>"
                f"<td>{int((self.block_table[index] >= 0).sum())}</td><td>{samples}</td></tr>"
            )
        saved = self.padded_tokens - self.num_tokens
        head = (
            f"<b>step {self.step}</b>: {self.num_tokens} tokens of {self.num_seqs} sequences "
            f"({self.num_decodes} decodes); budget {self.max_num_batched_tokens or 'unknown'}; "
            f"a rectangle would hold {self.padded_tokens} ({saved} of padding)"
        )
        names = ("", "request", "kind", "new tokens", "positions", "context", "pages", "samples")
        return (
            f'<div>{head}</div><div style="display:flex;height:1.4em;border:1px solid #888;margin:4px 0">'
            f"{''.join(bar)}</div><table><thead><tr>{''.join(f'<th>{n}</th>' for n in names)}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )


@dataclass(frozen=True, eq=False)
class SampleOutput:
    """What a model sampled for a plan's R logits rows, in their order.

    token_ids i32[R]; -1 where a row had no finite logit
    logprobs: per row None, or id -> natural log-probability of the likeliest ids and of the sampled one
    """

    token_ids: Int32Array
    logprobs: tuple[dict[int, float] | None, ...]
