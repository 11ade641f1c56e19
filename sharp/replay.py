"""Replay: the scheduler run again from a log, without a model; every plan is held against the logged one.

Knows the log's form (event_log.py) and the scheduler. Refuses to run a model: sampled ids are the log's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.door import Door
from sharp.event_log import TIMES, VERSION, planned
from sharp.latency_target import LatencyTarget
from sharp.plan import BatchPlan, SampleOutput
from sharp.policies import POLICIES, SchedulingPolicy, ShortestPromptFirst, make_policy
from sharp.predictor import HostTime, StepPredictor
from sharp.request import Request, SamplingParams, Status
from sharp.scheduler import Scheduler

ANY_TOKEN = 2**31 - 1  # token ids under it are taken: the vocabulary was checked when the log was written


class ReplayError(ValueError):
    """A log that cannot be run again, or gave another plan; in one line: file, line, and what was met."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:1000]))


class Header(msgspec.Struct):
    sharp_log: int
    dropped: int
    config: dict[str, Any]
    policy: dict[str, Any]
    num_blocks: int
    max_model_len: int
    eos_token_ids: list[int]


class Arrive(msgspec.Struct, tag_field="event", tag="arrive"):
    id: str
    prompt: list[int]
    params: dict[str, Any]
    priority: int


class End(msgspec.Struct, tag_field="event", tag="end"):
    id: str
    reason: Literal["abort", "timeout", "error"]


class Plan(msgspec.Struct, tag_field="event", tag="plan"):
    step: int
    scheduled: tuple[list[str], list[int]]
    checksum: int


class Nothing(msgspec.Struct, tag_field="event", tag="nothing"):
    """A plan() of nothing, while a step was in flight, that preempted or admitted somebody."""


class Rollback(msgspec.Struct, tag_field="event", tag="rollback"):
    pass


class Commit(msgspec.Struct, tag_field="event", tag="commit"):
    step: int
    sampled: list[int]
    stopped: list[tuple[str, str]]
    times: dict[str, float | None]


Event = Arrive | End | Plan | Nothing | Rollback | Commit


@dataclass(frozen=True)
class Replayed:
    """steps: plans that were made again, each the same as the logged one."""

    steps: int
    arrivals: int
    preemptions: int
    scheduler: Scheduler


def read_log(path: str | Path) -> tuple[Header, list[Event]]:
    """The events of a file that EventLog.save wrote. Raises ReplayError naming file and line."""
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ReplayError(f"cannot read {path}: {error.strerror or error}") from None
    if not lines:
        raise ReplayError(f"{path} is empty; a log begins with its header")
    header = _decode(path, 1, lines[0], msgspec.json.Decoder(Header).decode)
    if header.sharp_log != VERSION:
        raise ReplayError(f"{path}:1: a log of version {header.sharp_log}; this reads version {VERSION}")
    decode = msgspec.json.Decoder(Event).decode
    events = [_decode(path, number, line, decode) for number, line in enumerate(lines[1:], 2)]
    return header, events


