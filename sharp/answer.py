"""The text of one answer as it grows: whole characters, no part of a stop string, cut where a stop string
begins.

Knows a detokenizer and stop strings; refuses to know requests and steps.
"""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """Token ids in, final text out; `flush` gives what was still held back."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class AnswerText:
    """Feed tokens with `push`; read `visible`. After a stop string was met, `stopped_by` names it and nothing
    changes."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self._held = 0  # characters at the end that may yet become a stop string
        self.stopped_by: str | None = None

    @property
    def visible(self) -> str:
        return self._text[: len(self._text) - self._held]

    def push(self, token_id: int) -> None:
        """One more token of the answer."""
        if self.stopped_by is None:
            self._extend(self._detokenizer.push(token_id))

    def finish(self) -> None:
        """No more tokens: what was held back is text after all, unless it completes a stop string."""
        if self.stopped_by is None:
            self._extend(self._detokenizer.flush())
        self._held = 0

    def _extend(self, piece: str) -> None:
        if not piece:
            return
        searched = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        hits = [(at, stop) for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        if hits:
            at, self.stopped_by = min(hits)
            self._text, self._held = self._text[:at], 0
            return
        self._held = next(
            (
                size
                for size in range(min(self._longest - 1, len(self._text)), 0, -1)
                if any(stop.startswith(self._text[-size:]) for stop in self._stop)
            ),
            0,
        )
