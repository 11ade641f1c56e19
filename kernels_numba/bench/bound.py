"""A baseline tied to its tensors. Knows: nothing of torch, and refuses to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Bound:
    """run(): one call, queued on torch's current stream; outputs(result): what it returned, as tensors shaped
    like the op's outputs."""

    name: str
    run: Callable[[], Any]
    outputs: Callable[[Any], list[Any]] = lambda result: [result]
