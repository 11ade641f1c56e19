"""A workload run in real time against an engine: requests come when the workload says, tokens are timed.

Knows an engine's door and its sinks. Refuses to know what is behind them, and to judge the times.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from sharp.engine import Engine
from sharp.latencies import Spread, TokenClock
from sharp.live import Sink
from sharp.request import QueueFull, Request, RequestOutput, RequestTooLarge, SamplingParams
from sharp.workloads import Arrival

STALL_LIMIT_S = 300.0  # no token for so long: the run has failed


@dataclass(frozen=True)
class Load:
    """What a run came to, from the first arrival on (standing streams run by then).

    itl: of all answers after that moment; ttft: of the workload's requests, by their place in it; answers:
    token ids by place, standing streams at -1, -2 and so on, those that follow them after that; tokens:
    computed in all, prompts included; times: by place, seconds from a request's arrival to each of its
    tokens, of those of the workload that finished.
    """

    seconds: float
    itl: Spread
    ttft: dict[int, float]
    answers: dict[int, tuple[int, ...]]
    tokens: int
    answer_tokens: int
    steps: int
    refused: int
    unfinished: int
    times: dict[int, array[float]] = field(default_factory=dict, repr=False)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def ttft_of(self, places: Sequence[int] | None = None) -> Spread:
        """Of all requests of the workload that had a token, or of those at these places."""
        chosen = self.ttft if places is None else [place for place in places if place in self.ttft]
        return Spread.of([self.ttft[place] for place in chosen])


class _Listener:
    """The sink of all requests. It is told of each step's tokens on the engine's thread and only writes down
    when that was: what it means is counted by settle(), when somebody asks."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.clock = TokenClock()
        self.started: set[str] = set()  # ids: they are places as text
        self.finished: set[str] = set()
        self.answers: dict[int, tuple[int, ...]] = {}
        self.arrived: dict[int, float] = {}
        self.times: dict[int, array[float]] = {}  # 8 bytes a token
        self.error: BaseException | None = None
        self.standing = 0  # streams that begin again when all have ended,
        self.over: set[int] = set()  # those that have
        self.again: Callable[[], None] | None = None  # and what begins them
        self._heard: list[tuple[float, list[str]]] = []  # tokens; or the end of one, at a time below 0

    def arrive(self, place: int, now: float) -> None:
        with self.changed:
            self.clock.arrive(place, now)
            self.arrived[place], self.times[place] = now, array("d")

    def progress(self, names: list[str]) -> None:
        """A token of each."""
        now = time.perf_counter()
        with self.changed:
            self._heard.append((now, names))
            if not self.started.issuperset(names):  # not at every token: it wakes a thread
                self.started.update(names)
                self.changed.notify_all()

    def put(self, output: RequestOutput | BaseException) -> None:
        """The end of one, or of all."""
        with self.changed:
            if isinstance(output, BaseException):
                self.error = output
            else:
                name, place = output.request_id, int(output.request_id)
                self.answers[place] = output.outputs[0].token_ids
                self.finished.add(name)
                self._heard.append((-1.0, [name]))
                if place < 0:
                    self.over.add(place)
            self.changed.notify_all()

    def settle(self) -> None:
        """Count what was heard. The caller holds `changed`."""
        for now, names in self._heard:
            for place in map(int, names):
                if now < 0:
                    self.clock.end(place)
                else:
                    self.clock.token(place, now)
                    self.times[place].append(now - self.arrived[place])
        self._heard.clear()

    def wait_for(self, places: Collection[int], among: str, until: float | None = None) -> bool:
        """Wait until all `places` are among the started or finished ones; False if `until` comes first.
        Meanwhile `again` is called when all standing streams have ended. Raises the engine's error, and
        TimeoutError if nothing moves for STALL_LIMIT_S."""
        names = set(map(str, places))
        while True:
            with self.changed:
                if self.error is not None:
                    raise self.error
                if names <= getattr(self, among):
                    return True
                over = 0 < self.standing == len(self.over)
                if over:
                    self.over.clear()
                else:
                    left = STALL_LIMIT_S if until is None else until - time.perf_counter()
                    if left <= 0:
                        return False
                    if not self.changed.wait(left) and until is None:
                        raise TimeoutError(f"no token in {STALL_LIMIT_S:.0f} s")
            if over and self.again is not None:
                self.again()  # not under the lock, which the engine's thread takes under its own


