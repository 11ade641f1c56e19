"""EventLog: what went into the scheduler and what came out, in order, so that a run can be planned again.

Knows events and their form on disk (JSON lines, the first a header). Refuses to influence anything, and to
plan (replay.py does). It holds the latest LOG_BYTES of events; what was dropped is counted in the header.

A log holds the token ids of prompts and answers: pages with equal contents are shared, so plans depend on
them.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sharp.plan import BatchPlan, SampleOutput
from sharp.request import Request
from sharp.scheduler import Scheduler
from sharp.trace import StepRecord

VERSION = 2  # 1 had other times and one step in flight
LOG_BYTES = 32 << 20  # of events held, roughly: a busy engine's last quarter of an hour or so
EVENT_BYTES, SEQUENCE_BYTES, TOKEN_BYTES = 600, 24, 4  # what an event and its parts are counted as
# Of a StepRecord, beside its commit: what people look for, and the times that a policy was told.
TIMES = ("plan_s", "launch_s", "wait_s", "commit_s", "gpu_s", "seconds")
STATE = (
    "num_tokens", "num_decodes", "running", "waiting", "waiting_for", "not_scheduled", "blocks_used",
    "blocks_total", "free_blocks", "cached_blocks", "hit_tokens", "preemptions",
)  # fmt: skip


def checksum(plan: BatchPlan) -> int:
    """32 bits of all that a plan says of ids, pages, slots, positions, rows and copies."""
    value = 0
    for name in ("token_ids", "block_table", "slot_mapping", "positions", "cu_seqlens_q", "logits_rows",
                 "page_copies"):  # fmt: skip
        array = getattr(plan, name)
        value = zlib.crc32(array if array.flags.c_contiguous else array.tobytes(), value)
    return value


def planned(plan: BatchPlan) -> dict[str, Any]:
    """A plan as an event: who gets how many tokens, and the checksum of the rest."""
    return {
        "event": "plan",
        "step": plan.step,
        "scheduled": (plan.request_ids, plan.counts),
        "checksum": checksum(plan),
    }


class EventLog:
    """Events of one engine, in order. Its caller holds the engine's lock."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.dropped = 0
        self._scheduler = scheduler
        self._events: deque[tuple[int, dict[str, Any]]] = deque()  # (bytes, event)
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._events)

    def _add(self, event: dict[str, Any], extra_bytes: int = 0) -> None:
        size = EVENT_BYTES + extra_bytes
        self._events.append((size, event))
        self._bytes += size
        while self._bytes > LOG_BYTES:
            self._bytes -= self._events.popleft()[0]
            self.dropped += 1

    def arrive(self, request: Request) -> None:
        """A request was queued."""
        event = {
            "event": "arrive",
            "id": request.request_id,
            "prompt": request.prompt_array,
            "params": request.params,
            "seed": request.seed,
            "priority": request.priority,
        }
        self._add(event, TOKEN_BYTES * len(request.prompt_token_ids))

    def end(self, request: Request, reason: str) -> None:
        """A request was ended from outside: "abort", "timeout", or "error" of its step."""
        self._add({"event": "end", "id": request.request_id, "reason": reason})

    def plan(self, plan: BatchPlan) -> None:
        self._add(planned(plan), SEQUENCE_BYTES * plan.num_seqs)

    def plan_nothing(self) -> None:
        """A plan of nothing, which all the same preempted or admitted a request."""
        self._add({"event": "nothing"})

    def rollback(self) -> None:
        """The newest plan in flight did not happen."""
        self._add({"event": "rollback"})

    def commit(
        self, plan: BatchPlan, sampled: SampleOutput, stopped: Sequence[tuple[str, str]], record: StepRecord
    ) -> None:
        """The oldest plan in flight happened. stopped: (id, stop string) of answers that their text ended, in
        order."""
        event = {"event": "commit", "sampled": sampled.token_ids, "stopped": stopped, "record": record}
        self._add(event, TOKEN_BYTES * len(sampled.token_ids))

    def header(self) -> dict[str, Any]:
        """What a scheduler is made of."""
        scheduler = self._scheduler
        config = replace(scheduler.config, scheduling_policy="fcfs", target_itl_ms=None)
        return {
            "sharp_log": VERSION,
            "dropped": self.dropped,
            "config": msgspec.to_builtins(config),
            "policy": {"name": scheduler.policy.name, "options": scheduler.policy.options()},
            "num_blocks": scheduler.blocks.num_blocks,
            "max_model_len": scheduler.max_model_len,
            "eos_token_ids": sorted(scheduler.eos_token_ids),
        }

    def lines(self) -> list[bytes]:
        """The log as JSON lines."""
        events = [self.header(), *(_written(event) for _, event in self._events)]
        return [msgspec.json.encode(event, enc_hook=_plain) for event in events]

    def save(self, path: str | Path) -> None:
        """Write the log to a file, whole or not at all. Raises OSError where that cannot be done."""
        from kernels_numba.files import write_whole  # here: an engine that saves nothing needs no kernels

        write_whole(Path(path), b"".join(line + b"\n" for line in self.lines()))


def _written(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the file has it: parameters with the seed that was chosen, a record picked apart. Here, and
    not where an engine waits for it."""
    if event["event"] == "arrive":
        rest = {name: value for name, value in event.items() if name != "seed"}
        return {**rest, "params": replace(event["params"], seed=event["seed"])}
    if event["event"] != "commit":
        return event
    record: StepRecord = event["record"]
    return {
        "event": "commit",
        "step": record.step,
        "sampled": event["sampled"],
        "stopped": event["stopped"],
        "times": {name: getattr(record, name) for name in TIMES},
        **{name: getattr(record, name) for name in STATE},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into a log")
