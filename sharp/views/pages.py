"""PageMap: every KV page of a scheduler as a square, in the colour of whose it is.

Grey: empty. Hatched: kept for its content, nobody uses it. A dot: booked, but not written yet. A dark rim:
shared by several. Reads a scheduler's pages and requests; refuses to change them.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from sharp.scheduler import Scheduler

SIDE, COLUMNS, MAX_PAGES = 13, 64, 4096  # pixels of a page, pages a row, pages drawn
EMPTY = "#e6e6e6"


@dataclass(frozen=True, repr=False)
class PageMap:
    """owner: the first request that has each page, or None; written: whether it has content; references: of
    each page, 0 for an empty one, -1 for one that is only kept."""

    owner: tuple[str | None, ...]
    written: tuple[bool, ...]
    references: tuple[int, ...]

    @classmethod
    def of(cls, scheduler: Scheduler) -> PageMap:
        """The pages as they are now."""
        references = scheduler.blocks.references()
        owner: list[str | None] = [None] * len(references)
        written = [count < 0 for count in references]
        for request in scheduler.running:
            content = -(-request.num_computed_tokens // scheduler.config.block_size)
            for place, page in enumerate([*request.block_ids, *request.booked]):
                owner[page] = owner[page] or request.request_id
                written[page] = written[page] or place < content
        return cls(tuple(owner), tuple(written), tuple(references))

    def counts(self) -> dict[str, int]:
        """Pages that are written, booked, kept and empty; together they are all pages."""
        used = [page for page, count in enumerate(self.references) if count > 0]
        return {
            "written": sum(self.written[page] for page in used),
            "booked": sum(not self.written[page] for page in used),
            "kept": sum(count < 0 for count in self.references),
            "empty": sum(count == 0 for count in self.references),
        }

    def __str__(self) -> str:
        return f"{len(self.owner)} pages: " + ", ".join(f"{n} {what}" for what, n in self.counts().items())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = min(len(self.owner), MAX_PAGES)
        hues = {name: i * 137.5 % 360 for i, name in enumerate(dict.fromkeys(filter(None, self.owner)))}
        parts = [
            '<defs><pattern id="kept" width="4" height="4" patternUnits="userSpaceOnUse">'
            '<path d="M0 4L4 0" stroke="#888" stroke-width="1"/></pattern></defs>'
        ]
        for page in range(shown):
            x, y = page % COLUMNS * SIDE, page // COLUMNS * SIDE
            name, count = self.owner[page], self.references[page]
            if name is None:
                fill = EMPTY if count == 0 else "url(#kept)"
                what = "empty" if count == 0 else "kept for its content" if count < 0 else "being copied from"
            else:
                fill = f"hsl({hues[name]:.0f},55%,{60 if self.written[page] else 82}%)"
                what = f"{name}, {'written' if self.written[page] else 'booked'}"
            rim = ' stroke="#333" stroke-width="1.5"' if count > 1 else ""
            what += f", used by {count}" if count > 1 else ""
            parts.append(
                f'<rect x="{x}" y="{y}" width="{SIDE - 2}" height="{SIDE - 2}" fill="{fill}"{rim}>'
                f"<title>page {page}: {html.escape(what)}</title></rect>"
            )
            if name is not None and not self.written[page]:
                parts.append(f'<circle cx="{x + SIDE / 2 - 1}" cy="{y + SIDE / 2 - 1}" r="1.5" fill="#555"/>')
        more = f" (the first {shown} are drawn)" if shown < len(self.owner) else ""
        rows = -(-shown // COLUMNS)
        return (
            f"<div>{self}{more}</div>"
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{COLUMNS * SIDE}" height="{rows * SIDE}">'
            f"{''.join(parts)}</svg>"
        )
