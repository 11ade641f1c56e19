"""StepPredictor: how long a step of any mixture takes, from the curves of pure prefill and pure decode steps.

Knows what a step's time is made of: tokens through the matrices, rows through the last one, keys that chunks
and decodes attend to. Refuses to know requests, clocks and what is done with a prediction. The curves are the
probe's (curves.py); nothing here allocates, so that a scheduler can ask it in every step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharp.curves import StepCurve

if TYPE_CHECKING:
    from sharp.plan import BatchPlan

FULL = 64  # tokens of a chunk from which on attention keeps a device busy, whatever the chunk
Chunk = tuple[int, int]  # new tokens, keys in the pages before them


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes. rows: logits rows; keys: those that the decodes attend to, all together."""

    decodes: int
    keys: int
    longest: int  # keys of the longest decode
    chunks: tuple[Chunk, ...]
    rows: int

    @classmethod
    def of(cls, plan: BatchPlan) -> StepWork:
        """The work of a planned step."""
        decodes = plan.num_decodes
        contexts = plan.context_lens[:decodes]
        counts = np.diff(plan.cu_seqlens_q[decodes:]).tolist()
        ends = plan.context_lens[decodes:].tolist()
        return cls(
            decodes=decodes,
            keys=int(contexts.sum()) - decodes,
            longest=int(contexts.max(initial=1)) - 1,
            chunks=tuple((count, end - count) for count, end in zip(counts, ends, strict=True)),
            rows=len(plan.logits_rows),
        )


class Line:
    """Piecewise linear through points of growing x; flat before the first, its last slope after the last."""

    def __init__(self, x: Iterable[float], y: Iterable[float]) -> None:
        self.x, self.y = [float(value) for value in x], [float(value) for value in y]
        self.slope = 0.0
        if len(self.x) > 1:
            self.slope = (self.y[-1] - self.y[-2]) / (self.x[-1] - self.x[-2])

    def at(self, value: float) -> float:
        x, y = self.x, self.y
        if value <= x[0]:
            return y[0]
        if value >= x[-1]:
            return y[-1] + (value - x[-1]) * self.slope
        right = bisect_right(x, value)
        left = right - 1
        return y[left] + (y[right] - y[left]) * (value - x[left]) / (x[right] - x[left])


