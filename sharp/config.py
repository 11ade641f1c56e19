"""EngineConfig: every option of the engine, validated once, frozen afterwards.

Knows limits of the options themselves; refuses to know models, devices and memory (see budget.py for those).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharp.model_config import ModelConfig
from sharp.policies import SchedulingPolicy, make_policy

__all__ = ["EngineConfig", "ModelConfig"]

DEVICES = ("auto", "cuda", "cpu")
ADMISSIONS = ("reserve", "optimistic")
DTYPES = ("auto", "float32", "bfloat16")
MAX_INT32 = 2**31 - 1


class RungRefused(ValueError):
    """A kernel that was asked for does not run this model, or not here."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of the engine; the names are the field's. Raises TypeError or ValueError naming option and
    limit."""

    max_num_batched_tokens: int = 1024  # tokens of one step, decodes and prompt chunks together
    max_num_seqs: int = 64  # sequences running at once
    max_model_len: int | None = None  # prompt plus answer, in tokens; None: the model's own limit
    block_size: int = 64  # tokens of a KV page
    num_blocks: int | None = None  # KV pages; None: what memory allows
    memory_limit: int | None = None  # bytes of a smaller device, for all of it; None: what is free
    long_prefill_token_threshold: int | None = None  # longest chunk of one prompt in a step; None: no limit
    max_queue_len: int = 1024  # requests waiting; one more raises QueueFull
    admission: str = (
        "reserve"  # book a request's worst case in pages; "optimistic": what is known, preempting
    )
    scheduling_policy: str | SchedulingPolicy = "fcfs"  # a name of sharp.policies.POLICIES, or an instance
    target_itl_ms: float | None = None  # of "latency-target": milliseconds between two tokens of an answer
    max_bypass: int = 8  # times that others may be admitted past a request whose pages are not free
    prefix_caching: bool = (
        True  # whole pages of equal beginnings are computed once while room for them is free
    )
    overlap: bool | None = (
        None  # plan and launch a step while the one before runs; None: where the device runs beside the host
    )
    graphs: bool = True  # on a GPU: replay a step's launches as one, instead of queueing them one by one
    seed: int = 0  # of requests that bring none
    device: str = "auto"
    dtype: str = "auto"
    rungs: Mapping[str, str] = field(default_factory=dict)  # op name -> rung name, e.g. {"gemm": "plain"}

    def __post_init__(self) -> None:
        required = ("max_num_batched_tokens", "max_num_seqs", "block_size", "max_queue_len", "max_bypass")
        optional = ("max_model_len", "num_blocks", "memory_limit", "long_prefill_token_threshold")
        for name in required + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            low = {"max_model_len": 2, "max_bypass": 0}.get(name, 1)  # a token of prompt and one of answer
            if value < low:
                raise ValueError(f"{name} must be at least {low}, not {value}")
            if value > MAX_INT32 and name != "memory_limit":
                raise ValueError(f"{name} must be at most {MAX_INT32} (plans hold int32), not {value}")
        _check_seed(self.seed)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs {self.max_num_seqs} is over max_num_batched_tokens "
                f"{self.max_num_batched_tokens}: every running sequence decodes one token in every step"
            )
        if self.admission not in ADMISSIONS:
            raise ValueError(f"admission must be one of {', '.join(ADMISSIONS)}, not {self.admission!r}")
        for name in ("prefix_caching", "graphs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.overlap, bool | None):
            raise TypeError(f"overlap must be True, False or None, not {self.overlap!r}")
        make_policy(self.scheduling_policy, self.target_itl_ms)
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        object.__setattr__(self, "rungs", _checked_rungs(self.rungs))


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), not {seed}")


def _checked_rungs(rungs: Any) -> dict[str, str]:
    """A copy, because the caller's mapping may change later."""
    if not isinstance(rungs, Mapping):
        raise TypeError(f"rungs must map op names to rung names, not {rungs!r}")
    for op, rung in rungs.items():
        if not (isinstance(op, str) and isinstance(rung, str)):
            raise TypeError(f"rungs must map op names to rung names, not {op!r}: {rung!r}")
    return dict(rungs)
