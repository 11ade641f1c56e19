"""The debug build of Hopper prefill attention that notes what runs when: in numpy and on a GPU."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from decode_batches import BF16
from prefill_batches import bits, make_batch
from test_prefill import OnGpu, by_contract, items_of, same_bits

from kernels_numba.ops.prefill_attention.clocks import FIRST_WORD, NOTES, blank_notes, read_notes
from kernels_numba.ops.prefill_attention.config import Build, PrefillConfig
from kernels_numba.ops.prefill_attention.in_numpy import in_numpy

QUERIES, LENS = [300, 0, 1, 64, 140], [300, 9, 200, 64, 1100]


def check_items(items, batch, tile_rows):
    """Every item of the schedule once; those of a block one after another."""
    heads, group = batch.k_cache.shape[1], batch.group
    wanted = [item[:3] for item in items_of(batch.query_lens, batch.context_lens, heads, group, tile_rows)]
    assert sorted(zip(items["seq"], items["head"], items["first_row"], strict=True)) == sorted(wanted)
    assert items["start_us"].min() == 0
    assert (items["start_us"] <= items["end_us"]).all()
    for block in set(items["block"].tolist()):
        mine = items[items["block"] == block]
        assert len(set(mine["sm"].tolist())) == 1
        assert all(one["end_us"] <= two["start_us"] for one, two in pairwise(mine))


@pytest.mark.parametrize(("grid", "seed"), [(1, 0), (3, 1), (40, 2)])
def test_the_text_notes_every_item_and_keeps_its_bits(grid, seed):
    batch = make_batch(np.random.default_rng(3), QUERIES, LENS, 2, 2, 64, spread=2)
    out, lse = np.full(batch.q.shape, np.nan, BF16), np.full(batch.q.shape[:2], np.nan, np.float32)
    config = PrefillConfig(64)
    words = in_numpy(
        config, bits(out), *map(bits, (batch.q, batch.k_cache, batch.v_cache)), batch.cu_seqlens_q,
        batch.context_lens, batch.block_table, softmax_scale=batch.scale, lse=lse, grid=grid, seed=seed,
        build=Build(clock=True),
    )  # fmt: skip
    assert same_bits((out, lse), by_contract(batch))
    assert not words[:2].any()
    check_items(read_notes(words), batch, config.tile_rows)


def notes(*rows):
    """blank_notes of one block in which (seq, SM, time) stand."""
    words = blank_notes(1)
    places = words[FIRST_WORD:].reshape(NOTES, -1)
    for place, (seq, sm, time) in zip(places, rows, strict=False):
        place[:5] = seq, 0, 0, sm, np.int64(time).astype(np.int32)
    return words


def test_times_are_between_notes():
    """Two items: the second note after an item's own is its start, the third its end; 2**32 ns may pass."""
    edge = 1 << 32
    words = notes(
        (7, 5, edge - 900),
        (8, 5, edge - 800),
        (-1, 5, edge - 500),
        (-1, 5, edge + 1500),
        (-1, 5, edge + 1600),
    )
    items = read_notes(words)
    assert items["seq"].tolist() == [7, 8]
    assert items["sm"].tolist() == [5, 5]
    assert items["start_us"].tolist() == [0, 2]
    assert items["end_us"].tolist() == [2, 2.1]
    assert len(read_notes(blank_notes(3))) == 0
    with pytest.raises(ValueError, match=f"block 0 had over {NOTES - 3} items"):
        read_notes(notes(*[(1, 0, 0)] * NOTES))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_attention_with_clocks(gpu_where, head_dim):
    """The bits are those of the kernel without, every item is noted, the SMs are the card's, and no two items
    are on one SM at once."""
    from kernels_numba.ops.prefill_attention.clocks import attend_clocked
    from kernels_numba.ops.prefill_attention.hopper import num_sms

    cuda = gpu_where(lambda have: have == (9, 0), "9.0")
    batch = make_batch(np.random.default_rng(4), [900, *QUERIES], [3000, *LENS], 4, 7, head_dim)
    gpu = OnGpu(cuda, batch)
    want, _ = gpu()
    out = cuda.to_device(bits(np.full(batch.q.shape, np.nan, BF16)))
    k, v, table = gpu.pages
    items = attend_clocked(out, gpu.q, k, v, *gpu.lens, table, softmax_scale=batch.scale)
    assert np.array_equal(out.copy_to_host(), bits(want))
    check_items(items, batch, PrefillConfig(head_dim).tile_rows)
    assert 0 <= items["sm"].min() <= items["sm"].max() < num_sms()
    assert 1 < items["end_us"].max() < 1e5
