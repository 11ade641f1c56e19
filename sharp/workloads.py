"""Workloads: who comes when, with how many tokens, and how many answer tokens are wanted.

Knows JSON lines and made-up traffic. Refuses to know engines: simulate.py and load.py run a workload.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

FORM = '{"arrival_s": 0.5, "prompt_tokens": 100, "output_tokens": 20} (and "priority")'
MAX_TOKENS = 2**31 - 1


class WorkloadError(ValueError):
    """A workload file that is none; names file, line, value and limit."""


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request. arrival_s: seconds after the start; tokens: of the prompt and of the whole answer."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0


def read_workload(path: Path) -> list[Arrival]:
    """A JSONL file -> its requests by time of arrival (those at one time in the file's order), without blank
    lines. Raises WorkloadError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror or error}") from None
    decoder = msgspec.json.Decoder(Arrival)
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            arrival = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WorkloadError(f"{path}:{number}: {error}; a line is {FORM}") from None
        problem = problem_of(arrival)
        if problem:
            raise WorkloadError(f"{path}:{number}: {problem}")
        found.append(arrival)
    if not found:
        raise WorkloadError(f"{path} holds no requests; a line is {FORM}")
    return sorted(found, key=lambda arrival: arrival.arrival_s)


def problem_of(arrival: Arrival) -> str | None:
    """What is wrong with a request's numbers, in words."""
    if not 0 <= arrival.arrival_s < math.inf:
        return f"arrival_s must be at least 0, not {arrival.arrival_s}"
    for name in ("prompt_tokens", "output_tokens"):
        value = getattr(arrival, name)
        if not 1 <= value <= MAX_TOKENS:
            return f"{name} must be in [1, {MAX_TOKENS}], not {value}"
    if not -(2**31) <= arrival.priority < 2**31:
        return f"priority must be in [-2**31, 2**31), not {arrival.priority}"
    return None


def write_workload(path: Path, arrivals: Iterable[Arrival]) -> None:
    """Write what read_workload reads. Raises OSError."""
    path.write_bytes(b"".join(msgspec.json.encode(arrival) + b"\n" for arrival in arrivals))


def random_traffic(
    count: int,
    seconds: float,
    *,
    prompt: tuple[int, int],
    output: tuple[int, int],
    seed: int,
    day: bool = False,
) -> list[Arrival]:
    """`count` requests in `seconds`, lengths log-uniform in the closed ranges `prompt` and `output`.

    Arrivals are a Poisson process of constant rate; with `day` the rate follows one sine over the whole
    time, from a twentieth of its peak at the ends to the peak in the middle.
    """
    rng = np.random.default_rng(seed)
    if day:
        grid = np.linspace(0, 1, 4097)
        rate = 0.05 + 0.95 * np.sin(np.pi * grid) ** 2
        total = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
        times = np.interp(rng.random(count), total / total[-1], grid)
    else:
        times = rng.random(count)
    times = np.sort(times) * seconds
    lengths = [
        np.exp(rng.uniform(math.log(low), math.log(high + 1), count)).astype(int).clip(low, high).tolist()
        for low, high in (prompt, output)
    ]
    return [Arrival(float(t), p, o) for t, p, o in zip(times, *lengths, strict=True)]


def poisson(count: int, rate: float, *, seed: int) -> list[float]:
    """Arrival times, in seconds, of `count` requests at `rate` a second: a Poisson process, stretched so that
    the last one comes at count / rate; all at 0 for an infinite rate. ValueError for a rate not over 0."""
    if not rate > 0:
        raise ValueError(f"a rate of arrivals must be over 0 requests/s, not {rate}")
    gaps = np.random.default_rng(seed).exponential(1.0, count)
    times = np.cumsum(gaps)
    return [] if not count else (times * (count / rate / times[-1])).tolist()  # x / inf is 0


# The requests on which the peers were measured on an H100 (2026-11-23), drawn with the standard library's
# generator so that anybody can make them again. Other seeds are as good: a result for these alone is none.
VOCABULARY = 40_000  # ids that every vocabulary of the measured models has


def online(num_requests: int = 256, vocab: int = VOCABULARY, seed: int = 11) -> list[tuple[list[int], int]]:
    """(prompt ids, new tokens) of each request: 16..1024 and 64..256, uniform; eos is to be ignored. With the
    defaults 134,456 prompt tokens and 41,742 new ones."""
    rng = random.Random(seed)
    return [
        ([rng.randint(1, vocab) for _ in range(rng.randint(16, 1024))], rng.randint(64, 256))
        for _ in range(num_requests)
    ]


def documents(num_docs: int = 512, vocab: int = VOCABULARY, seed: int = 13) -> list[list[int]]:
    """Prompt ids of documents, of each of which one token is wanted: log-normal lengths of median 120, from
    60 to 2048. With the defaults 95,353 tokens, median 111, longest 1,953."""
    rng = random.Random(seed)
    lengths = [min(2048, max(60, int(rng.lognormvariate(math.log(120), 1.0)))) for _ in range(num_docs)]
    return [[rng.randint(1, vocab) for _ in range(length)] for length in lengths]


def every(
    seconds: float, duration: float, *, prompt_tokens: int, output_tokens: int, start: float = 0.0
) -> list[Arrival]:
    """One request each `seconds` from `start` on, before `duration`."""
    times: list[float] = np.arange(start, duration, seconds).tolist()
    return [Arrival(time, prompt_tokens, output_tokens) for time in times]


def as_json(arrivals: Iterable[Arrival]) -> list[dict[str, Any]]:
    """Plain values, for a notebook's table."""
    return [msgspec.to_builtins(arrival) for arrival in arrivals]
