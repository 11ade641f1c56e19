"""What happened in each step, for people: frozen records, a bounded history, totals.

Knows numbers only; refuses to influence anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np

from sharp.plan import BatchPlan
from sharp.scheduler import Scheduler

HISTORY = 4096  # steps kept
RECENT = 64  # steps that an estimate looks back on: seconds of a busy engine


@dataclass(frozen=True)
class StepRecord:
    """One step: what it computed, how long each phase took (seconds, host clock), and what was in use after
    it."""

    step: int
    plan_s: float
    stage_s: float
    forward_s: float  # on a GPU: queueing the launches; the wait for them is in sample_s
    sample_s: float
    commit_s: float
    num_tokens: int
    num_seqs: int
    num_decodes: int
    num_sampled: int
    padded_tokens: int  # what a rectangle of this step's sequences would have computed
    blocks_used: int
    blocks_total: int
    running: int
    waiting: int  # the queue's depth
    scheduled: tuple[tuple[str, int], ...]  # who: request id and tokens
    not_scheduled: dict[str, str]  # why not: running or preempted requests without a token, by id
    waiting_for: str | None  # what the queue waits for: "pages", "token budget", "max_num_seqs", "preemption"
    free_blocks: int
    cached_blocks: int  # that nobody uses, kept for their content: free + used + cached = total
    hit_tokens: int  # found in the prefix cache instead of computed, since the start
    preemptions: int  # since the start

    @classmethod
    def of(cls, plan: BatchPlan, clock: list[float], scheduler: Scheduler, blocks_used: int) -> StepRecord:
        """The record of a step that was just committed; clock: the six times between its five phases."""
        plan_s, stage_s, forward_s, sample_s, commit_s = (b - a for a, b in pairwise(clock))
        return cls(
            step=plan.step,
            plan_s=plan_s,
            stage_s=stage_s,
            forward_s=forward_s,
            sample_s=sample_s,
            commit_s=commit_s,
            num_tokens=plan.num_tokens,
            num_seqs=plan.num_seqs,
            num_decodes=plan.num_decodes,
            num_sampled=len(plan.logits_rows),
            padded_tokens=plan.padded_tokens,
            blocks_used=blocks_used,
            blocks_total=scheduler.blocks.num_blocks,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            scheduled=tuple(zip(plan.request_ids, np.diff(plan.cu_seqlens_q).tolist(), strict=True)),
            not_scheduled=dict(scheduler.not_scheduled),
            waiting_for=scheduler.waiting_for,
            free_blocks=scheduler.blocks.num_free,
            cached_blocks=scheduler.blocks.num_cached,
            hit_tokens=scheduler.pages.hit_tokens,
            preemptions=scheduler.preemptions,
        )

    @property
    def seconds(self) -> float:
        return self.plan_s + self.stage_s + self.forward_s + self.sample_s + self.commit_s

    def _repr_html_(self) -> str:
        return records_table([self])


def records_table(records: Iterable[StepRecord]) -> str:
    """An HTML table, a row a step."""
    head = "step|tokens|sequences|decodes|sampled|rectangle|pages|cached|hits|running|waiting|for|"
    head += "preemptions|plan ms|stage|forward|sample|commit"
    rows = []
    for r in records:
        cells: list[object] = [
            r.step, r.num_tokens, r.num_seqs, r.num_decodes, r.num_sampled, r.padded_tokens,
            f"{r.blocks_used} / {r.blocks_total}", r.cached_blocks, r.hit_tokens, r.running, r.waiting,
            r.waiting_for or "", r.preemptions,
            *(f"{1e3 * t:.2f}" for t in (r.plan_s, r.stage_s, r.forward_s, r.sample_s, r.commit_s)),
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td style='text-align:right'>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head.split("|"))
    return f"<table><tr>{header}</tr>{''.join(rows)}</table>"


@dataclass
class RunStats:
    """Totals since the engine started (or since `reset`), and the latest steps."""

    steps: int = 0
    tokens: int = 0  # computed: prompt tokens and decoded ones
    sampled: int = 0  # answer tokens
    padded_tokens: int = 0  # what padding each step to a rectangle would have computed
    seconds: float = 0.0
    peak_blocks: int = 0
    blocks_total: int = 0
    history: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        self.tokens += record.num_tokens
        self.sampled += record.num_sampled
        self.padded_tokens += record.padded_tokens
        self.seconds += record.seconds
        self.peak_blocks = max(self.peak_blocks, record.blocks_used)
        self.blocks_total = record.blocks_total
        self.history.append(record)

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__()  # type: ignore[misc]

    def estimate_seconds(self, tokens: int) -> float | None:
        """How long `tokens` take at the pace of the latest RECENT steps; None before any step."""
        recent = list(islice(reversed(self.history), RECENT))
        done = sum(record.num_tokens for record in recent)
        return tokens * sum(record.seconds for record in recent) / done if done else None

    @property
    def padding_saved(self) -> int:
        """Tokens that rectangles would have computed beyond the real ones."""
        return self.padded_tokens - self.tokens
