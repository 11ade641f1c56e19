"""How a Request is made of what a caller gives: everything is checked before anything is queued.

Knows tokenizers and vocabulary sizes; refuses to know queues and pages (see sizes.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sharp.request import Request, SamplingParams


def check_prompt(prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """The token ids of a prompt given as text or as ids. Raises TypeError or ValueError naming value and
    limit."""
    if isinstance(prompt, str):
        token_ids: list[int] = tokenizer.encode(prompt)
    elif isinstance(prompt, (list, tuple, np.ndarray)):
        token_ids = []
        for token_id in prompt:
            if isinstance(token_id, (bool, np.bool_)) or not isinstance(token_id, (int, np.integer)):
                raise TypeError(f"token ids must be whole numbers, not {token_id!r}")
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"token id {token_id} is outside [0, {vocab_size})")
            token_ids.append(int(token_id))
    else:
        raise TypeError(f"a prompt must be text or a list of token ids, not {type(prompt).__name__}")
    if not token_ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    return token_ids


def check_params(params: Any) -> SamplingParams:
    """Sampling parameters, the default ones for None; those inside have been checked when they were made."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling parameters must be SamplingParams, not {type(params).__name__}")
    return params


def check_request_id(request_id: Any) -> str | None:
    """A caller's own id for a request, or None."""
    if not isinstance(request_id, str | None):
        raise TypeError(f"a request id must be a str, not {request_id!r}")
    return request_id


def check_priority(priority: Any) -> None:
    """Raise TypeError or ValueError unless it is a whole number that fits 32 bits."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, not {priority!r}")
    if not -(2**31) <= priority < 2**31:
        raise ValueError(f"priority must be in [-2**31, 2**31), not {priority}")


def derive_seed(seed: int, order: int) -> int:
    """A 64-bit seed for the engine's `order`-th request, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, order]).generate_state(1, np.uint64)[0])


def sample_seed(seed: int, index: int) -> int:
    """The 64-bit seed of sample `index` of a request of this seed.

    Sample 0 has the request's own, as if it were alone; the others have numpy's SeedSequence(seed,
    spawn_key=(index,)), well mixed. A request of one sample with that seed gives the same answer.
    """
    if index == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0])


class Door:
    """Makes the Requests of one engine. seed: the engine's, of requests that bring none."""

    def __init__(self, tokenizer: Any, vocab_size: int, seed: int) -> None:
        self.tokenizer, self.vocab_size, self.seed = tokenizer, vocab_size, seed
        self._order: Iterator[int] = itertools.count()

    def make_request(self, prompt: Any, params: Any, request_id: Any, priority: Any) -> Request:
        """A Request that is not yet queued, with those of the other samples that n asks for: "id#1", "id#2".

        Raises TypeError or ValueError naming the value and the limit.
        """
        params = check_params(params)
        request_id = check_request_id(request_id)
        check_priority(priority)
        token_ids = check_prompt(prompt, self.tokenizer, self.vocab_size)
        order = next(self._order)  # only now: what is refused does not shift the seeds of the others
        request_id = f"request-{order}" if request_id is None else request_id
        seed = derive_seed(self.seed, order) if params.seed is None else params.seed
        samples = [
            Request(
                request_id=f"{request_id}#{index}" if index else request_id,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=token_ids,
                params=params,
                seed=sample_seed(seed, index),
                priority=priority,
                index=index,
            )
            for index in range(params.n)
        ]
        first, *first.samples = samples
        _ = first.prompt_array  # made here, where no lock is held
        for sample in first.samples:
            sample.first = first
        return first
