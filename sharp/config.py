"""EngineConfig: the options of an engine, checked when they are given. ModelConfig is re-exported here.

Knows names, types and ranges. Knows nothing of models, memory or devices: what "auto" becomes is settled when
a model is loaded, and the result is a new EngineConfig, never a changed one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharp.model_config import ModelConfig

__all__ = ["DEVICES", "DTYPES", "EngineConfig", "ModelConfig", "check_int"]

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "float32", "bfloat16")
MAX_INT32 = 2**31 - 1  # plans hold int32


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int in [low, high]. TypeError for anything that is no integer (bool too), else ValueError."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got the bool {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})") from None
    if not low <= number <= high:
        bound = f"at least {low}" if number < low else f"at most {high}"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine. Raises TypeError or ValueError, naming value and limit.

    max_num_batched_tokens: token budget of a step, decodes and prompt chunks together
    max_num_seqs: requests that may run at once (never more than the token budget: each may need one a step)
    max_model_len: longest prompt + output, tokens; None = what the model was trained for
    block_size: tokens in a KV page
    num_blocks: KV pages; None = as many as memory_limit or free memory allows
    memory_limit: bytes for the KV pages; None = by free memory
    long_prefill_token_threshold: longest chunk of one prompt in one step, tokens; None = the budget
    max_queue_len: requests that may wait; one more raises QueueFull
    seed: from which requests without a seed of their own get theirs, by their order
    dtype, device: "auto" lets the model's loader choose
    rungs: op name -> rung name, to force a kernel
    """

    max_num_batched_tokens: int = 1024
    max_num_seqs: int = 64
    max_model_len: int | None = None
    block_size: int = 64
    num_blocks: int | None = None
    memory_limit: int | None = None
    long_prefill_token_threshold: int | None = None
    max_queue_len: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    rungs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def settle(name: str, low: int, high: int = MAX_INT32, optional: bool = False) -> None:
            value = getattr(self, name)
            if not (optional and value is None):
                object.__setattr__(self, name, check_int(name, value, low, high))

        settle("max_num_batched_tokens", 1)
        settle("max_num_seqs", 1)
        settle("max_model_len", 2, optional=True)  # one prompt token and one token of output
        settle("block_size", 1)
        settle("num_blocks", 1, optional=True)
        settle("memory_limit", 1, 2**63 - 1, optional=True)
        settle("long_prefill_token_threshold", 1, optional=True)
        settle("max_queue_len", 1)
        settle("seed", 0, 2**64 - 1)
        for name, allowed in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.rungs, Mapping):
            raise TypeError(f"rungs must map op names to rung names, got {self.rungs!r}")
        for op, rung in self.rungs.items():
            if not isinstance(op, str) or not isinstance(rung, str):
                raise TypeError(f"rungs must map op names to rung names, got {op!r}: {rung!r}")
        object.__setattr__(self, "rungs", dict(self.rungs))  # a copy: the caller's dict may change later
