"""Timeline: who got how many tokens in each step, drawn from StepRecords.

A row a request, a column a step, as wide as the step took (or all alike). Green: one token of an answer.
Blue: a chunk of a prompt, as high as its share of the largest chunk. A thin red line: it ran and got nothing.
Refuses to know a scheduler: records are enough.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from sharp.trace import StepRecord

GREEN, BLUE, RED, GREY = "#2a9d4b", "#2b6cb0", "#c53030", "#9a9a9a"  # the first two as in BatchPlan's picture
WIDTH, ROW, LABELS = 860, 16, 90  # pixels: of the steps, of a row, of the names
MAX_STEPS, MAX_ROWS = 400, 60  # drawn; of more, the latest steps and the first requests


@dataclass(frozen=True)
class Timeline:
    """by_time: columns as wide as their steps took; else all alike. names: for ids that say little."""

    records: tuple[StepRecord, ...]
    by_time: bool = True
    names: dict[str, str] | None = None

    @classmethod
    def of(cls, records: Iterable[StepRecord], **options: object) -> Timeline:
        return cls(tuple(records)[-MAX_STEPS:], **options)  # type: ignore[arg-type]

    def requests(self) -> list[str]:
        """Ids in the order of their first step."""
        seen: dict[str, None] = {}
        for record in self.records:
            seen.update(dict.fromkeys(name for name, _ in record.scheduled))
            seen.update(dict.fromkeys(record.not_scheduled))
        return list(seen)

    def svg(self) -> str:
        """The picture; a tooltip on each cell says step, tokens and time."""
        rows = {name: row for row, name in enumerate(self.requests()[:MAX_ROWS])}
        widths = [record.seconds if self.by_time else 1.0 for record in self.records]
        scale = WIDTH / max(sum(widths), 1e-12)
        chunks = [count for record in self.records for _, count in record.scheduled]
        largest = max(chunks, default=1)
        parts, x = [], float(LABELS)
        for record, width in zip(self.records, widths, strict=True):
            wide = width * scale
            drawn = max(0.4, wide - (0.6 if wide > 3 else 0.0))
            for name, count in record.scheduled:
                if name in rows:
                    parts.append(self._cell(record, name, count, rows[name], x, drawn, largest))
            for name, why in record.not_scheduled.items():
                if name in rows:
                    y = rows[name] * ROW + ROW - 3
                    title = html.escape(f"step {record.step}: {name} waits: {why}")
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{drawn:.1f}" height="2" fill="{RED}">'
                        f"<title>{title}</title></rect>"
                    )
            x += wide
        for name, row in rows.items():
            shown = html.escape((self.names or {}).get(name, name)[-12:])
            place = f'x="{LABELS - 6}" y="{row * ROW + ROW - 4}" text-anchor="end"'
            parts.append(f'<text {place} font-size="11">{shown}</text>')
        height = len(rows) * ROW
        seconds = sum(record.seconds for record in self.records)
        unit = f"{seconds * 1e3:.0f} ms" if self.by_time else f"{len(self.records)} steps"
        parts.append(
            f'<text x="{LABELS}" y="{height + 14}" font-size="11" fill="{GREY}">{unit}; green: decode, blue: '
            f"prompt chunk (the highest: {largest} tokens), red: ran without a token</text>"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABELS + WIDTH}" height="{height + 20}" '
            f'font-family="sans-serif">{"".join(parts)}</svg>'
        )

    def _cell(
        self, record: StepRecord, name: str, count: int, row: int, x: float, width: float, largest: int
    ) -> str:
        colour, high = (GREEN, ROW - 6) if count == 1 else (BLUE, 3 + (ROW - 5) * count / largest)
        top = row * ROW + ROW - 2 - high
        title = html.escape(f"step {record.step}: {name}, tokens: {count}, {record.seconds * 1e3:.1f} ms")
        return (
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{high:.1f}" fill="{colour}">'
            f"<title>{title}</title></rect>"
        )

    def _repr_html_(self) -> str:
        return self.svg()
