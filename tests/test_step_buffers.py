"""A plan's way into fixed buffers: packed words, apply_step, buckets; against what stage() gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import random_workloads
from fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_numba.compiler import cuda
from kernels_numba.ops import apply_step as op
from kernels_numba.ops.apply_step import HEADER, StepLayout, packed_words
from sharp.buckets import LAUNCH_KEYS, Bucket, Buckets, bucket_sizes, rides
from sharp.device import HostDevice
from sharp.device_array import DeviceArray
from sharp.plan import BatchPlan
from sharp.staging import stage
from sharp.step_buffers import StepBuffers, StepPacker

HOST = HostDevice("float32")
POISON = -77777  # of buffers that no step has written


def random_plan(rng, layout, *, decodes, lengths, rows_before=0, block_size=4, step=1):
    """A plan of `decodes` decodes and sequences of `lengths` tokens, over random pages and contexts."""
    counts = np.array([1] * decodes + list(lengths), np.int32)
    seqs = len(counts)
    context = counts + rng.integers(0, layout.max_pages * block_size - counts.max(initial=0) + 1, seqs)
    context = context.astype(np.int32)
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    pages = -(-int(context.max(initial=1)) // block_size)
    table = rng.integers(0, 1000, (seqs, pages), dtype=np.int32)
    table[np.arange(pages) >= -(-context // block_size)[:, None]] = -1
    ends = np.sort(rng.choice(seqs, rng.integers(0, seqs + 1), replace=False))
    token_ids = rng.integers(0, 500, cu[-1], dtype=np.int32)
    if rows_before:
        unknown = rng.random(decodes) < 0.5
        token_ids[:decodes][unknown] = ~rng.integers(0, rows_before, unknown.sum(), dtype=np.int32)
    rows = len(ends)
    return BatchPlan(
        step=step,
        request_ids=tuple(f"r{i}" for i in range(seqs)),
        num_decodes=decodes,
        token_ids=token_ids,
        positions=np.concatenate(
            [np.arange(c - n, c) for c, n in zip(context, counts, strict=True)] or [[]]
        ).astype(np.int32),
        cu_seqlens_q=cu,
        context_lens=context,
        block_table=table,
        slot_mapping=rng.integers(0, 4000, cu[-1], dtype=np.int32),
        logits_rows=(cu[1:][ends] - 1).astype(np.int32),
        temperatures=rng.random(rows, np.float32),
        top_ks=rng.integers(0, 50, rows, dtype=np.int32),
        top_ps=rng.random(rows, np.float32),
        seeds=rng.integers(0, 2**64, rows, dtype=np.uint64),
        output_indices=rng.integers(0, 99, rows, dtype=np.int32),
        num_logprobs=np.full(rows, -1, np.int32),
    )


class Steps:
    """One engine's buffers on the host, and plans that go through them; rung: "reference" or "plain"."""

    def __init__(self, layout, rung="reference", where="ride"):
        self.layout, self.rung = layout, rung
        self.buckets = Buckets(layout.max_tokens, layout.max_seqs, where)
        self.packer, self.buffers = StepPacker(layout), StepBuffers(HOST, layout)
        self.buffers.state[...] = POISON
        self.sampled = np.full(layout.max_seqs, POISON, np.int32)
        self.out = np.full(layout.packed_words, POISON, np.int32)

    def apply(self, plan, bucket):
        used = self.packer.pack(plan, bucket, self.out)
        assert (self.out[used:] == POISON).all(), "words behind the step were written"
        packed = self.out[:used].copy()
        self.out[:used] = POISON
        if self.rung == "reference":
            op.rungs["reference"](self.buffers.state, packed, self.sampled, self.layout)
        else:
            state = cuda.to_device(self.buffers.state)
            arrays = (cuda.to_device(packed), cuda.to_device(self.sampled))
            op.rungs[self.rung](state, *arrays, self.layout)
            self.buffers.state[...] = state.copy_to_host()
        self.packer.launched()

    def check(self, plan):
        """Put a plan into the buffers; they hold what stage() gives, and harmless values past it."""
        bucket = self.buckets.of(plan)
        known = plan.token_ids.copy()
        unknown = known < 0
        known[unknown] = self.sampled[~known[unknown]]
        self.apply(plan, bucket)
        arrays, wanted = self.buffers.arrays(bucket), stage(plan, HOST)
        tokens, seqs, decodes = plan.num_tokens, plan.num_seqs, plan.num_decodes
        rows, several = len(plan.logits_rows), seqs - decodes
        apart = decodes if bucket.apart or not bucket.mixed else 0
        counts = (tokens, rows, apart, seqs)
        assert self.buffers.counts.tolist() == list(counts)
        assert (self.buffers.num_tokens.tolist(), self.buffers.num_rows.tolist()) == ([tokens], [rows])
        assert (arrays.num_tokens, arrays.num_rows) == (bucket.tokens, bucket.seqs)

        def same(name, count, rest, array=None):
            array = getattr(arrays, name) if array is None else array
            np.testing.assert_array_equal(array[:count], getattr(wanted, name), name)
            assert array.dtype == getattr(wanted, name).dtype
            if rest is not None:
                assert (array[count:] == rest).all(), f"{name} past the real ones"

        np.testing.assert_array_equal(arrays.token_ids[:tokens], known)
        assert (arrays.token_ids[tokens:] == 0).all()
        same("positions", tokens, 0)
        same("slot_mapping", tokens, -1)
        if apart:
            same("decode_context_lens", decodes, 0)
        else:
            assert arrays.num_decodes == (bucket.seqs if bucket.apart or not bucket.mixed else 0)
            assert (arrays.decode_context_lens == 0).all()
        for name in (*op.ROW_COLUMNS, "seeds"):
            same(name, rows, 0)
        pages = plan.block_table.shape[1]
        tables = [t for t in (arrays.decode_block_table, arrays.prefill_block_table) if len(t)]
        for table in tables:
            np.testing.assert_array_equal(table[:seqs, :pages], plan.block_table)
            assert np.shares_memory(table, tables[0])
        assert arrays.num_prefills == (bucket.seqs if bucket.mixed else 0)
        if bucket.mixed:  # as stage() has them, from the first sequence of several tokens on
            before = decodes if apart else np.arange(decodes)
            assert (arrays.prefill_cu_seqlens_q[:decodes] == before).all()
            same("prefill_cu_seqlens_q", several + 1, tokens, arrays.prefill_cu_seqlens_q[decodes:])
            same("prefill_context_lens", several, 0, arrays.prefill_context_lens[decodes:])
            np.testing.assert_array_equal(arrays.prefill_context_lens[:seqs], plan.context_lens)
        else:
            assert several == 0


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(2, 9), max_size=3)), min_size=1, max_size=6
    ),
    interrupted=st.integers(0, 5),
    bits=st.sampled_from(["reference", "reference", "reference", "plain"]),
    where=st.sampled_from(["ride", "apart"]),
)
@settings(max_examples=60, deadline=None)
def test_buffers_hold_what_stage_gives(seed, sizes, interrupted, bits, where):
    """Random steps one after the other, of which one is packed and then lost on its way."""
    rng, layout = np.random.default_rng(seed), StepLayout(40, 8, 6)
    steps, before = Steps(layout, bits, where), 0
    for number, (decodes, lengths) in enumerate(sizes):
        if not decodes and not lengths:
            continue
        plan = random_plan(rng, layout, decodes=decodes, lengths=lengths, rows_before=before, step=number)
        if number == interrupted:
            steps.packer.pack(plan, steps.buckets.of(plan), steps.out)  # and never arrives
            steps.out[...] = POISON
        steps.check(plan)
        before = len(plan.logits_rows)
        steps.sampled[:before] = rng.integers(0, 500, before)


