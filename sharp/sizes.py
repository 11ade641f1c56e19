"""How large a request can become, in tokens and KV pages, and the refusal of what could never fit.

Arithmetic on a request and the engine's limits; refuses to know what is free or running at the moment.
"""

from __future__ import annotations

from sharp.config import EngineConfig
from sharp.request import Request, RequestTooLarge


class Sizes:
    """Worst cases under `config` with `num_blocks` pages and sequences of at most max_model_len tokens."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int) -> None:
        self.block_size, self.max_num_seqs = config.block_size, config.max_num_seqs
        self.reserve = config.admission == "reserve"
        self.num_blocks, self.max_model_len = num_blocks, max_model_len

    def worst_tokens(self, request: Request) -> int:
        """Tokens that one sample can come to hold: min(prompt + max_tokens, max_model_len)."""
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self.max_model_len)

    def pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def worst_pages(self, request: Request) -> int:
        """Pages of one sample's worst case. The last token is never stored: nothing is computed after it."""
        return max(1, self.pages(self.worst_tokens(request) - 1))

    def shared_pages(self, request: Request) -> int:
        """Whole pages of the prompt that its samples share. Each computes the last token for itself, so
        the page of that one is never among them."""
        return (len(request.prompt_token_ids) - 1) // self.block_size

    def booking(self, request: Request) -> tuple[int, int]:
        """Pages to book when it starts: its own, and those of each sample that will fork from it.

        "reserve": the worst case. "optimistic": what is known, and for a sample the page of its last token.
        """
        if not self.reserve:
            return self.pages(request.num_tokens), 1
        own = self.worst_pages(request)
        return own, own - self.shared_pages(request)

    def refuse_if_too_large(self, request: Request) -> None:
        """Raise RequestTooLarge, with needed, limit and what to change, for what could never fit."""
        length = len(request.prompt_token_ids)
        if length >= self.max_model_len:
            raise RequestTooLarge(
                f"the prompt has {length} tokens, but max_model_len {self.max_model_len} leaves "
                f"room for a prompt of {self.max_model_len - 1} and one answer token; shorten the prompt or "
                "raise max_model_len"
            )
        samples = 1 + len(request.samples)
        if samples > self.max_num_seqs:
            raise RequestTooLarge(
                f"n is {samples}, but max_num_seqs is {self.max_num_seqs}, and all samples of a prompt run "
                "at once; lower n or raise max_num_seqs"
            )
        own = self.worst_pages(request)
        needed = own + (samples - 1) * (own - self.shared_pages(request))
        if needed > self.num_blocks:
            whose = "the request" if samples == 1 else f"the request's {samples} samples together"
            raise RequestTooLarge(
                f"{whose} need{'s' if samples == 1 else ''} {needed} KV pages "
                f"({self.worst_tokens(request)} tokens{'' if samples == 1 else ' each'}), "
                f"but there are {self.num_blocks} in all; lower max_tokens{'' if samples == 1 else ' or n'}, "
                "shorten the prompt or raise memory_limit"
            )
