"""What a caller asks (SamplingParams), what it becomes inside (Request) and what comes back (RequestOutput).

Knows names, types and ranges of the values a caller may give. Knows nothing of models, pages or text. Only the
Scheduler changes a Request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from sharp.config import MAX_INT32, check_int

MAX_LOGPROBS = 20  # the log-probabilities of one token that a caller may ask for, as elsewhere in the field
MAX_TEMPERATURE = 1e6  # hotter than this is uniform, and logits / temperature leaves float32's normal range
MAX_STOP_STRINGS = 64

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Raises TypeError or ValueError on construction, naming value and limit.

    max_tokens: most tokens to generate, at least 1
    temperature: 0 is greedy; otherwise logits are divided by it before sampling
    seed: of this request's random numbers, 0 <= seed < 2**64; None = from the engine's seed and the order
    stop: strings that end the output; the text is cut before the first of them
    stop_token_ids: ids that end the output as an end-of-sequence id does
    ignore_eos: go on past the model's end-of-sequence ids
    logprobs: None, or how many of the likeliest ids to report beside the sampled one, at most MAX_LOGPROBS
    """

    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        settle("max_tokens", check_int("max_tokens", self.max_tokens, 1, MAX_INT32))
        settle("temperature", _check_temperature(self.temperature))
        if self.seed is not None:
            settle("seed", check_int("seed", self.seed, 0, 2**64 - 1))
        if self.stop is not None:
            settle("stop", _check_stop(self.stop))
        if isinstance(self.stop_token_ids, (str, bytes)) or not hasattr(self.stop_token_ids, "__iter__"):
            raise TypeError(f"stop_token_ids must be a sequence of token ids, got {self.stop_token_ids!r}")
        ids = tuple(self.stop_token_ids)
        settle(
            "stop_token_ids",
            tuple(check_int(f"stop_token_ids[{i}]", x, 0, MAX_INT32) for i, x in enumerate(ids)),
        )
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if self.logprobs is not None:
            settle("logprobs", check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


def _check_temperature(value: Any) -> float:
    number = None
    if not isinstance(value, (bool, str, bytes)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if number is None:
        raise TypeError(f"temperature must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(number) or not 0.0 <= number <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be from 0 (greedy) to {MAX_TEMPERATURE:g}, got {value!r}")
    return number


def _check_stop(value: Any) -> str | tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)):
        raise TypeError(
            f"stop must be a string or a sequence of strings, got {value!r} ({type(value).__name__})"
        )
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop holds {len(strings)} strings, at most {MAX_STOP_STRINGS} are allowed")
    for index, string in enumerate(strings):
        if not isinstance(string, str):
            raise TypeError(f"stop[{index}] must be a string, got {string!r} ({type(string).__name__})")
        if not string:
            raise ValueError(f"stop[{index}] is the empty string; a stop string has at least 1 character")
    return value if isinstance(value, str) else tuple(strings)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A request inside the engine. The Scheduler alone changes it after construction.

    num_computed_tokens: tokens whose K and V are written, or will be by the plan in flight
    block_ids: its KV pages in order; token t lives in page block_ids[t // block_size]
    num_reserved_blocks: pages booked at admission, those in block_ids included
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    prompt: str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[dict[int, float]] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_reserved_blocks: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt's and those generated."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known token ids [start, stop), without copying the rest."""
        split = len(self.prompt_token_ids)
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        return self.prompt_token_ids[start:stop] + self.output_token_ids[: max(stop - split, 0)]


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation. logprobs[i] maps ids to natural log-probabilities where token i was chosen.

    text: what is final so far; a character, or a stop string, that may be half there is held back
    token_ids: all generated ids, the one that ended the output included
    finish_reason: None while running, "stop" (stop_reason: the id or string; None for end-of-sequence),
        "length" or "abort"
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, float], ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A snapshot of a request: the prompt and its continuations so far. prompt is None if ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
