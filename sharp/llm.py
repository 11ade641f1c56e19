"""LLM: the front door. Load a model, generate, stream, chat; any number of threads at once.

Drives an Engine on its background thread and waits on sinks, so that a Ctrl-C or a dropped iterator ends the
caller's requests and nobody else's. Refuses to know steps, pages and devices.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.latency_target import LatencyTarget, with_step_times
from sharp.live import Sink
from sharp.request import (
    EngineClosed,
    EngineDead,
    QueueFull,
    Request,
    RequestOutput,
    RequestTooLarge,
    SamplingParams,
)

POLL_SECONDS = 0.2  # how often a waiting caller looks whether the engine still lives

Prompt = str | Sequence[int]
Message = Mapping[str, str]


class LLM:
    """A model and its engine. `model`: a GGUF file, an HF directory, a pulled name, or (for tests) a model
    object.

    device: "auto", "cuda" or "cpu"; dtype: "auto", "float32" or "bfloat16"; rungs: op name -> rung name, to
    force a kernel; further options are EngineConfig's. Raises ValueError or TypeError for options out of
    range, ModelFileError for files, RuntimeError for a device that cannot be had, MemoryError for a model
    that does not fit.
    """

    def __init__(
        self,
        model: str | Path | Any,
        *,
        device: str = "auto",
        dtype: str = "auto",
        rungs: Mapping[str, str] | None = None,
        tokenizer: Any = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        config = EngineConfig(device=device, dtype=dtype, rungs={} if rungs is None else rungs, **options)
        predictor, found = None, "the model was not opened from a file"
        if isinstance(model, (str, Path)):
            from sharp.model import Model

            path, model = model, Model.load(model, config, progress=progress)
            model.capture(progress)
            if config.scheduling_policy == LatencyTarget.name:
                from sharp.probe_cache import kept_predictor

                predictor, found = kept_predictor(path, model.device, config)
        elif not hasattr(model, "launch"):
            raise TypeError(f"model must be a path or the name of a model, not {model!r}")
        if config.scheduling_policy == LatencyTarget.name:
            config = with_step_times(config, predictor, found)
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        self.config = config
        self.engine = Engine(model, self.tokenizer, config)
        self.engine.start()
        # An LLM that is dropped, or still open when Python exits, ends its thread and frees the model.
        weakref.finalize(self, self.engine.close)

    @property
    def device_name(self) -> str:
        """The device and dtype that were taken, for people."""
        return str(getattr(self.model, "device_name", type(self.model).__name__))

    # Text in, text out --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers to all prompts, in their order. A prompt is text (as it is, no template) or token ids.

        One SamplingParams and one priority (lower goes first, see Engine.make_request) for all or one a
        prompt. Raises at the door, naming the prompt's index, before
        anything is queued; raises StepFailed if a step of one of them fails, and the engine's error if it
        dies. Such an error or a Ctrl-C ends all requests of this call; StepFailed and Ctrl-C leave the engine
        usable.

        Only the last answer's end counts here, so of one priority those that may take the most tokens start
        first (longest processing time first, Graham 1969): short answers then fill the end instead of a few
        long ones. No answer depends on it.
        """
        requests = self._requests(prompts, sampling_params, priority)
        finished: dict[str, RequestOutput] = {}
        with _progress_bar(len(requests), use_tqdm) as bar:
            for output in self._run(sorted(requests, key=longest_first), final_only=True):
                finished[output.request_id] = output
                bar.update()
        return [finished[request.request_id] for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[RequestOutput]:
        """The growing answers of all prompts as they come: each output holds the whole text so far.

        request_id is "…-0" for the first prompt, "…-1" for the second and so on (see `prompt_index`). The
        prompts are checked and queued at once; closing the iterator ends what is unfinished.
        """
        requests = self._requests(prompts, sampling_params, priority)
        return self._run(requests, final_only=False)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Like generate, for one conversation or a list of them: [{"role": ..., "content": ...}, ...]."""
        return self.generate(self._render(messages), sampling_params, priority=priority, use_tqdm=use_tqdm)

    def chat_stream(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[RequestOutput]:
        """Like stream, for one conversation or a list of them."""
        return self.stream(self._render(messages), sampling_params, priority=priority)

    def abort(self, request_id: str) -> bool:
        """End a request; its caller gets what there is, with finish_reason "abort"."""
        return self.engine.abort(request_id)

    # Inside -------------------------------------------------------------------------------------------

    def _render(self, messages: Any) -> list[list[int]]:
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(
                "messages must be a non-empty list of {'role', 'content'} or a list of such lists"
            )
        talks = [messages] if isinstance(messages[0], Mapping) else messages
        # The template writes the special tokens itself, a second bos would be one too many.
        return [
            self.tokenizer.encode(self.tokenizer.apply_chat_template(talk), add_special_tokens=False)
            for talk in talks
        ]

    def _requests(self, prompts: Any, params: Any, priority: Any = 0) -> list[Request]:
        self.engine.raise_if_over()
        if isinstance(prompts, (str, bytes)):
            prompts = [prompts]
        elif not isinstance(prompts, (list, tuple, np.ndarray)) or getattr(prompts, "ndim", 1) < 1:
            raise TypeError(
                f"prompts must be text, token ids or a list of them, not {type(prompts).__name__}"
            )
        elif len(prompts) and isinstance(prompts[0], (int, np.integer)):
            prompts = [prompts]
        if params is None or isinstance(params, SamplingParams):
            per_prompt = [params] * len(prompts)
        elif isinstance(params, (list, tuple)):
            per_prompt = list(params)
        else:
            raise TypeError(
                f"sampling_params must be SamplingParams or a list of them, not {type(params).__name__}"
            )
        if len(per_prompt) != len(prompts):
            raise ValueError(f"{len(per_prompt)} sampling parameters for {len(prompts)} prompts")
        priorities = list(priority) if isinstance(priority, (list, tuple)) else [priority] * len(prompts)
        if len(priorities) != len(prompts):
            raise ValueError(f"{len(priorities)} priorities for {len(prompts)} prompts")
        group = f"{threading.get_ident():x}-{next(_GROUPS)}"
        requests = []
        for index, (prompt, own, rank) in enumerate(zip(prompts, per_prompt, priorities, strict=True)):
            try:
                requests.append(self.engine.make_request(prompt, own, f"{group}-{index}", rank))
            except (ValueError, TypeError) as error:
                if len(prompts) == 1:
                    raise
                # A subclass may want more than a message (UnicodeEncodeError).
                kind = next(k for k in (RequestTooLarge, ValueError, TypeError) if isinstance(error, k))
                raise kind(f"prompt {index}: {error}") from error
        return requests

    def _run(self, requests: list[Request], *, final_only: bool) -> _Outputs:
        outputs = _Outputs(self, requests, final_only)
        try:
            outputs.feed()
        except BaseException:
            outputs.close()
            raise
        return outputs

    def close(self) -> None:
        """End the engine and free the model; callers that still wait get EngineClosed. May be called
        twice."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Outputs(Iterator[RequestOutput]):
    """The outputs of one call's requests as they come. Ends its requests when it is closed or dropped.

    Queues what has room and the rest as the queue empties.
    """

    def __init__(self, llm: LLM, requests: list[Request], final_only: bool) -> None:
        self._llm = llm  # a dropped LLM ends its engine: not before this is done
        self._engine, self._final_only = llm.engine, final_only
        self._pending = deque(requests)
        self._in_flight: set[str] = set()
        self._sink: Sink = SimpleQueue()

    def feed(self) -> None:
        """Queue pending requests until the queue is full. Raises EngineDead or EngineClosed."""
        while self._pending:
            request = self._pending[0]
            self._in_flight.add(request.request_id)  # first, so that a Ctrl-C in between finds it here
            try:
                self._engine.submit(request, self._sink, final_only=self._final_only)
            except QueueFull:
                self._in_flight.discard(request.request_id)
                return
            self._pending.popleft()

    def __iter__(self) -> _Outputs:
        return self

    def __next__(self) -> RequestOutput:
        try:
            return self._next()
        except BaseException:  # the end, a Ctrl-C, or the engine's error
            self.close()
            raise

    def _next(self) -> RequestOutput:
        while self._pending or self._in_flight:
            over = not self._engine.alive
            output: RequestOutput | BaseException | None
            try:
                output = self._sink.get(timeout=0 if over else POLL_SECONDS)
            except Empty:
                output = self._engine.error if over else None
                if over and output is None:
                    self._engine.raise_if_over()
            # These two would end the caller's loop in silence.
            if isinstance(output, (StopIteration, GeneratorExit)):
                raise EngineDead(f"the engine died of {output!r}") from output
            if isinstance(output, BaseException):
                raise output
            if output is not None and output.finished:
                self._in_flight.discard(output.request_id)
            if output is None or output.finished:
                with suppress(EngineDead, EngineClosed):  # the next round raises the error itself
                    self.feed()
            if output is not None:
                return output
        raise StopIteration

    def close(self) -> None:
        """End what is unfinished."""
        self._pending.clear()
        for request_id in list(self._in_flight):
            self._engine.abort(request_id)
        self._in_flight.clear()

    def __del__(self) -> None:
        self._engine.abort_soon(self._in_flight)  # the garbage collector's moment is no moment for a lock


def longest_first(request: Request) -> tuple[int, int]:
    """Sorts by priority, then by how many tokens an answer may have, the most first."""
    return request.priority, -request.params.max_tokens


def prompt_index(output: RequestOutput) -> int:
    """Which of the prompts of its call an output of stream() or chat_stream() belongs to."""
    return int(output.request_id.rsplit("-", 1)[1])


_GROUPS = itertools.count()


def _progress_bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="generating", unit="request", disable=not shown)
