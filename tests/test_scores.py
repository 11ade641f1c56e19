"""attention_scores: probabilities that, applied to values, are attention."""

from __future__ import annotations

import numpy as np
import pytest
from prefill_batches import make_batch

from kernels_numba.ops.prefill_attention import prefill_attention_spec
from kernels_numba.ops.prefill_attention.scores import attention_scores


@pytest.mark.parametrize("window", [None, 1, 90])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (70, 70), (40, 200)])
def test_probabilities_times_values_are_attention(tokens, context, window):
    rng = np.random.default_rng(context)
    batch = make_batch(rng, [tokens], [context], 2, 3, 64, window=window)
    q, k_cache, v_cache = batch.q, batch.k_cache, batch.v_cache
    pages = np.where(batch.block_table[0] < 0, 0, batch.block_table[0])
    how = {"softmax_scale": batch.scale, "window": window}
    want = prefill_attention_spec(q, k_cache, v_cache, [0, tokens], [context], pages[None], **how)
    rows = np.arange(0, tokens, 3)
    for head in (0, 4):
        p = attention_scores(q, k_cache, pages, context, head, rows, **how)
        assert p.shape == (len(rows), context)
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
        for row, token in zip(p, rows, strict=True):
            visible = context - tokens + 1 + token
            seen = np.arange(context) < visible
            if window is not None:
                seen &= np.arange(context) >= visible - window
            assert not row[~seen].any()
            assert row[seen].all()
        _, values = batch.keys_values(0, head // 3)
        got = np.where(p > 0, p, 0) @ np.nan_to_num(values.astype(np.float32))
        np.testing.assert_allclose(got, want[rows, head], atol=2e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"head": 6}, "head is 6; 0 to 5 is required"),
    ({"head": -1}, "head is -1"),
    ({"context_len": 3}, "context_len is 3; at least q's 5 tokens"),
    ({"pages": [0]}, r"pages are \[0\]; 2 of 0 to 4 is required"),
    ({"pages": [0, 5]}, r"pages are \[0, 5\]"),
    ({"tokens": [0, 5]}, "tokens hold 5; 0 to 4 is required"),
])  # fmt: skip
def test_what_is_not_there_is_named(change, message):
    batch = make_batch(np.random.default_rng(1), [5], [70], 2, 3, 64)
    arguments = {
        "q": batch.q, "k_cache": batch.k_cache, "pages": [0, 1], "context_len": 70, "head": 0, "tokens": [0],
    } | change  # fmt: skip
    assert batch.k_cache.shape[0] == 5
    with pytest.raises(ValueError, match=message):
        attention_scores(**arguments, softmax_scale=1.0)
