"""Lanes: the rows of a trace over time, as bars on a matplotlib axis: host phases above, a device's streams
below. Reads a Trace; refuses to know an engine, and imports no matplotlib (the axis is the caller's).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sharp.trace_events import ROWS, Span, Trace

COLOURS = {
    "plan": "#2b6cb0", "launch": "#dd6b20", "wait": "#d9d9d9", "commit": "#2a9d4b", "detokenise": "#1c6b33",
}  # fmt: skip
OTHER = "#805ad5"  # streams
INNER = 0.45  # height of a part within its phase


def window(trace: Trace, first: int, steps: int) -> tuple[float, float]:
    """(start, end) of the steps with the numbers first .. first + steps - 1, of all rows. ValueError if the
    trace has none of them."""
    spans = [span for span in trace.spans() if span.step is not None and first <= span.step < first + steps]
    if not spans:
        raise ValueError(f"the trace holds no step from {first} to {first + steps - 1}")
    return min(span.start for span in spans), max(span.end for span in spans)


def calmest(trace: Trace, steps: int, firsts: Iterable[int]) -> int:
    """Of these first steps the one whose window is shortest: where nothing else was in the loop's way."""

    def length(first: int) -> float:
        start, end = window(trace, first, steps)
        return end - start

    return min(firsts, key=length)


def lanes(trace: Trace, start: float, end: float) -> dict[str, list[Span]]:
    """Rows of the trace, the host's first -> their spans that lie in this time, at least in part."""
    found: dict[str, list[Span]] = {}
    for span in trace.spans():
        if span.end > start and span.start < end:
            found.setdefault(span.row, []).append(span)
    order = [*ROWS, *sorted(set(found) - set(ROWS))]
    return {row: found[row] for row in order if row in found}


def draw(axis: Any, trace: Trace, first: int, steps: int, title: str = "") -> None:
    """Draw some steps, in milliseconds from the beginning of the first. A step's number is on its plan and on
    its work of a device."""
    start, end = window(trace, first, steps)
    rows = lanes(trace, start, end)
    labels: set[str] = set()
    for place, spans in enumerate(rows.values()):
        for span in spans:
            high = INNER if span.name == "detokenise" else 0.8
            colour = COLOURS.get(span.name, OTHER)
            left, width = 1e3 * (span.start - start), 1e3 * (span.end - span.start)
            axis.barh(
                -place, width, left=left, height=high, color=colour, edgecolor="white", linewidth=0.4,
                label=None if span.name in labels else span.name,
            )  # fmt: skip
            labels.add(span.name)
            if span.name == "plan" or span.name not in COLOURS:
                axis.text(left, -place + 0.42, str(span.step), fontsize=6, va="bottom", clip_on=True)
    axis.set(yticks=[-place for place in range(len(rows))], yticklabels=list(rows), title=title)
    axis.set(xlim=(0, 1e3 * (end - start)), ylim=(0.4 - len(rows), 0.75))
    axis.set_xlabel("ms", loc="right", fontsize=8)
    axis.legend(fontsize=7, ncols=7, loc="upper center", bbox_to_anchor=(0.45, -0.18), frameon=False)
