"""What `sharp generate` shows of its outputs, as text or as JSON. Knows outputs; refuses to print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sharp.request import RequestOutput


def answers_json(outputs: Sequence[RequestOutput]) -> Iterator[dict[str, Any]]:
    """An object for each answer, in order; "index" says which one where a prompt has several."""
    for output in outputs:
        for answer in output.outputs:
            which = {"index": answer.index} if len(output.outputs) > 1 else {}
            yield {
                "prompt": output.prompt,
                "prompt_token_ids": list(output.prompt_token_ids),
                **which,
                "token_ids": list(answer.token_ids),
                "text": answer.text,
                "finish_reason": answer.finish_reason,
            }


def answers_text(outputs: Sequence[RequestOutput]) -> Iterator[str]:
    """The answers, each after its numbers where there are several: [prompt], [answer], [prompt.answer]."""
    for place, output in enumerate(outputs, 1):
        for answer in output.outputs:
            numbers = [str(place)] if len(outputs) > 1 else []
            numbers += [str(answer.index + 1)] if len(output.outputs) > 1 else []
            yield f"[{'.'.join(numbers)}] {answer.text}" if numbers else answer.text