class ThroughBuffers(FakeModel):
    """The fake model reading what the buffers hold, and nothing of the plan but its counts; ids that it
    sampled in the step before come from there."""

    layouts: tuple[int, ...] = ()

    fed: ClassVar[int] = 0  # ids that only the buffers knew

    def __post_init__(self):
        super().__post_init__()
        self.steps, self.last = None, {}

    def forward(self, plan):
        if self.steps is None:  # the largest steps of random_workloads.py
            self.steps = Steps(StepLayout(40, 6, 4096 // self.block_size))
        given = plan.token_ids.copy()
        for seq in range(plan.num_decodes):
            row, token = self.last.get(plan.request_ids[seq], (0, -1))
            if token == given[seq]:
                given[seq] = ~row
        self.last = {}
        ThroughBuffers.fed += int((given < 0).sum())
        self.steps.check(replace(plan, token_ids=given))
        arrays = self.steps.buffers.arrays(self.steps.buckets.of(plan))
        tokens, rows = plan.num_tokens, len(plan.logits_rows)
        table = arrays.prefill_block_table if arrays.num_prefills else arrays.decode_block_table
        staged = replace(
            plan,
            token_ids=arrays.token_ids[:tokens].copy(),
            positions=arrays.positions[:tokens].copy(),
            slot_mapping=arrays.slot_mapping[:tokens].copy(),
            block_table=table[: plan.num_seqs].copy(),
            logits_rows=arrays.logits_rows[:rows].copy(),
        )
        return super().forward(staged)

    def sample(self, logits, plan):
        sampled = super().sample(logits, plan)
        rows = len(plan.logits_rows)
        self.steps.sampled[:rows] = sampled.token_ids
        names = [plan.request_ids[seq] for seq in plan.logits_seqs]
        self.last = {name: (row, int(sampled.token_ids[row])) for row, name in enumerate(names)}
        return sampled


def test_a_schedulers_steps_through_the_buffers(monkeypatch):
    """Arrivals, forks, preemptions, aborts and steps that did not happen: every answer as if alone, computed
    from the fixed buffers."""
    monkeypatch.setattr(random_workloads, "FakeModel", ThroughBuffers)
    ThroughBuffers.fed = 0
    reached = random_workloads.run_workloads(160, same=True)
    assert min(reached[name] for name in ("preemptions", "forks", "rollbacks", "cancelled")) > 5, reached
    assert ThroughBuffers.fed > 500


def test_only_changes_of_the_block_table_cross():
    rng, layout = np.random.default_rng(0), StepLayout(8, 8, 16)
    packer, out, bucket = StepPacker(layout), np.zeros(layout.packed_words, np.int32), Bucket(False, 8, 8)
    plan = random_plan(rng, layout, decodes=6, lengths=())
    rows = len(plan.logits_rows)

    def words(plan):
        used = packer.pack(plan, bucket, out)
        packer.launched()
        changes = int(out[6])
        assert used == packed_words(6, 6, rows, changes)
        return changes

    assert words(plan) == plan.block_table.size
    assert words(plan) == 0
    table = plan.block_table.copy()
    table[2, 1], table[5, 0] = 7777, 7778
    assert words(replace(plan, block_table=table)) == 2
    assert words(replace(plan, block_table=table[:, :2].copy())) == 0
    packer.pack(plan, bucket, out)  # never launched: nothing is known to have arrived
    assert words(plan) == plan.block_table.size


def test_the_largest_step_fits_and_no_larger_one():
    layout = StepLayout(24, 4, 5)
    rng, packer = np.random.default_rng(1), StepPacker(layout)
    plan = random_plan(rng, layout, decodes=0, lengths=(6, 6, 6, 6))
    full = replace(
        plan,
        context_lens=np.full(4, 20, np.int32),
        block_table=np.arange(20, dtype=np.int32).reshape(4, 5),
        logits_rows=plan.cu_seqlens_q[1:] - 1,
        temperatures=np.ones(4, np.float32),
        top_ks=np.ones(4, np.int32),
        top_ps=np.ones(4, np.float32),
        seeds=np.ones(4, np.uint64),
        output_indices=np.ones(4, np.int32),
        num_logprobs=np.full(4, -1, np.int32),
    )
    out = np.zeros(layout.packed_words, np.int32)
    assert packer.pack(full, Bucket(True, 24, 4), out) == layout.packed_words
    packer.launched()
    for name, bucket in (("tokens", Bucket(True, 16, 4)), ("sequences", Bucket(True, 24, 3))):
        with pytest.raises(ValueError, match="24 tokens and 4 logits rows of 4 sequences"):
            packer.pack(full, bucket, out), name
    wide = replace(full, block_table=np.zeros((4, 6), np.int32))
    with pytest.raises(ValueError, match="6 pages a sequence; at most 5"):
        packer.pack(wide, Bucket(True, 24, 4), out)
    unknown = full.token_ids.copy()
    unknown[0] = ~4
    with pytest.raises(ValueError, match="row 4 of the step before, which had 4"):
        packer.pack(replace(full, token_ids=unknown), Bucket(True, 24, 4), out)


@pytest.mark.parametrize(("tokens", "seqs", "pages"), [(1, 1, 1), (63, 5, 2), (64, 64, 3), (8192, 256, 512)])
def test_sections_lie_apart_and_aligned(tokens, seqs, pages):
    layout = StepLayout(tokens, seqs, pages)
    lengths = {"counts": 4}
    lengths |= dict.fromkeys(op.TOKEN_COLUMNS, tokens) | dict.fromkeys(op.SEQ_COLUMNS, seqs)
    lengths |= {"cu_seqlens_q": seqs + 1, **dict.fromkeys(op.ROW_COLUMNS, seqs)}
    lengths |= {"seeds": 2 * seqs, "block_table": seqs * pages}
    taken = np.zeros(layout.words, np.int32)
    for name, length in lengths.items():
        start = layout.offset(name)
        assert start * 4 % 256 == 0
        taken[start : start + length] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(lengths.values())
    with pytest.raises(KeyError):
        layout.offset("nothing")


def test_layouts_say_what_they_cannot_hold():
    with pytest.raises(ValueError, match="max_pages is 0; at least 1"):
        StepLayout(1, 1, 0)
    with pytest.raises(ValueError, match="at most 2,147,483,647"):
        StepLayout(1024, 1024, 1 << 21)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda words: words.__setitem__(0, 9),  # more tokens than the bucket
        lambda words: words.__setitem__(1, 3),  # more rows than sequences
        lambda words: words.__setitem__(5, 99),  # a bucket over the layout
        lambda words: words.__setitem__(HEADER, ~8),  # an id of a row that was not sampled
    ],
)
def test_the_definition_refuses_what_the_kernel_cannot(break_it):
    layout = StepLayout(8, 4, 2)
    steps = Steps(layout)
    plan = random_plan(np.random.default_rng(3), layout, decodes=2, lengths=())
    steps.packer.pack(plan, Bucket(False, 4, 4), steps.out)
    break_it(steps.out)
    with pytest.raises(ValueError, match="apply_step"):
        op.apply_step_spec(steps.buffers.state, steps.out, np.zeros(4, np.int32), layout)


