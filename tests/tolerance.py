"""Tolerances that are earned, never chosen: twice the error of a plain numpy version of the same dtype, plus
rounding.

Source of the rule: flash-attention's tests compare a kernel's error with that of a straightforward
implementation.
"""

from __future__ import annotations

import numpy as np

EPS = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def _row_max(array):
    array = np.abs(np.asarray(array, np.float64))
    return array.max(axis=-1, keepdims=True) if array.size else array


def error_ratio(actual, plain, truth, dtype, terms=1):
    """Largest error over its allowance (at most 1 passes): actual against truth (float64), row by row.

    Errors are measured relative to the largest true value of their row, so a row of small numbers is held
    as tightly as one of large numbers. (The least is a sixteenth of the largest value of all, in rows of
    n < 16 values an n-th: sums that cancel have no relative accuracy, and few values cancel together.)
    Allowed: 2 x the largest such error of `plain` + rounding. Rounding is one eps of the dtype, plus the
    random walk of a float32 sum of `terms` terms added one by one (BLAS, which made `plain`, adds in
    blocks and errs less): 0.25 sqrt(terms) float32 eps. NaN or inf in one and not in the other: inf.
    `plain` may be several versions, [n, *shape]: then the largest error of all counts. Where one row has
    nearly all the error, a single version that met it with luck would allow too little.
    """
    actual, plain, truth = (np.asarray(a, np.float64) for a in (actual, plain, truth))
    assert actual.shape == truth.shape == plain.shape[-truth.ndim :], (actual.shape, plain.shape, truth.shape)
    if actual.size == 0:
        return 0.0
    finite = np.isfinite(truth)
    same = np.where(finite, np.isfinite(actual), (actual == truth) | (np.isnan(actual) & np.isnan(truth)))
    if not same.all():
        return np.inf
    actual, plain, truth = (np.where(finite, a, 0.0) for a in (actual, plain, truth))
    rounding = EPS[dtype] + 0.25 * np.sqrt(terms) * EPS["float32"]
    largest = np.abs(truth).max()
    least = largest / min(16, truth.shape[-1] if truth.ndim else 1)
    scale = np.maximum(_row_max(truth), max(least, np.finfo(np.float64).tiny))
    allowed = 2 * (np.abs(plain - truth) / scale).max() + rounding
    return float((np.abs(actual - truth) / scale).max() / allowed)


def assert_close(actual, plain, truth, dtype, terms=1, what=""):
    """error_ratio of at most 1."""
    ratio = error_ratio(actual, plain, truth, dtype, terms)
    assert ratio <= 1, f"{what}: error is {ratio:.3g} times the allowed one ({dtype})"
