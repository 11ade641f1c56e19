"""What counts as a right result: errors in tolerances, row by row.

The tolerance is earned, as in the tests: twice the error of the plain result of the same dtype, plus one
rounding. Source of the rule: flash-attention's tests. Knows: arrays of numpy or torch. Refuses to know: ops.
"""

from __future__ import annotations

import math
from typing import Any

BF16_ROUNDING = 2.0**-9  # half a unit in the last place, relative
FLOAT32_ROUNDING = 2.0**-14  # of sums on tensor cores: 1.6e-5 was measured at 14,336 terms on an H100
AGREEMENT = 8.0  # roundings by which two right results may differ: rope in bfloat16 alone may be 6 off


def _scale(exact: Any) -> Any:
    """The largest value of each row (last axis), and at least a sixteenth of the largest of all."""
    size = abs(exact)
    rows = size.max(axis=-1, keepdims=True) if _is_numpy(exact) else size.amax(-1, keepdim=True)
    return rows.clip(max(float(size.max()) / 16, 1e-30))


def _is_numpy(array: Any) -> bool:
    """Whether an array is numpy's and not torch's."""
    return type(array).__module__.partition(".")[0] == "numpy"


def _number(value: Any) -> float:
    value = float(value)
    return value if math.isfinite(value) else math.inf


def error_in_tolerances(got: Any, plain: Any, exact: Any, rounding: float = BF16_ROUNDING) -> float:
    """Largest error over the allowed one: 2x the largest of `plain`, plus `rounding`; relative to each row.

    Arrays of one shape in float32 or wider. 0.0 for empty ones, inf where `got` holds a NaN or inf.
    """
    if 0 in exact.shape:
        return 0.0
    scale = _scale(exact)
    allowed = 2 * float((abs(plain - exact) / scale).max()) + rounding
    return _number((abs(got - exact) / scale).max()) / allowed


def disagreement(got: Any, theirs: Any) -> float:
    """How far two results are apart, every element, in units of what two right ones may differ by (in
    bfloat16)."""
    if 0 in theirs.shape:
        return 0.0
    return _number((abs(got - theirs) / _scale(theirs)).max()) / (AGREEMENT * BF16_ROUNDING)
