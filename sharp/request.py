"""What a caller asks for, what is known of it while it runs, and what the caller gets back.

SamplingParams and outputs are frozen; a Request is changed by the scheduler alone (plan() and commit()).
Refuses to know text beyond carrying it, models and pages beyond their ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sharp.running import RunningTable

MAX_LOGPROBS = 1024
MAX_TOKENS_LIMIT = 2**31 - 1
MAX_SAMPLES = 2**16  # the engine's max_num_seqs is a lower limit as a rule
MAX_TIMEOUT_S = 1e9
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # logits / temperature stays well inside float32


class EngineDead(RuntimeError):
    """The engine's loop has ended with an error (its __cause__); no request can be taken any more."""


class EngineClosed(RuntimeError):
    """The engine was closed by its owner."""


class QueueFull(RuntimeError):
    """The waiting queue is at its limit; try again when some requests have finished.

    estimated_wait_s: seconds until all that is queued and running now has ended at the latest steps' pace, if
    every answer took its max_tokens; None before any step was measured.
    """

    def __init__(self, length: int, limit: int, estimated_wait_s: float | None = None) -> None:
        wait = "" if estimated_wait_s is None else f"; all of them end in about {estimated_wait_s:.1f} s"
        super().__init__(f"{length} requests are waiting; the limit is max_queue_len {limit}{wait}")
        self.length, self.limit, self.estimated_wait_s = length, limit, estimated_wait_s


class RequestTooLarge(ValueError):
    """The request could never fit, however long it waited."""


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], not {value}")


def _check_temperature(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a number, not {value!r}")
    low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
    if not (value == 0 or low <= value <= high):  # NaN fails both
        raise ValueError(f"temperature must be 0 (greedy) or in [{low:g}, {high:g}], not {value}")


def _check_top_p(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"top_p must be a number, not {value!r}")
    if not 0 < value <= 1:  # NaN fails both
        raise ValueError(f"top_p must be over 0 and at most 1, not {value}")


def _check_timeout(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"timeout_s must be a number of seconds or None, not {value!r}")
    if not 0 < value <= MAX_TIMEOUT_S:  # NaN fails both
        raise ValueError(f"timeout_s must be over 0 and at most {MAX_TIMEOUT_S:g}, not {value}")


def _checked_stop(value: Any) -> tuple[str, ...]:
    stop = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) for s in stop):
        raise TypeError(f"stop must be a string or a list of strings, not {value!r}")
    if not all(stop):
        raise ValueError(f"stop strings must have at least 1 character, not {value!r}")
    return tuple(stop)


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Raises TypeError or ValueError naming value and
    limit."""

    max_tokens: int = 16
    temperature: float = 1.0  # 0 is greedy, whatever top_k and top_p are
    top_k: int | None = None  # drawn from so many of the likeliest ids; None or 0: from all
    top_p: float = (
        1.0  # of these, from the fewest likeliest whose probabilities reach this sum; 1.0: from all
    )
    seed: int | None = (
        None  # of this request's random numbers; None: from the engine's seed and the request's order
    )
    stop: str | tuple[str, ...] | list[str] | None = None  # strings that end the answer; they are cut off it
    stop_token_ids: tuple[int, ...] | list[int] = ()  # ids that end the answer, besides the model's eos
    ignore_eos: bool = False
    logprobs: int | None = None  # log-probabilities of the best so many ids, and the chosen one, per token
    n: int = 1  # answers to the prompt, which is read once; sharp.door.sample_seed gives each its seed
    timeout_s: float | None = None  # seconds after it was queued, then finish_reason is "timeout"

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_temperature(self.temperature)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 0, MAX_TOKENS_LIMIT)
        _check_top_p(self.top_p)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _whole("n", self.n, 1, MAX_SAMPLES)
        _check_timeout(self.timeout_s)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        ids: object = self.stop_token_ids
        if not isinstance(ids, (tuple, list)):
            raise TypeError(f"stop_token_ids must be a list of token ids, not {ids!r}")
        for token_id in ids:
            _whole("stop_token_ids", token_id, 0, MAX_TOKENS_LIMIT)
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop if isinstance(self.stop, tuple) else ()


class Status(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One request. While it runs, `table` and `row` say where the scheduler keeps its columns. A preempted
    request is WAITING again, without pages, its answer kept."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0  # lower goes first, as in vLLM
    arrival: int = -1  # its number in the order of arrival, given by the scheduler
    num_preemptions: int = 0
    num_passed: int = 0  # times that others were admitted past it since it was queued
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(
        default_factory=list, repr=False
    )  # of its first whole pages, see prefix.py
    num_found: int = 0  # pages that were in the prefix cache when it was last looked at
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when it first started
    index: int = 0  # among the n samples of its prompt
    samples: list[Request] = field(default_factory=list, repr=False)  # that will fork from it, see forks.py
    first: Request | None = field(default=None, repr=False)  # what it will fork from
    booked: list[int] = field(default_factory=list)  # pages for its samples
    table: RunningTable | None = field(default=None, repr=False)
    row: int = -1
    status: Status = Status.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort", "timeout" or "error" (its step failed)
    stop_reason: int | str | None = None  # the token id or string that ended it; None for eos and limits
    _prompt_array: npt.NDArray[np.int32] | None = field(default=None, repr=False)

    @property
    def prompt_array(self) -> npt.NDArray[np.int32]:
        """The prompt as an array, made once, for plans and logs: lists are slow to read."""
        if self._prompt_array is None:
            self._prompt_array = np.array(self.prompt_token_ids, np.int32)
            self._prompt_array.setflags(write=False)
        return self._prompt_array

    @property
    def num_tokens(self) -> int:
        """Tokens whose values are known."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def last_token(self) -> int:
        return (self.output_token_ids or self.prompt_token_ids)[-1]

    @property
    def num_computed_tokens(self) -> int:
        """Tokens planned into steps: their K and V are, or are about to be, in the pages `block_ids`."""
        return 0 if self.table is None else int(self.table.computed[self.row])

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start to stop - 1."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return (self.prompt_token_ids[start:stop] + self.output_token_ids[: max(0, stop - prompt)])[
            : stop - start
        ]

    def known_array(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """The same, as an array; without copies inside of the prompt."""
        if stop <= len(self.prompt_token_ids):
            return self.prompt_array[start:stop]
        return np.array(self.known_tokens(start, stop), np.int32)


# Structs, as one of each is made for every token of every answer: a frozen dataclass takes several times as
# long. They hold no cycles, so the garbage collector need not look at them.
class CompletionOutput(msgspec.Struct, frozen=True, gc=False):
    """One answer, as far as it has got. `text` holds whole characters only and never a part of a stop
    string."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, float], ...] | None = None


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """A request's answer so far; the last one of a request has finished=True."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]  # n
    finished: bool
    num_cached_tokens: int = 0  # of the prompt, that did not have to be computed
