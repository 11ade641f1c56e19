"""StepCurve: how long a step takes, as a function of its tokens and of the keys that it attends to.

Knows measured points and interpolation; refuses to know what was measured, and where. Pure Python and numpy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

KNEE = 0.9  # of the best throughput: what a step must reach to count as large enough

Point = tuple[int, int, float]  # tokens, context, seconds


@dataclass(frozen=True)
class StepCurve:
    """Seconds of a step over (tokens, context), piecewise linear and never falling in either.

    tokens: of the step: a chunk of a prompt, or the sequences of a decode batch. context: keys that are in
    the pages before the step, for each sequence. points: as measured, at least one, in any order; not every
    pair needs to be there. More work cannot take less time, and what disturbs a clock only adds to it, so a
    point over a larger one is noise and is lowered to it. Raises ValueError for no points or for one that
    no step can have.
    """

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted((int(t), int(c), float(s)) for t, c, s in self.points))
        if not ordered:
            raise ValueError("a curve needs at least one point (tokens, context, seconds)")
        for point in ordered:
            tokens, context, seconds = point
            if tokens < 1 or context < 0 or not 0 < seconds < float("inf"):
                raise ValueError(
                    f"{point} is no measured step: tokens >= 1, context >= 0 and finite seconds > 0"
                )
        if len({point[:2] for point in ordered}) < len(ordered):
            raise ValueError("a pair of tokens and context is there twice")
        object.__setattr__(self, "points", ordered)
        object.__setattr__(self, "_grid", _grid(ordered))

    @classmethod
    def of(cls, points: Iterable[Point]) -> StepCurve:
        return cls(tuple(points))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens per step that were measured, ascending."""
        return tuple(sorted({t for t, _, _ in self.points}))

    @property
    def contexts(self) -> tuple[int, ...]:
        """Contexts that were measured, ascending."""
        return tuple(sorted({c for _, c, _ in self.points}))

    def predict(self, tokens: int, context: int = 0) -> float:
        """Seconds of a step of `tokens` at `context`; 0 tokens take none.

        Bilinear between measured points. Under the smallest it stays at theirs (a step has a floor); over
        the largest it goes on at the steepest slope that was measured there.
        """
        if tokens < 0 or context < 0:
            raise ValueError(f"tokens and context must be at least 0, not {tokens} and {context}")
        if tokens == 0:
            return 0.0
        grid: _Grid = self._grid  # type: ignore[attr-defined]
        at_tokens = [float(np.interp(tokens, grid.tokens, row)) for row in grid.seconds]
        inside = float(np.interp(context, grid.contexts, at_tokens))
        more_tokens = max(0.0, tokens - grid.tokens[-1]) * np.interp(
            context, grid.contexts, grid.token_slopes
        )
        more_context = max(0.0, context - grid.contexts[-1]) * np.interp(
            tokens, grid.tokens, grid.context_slopes
        )
        return inside + float(more_tokens) + float(more_context)

    def throughput(self, tokens: int, context: int = 0) -> float:
        """Tokens per second of steps of this size."""
        return tokens / self.predict(tokens, context)

    def knee(self, context: int = 0) -> int:
        """The smallest measured token count whose throughput is within 10 % of the best measured one.

        Larger steps only add latency. The last point is the answer when throughput still grows there: the
        true knee lies further on.
        """
        best = max(self.throughput(tokens, context) for tokens in self.tokens)
        return next(t for t in self.tokens if self.throughput(t, context) >= KNEE * best)

    def largest_under(self, seconds: float, context: int = 0) -> int:
        """The most tokens, up to the most measured, whose step takes at most `seconds`; 0 if none."""
        low, high = 0, self.tokens[-1]
        while low < high:  # predict never falls, so halving finds the edge
            middle = (low + high + 1) // 2
            if self.predict(middle, context) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True)
class _Grid:
    """A curve on all pairs of its tokens and contexts, never falling, with the slopes beyond its edges."""

    tokens: np.ndarray
    contexts: np.ndarray
    seconds: np.ndarray  # [contexts, tokens]
    token_slopes: np.ndarray  # [contexts] seconds per token over the last one
    context_slopes: np.ndarray  # [tokens] seconds per key over the last context


def _grid(points: tuple[Point, ...]) -> _Grid:
    tokens = np.array(sorted({t for t, _, _ in points}), dtype=float)
    contexts = np.array(sorted({c for _, c, _ in points}), dtype=float)
    rows: list[np.ndarray] = []
    for context in contexts:
        line = [(t, s) for t, c, s in points if c == context]
        known, seconds = np.array([t for t, _ in line], float), np.array([s for _, s in line])
        seconds = np.minimum.accumulate(seconds[::-1])[::-1]
        row = np.interp(tokens, known, seconds)
        # A line that stops early (too slow, too few pages) goes on at its last slope, never flat; and never
        # nearer to the line of the context before it than where it stopped: it would lower measured points.
        if len(known) > 1:
            slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
        else:
            slope = seconds[-1] / known[-1]
        row += np.maximum(0.0, tokens - known[-1]) * slope
        if rows:
            gap = max(0.0, seconds[-1] - float(np.interp(known[-1], tokens, rows[-1])))
            row = np.where(tokens > known[-1], np.maximum(row, rows[-1] + gap), row)
        rows.append(row)
    grid = np.minimum.accumulate(np.array(rows)[::-1], axis=0)[::-1]
    # Slopes are made to grow along the other axis: otherwise two extrapolated lines could cross.
    context_slopes = np.zeros(len(tokens))
    if len(tokens) > 1:
        token_slopes = np.maximum.accumulate((grid[:, -1] - grid[:, -2]) / (tokens[-1] - tokens[-2]))
    else:
        token_slopes = grid[:, -1] / tokens[-1]
    if len(contexts) > 1:
        context_slopes = np.maximum.accumulate((grid[-1] - grid[-2]) / (contexts[-1] - contexts[-2]))
    return _Grid(tokens, contexts, grid, token_slopes, context_slopes)
