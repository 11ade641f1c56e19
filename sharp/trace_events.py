"""Trace: when each phase of each step ran, on the host and on the GPU's streams, as a file for Perfetto.

Holds the latest steps' spans and counters in rings (engine.trace); save() writes them. Refuses to influence
anything, and to know what a phase does.

The file is JSON in the Trace Event Format (Google, "Trace Event Format", linked from
chromium.googlesource.com, catapult/docs/trace-event-format.md), which ui.perfetto.dev and chrome://tracing
open: complete events (ph X) with ts and dur in microseconds, counters (ph C), names of rows (ph M).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sharp import trace

if TYPE_CHECKING:
    from sharp.trace import StepRecord

SPANS_A_STEP = 10  # room for so many: five or six phases, detokenising, a graph, copies up and down
HOST, COMPUTE, COPIES = "host", "GPU compute", "GPU copies"
ROWS = (HOST, COMPUTE, COPIES)  # from the top; other names follow


class Span(NamedTuple):
    """A phase. start and end: seconds of time.perf_counter's clock."""

    row: str
    name: str
    start: float
    end: float
    step: int | None


class Sample(NamedTuple):
    """Counters after a step."""

    time: float
    running: int
    waiting: int
    pages: int
    tokens: int


class Trace:
    """The latest spans and counters. One thread writes; others may read or save at any time."""

    def __init__(self) -> None:
        steps = trace.HISTORY
        self._spans: deque[tuple[str, str, float, float, int | None]] = deque(maxlen=SPANS_A_STEP * steps)
        self._samples: deque[tuple[float, int, int, int, int]] = deque(maxlen=steps)
        self._ends: dict[str, float] = {}  # of the latest span of each stream
        self.added = 0  # spans in all

    def add(self, name: str, start: float, end: float, step: int | None, row: str = HOST) -> None:
        """A span that is over. Of spans that nest, the inner one is over first."""
        self.added += 1
        self._spans.append((row, name, start, end, step))

    def add_stream(self, row: str, name: str, start: float, end: float, step: int | None) -> None:
        """Work of a GPU stream, in the order of the stream. Its events are rounded, and a stream does one
        thing at a time: what seems to begin before the last one ended begins with its end."""
        start = max(start, self._ends.get(row, start))
        self._ends[row] = end = max(start, end)
        self.add(name, start, end, step, row)

    def count(self, now: float, record: StepRecord) -> None:
        """The counters after a step that is committed."""
        self._samples.append((now, record.running, record.waiting, record.blocks_used, record.num_tokens))

    def clear(self) -> None:
        """Forget all spans and counters."""
        self._spans.clear()
        self._samples.clear()
        self.added = 0

    @property
    def dropped(self) -> int:
        """Spans that the ring had no room for any more, the oldest."""
        return self.added - len(self._spans)

    def spans(self, row: str | None = None) -> list[Span]:
        """What the ring holds, of one row or of all, by start; of those that nest, the outer one first."""
        found = [Span(*span) for span in list(self._spans) if row in (None, span[0])]
        return sorted(found, key=lambda span: (span.start, -span.end))

    def samples(self) -> list[Sample]:
        """The counters, by time."""
        return [Sample(*sample) for sample in list(self._samples)]

    def seconds(self, name: str, row: str = HOST) -> float:
        """Sum of all spans of this name."""
        return sum(span.end - span.start for span in self.spans(row) if span.name == name)

    def document(self) -> dict[str, Any]:
        """The file's content, plain values. Times begin with the first span; whole nanoseconds, so that a
        phase ends exactly where the next begins."""
        spans, samples, pid = self.spans(), self.samples(), os.getpid()
        zero = min([span.start for span in spans] + [sample.time for sample in samples], default=0.0)
        rows = sorted({span.row for span in spans}, key=lambda row: (_place(row), row))
        tids = {row: tid for tid, row in enumerate(rows, 1)}

        def meta(kind: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
            return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}

        events = [meta("process_name", 0, {"name": "sharp"})]
        for row, tid in tids.items():
            events.append(meta("thread_name", tid, {"name": row}))
            events.append(meta("thread_sort_index", tid, {"sort_index": tid}))
        for span in spans:
            start, end = (round((time - zero) * 1e9) for time in (span.start, span.end))
            event = {
                "ph": "X", "name": span.name, "cat": span.row, "pid": pid, "tid": tids[span.row],
                "ts": start / 1000, "dur": (end - start) / 1000,
            }  # fmt: skip
            events.append(event if span.step is None else {**event, "args": {"step": span.step}})
        for sample in samples:
            ts = round((sample.time - zero) * 1e9) / 1000
            for name, args in _counters(sample):
                events.append({"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": ts, "args": args})
        return {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"spans": len(spans), "dropped": self.dropped},
        }

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OSError where that cannot be done."""
        import msgspec

        from kernels_numba.files import write_whole  # here: an engine that saves nothing needs no kernels

        write_whole(Path(path), msgspec.json.encode(self.document()))


def _place(row: str) -> int:
    return ROWS.index(row) if row in ROWS else len(ROWS)


def _counters(sample: Sample) -> Sequence[tuple[str, dict[str, int]]]:
    return (
        ("requests", {"running": sample.running, "waiting": sample.waiting}),
        ("pages", {"used": sample.pages}),  # a viewer shows both words
        ("tokens", {"per step": sample.tokens}),
    )
