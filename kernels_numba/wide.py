"""The working precision of the numpy definitions: float32, or float64 when a test hands in float64 as the
truth."""

from __future__ import annotations

from typing import Any

import numpy as np


def wide(array: Any) -> Any:
    """float64 stays, anything else (float32, bfloat16) becomes float32; no copy where none is needed."""
    array = np.asarray(array)
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
