"""What top-k and top-p leave, and what is drawn from it: the definition against the obvious float64, draws
against their distribution, each rung against the definition, in integers and so to the last id."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from kernels_numba.compiler import SIMULATOR, cuda
from kernels_numba.ops import OPS
from kernels_numba.ops.sample import nucleus
from sharp.sampling import sample

SAMPLE = OPS["sample"]
ROOM = 1e-5  # of a sum of probabilities: ten times what nucleus.py says of 10,000 ids


def naive_kept(logits, temperature, top_k, top_p):
    """(ids, probabilities in their order, the sum before each) in float64, by sorting everything."""
    values = np.asarray(logits, np.float64)
    ids = [i for i in range(len(values)) if values[i] > -math.inf]
    ids.sort(key=lambda i: (-values[i], i))
    if top_k:
        ids = ids[:top_k]
    powers = [math.exp((values[i] - values[ids[0]]) / temperature) for i in ids]
    total = math.fsum(powers)
    kept, before = [], []
    for i in ids:
        done = math.fsum(powers[: len(kept)]) / total
        if kept and done >= top_p:
            break
        kept.append(i)
        before.append(done)
    return kept, before


ROWS = [
    ("normal", lambda rng, n: rng.standard_normal(n) * 3),
    ("flat", lambda rng, n: rng.standard_normal(n) * 0.01),
    ("peaked", lambda rng, n: np.where(np.arange(n) == n // 2, 30.0, rng.standard_normal(n))),
    ("ties", lambda rng, n: rng.integers(0, 4, n).astype(float)),
    ("equal", lambda rng, n: np.full(n, 1.5)),
    ("holes", lambda rng, n: np.where(rng.random(n) < 0.5, -np.inf, rng.standard_normal(n))),
]


@pytest.mark.parametrize(("kind", "make"), ROWS, ids=[name for name, _ in ROWS])
def test_what_stays_is_what_float64_says(kind, make):
    """Exactly for top-k; for top-p up to ids whose sum is within the stated error of top_p."""
    rng = np.random.default_rng([len(kind), 7])
    for size in (1, 2, 37, 400):
        for temperature in (0.3, 1.0, 5.0):
            logits = np.asarray(make(rng, size), np.float32)
            if not (logits > -np.inf).any():
                logits[0] = 0
            for top_k in (0, 1, 3, size // 2, size, 5 * size):
                alone = SAMPLE.kept_spec(logits, temperature, top_k, 1.0)
                assert sorted(naive_kept(logits, temperature, top_k, 2.0)[0]) == alone.tolist()
                for top_p in (1e-7, 0.1, 0.5, 0.9, 0.999):
                    top_p = float(np.float32(top_p))
                    got = SAMPLE.kept_spec(logits, temperature, top_k, top_p).tolist()
                    wanted, before = naive_kept(logits, temperature, top_k, top_p + ROOM)
                    assert sorted(wanted[: len(got)]) == got, (size, temperature, top_k, top_p)
                    assert before[len(got) - 1] <= top_p + ROOM
                    if len(got) < len(wanted):
                        assert before[len(got)] >= top_p - ROOM


def test_weights_are_as_near_as_they_say():
    steps = np.arange(0, (nucleus.OCTAVES << nucleus.Y_BITS) + 1, 997, dtype=np.uint32)
    exact = 2.0 ** (nucleus.FRACTION_BITS - steps / 2.0**nucleus.Y_BITS)
    assert (np.abs(nucleus.fixed_spec(steps).astype(np.float64) - exact) <= 0.5 + 2e-9 * exact).all()
    part = np.arange(0, 1 << nucleus.Y_BITS, dtype=np.uint32)
    assert (np.diff(nucleus.fixed_spec(part).astype(np.int64)) <= 0).all()
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal(5000) * 6).astype(np.float32)
    for temperature in (0.5, 1.0, 3.0):
        y = (float(logits.max()) - logits.astype(np.float64)) / temperature * nucleus.LOG2_E
        exact = 2.0 ** (nucleus.FRACTION_BITS - y)
        bound = (0.7 * y * 1.8e-7 + 2.3e-8) * exact + 1
        got = SAMPLE.weights_spec(logits, np.float32(temperature)).astype(np.float64)
        assert (np.abs(got - exact) <= bound).all()


def test_shares_are_rounded_up_exactly():
    rng = np.random.default_rng(3)
    for total in (nucleus.ONE, nucleus.ONE + 1, (1 << 60) - 1, int(rng.integers(1 << 59))):
        for top_p in np.float32([1e-30, 1e-9, 0.1, 0.5, 0.9, 0.99999994]):
            share = nucleus.share_spec(total, top_p)
            exact = max(1, int(float(top_p) * 2**32)) * total
            assert (share - 1) * 2**32 < exact <= share * 2**32
            assert 0 < share <= total


def draws(logits, temperature, top_k, top_p, count, rung="reference"):
    """Ids of `count` requests, half of them of other seeds and half of other output indices."""
    rows = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits))).copy()
    seeds = np.where(np.arange(count) % 2, np.arange(count) + 2**40, 5).astype(np.uint64)
    out = np.empty(count, np.int32)
    SAMPLE.rungs[rung](
        out, rows, np.full(count, temperature, np.float32), seeds, np.arange(count, dtype=np.int32),
        np.full(count, top_k, np.int32), np.full(count, top_p, np.float32),
    )  # fmt: skip
    return out


def chi_squared(ids, probabilities):
    """The statistic, and infinity if an id of no probability was drawn."""
    counts = np.bincount(ids, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return math.inf
    p = probabilities[probabilities > 0]
    expected = len(ids) * p
    return float((((counts[probabilities > 0] - expected) ** 2) / expected).sum())


def truncated(logits, temperature, top_k, top_p):
    kept = naive_kept(logits, temperature, top_k, top_p)[0]
    p = np.zeros(len(logits))
    p[kept] = np.exp((np.asarray(logits, np.float64)[kept] - max(logits)) / temperature)
    return p / p.sum()


LOGITS = [1.0, 0.2, 2.5, -1.0, 0.7, 2.0, -3.0, 1.6]
CUTS = [(0, 1.0), (3, 1.0), (0, 0.86), (7, 0.93), (6, 1.0)]  # 8, 3, 4, 5 and 6 ids


@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_draws_follow_the_truncated_softmax(top_k, top_p):
    """Chi-squared over 6,000 draws; 32 is the 99.99th percentile at 7 degrees of freedom, the most here."""
    ids = draws(LOGITS, 0.9, top_k, top_p, 6000)
    assert chi_squared(ids, truncated(LOGITS, 0.9, top_k, top_p)) < 32
    for other in CUTS:  # and it would notice another cut
        if other != (top_k, top_p):
            assert chi_squared(ids, truncated(LOGITS, 0.9, *other)) > 60, other
    assert chi_squared(ids, truncated(LOGITS, 1.3, top_k, top_p)) > 60


def test_each_cut_keeps_its_number():
    """So that the test above tells them apart."""
    assert [len(naive_kept(LOGITS, 0.9, *cut)[0]) for cut in CUTS] == [8, 3, 4, 5, 6]


def test_a_slightly_wrong_top_p_is_noticed():
    """Ids of equal probability: 0.5 of ten is five of them, 0.51 six."""
    ids = draws([0.0] * 10, 1.0, 0, 0.5, 3000)
    assert set(ids.tolist()) == set(range(5))
    ids = draws([0.0] * 10, 1.0, 0, 0.51, 3000)
    assert set(ids.tolist()) == set(range(6))


def test_a_cut_that_keeps_the_drawn_id_does_not_change_it():
    whole = draws(LOGITS, 0.9, 0, 1.0, 500)
    cut = draws(LOGITS, 0.9, 5, 0.9, 500)
    kept = np.isin(whole, naive_kept(LOGITS, 0.9, 5, 0.9)[0])
    assert 0.5 < kept.mean() < 1
    np.testing.assert_array_equal(cut[kept], whole[kept])
    np.testing.assert_array_equal(draws(LOGITS, 0.0, 2, 0.1, 3), np.argmax(LOGITS))


def test_the_reference_is_the_definition_at_a_real_size():
    """Every way that it takes: few and many ids in the nucleus, ties at both borders."""
    rng = np.random.default_rng(4)
    vocab, rows = 30_001, []
    for scale in (0.02, 1.0, 3.0):
        rows += [rng.standard_normal(vocab) * scale, np.round(rng.standard_normal(vocab) * scale * 4) / 4]
    logits = np.array(rows, np.float32)
    logits[1, 7] = np.nan
    for top_k, top_p in ((0, 0.9), (50, 1.0), (1000, 0.95), (20_000, 0.5), (0, 1e-6), (40_000, 0.999)):
        count = len(logits)
        args = (
            np.full(count, 0.8, np.float32), np.arange(count, dtype=np.uint64) + 2**33,
            np.arange(count, dtype=np.int32), np.full(count, top_k, np.int32),
            np.full(count, top_p, np.float32),
        )  # fmt: skip
        out = np.empty(count, np.int32)
        SAMPLE.rungs["reference"](out, logits, *args)
        np.testing.assert_array_equal(out, SAMPLE.sample_spec(logits, *args), f"{top_k} {top_p}")
        for row in (0, 3, 5):
            kept = SAMPLE.kept_spec(logits[row], np.float32(0.8), top_k, np.float32(top_p))
            heavy = kept[SAMPLE.weights_spec(logits[row], np.float32(0.8))[kept] > 0]
            mine = SAMPLE._kept_reference(logits[row], np.float32(0.8), top_k, np.float32(top_p))
            np.testing.assert_array_equal(mine, heavy)


def hard_rows(rng, vocab):
    """Rows that meet every way of a kernel: ties across a border, one id, nothing, infinities, wide
    logits."""
    rows = np.round(rng.standard_normal((9, vocab)) * 8) / 4
    rows[1] = 1.5
    rows[2, : vocab // 2] = -np.inf
    rows[3] = -np.inf
    rows[4] = np.nan
    rows[5, [vocab // 3, vocab - 1]] = np.inf
    rows[6] *= 40
    rows[7] = np.where(np.arange(vocab) % 5 == 0, 0.0, -0.0)
    rows[8, vocab // 2] = np.nan
    return rows.astype(np.float32)


HARD_CUTS = [(2, 1.0), (0, 0.6), (7, 0.5), (3, 0.9), (10_000, 0.999)]


@pytest.mark.parametrize(("top_k", "top_p"), HARD_CUTS)
def test_plain_kernel_cuts_as_the_definition(top_k, top_p):
    """Every id: what stays is found in integers, and here the noise has numpy's bits."""
    logits = hard_rows(np.random.default_rng(6), 23)
    count = len(logits)
    args = (
        np.linspace(0.4, 2, count).astype(np.float32), np.arange(count, dtype=np.uint64),
        np.arange(count, dtype=np.int32), np.full(count, top_k, np.int32), np.full(count, top_p, np.float32),
    )  # fmt: skip
    out = cuda.to_device(np.full(count, -7, np.int32))
    SAMPLE.rungs["plain"](out, *map(cuda.to_device, (logits, *args)))
    wanted = SAMPLE.sample_spec(logits, *args)
    if SIMULATOR:
        np.testing.assert_array_equal(out.copy_to_host(), wanted)
    for row, chosen in enumerate(out.copy_to_host()):
        kept = SAMPLE.kept_spec(logits[row], args[0][row], top_k, np.float32(top_p))
        assert chosen in kept if kept.size else chosen == -1