def run_load(
    engine: Engine,
    workload: Sequence[Arrival],
    *,
    standing: Sequence[Arrival] = (),
    again: bool = False,
    prompts: Sequence[list[int]] | None = None,
    duration: float | None = None,
    seed: int = 0,
) -> Load:
    """Run a workload (by time of arrival) in real time.

    prompts: token ids of the workload's requests, by place; None: random ids, the same for a seed.
    standing: requests that are started first; the workload's time begins when each of them has a token.
    again: whether they begin anew, with the same prompts, whenever all of them have ended: all at once, so
    that their one-token prompts (the prefix cache has the rest) are in few steps.
    duration: seconds after which all that is unfinished is aborted; None: run to the end.
    Raises the engine's error if it dies.
    """
    listener = _Listener()
    vocab_size = engine.model.config.vocab_size

    def request(place: int, arrival: Arrival) -> Request:
        if prompts is not None and place >= 0:
            ids = prompts[place]
        else:
            stream = place if place >= 0 else -1 - (-1 - place) % len(standing)
            rng = np.random.default_rng([seed, stream + 2**20])
            ids = rng.integers(0, vocab_size, arrival.prompt_tokens).tolist()
        params = SamplingParams(max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True)
        return engine.make_request(ids, params, str(place), arrival.priority)

    def send(one: Request) -> None:
        engine.submit(one, cast(Sink, listener), final_only=True, progress=listener.progress)

    requests: list[tuple[int, Arrival, Any]] = []
    refused = 0
    for place, arrival in enumerate(workload):  # made ahead: drawing thousands of ids takes time
        try:
            requests.append((place, arrival, request(place, arrival)))
        except RequestTooLarge:
            refused += 1
    background = {-1 - i: request(-1 - i, arrival) for i, arrival in enumerate(standing)}
    engine.start()
    for place, one in background.items():
        listener.arrive(place, time.perf_counter())
        send(one)
    listener.wait_for(set(background), "started")

    streams = len(standing)
    ready: list[tuple[int, Request]] = []  # the streams' next requests, made ahead

    def make_ready() -> None:
        first = min(background) - 1
        ready.extend((first - i, request(first - i, arrival)) for i, arrival in enumerate(standing))

    def begin_again() -> None:
        for place, one in ready:
            background[place] = one
            listener.arrive(place, time.perf_counter())
            send(one)
        ready.clear()
        make_ready()

    if again and standing:
        make_ready()
        with listener.changed:
            listener.standing, listener.again = streams, begin_again
    with listener.changed:
        listener.settle()
        before = listener.clock.tokens
        listener.clock.forget_gaps()
    tokens, steps = engine.stats.tokens, engine.stats.steps
    start = time.perf_counter()
    end = None if duration is None else start + duration
    sent: set[int] = set()
    for place, arrival, one in requests:
        due = start + arrival.arrival_s
        if end is not None and due >= end:
            break
        if due > time.perf_counter():
            listener.wait_for({len(workload)}, "finished", due)  # nobody has this place: wait until due
        listener.arrive(place, due)
        try:
            send(one)
            sent.add(place)
        except QueueFull:
            refused += 1
    waited_for = sent if end is None else sent | set(background) | {len(workload)}
    if again:
        waited_for = waited_for | {len(workload)}  # nobody has this place: wait until the end
    listener.wait_for(waited_for, "finished", end)
    seconds = time.perf_counter() - start
    tokens, steps = engine.stats.tokens - tokens, engine.stats.steps - steps
    with listener.changed:
        listener.settle()
        finished = set(map(int, listener.finished))
        itl, answered = listener.clock.itl, listener.clock.tokens - before
        ttft = {int(str(p)): s for p, s in listener.clock.ttft.items() if int(str(p)) >= 0}
        unfinished = len(sent - finished)
        times = {place: listener.times[place] for place in sorted(sent & finished)}
    for place in (sent | set(background)) - finished:
        engine.abort(str(place))
    return Load(
        seconds, itl, ttft, dict(listener.answers), tokens, answered, steps, refused, unfinished, times
    )