def test_launchers_name_what_is_wrong():
    layout = StepLayout(8, 4, 2)
    state, packed, sampled = (np.zeros(n, np.int32) for n in (layout.words, 40, 4))
    for rung in ("reference", "plain"):
        convert = np.array if rung == "reference" else cuda.to_device
        with pytest.raises(ValueError, match="state has shape"):
            op.rungs[rung](convert(state[1:]), convert(packed), convert(sampled), layout)
        with pytest.raises(ValueError, match="sampled has dtype"):
            op.rungs[rung](convert(state), convert(packed), convert(sampled.astype(np.int64)), layout)
        with pytest.raises(ValueError, match="packed has 7 words"):
            op.rungs[rung](convert(state), convert(packed[:7]), convert(sampled), layout)
    with pytest.raises(ValueError, match="a numba device array"):
        op.rungs["plain"](state, packed, sampled, layout)


def test_the_prepared_launch_has_the_addresses_of_device_arrays():
    layout = StepLayout(8, 4, 2)
    state, packed, sampled = (
        DeviceArray(256 * (at + 1), (n,), np.int32) for at, n in enumerate((layout.words, 40, 4))
    )
    launch = op.prepare_apply_step(state, packed[3:], sampled[:2], layout)
    assert [value.value for value in launch.values] == [256, 524, 768, layout.token_stride, layout.seq_stride]
    with pytest.raises(ValueError, match="sampled has dtype float32"):
        op.prepare_apply_step(state, packed, sampled.view(np.float32), layout)
    with pytest.raises(ValueError, match="state is a ndarray; a numba device array"):
        op.prepare_apply_step(np.zeros(layout.words, np.int32), packed, sampled, layout)


