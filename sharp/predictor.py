"""StepPredictor: how long a step of any mixture takes, from the curves of pure prefill and pure decode steps.

Knows what a step's time is made of: tokens through the matrices, rows through the last one, keys that chunks
and decodes attend to. Refuses to know requests, clocks and what is done with a prediction. The curves are the
probe's (curves.py); nothing here allocates, so that a scheduler can ask it in every step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sharp.curves import StepCurve

if TYPE_CHECKING:
    from sharp.plan import BatchPlan

FULL = 64  # tokens of a chunk from which on attention keeps a device busy, whatever the chunk
FAR = 4096  # keys: a context so far off tells what a key costs each size of chunk, a nearer one only a mean
Chunk = tuple[int, int]  # new tokens, keys in the pages before them


class HostTime(NamedTuple):
    """Seconds of the engine itself: before a step can start (planning, launching) and after it has ended
    (landing, committing, handing over), each for a step and for each of its sequences."""

    before: float = 0.0
    before_each: float = 0.0
    after: float = 0.0
    after_each: float = 0.0

    def of(self, num_seqs: int) -> tuple[float, float]:
        """Seconds before and after a step of so many sequences."""
        return self.before + self.before_each * num_seqs, self.after + self.after_each * num_seqs

    def total(self, num_seqs: int) -> float:
        return sum(self.of(num_seqs))


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes. rows: logits rows; keys: those that the decodes attend to, all together."""

    decodes: int
    keys: int
    longest: int  # keys of the longest decode
    chunks: tuple[Chunk, ...]
    rows: int

    @property
    def num_seqs(self) -> int:
        return self.decodes + len(self.chunks)

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


NO_HOST = HostTime()


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
    predicted as their curve says. host_s: the engine's own, which the curves do not hold. overlap: steps run
    beside the host, so the longer of both counts; else one comes after the other.
    """

    def __init__(
        self, prefill: StepCurve, decode: StepCurve, host_s: HostTime = NO_HOST, *, overlap: bool = False
    ) -> None:
        self.prefill, self.decode, self.host_s, self.overlap = prefill, decode, host_s, overlap
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
        self.batches = Line(batches, without)  # steps that decode and do nothing else, without keys
        beyond = without - np.array([self.tokens.at(n) for n in batches])
        # Graphs of steps without chunks leave launches out that all others have: a step of both has both.
        both = max(0.0, -float(beyond.min())) if overlap else 0.0
        self.first_row = max(0.0, float(beyond[0]))  # a step of one decode beyond one token's chunk
        self.rows = Line(batches, np.maximum.accumulate(np.maximum(beyond + both - self.first_row, 0.0)))
        self.per_key_alone = self.decode_growth.at(1)

    def seconds(self, work: StepWork) -> float:
        """Predicted seconds from the tokens of the step before to this one's, in an engine that has always
        another step; 0 for one without tokens."""
        return self._with_host(self.device_seconds(work), work.num_seqs)

    def parts(self, work: StepWork) -> tuple[float, float, float]:
        """Seconds of the host before a step, of the device, and of the host after it."""
        before, after = self.host_s.of(work.num_seqs)
        return before, self.device_seconds(work), after

    def _with_host(self, device_s: float, num_seqs: int) -> float:
        host_s = self.host_s.total(num_seqs)
        if not device_s:
            return 0.0
        return max(device_s, host_s) if self.overlap else device_s + host_s

    def device_seconds(self, work: StepWork) -> float:
        """What a step takes where it is computed."""
        chunk_tokens = sum(count for count, _ in work.chunks)
        if not chunk_tokens:
            return self._decodes(work.decodes, work.keys, work.longest) if work.decodes else 0.0
        total = self._beside_chunks(work.decodes, work.keys, work.longest, work.rows)
        return total + self.tokens.at(work.decodes + chunk_tokens) + self._chunks(work.chunks, chunk_tokens)

    def _decodes(self, decodes: int, keys: int, longest: int) -> float:
        """A step that has no chunk."""
        return self.batches.at(decodes) + self._keys(decodes, keys, longest)

    def _keys(self, decodes: int, keys: int, longest: int) -> float:
        return max(keys * self.decode_growth.at(decodes) / decodes, longest * self.per_key_alone)

    def _beside_chunks(self, decodes: int, keys: int, longest: int, rows: int) -> float:
        """What a step with chunks has beside their tokens."""
        total = self.rows.at(rows)
        if decodes:
            total += self.first_row + self._keys(decodes, keys, longest)
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
        fixed = self._beside_chunks(decodes, keys, longest, decodes)
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
            if self._with_host(took, decodes + len(chunks)) <= limit_s:
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
    """The same for chunks. Where contexts are near, from FULL tokens on each pair of a token and a key costs
    the same.

    Its cost is a mean over those sizes, each weighted by how well its two times tell a difference: of large
    steps both times are long, and noise is a part of either. A FAR context needs no mean, and shows what a
    mean hides: how long a chunk takes that is too small to fill a device.
    """
    sizes, both, rise = _rises(curve)
    if not len(both):
        return np.zeros(len(sizes))
    if curve.contexts[-1] - curve.contexts[0] >= FAR:
        return _growth(curve)
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