class OneDevice:
    """A device of numpy arrays that says it is a GPU."""

    kind, stream = "cuda", None

    def download(self, array):
        return array

    def synchronize(self):
        pass


def test_logprobs_say_once_that_they_are_slower_on_a_gpu():
    """Once for an engine's device; other steps and devices of a host say nothing."""
    rows = np.array([LOGITS, LOGITS], np.float32)
    arrays = {
        "temperatures": np.array([0, 0.9], np.float32), "seeds": np.arange(2, dtype=np.uint64),
        "output_indices": np.zeros(2, np.int32), "top_ks": np.array([0, 3], np.int32),
        "top_ps": np.array([1, 0.5], np.float32),
    }  # fmt: skip

    def step(device, wanted):
        numbers = np.array([wanted, -1], np.int32)
        plan = SimpleNamespace(step=1, logits_rows=np.arange(2, dtype=np.int32), num_logprobs=numbers)
        ops = SimpleNamespace(sample=SAMPLE.rungs["reference"])
        return sample(rows, SimpleNamespace(plan=plan, **arrays), np.empty(2, np.int32), ops, device)

    device, other = OneDevice(), OneDevice()
    assert step(device, -1).logprobs == (None, None)
    with pytest.warns(RuntimeWarning, match="logprobs=...\\) is not computed on the GPU yet") as told:
        found = [step(device, 2), step(device, 2), step(other, 0)]
    assert len(told) == 2
    other.kind = "cpu"
    assert step(other, 1).token_ids.tolist() == found[0].token_ids.tolist() == [2, 2]
    assert list(found[0].logprobs[0]) == [2, 5]