def test_cost_counts_every_word():
    """Of a step that fills its bucket: words read, and words that change where all were poison."""
    layout = StepLayout(9, 3, 4)
    steps = Steps(layout)
    plan = random_plan(np.random.default_rng(5), layout, decodes=1, lengths=(4, 4))
    used = steps.packer.pack(plan, Bucket(True, 9, 3), steps.out)
    rows, changes = len(plan.logits_rows), plan.block_table.size
    state = op.apply_step_spec(steps.buffers.state, steps.out[:used], steps.sampled, layout)
    written = int((state != POISON).sum())
    idle = (3 - rows) * (len(op.ROW_COLUMNS) + 2)  # rows without logits
    assert op.apply_step_cost(9, 3, rows, changes).bytes == 4 * (used + written - idle)
    assert op.apply_step_cost(9, 3, rows, changes).flops == 0


def test_bucket_sizes():
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(5) == (1, 2, 4, 5)
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert bucket_sizes(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert bucket_sizes(8192)[-5:] == (2048, 3072, 4096, 6144, 8192)
    with pytest.raises(ValueError, match="a bucket for 0 tokens"):
        bucket_sizes(0)


@given(
    tokens=st.integers(1, 300),
    seqs=st.integers(1, 300),
    seed=st.integers(0, 999),
    where=st.sampled_from(["ride", "apart", "either"]),
)
@settings(max_examples=60, deadline=None)
def test_every_step_has_the_smallest_bucket(tokens, seqs, seed, where):
    seqs = min(seqs, tokens)
    buckets, rng = Buckets(tokens, seqs, where), np.random.default_rng(seed)
    layout = StepLayout(tokens, seqs, 4)
    number = len(buckets.decode) + len(buckets.mixed) + len(buckets.apart)
    assert len(set(buckets.all())) == len(buckets.all()) == number
    assert bool(buckets.apart) == (where != "ride" and tokens > 2 and seqs > 1)
    decodes = int(rng.integers(1, seqs + 1))
    bucket = buckets.of(random_plan(rng, layout, decodes=decodes, lengths=(), block_size=99))
    assert bucket == Bucket(
        False, min(b.tokens for b in buckets.decode if b.tokens >= decodes), bucket.tokens
    )
    if tokens >= 2:
        plan = random_plan(rng, layout, decodes=0, lengths=(int(rng.integers(2, tokens + 1)),), block_size=99)
        bucket = buckets.of(plan)
        assert bucket.mixed
        assert bucket.tokens == min(b.tokens for b in buckets.mixed if b.tokens >= plan.num_tokens)
        assert bucket.seqs == min(bucket.tokens, seqs)
        assert not bucket.apart
    if tokens >= 3 and seqs >= 2:
        plan = random_plan(rng, layout, decodes=1, lengths=(int(rng.integers(2, tokens)),), block_size=99)
        bucket = buckets.of(plan)
        assert bucket.mixed
        assert bucket.apart == (where == "apart" or (where == "either" and not rides(plan)))
        assert (bucket.decodes, bucket.chunks) == (bucket.seqs if bucket.apart else 0, bucket.seqs)


def test_a_step_over_all_buckets_is_named():
    layout = StepLayout(64, 8, 4)
    plan = random_plan(np.random.default_rng(0), layout, decodes=0, lengths=(5, 4), block_size=99)
    with pytest.raises(ValueError, match=r"9 tokens .* is over the 8 tokens and 4 sequences"):
        Buckets(8, 4).of(plan)


@pytest.mark.parametrize(
    ("decodes", "chunks", "wanted"),
    [  # as one launch or two were faster on an H100
        ([1024] * 64, [(2048, 2048)], True),
        ([600] * 200, [(512, 512)], True),
        ([100, 7990] + [4000] * 62, [(2048, 2048)], True),
        ([1024] * 8, [(512, 512)], True),
        ([1024] * 32, [(1024, 17408)], True),
        ([16384] * 4, [(2048, 2048)], False),
        ([32768], [(2048, 2048)], False),
        ([], [(16, 16)], True),
        ([LAUNCH_KEYS + 2], [(2, 2)], True),  # its own keys are worth 64 more
        ([LAUNCH_KEYS + 80], [(2, 2)], False),
    ],
)
def test_decodes_ride_where_chunks_hide_the_longest(decodes, chunks, wanted):
    queries = np.array([1] * len(decodes) + [count for count, _ in chunks], np.int32)
    plan = SimpleNamespace(
        num_decodes=len(decodes),
        context_lens=np.array([*decodes, *(length for _, length in chunks)], np.int32),
        cu_seqlens_q=np.concatenate([[0], np.cumsum(queries)]).astype(np.int32),
    )
    assert rides(plan) == wanted
