"""Requests that have not finished, as the engine sees them: their texts so far and who wants to hear of them.

Reads Requests; refuses to change one (that is the scheduler's), and to know steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from sharp.answer import AnswerText
from sharp.request import CompletionOutput, Request, RequestOutput, Status

Sink = SimpleQueue["RequestOutput | BaseException"]
Progress = Callable[[list[str]], object]


@dataclass(eq=False)
class Sample:
    """One of the n answers to a prompt."""

    request: Request
    text: AnswerText
    num_read: int = 0  # output tokens already in the text

    @property
    def finished(self) -> bool:
        return self.request.status is Status.FINISHED

    def read(self) -> str | None:
        """Turn new tokens into text; returns the stop string that the text has met, if it has."""
        request, token_ids = self.request, self.request.output_token_ids
        while self.num_read < len(token_ids):
            # The id that ended an answer (eos or a stop id) is no part of its text.
            ended_it = request.finish_reason == "stop" and self.num_read == len(token_ids) - 1
            if not ended_it:
                self.text.push(token_ids[self.num_read])
            self.num_read += 1
        if self.finished:
            self.text.finish()
        return self.text.stopped_by

    def snapshot(self) -> CompletionOutput:
        """The answer so far."""
        request = self.request
        if self.finished:
            self.text.finish()
        return CompletionOutput(
            index=request.index,
            text=self.text.visible,
            token_ids=tuple(request.output_token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=tuple(request.logprobs) if request.params.logprobs is not None else None,
        )


@dataclass(eq=False)
class LiveRequest:
    """A prompt and its n answers. sink: where outputs go, and the engine's error if it dies; final_only: the
    finished output alone; deadline: when it ends with "timeout", in time.monotonic()'s seconds; progress: is
    called once a step with the ids of all its requests that have new tokens, before any of their outputs."""

    samples: list[Sample]
    sink: Sink | None
    final_only: bool
    deadline: float | None = None
    progress: Progress | None = None
    _prompt_token_ids: tuple[int, ...] = ()  # made once: an output is for every token, a prompt may be long

    @property
    def request_id(self) -> str:
        return self.samples[0].request.request_id

    @property
    def finished(self) -> bool:
        # A list, which is faster than a generator: this is asked of every request in every step.
        return all([sample.request.status is Status.FINISHED for sample in self.samples])  # noqa: C419

    def unfinished(self) -> list[Request]:
        return [sample.request for sample in self.samples if not sample.finished]

    def snapshot(self) -> RequestOutput:
        """The answers so far."""
        first = self.samples[0].request
        if not self._prompt_token_ids:
            self._prompt_token_ids = tuple(first.prompt_token_ids)
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple([sample.snapshot() for sample in self.samples]),
            finished=self.finished,
            num_cached_tokens=first.num_cached_tokens,
        )


class LiveRequests:
    """All that has not finished, by the id of the request, and what callers without a sink have to fetch."""

    def __init__(self) -> None:
        self._live: dict[str, LiveRequest] = {}
        self._of: dict[str, tuple[LiveRequest, Sample]] = {}  # by the id of each sample
        self._outbox: list[RequestOutput] = []
        self._earliest = float("inf")  # no deadline is before it

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request_id: str) -> LiveRequest | None:
        return self._live.get(request_id)

    def in_use(self, request: Request) -> str | None:
        """An id of the request or of one of its samples that somebody has, or None."""
        names = (sample.request_id for sample in (request, *request.samples))
        return next((name for name in names if name in self._of), None)

    def add(self, live: LiveRequest) -> None:
        self._live[live.request_id] = live
        self._of.update((sample.request.request_id, (live, sample)) for sample in live.samples)
        if live.deadline is not None:
            self._earliest = min(self._earliest, live.deadline)

    def of(self, requests: Iterable[Request]) -> list[tuple[LiveRequest, Sample]]:
        return [self._of[request.request_id] for request in requests]

    def overdue(self, now: float) -> list[LiveRequest]:
        """What is past its deadline. Looks at all requests only when a deadline may have passed."""
        if now < self._earliest:
            return []
        timed = [live for live in self._live.values() if live.deadline is not None]
        late = [live for live in timed if live.deadline is not None and live.deadline <= now]
        rest = (live.deadline for live in timed if live.deadline is not None and live.deadline > now)
        self._earliest = min(rest, default=float("inf"))
        return late

    def tell_progress(self, moved: Sequence[LiveRequest]) -> None:
        """Tell those who want to hear of new tokens and not be handed an output for each."""
        told: dict[Progress, dict[str, None]] = {}
        for live in moved:
            if live.progress is not None:
                told.setdefault(live.progress, {})[live.request_id] = None
        for progress, names in told.items():
            progress(list(names))

    def deliver(self, moved: Iterable[LiveRequest]) -> None:
        """Hand out an output of each, once; what has finished is forgotten."""
        for live in dict.fromkeys(moved):
            finished = live.finished
            if finished:
                self._forget(live)
            if live.final_only and not finished:
                continue
            output = live.snapshot()
            if live.sink is not None:
                live.sink.put(output)
            else:
                self._outbox.append(output)

    def fail(self, ended: Iterable[LiveRequest], error: BaseException) -> None:
        """Hand `error` to those who wait for these requests, each sink once, and forget them. Who fetches
        finds their last outputs, as far as they got."""
        sinks: dict[int, Sink] = {}
        for live in ended:
            self._forget(live)
            if live.sink is not None:
                sinks[id(live.sink)] = live.sink
            else:
                self._outbox.append(live.snapshot())
        for sink in sinks.values():
            sink.put(error)

    def _forget(self, live: LiveRequest) -> None:
        del self._live[live.request_id]
        for sample in live.samples:
            del self._of[sample.request.request_id]

    def fetch(self) -> list[RequestOutput]:
        """The outputs since the last call of those without a sink."""
        outputs, self._outbox = self._outbox, []
        return outputs

    @property
    def unfetched(self) -> bool:
        return bool(self._outbox)

    def tell_all(self, error: BaseException) -> None:
        """Hand `error` to every caller that waits on a sink, each once, and forget all requests."""
        sinks = {id(live.sink): live.sink for live in self._live.values() if live.sink is not None}
        for sink in sinks.values():
            sink.put(error)
        self._live.clear()
        self._of.clear()
