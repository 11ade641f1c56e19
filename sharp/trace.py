"""What happened in each step, for people: frozen records, a bounded history, totals.

Knows numbers only; refuses to influence anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from sharp.plan import BatchPlan
from sharp.scheduler import Scheduler

HISTORY = 4096  # steps kept
RECENT = 64  # steps that an estimate looks back on: seconds of a busy engine


@dataclass
class Phases:
    """Seconds of a step by the host's clock, as they become known; gpu_s by the device's, if it tells."""

    plan_s: float = 0.0
    launch_s: float = 0.0  # queueing it; where the host computes (numpy, the simulator), the computation
    wait_s: float = 0.0  # the host waiting for the device
    commit_s: float = 0.0
    gpu_s: float | None = None
    seconds: float = 0.0  # what it took: see StepRecord


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):  # made in each step: see request.py
    """One step: what it computed, how long it took, and what was in use after it.

    seconds: until its tokens were there, from when its planning began or, if that is later, from when those
    of the step before were there. With overlap, planning and launching fall into the time of the step before.
    The host's share is host_s, the device's gpu_s.
    """

    step: int
    plan_s: float
    launch_s: float  # queueing it; where the host computes (numpy, the simulator), the computation
    wait_s: float  # the host waiting for the device
    commit_s: float
    gpu_s: float | None  # from its start to its end on the device; None where that is not measured
    seconds: float
    num_tokens: int
    num_seqs: int
    num_decodes: int
    num_sampled: int  # tokens that became part of an answer
    padded_tokens: int  # what a rectangle of this step's sequences would have computed
    blocks_used: int
    blocks_total: int
    running: int
    waiting: int  # the queue's depth
    request_ids: tuple[str, ...]  # who,
    counts: tuple[int, ...]  # and how many tokens of each
    not_scheduled: dict[str, str]  # why not: running or preempted requests without a token, by id
    waiting_for: str | None  # what the queue waits for: "pages", "token budget", "max_num_seqs", "preemption"
    free_blocks: int
    cached_blocks: int  # that nobody uses, kept for their content: free + used + cached = total
    hit_tokens: int  # found in the prefix cache instead of computed, since the start
    preemptions: int  # since the start

    @classmethod
    def of(
        cls,
        plan: BatchPlan,
        phases: Phases,
        scheduler: Scheduler,
        *,
        blocks_used: int,
        num_sampled: int,
        not_scheduled: dict[str, str],
        waiting_for: str | None,
    ) -> StepRecord:
        """The record of a step that was just committed. blocks_used: before those that ended gave theirs
        back; not_scheduled, waiting_for: the scheduler's when it was planned."""
        counts: list[int] = plan.counts.tolist()
        return cls(
            step=plan.step,
            **vars(phases),
            num_tokens=plan.num_tokens,
            num_seqs=plan.num_seqs,
            num_decodes=plan.num_decodes,
            num_sampled=num_sampled,
            padded_tokens=len(counts) * max(counts),
            blocks_used=blocks_used,
            blocks_total=scheduler.blocks.num_blocks,
            running=len(scheduler.table),
            waiting=len(scheduler.waiting),
            request_ids=plan.request_ids,
            counts=tuple(counts),
            not_scheduled=not_scheduled,
            waiting_for=waiting_for,
            free_blocks=scheduler.blocks.num_free,
            cached_blocks=scheduler.blocks.num_cached,
            hit_tokens=scheduler.pages.hit_tokens,
            preemptions=scheduler.preemptions,
        )

    @property
    def scheduled(self) -> tuple[tuple[str, int], ...]:
        """Who: request id and tokens."""
        return tuple(zip(self.request_ids, self.counts, strict=True))

    @property
    def host_s(self) -> float:
        """Seconds that the host worked for this step; on the host itself, computing is among them."""
        return self.plan_s + self.launch_s + self.commit_s

    def _repr_html_(self) -> str:
        return records_table([self])


def records_table(records: Iterable[StepRecord]) -> str:
    """An HTML table, a row a step."""
    head = "step|tokens|sequences|decodes|sampled|rectangle|pages|cached|hits|running|waiting|for|"
    head += "preemptions|ms|plan|launch|wait|commit|gpu"
    rows = []
    for r in records:
        cells: list[object] = [
            r.step, r.num_tokens, r.num_seqs, r.num_decodes, r.num_sampled, r.padded_tokens,
            f"{r.blocks_used} / {r.blocks_total}", r.cached_blocks, r.hit_tokens, r.running, r.waiting,
            r.waiting_for or "", r.preemptions,
            *(f"{1e3 * t:.2f}" for t in (r.seconds, r.plan_s, r.launch_s, r.wait_s, r.commit_s)),
            "" if r.gpu_s is None else f"{1e3 * r.gpu_s:.2f}",
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