class StepPredictor:
    """Seconds of mixed steps.

        tokens(T)                        all T tokens through all matrices, one row of logits
      + rows(R)                          further rows of logits, and their sampling
      + max(keys x per_key(n), longest x per_key(1))            attention of n decodes
      + max(pairs x per_pair(t), the same for any chunk alone)  attention of chunks of t tokens, where
                                         pairs = sum of count x (context + count / 2)

    Each part is read off the curves: what a step gains from context 0 to the longest one measured is
    attention, the rest is tokens, and what a decode step takes beyond a chunk of as many tokens is rows. A
    sequence alone cannot use a whole GPU, so the longest one bounds a step from below. Pure steps are
    predicted as their curve says. host_s: seconds of the engine itself for a step and for each of its
    sequences, which the curves do not hold.
    """

    def __init__(
        self, prefill: StepCurve, decode: StepCurve, host_s: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.prefill, self.decode, self.host_s = prefill, decode, host_s
        near, counts = prefill.contexts[0], _sizes(prefill)
        sizes, growth = np.array(counts, float), _chunk_growth(prefill)
        seconds = np.array([prefill.predict(t, near) for t in counts])
        # Attention to the near context and to the chunk's own tokens is no part of the matrices' time. Noise
        # may leave less than nothing; a step takes at least what its smallest takes.
        alone = seconds - growth * (near + sizes / 2)
        alone[0] = max(alone[0], 0.5 * seconds[0])
        self.tokens = Line(sizes, np.maximum.accumulate(alone))
        self.chunk_growth = Line(sizes, growth)  # seconds a key of context, for t tokens
        near, counts = decode.contexts[0], _sizes(decode)
        batches, growth = np.array(counts, float), _growth(decode)
        self.decode_growth = Line(batches, growth)
        without = np.array([decode.predict(n, near) for n in counts]) - growth * near
        beyond = without - np.array([self.tokens.at(n) for n in batches])
        self.rows = Line(batches, np.maximum.accumulate(np.maximum(beyond - max(beyond[0], 0.0), 0.0)))
        self.first_row = max(
            0.0, float(beyond[0])
        )  # what a step of one decode takes beyond one token's chunk
        self.per_key_alone = self.decode_growth.at(1)

    def seconds(self, work: StepWork) -> float:
        """Predicted seconds of a step; 0 for one without tokens."""
        chunk_tokens = sum(count for count, _ in work.chunks)
        tokens = work.decodes + chunk_tokens
        if not tokens:
            return 0.0
        total = self._fixed(work.decodes, work.keys, work.longest, work.rows)
        total += self.tokens.at(tokens)
        if chunk_tokens:
            total += self._chunks(work.chunks, chunk_tokens)
        return total + self.host_s[1] * len(work.chunks)

    def _fixed(self, decodes: int, keys: int, longest: int, rows: int) -> float:
        """What does not depend on the chunks."""
        total = self.rows.at(rows) + self.host_s[0] + self.host_s[1] * decodes
        if decodes:
            total += self.first_row
            total += max(keys * self.decode_growth.at(decodes) / decodes, longest * self.per_key_alone)
        return total

    def _chunks(self, chunks: Sequence[Chunk], tokens: int) -> float:
        growth = self.chunk_growth
        together, alone = 0.0, 0.0
        for count, context in chunks:
            keys = context + count / 2
            together += count * keys
            alone = max(alone, keys * growth.at(count))
        return max(together * growth.at(tokens) / tokens, alone)

    def largest_chunk(
        self, limit_s: float, decodes: int, keys: int, longest: int, prompts: Sequence[Chunk], most: int
    ) -> int:
        """The most prompt tokens, up to `most`, whose step with these decodes takes at most limit_s seconds;
        0 if none.

        prompts: (tokens left, keys before them) of those that are being read; the dearest first, so that
        however the tokens are shared the step takes no longer. Tokens beyond theirs are new prompts'.
        """
        fixed = self._fixed(decodes, keys, longest, decodes)
        dearest = sorted(prompts, key=lambda prompt: -prompt[1])
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            chunks, left = [], middle
            for remaining, context in dearest:
                if not left:
                    break
                chunks.append((min(left, remaining), context))
                left -= chunks[-1][0]
            if left:
                chunks.append((left, 0))
            took = fixed + self.tokens.at(decodes + middle) + self._chunks(chunks, middle)
            if took + self.host_s[1] * len(chunks) <= limit_s:
                low = middle
            else:
                high = middle - 1
        return low


def _sizes(curve: StepCurve) -> list[int]:
    """The measured sizes, and twice the largest: past it, lines go on as the curve does, which never takes a
    larger step for free."""
    return [*curve.tokens, 2 * curve.tokens[-1]]


def _growth(curve: StepCurve) -> np.ndarray:
    """Seconds that a key of context adds to a step of each size; never falling with the size.

    Read off the sizes that were measured at the nearest and the farthest context. This is for decodes: n
    sequences of one token each.
    """
    sizes, both, rise = _rises(curve)
    if not len(both):
        return np.zeros(len(sizes))
    rise = np.maximum.accumulate(rise)
    return np.asarray(np.interp(sizes, both, rise) * np.maximum(1.0, sizes / both[-1]))


def _chunk_growth(curve: StepCurve) -> np.ndarray:
    """The same for chunks. From FULL tokens on each pair of a token and a key costs the same.

    Its cost is a mean over those sizes, each weighted by how well its two times tell a difference: of large
    steps both times are long, and noise is a part of either.
    """
    sizes, both, rise = _rises(curve)
    if not len(both):
        return np.zeros(len(sizes))
    far, near = curve.contexts[-1], curve.contexts[0]
    full = both >= min(FULL, both[-1])
    noise = [curve.predict(int(t), far) ** 2 + curve.predict(int(t), near) ** 2 for t in both[full]]
    weights = both[full] ** 2 / np.array(noise)
    pair = float((weights * rise[full] / both[full]).sum() / weights.sum())
    first = both[full][0]
    small = np.minimum(np.maximum.accumulate(np.interp(sizes, both, rise)), pair * first)
    return np.asarray(np.where(sizes >= first, pair * sizes, small))


def _rises(curve: StepCurve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All sizes, those measured at the nearest and the farthest context, and what a key adds to each."""
    near, far = curve.contexts[0], curve.contexts[-1]
    points = {(tokens, context) for tokens, context, _ in curve.points}
    both = [t for t in curve.tokens if near < far and {(t, near), (t, far)} <= points]
    rise = [(curve.predict(t, far) - curve.predict(t, near)) / (far - near) for t in both]
    return np.array(_sizes(curve), float), np.array(both, float), np.array(rise)