def _decode(path: Path, number: int, line: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(line)
    except (ValueError, TypeError, RecursionError) as error:
        raise ReplayError(f"{path}:{number}: damaged: {error}") from None


def replay(path: str | Path, policy: SchedulingPolicy | None = None) -> Replayed:
    """Plan a logged run again and compare plan by plan.

    policy: a fresh instance, for runs of a policy of one's own. Raises ReplayError for a damaged or shortened
    log, for a policy that does not ship, and for the first plan that is another.
    """
    header, events = read_log(path)
    if header.dropped:
        raise ReplayError(
            f"{path}: its first {header.dropped} events were dropped (a log keeps the latest ones), so it "
            "cannot be run again from the start"
        )
    try:
        rebuilt = rebuild_policy(header.policy) if policy is None else policy
        config = EngineConfig(**{**header.config, "scheduling_policy": rebuilt})
        scheduler = Scheduler(config, header.num_blocks, header.max_model_len, header.eos_token_ids)
    except (ValueError, TypeError, KeyError) as error:
        raise ReplayError(f"{path}:1: {error}") from None
    run = _Run(scheduler)
    for number, event in enumerate(events, 2):
        try:
            run.take(event)
        except ReplayError as error:
            raise ReplayError(f"{path}:{number}: {error}") from None
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ReplayError(f"{path}:{number}: does not fit what came before: {error}") from None
    return Replayed(run.steps, run.arrivals, scheduler.preemptions, scheduler)


def rebuild_policy(described: dict[str, Any]) -> SchedulingPolicy:
    """A policy of the log's header. Raises ReplayError for one that does not ship."""
    name, options = described["name"], described.get("options", {})
    if name == LatencyTarget.name:
        predictor = None
        if "prefill" in options:
            prefill, decode = (StepCurve.of(tuple(p) for p in options[k]) for k in ("prefill", "decode"))
            predictor = StepPredictor(
                prefill, decode, HostTime(*options["host_s"]), overlap=options["overlap"]
            )
        return LatencyTarget(options["target_itl_ms"], predictor)
    if name == ShortestPromptFirst.name:
        return ShortestPromptFirst(**options)
    if name not in POLICIES:
        raise ReplayError(
            f"policy {name!r} does not ship with sharp: pass a fresh instance, replay(path, policy)"
        )
    return make_policy(name)


class _Run:
    """The state of a replay."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.steps, self.arrivals = scheduler, 0, 0
        self._door = Door(None, ANY_TOKEN, 0)
        self._requests: dict[str, Request] = {}

    def take(self, event: Event) -> None:
        match event:
            case Arrive():
                self._arrive(event)
            case End():
                self._end(self._request(event.id), event.reason)
            case Plan():
                self._compare(event)
            case Nothing():
                if (plan := self.scheduler.plan()) is not None:
                    raise ReplayError(f"the log has nothing to compute, the scheduler plans step {plan.step}")
            case Rollback():
                self.scheduler.rollback(self._in_flight(-1))
            case Commit():
                self._commit(event)

    def _arrive(self, event: Arrive) -> None:
        request = self._door.make_request(
            event.prompt, SamplingParams(**event.params), event.id, event.priority
        )
        for one in (request, *request.samples):
            if one.request_id in self._requests:
                raise ReplayError(f"request id {one.request_id!r} is in use")
            self._requests[one.request_id] = one
        self.scheduler.add(request)
        self.arrivals += 1

    def _request(self, name: str) -> Request:
        if name not in self._requests:
            raise ReplayError(f"no unfinished request {name!r}")
        return self._requests[name]

    def _end(self, request: Request, reason: str) -> None:
        names = [one.request_id for one in (request, *request.samples)]
        if reason == "error":
            self.scheduler.fail(request)
        else:
            self.scheduler.finish(request, reason)
        for name in names:
            del self._requests[name]

    def _in_flight(self, which: int) -> BatchPlan:
        """The oldest plan in flight (0) or the newest (-1)."""
        if not self.scheduler.in_flight:
            raise ReplayError("no plan is in flight")
        return self.scheduler.in_flight[which]

    def _compare(self, logged: Plan) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            raise ReplayError(f"the log has a plan of step {logged.step}, the scheduler plans nothing")
        again = planned(plan)
        names, counts = again["scheduled"]
        ours = (list(names), counts.tolist())
        if (again["step"], ours) != (logged.step, logged.scheduled):
            raise ReplayError(
                f"step {logged.step}: the log has {_who(*logged.scheduled)}, the scheduler plans step "
                f"{again['step']}: {_who(*ours)}"
            )
        if again["checksum"] != logged.checksum:
            raise ReplayError(f"step {logged.step}: the same tokens, but other ids, pages, rows or copies")
        self.steps += 1

    def _commit(self, event: Commit) -> None:
        plan = self._in_flight(0)
        if event.step != plan.step:
            raise ReplayError(f"step {event.step} is committed, but step {plan.step} is in flight")
        missing = [name for name in TIMES if name not in event.times]
        if missing:
            raise ReplayError(f"times lack {', '.join(missing)}")
        logprobs: tuple[dict[int, float] | None, ...] = tuple(
            {} if wanted >= 0 else None for wanted in plan.num_logprobs.tolist()
        )
        updated = self.scheduler.commit(plan, SampleOutput(np.array(event.sampled, np.int32), logprobs))
        for name, stop in event.stopped:
            self.scheduler.stop_on_text(self._request(name), stop)
        self._forget(r.request_id for r in updated if r.status is Status.FINISHED)
        self.scheduler.policy.observe(plan, event.times["seconds"] or 0.0)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            for sample in self._requests[name].samples:
                self._requests.pop(sample.request_id, None)
            del self._requests[name]


def _who(names: list[str], counts: list[int]) -> str:
    shown = [f"{name}: {count}" for name, count in zip(names[:6], counts[:6], strict=False)]
    return ", ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
