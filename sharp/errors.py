"""The errors a caller of the engine may want to catch by name. Bad values raise ValueError or TypeError."""

from __future__ import annotations


class EngineDead(RuntimeError):
    """The engine's loop has died; `__cause__` is the error it died of. A new engine has to be built."""


class EngineClosed(RuntimeError):
    """The engine was stopped or closed while this caller waited, or before it asked."""


class RequestTooLarge(ValueError):
    """A request that can never run on this engine: its worst case needs more pages than the engine has."""

    def __init__(
        self, request_id: str, needed: int, available: int, num_tokens: int, block_size: int
    ) -> None:
        super().__init__(
            f"request {request_id!r} can never run: prompt + max_tokens is {num_tokens} tokens at worst, which "
            f"needs {needed} KV pages of {block_size} tokens; available: {available} (the limit is {available} "
            f"pages, {available * block_size} tokens). Lower max_tokens, shorten the prompt, or give the engine "
            "more pages (num_blocks, memory_limit)"
        )
        self.request_id, self.needed, self.available, self.limit = request_id, needed, available, available


class QueueFull(RuntimeError):
    """The waiting queue is at its bound; try again later or raise max_queue_len."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"the waiting queue holds {length} requests; the limit is max_queue_len = {limit}")
        self.length, self.limit = length, limit


class OutOfBlocks(RuntimeError):
    """More KV pages were asked of the allocator than are free. Admission makes this unreachable in the engine."""
