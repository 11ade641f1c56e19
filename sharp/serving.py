"""What a serving benchmark reports of finished requests, by the names and definitions that the field uses.

Knows times and counts alone. They are those of vLLM's `vllm bench serve` (vllm/benchmarks/serve.py,
calculate_metrics), so that its numbers and ours can stand side by side:

    ttft   from a request's arrival to its first token
    e2el   from its arrival to its last token
    tpot   (e2el - ttft) / (tokens - 1), of requests with more than one token
    itl    from one token of an answer to its next: each of them counts, not one a request
    request_throughput, output_throughput, total_token_throughput: finished requests, their new tokens, and
           their prompts' tokens beside these, over the seconds from the first arrival to the last token
    request_goodput: finished requests that keep every given limit, over the same seconds

mean, median and p99 (linearly interpolated) are in milliseconds. A limit on itl, which vLLM does not have,
holds for the longest gap of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LATENCIES = ("ttft", "tpot", "itl", "e2el")
SUMMARIES = ("mean", "median", "p99")


@dataclass(frozen=True)
class Served:
    """One finished request. times: seconds from its arrival to each of its tokens, at least one."""

    prompt_tokens: int
    times: Sequence[float]

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.times)]

    def latency(self, name: str) -> float:
        """Seconds of one of LATENCIES, as a limit is held against it."""
        first, last = self.times[0], self.times[-1]
        if name == "ttft":
            return first
        if name == "e2el":
            return last
        if name == "itl":
            return max(self.gaps, default=0.0)
        return (last - first) / (len(self.times) - 1) if len(self.times) > 1 else 0.0


def parse_limits(words: Iterable[str]) -> dict[str, float]:
    """["ttft:500", "itl:50"] -> {"ttft": 500.0, "itl": 50.0} in ms. ValueError names word and limit."""
    limits: dict[str, float] = {}
    for word in words:
        name, colon, text = word.partition(":")
        if not colon or name not in LATENCIES:
            known = ", ".join(LATENCIES)
            raise ValueError(f"--goodput is {word!r}; NAME:MILLISECONDS is required, NAME one of {known}")
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"--goodput is {word!r}; {text!r} is no number of milliseconds") from None
        if not 0 < value < float("inf"):
            raise ValueError(f"--goodput is {word!r}; the limit must be over 0 ms and finite")
        if name in limits:
            raise ValueError(f"--goodput gives {name} twice: {limits[name]:g} and {value:g}")
        limits[name] = value
    return limits


def metrics(
    served: Sequence[Served], seconds: float, limits: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Name -> value, throughputs first. limits: of parse_limits; without any there is no goodput.

    ValueError without a finished request, or without time."""
    if not served or not seconds > 0:
        raise ValueError(
            f"{len(served)} requests finished in {seconds} s; at least 1 in over 0 s is required"
        )
    new = sum(len(one.times) for one in served)
    found = {
        "request_throughput": len(served) / seconds,
        "output_throughput": new / seconds,
        "total_token_throughput": (new + sum(one.prompt_tokens for one in served)) / seconds,
    }
    if limits:
        good = [
            one for one in served if all(1e3 * one.latency(name) <= limit for name, limit in limits.items())
        ]
        found["request_goodput"] = len(good) / seconds
    values = {
        "ttft": [one.latency("ttft") for one in served],
        "tpot": [one.latency("tpot") for one in served if len(one.times) > 1],
        "itl": [gap for one in served for gap in one.gaps],
        "e2el": [one.latency("e2el") for one in served],
    }
    for name in LATENCIES:
        ms = 1e3 * np.array(values[name] or [0.0])
        summaries = (ms.mean(), np.median(ms), np.percentile(ms, 99))
        for summary, value in zip(SUMMARIES, summaries, strict=True):
            found[f"{summary}_{name}_ms"] = float(value)
    return found


def unit_of(metric: str) -> str:
    """Of a name that metrics() gives."""
    if metric.endswith("_ms"):
        return "ms"
    return "request/s" if metric.startswith("request") else "token/s"


def table(found: Mapping[str, float]) -> str:
    """The metrics for a terminal, a line each for throughputs, a line a latency."""
    lines = [
        f"  {name:<24}{value:12,.2f} {unit_of(name)}" for name, value in found.items() if "_ms" not in name
    ]
    for name in LATENCIES:
        each = ", ".join(f"{summary} {found[f'{summary}_{name}_ms']:,.2f}" for summary in SUMMARIES)
        lines.append(f"  {name + ' ms':<24}{each}")
    return "\n".join(lines)
