"""A step's words go to their fixed places: what a captured graph reads is always at the same addresses.

A step crosses to the device as one array of words, as long as the step is; this op spreads it over buffers
that never move, fills what a bucket has beyond the real counts with values that harm nobody, puts the changed
entries into the block table, and looks up token ids that only the device knows. Knows: the two layouts.
Refuses to know: whose tokens they are, and what is a step's. It is no op of the forward: nobody picks a rung
of it by name, so it is not among OP_NAMES.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_numba.checks import Device, Host, check, fail, require_device
from kernels_numba.compiler import SIMULATOR, cuda, jit
from kernels_numba.cost import Cost
from kernels_numba.launch import Kernel, Launch, address
from kernels_numba.ptx.ldst import ld_global_i32, st_global_b32

OP = "apply_step"
THREADS, BLOCKS = (4, 2) if SIMULATOR else (256, 16)  # 4,096 threads: two turns for 8,192 tokens
LINE = 64  # words: a section starts on a multiple of 256 bytes, as the widest load of any kernel likes it
HEADER = 8  # words before the sections of a packed step
MAX_WORDS = 2**31 - 1  # positions in a buffer are int32
TOKEN_COLUMNS = ("token_ids", "positions", "slot_mapping")
SEQ_COLUMNS = ("decode_context_lens", "context_lens", "cu_seqlens_q")
# Of a word each; then seeds, of two.
ROW_COLUMNS = ("logits_rows", "temperatures", "top_ks", "top_ps", "output_indices")


def _lines(words: int) -> int:
    return -(-words // LINE) * LINE


@dataclass(frozen=True)
class StepLayout:
    """Where the sections of the fixed buffers are, in words of 4 bytes, for steps of up to T = max_tokens
    tokens of S = max_seqs sequences (a logits row each) with P = max_pages pages each.

    counts i32[4] (tokens, logits rows, decodes that have a launch of their own, sequences); token_ids,
    positions, slot_mapping i32[T]; decode_context_lens, context_lens i32[S], cu_seqlens_q i32[S + 1];
    logits_rows, top_ks, output_indices i32[S], temperatures, top_ps f32[S], seeds u64[S]; block_table
    i32[S, P]. ValueError for sizes under 1, or of more than 2**31 - 1 words.
    """

    max_tokens: int
    max_seqs: int
    max_pages: int

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_seqs", "max_pages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{OP}: {name} is {getattr(self, name)}; at least 1 is required")
        most = max(self.words, self.packed_words)
        if most > MAX_WORDS:
            raise ValueError(
                f"{OP}: {self.max_tokens} tokens, {self.max_seqs} sequences of {self.max_pages} pages: "
                f"{most:,} words; at most {MAX_WORDS:,} are possible"
            )

    @property
    def token_stride(self) -> int:
        """Words from one column of tokens to the next."""
        return _lines(self.max_tokens)

    @property
    def seq_stride(self) -> int:
        """Words from one column of sequences to the next; cu_seqlens_q has one word more than there are."""
        return _lines(self.max_seqs + 1)

    def offset(self, name: str) -> int:
        """Where a section begins. KeyError for a name that is none."""
        if name == "counts":
            return 0
        if name in TOKEN_COLUMNS:
            return LINE + TOKEN_COLUMNS.index(name) * self.token_stride
        columns = (*SEQ_COLUMNS, *ROW_COLUMNS, "seeds", "seeds, second word", "block_table")
        if name not in columns:
            raise KeyError(name)
        return LINE + len(TOKEN_COLUMNS) * self.token_stride + columns.index(name) * self.seq_stride

    @property
    def words(self) -> int:
        """Of the fixed buffers together."""
        return self.offset("block_table") + _lines(self.max_seqs * self.max_pages)

    @property
    def packed_words(self) -> int:
        """The most that a packed step takes: every entry of the block table changed."""
        return packed_words(self.max_tokens, self.max_seqs, self.max_seqs, self.max_seqs * self.max_pages)


def packed_words(tokens: int, seqs: int, rows: int, changes: int) -> int:
    """Words of a packed step, whose sections follow each other without gaps.

    Header (tokens, logits rows, decodes, sequences; bucket's tokens, bucket's sequences; changes; 0);
    token_ids, positions, slot_mapping [tokens]; context_lens [seqs], cu_seqlens_q [seqs + 1]; ROW_COLUMNS
    [rows] each, seeds [rows, 2]; of each changed entry of the block table its place (row x max_pages +
    column), then the page of each. A token id below 0 is ~row: the id sampled last for that row.
    """
    columns = len(ROW_COLUMNS) + 2
    return HEADER + len(TOKEN_COLUMNS) * tokens + 2 * seqs + 1 + columns * rows + 2 * changes


def apply_step_spec(state: Any, packed: Any, sampled: Any, layout: StepLayout) -> Any:
    """The fixed buffers after a step: state i32[layout.words], packed i32[packed_words], sampled i32[rows of
    the last step] -> i32[layout.words].

    Of a bucket of more tokens and sequences than there are, the rest is: token 0 at position 0 in slot -1
    (stored nowhere), contexts of no keys, cu_seqlens_q as at the last sequence, logits row 0 with a
    temperature of 0. decode_context_lens is 0 for those that are no decodes; cu_seqlens_q is at least the
    number of decodes, so that decodes have no rows in it. ValueError for a token id that no row was sampled
    for, or a step larger than its bucket or the layout.
    """
    out = np.array(state)
    words: list[int] = np.asarray(packed).tolist()
    tokens, rows, decodes, seqs, all_tokens, all_seqs, changes, _ = words[:HEADER]
    if not (tokens <= all_tokens <= layout.max_tokens and rows <= seqs <= all_seqs <= layout.max_seqs):
        raise ValueError(
            f"{OP}: {tokens} tokens, {rows} rows, {seqs} sequences in a bucket of {all_tokens} and "
            f"{all_seqs}; the layout is for {layout.max_tokens} and {layout.max_seqs}"
        )
    at = HEADER

    def section(count: int) -> list[int]:
        nonlocal at
        at += count
        return words[at - count : at]

    def put(name: str, index: int, value: int, width: int = 1) -> None:
        out[layout.offset(name) + index * width] = value

    for index, count in enumerate((tokens, rows, decodes, seqs)):
        put("counts", index, count)
    token_ids, positions, slots = section(tokens), section(tokens), section(tokens)
    for i in range(all_tokens):
        token = token_ids[i] if i < tokens else 0
        if token < 0 and ~token >= len(sampled):
            raise ValueError(f"{OP}: token {i} is of row {~token}, and {len(sampled)} rows were sampled")
        put("token_ids", i, token if token >= 0 else int(sampled[~token]))
        put("positions", i, positions[i] if i < tokens else 0)
        put("slot_mapping", i, slots[i] if i < tokens else -1)
    lens, cu = section(seqs), section(seqs + 1)
    for i in range(all_seqs):
        put("decode_context_lens", i, lens[i] if i < decodes else 0)
        put("context_lens", i, lens[i] if i < seqs else 0)
    for i in range(all_seqs + 1):
        put("cu_seqlens_q", i, max(cu[min(i, seqs)], decodes))
    for name in ROW_COLUMNS:
        column = section(rows)
        for i in range(all_seqs):
            put(name, i, column[i] if i < rows else 0)
    seeds = section(2 * rows)
    for i in range(2 * all_seqs):
        put("seeds", i, seeds[i] if i < 2 * rows else 0)
    places, pages = section(changes), section(changes)
    for place, page in zip(places, pages, strict=True):
        put("block_table", place, page)
    return out


def apply_step_cost(tokens: int, seqs: int, rows: int, changes: int) -> Cost:
    """Each packed word read once, each word of the fixed buffers that it goes to written once (a context
    length to two places); no arithmetic."""
    read = packed_words(tokens, seqs, rows, changes)
    written = 4 + len(TOKEN_COLUMNS) * tokens + 3 * seqs + 1 + (len(ROW_COLUMNS) + 2) * rows + changes
    return Cost(bytes=4 * (read + written), flops=0)


@cache
def make_apply_step_kernel(by_address: bool) -> Any:
    """state = apply_step_spec(state, packed, sampled), in place.

    Arguments: state i32[words], packed i32[..], sampled i32[..], as arrays or (by_address) as addresses of
    them; token_stride, seq_stride: of the layout.
    Who does what: thread i of all takes elements i, i + threads, ... of every section in turn. No two threads
    write one word, and none reads what another writes: sampled is read here and written by a later launch.
    """

    def read_array(buffer: Any, at: Any) -> Any:
        return buffer[at]

    def write_array(buffer: Any, at: Any, value: Any) -> None:
        buffer[at] = value

    def read_address(buffer: Any, at: Any) -> Any:
        return ld_global_i32(np.int64(buffer + np.int64(at) * 4))

    def write_address(buffer: Any, at: Any, value: Any) -> None:
        st_global_b32(np.int64(buffer + np.int64(at) * 4), value)

    read = jit(device=True)(read_address if by_address else read_array)
    write = jit(device=True)(write_address if by_address else write_array)
    columns = len(ROW_COLUMNS)
    header = HEADER

    def apply_step(state: Any, packed: Any, sampled: Any, token_stride: Any, seq_stride: Any) -> None:
        first = np.int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        step = np.int32(cuda.gridDim.x * cuda.blockDim.x)
        tokens, rows = read(packed, 0), read(packed, 1)
        decodes, seqs = read(packed, 2), read(packed, 3)
        all_tokens, all_seqs, changes = read(packed, 4), read(packed, 5), read(packed, 6)
        for i in range(first, 4, step):
            write(state, i, read(packed, i))
        for i in range(first, all_tokens, step):
            token = np.int32(0)
            position = np.int32(0)
            slot = np.int32(-1)
            if i < tokens:
                token = read(packed, header + i)
                position = read(packed, header + tokens + i)
                slot = read(packed, header + 2 * tokens + i)
            if token < 0:
                token = read(sampled, -1 - token)
            write(state, LINE + i, token)
            write(state, LINE + token_stride + i, position)
            write(state, LINE + 2 * token_stride + i, slot)
        to = LINE + 3 * token_stride
        lens = header + 3 * tokens
        cu = lens + seqs
        values = cu + seqs + 1
        for i in range(first, all_seqs + 1, step):
            write(state, to + 2 * seq_stride + i, max(read(packed, cu + min(i, seqs)), decodes))
            if i < all_seqs:
                length = np.int32(0)
                alone = np.int32(0)
                if i < seqs:
                    length = read(packed, lens + i)
                if i < decodes:
                    alone = length
                write(state, to + i, alone)
                write(state, to + seq_stride + i, length)
                for column in range(columns):
                    value = np.int32(0)
                    if i < rows:
                        value = read(packed, values + column * rows + i)
                    write(state, to + (3 + column) * seq_stride + i, value)
        to = to + (3 + columns) * seq_stride
        values = values + columns * rows
        for i in range(first, 2 * all_seqs, step):
            value = np.int32(0)
            if i < 2 * rows:
                value = read(packed, values + i)
            write(state, to + i, value)
        to = to + 2 * seq_stride
        values = values + 2 * rows
        for i in range(first, changes, step):
            write(state, to + read(packed, values + i), read(packed, values + changes + i))

    return apply_step if by_address else jit()(apply_step)


@cache
def apply_step_kernel() -> Kernel:
    """The kernel by addresses, compiled when first launched."""
    return Kernel(
        OP, lambda: make_apply_step_kernel(True), (), "void(int64, int64, int64, int32, int32)", THREADS
    )


def kernels() -> Iterator[Kernel]:
    """For building them ahead."""
    yield apply_step_kernel()


def _check(kind: type[Host], state: Any, packed: Any, sampled: Any, layout: StepLayout) -> None:
    for name, array in (("state", state), ("packed", packed), ("sampled", sampled)):
        if kind is Device:
            require_device(OP, name, array)
    check(OP, "state", state, kind.int32, (layout.words,))
    check(OP, "packed", packed, kind.int32, (None,))
    check(OP, "sampled", sampled, kind.int32, (None,))
    if packed.shape[0] < HEADER:
        fail(OP, "packed", f"has {packed.shape[0]} words", f"a header of {HEADER} words")


def apply_step_reference(
    state: Any, packed: Any, sampled: Any, layout: StepLayout, *, stream: Any = None
) -> None:
    """Rung "reference": the definition, into the caller's buffers."""
    _check(Host, state, packed, sampled, layout)
    state[...] = apply_step_spec(state, packed, sampled, layout)


def apply_step(state: Any, packed: Any, sampled: Any, layout: StepLayout, *, stream: Any = None) -> None:
    """Rung "plain": launch the kernel on `stream`. ValueError for wrong dtypes, shapes, strides. What the
    words say is not checked: they are on the device."""
    _check(Device, state, packed, sampled, layout)
    kernel = make_apply_step_kernel(False)
    kernel[BLOCKS, THREADS, stream or 0](state, packed, sampled, layout.token_stride, layout.seq_stride)


def prepare_apply_step(state: Any, packed: Any, sampled: Any, layout: StepLayout) -> Launch:
    """The launch by addresses, to be repeated: a step then costs one driver call. The arrays must outlive
    it. ValueError as apply_step."""
    _check(Device, state, packed, sampled, layout)
    addresses = (address(state), address(packed), address(sampled))
    return apply_step_kernel().prepare(BLOCKS, (*addresses, layout.token_stride, layout.seq_stride))


rungs = {"reference": apply_step_reference, "plain": apply_step}
