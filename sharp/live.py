"""A request that has not finished, as the engine sees it: its text so far and who wants to hear of it.

Reads a Request; refuses to change one (that is the scheduler's).
"""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue

from sharp.answer import AnswerText
from sharp.request import CompletionOutput, Request, RequestOutput, Status

Sink = SimpleQueue["RequestOutput | BaseException"]


@dataclass(eq=False)
class LiveRequest:
    """sink: where outputs go, and the engine's error if it dies; final_only: the finished output alone."""

    request: Request
    text: AnswerText
    sink: Sink | None
    final_only: bool
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

    def snapshot(self) -> RequestOutput:
        """The answer so far."""
        request = self.request
        if self.finished:
            self.text.finish()
        answer = CompletionOutput(
            index=0,
            text=self.text.visible,
            token_ids=tuple(request.output_token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=tuple(request.logprobs) if request.params.logprobs is not None else None,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=tuple(request.prompt_token_ids),
            outputs=(answer,),
            finished=self.finished,
        )
