"""WaitingQueue: who waits, in the order that a policy gives, and who may be passed how often.

Refuses to know pages and seats: take() asks whether a request can start now.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, overload

from sharp.policies import SchedulingPolicy
from sharp.request import Request

# Requests that are looked at in a step for one that fits. It bounds the time of plan() under a long queue; a
# head may be passed max_bypass times anyway, so looking much further would find little.
LOOK_AHEAD = 32


class WaitingQueue(Sequence[Request]):
    """A sorted list of requests. max_bypass: times that others may be taken past one that does not fit."""

    def __init__(self, policy: SchedulingPolicy, max_bypass: int) -> None:
        self.policy, self.max_bypass = policy, max_bypass
        self._requests: list[Request] = []

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...

    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        return self._requests[index]

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        place = self._place(request)
        if not self._requests or self._place(self._requests[-1]) <= place:  # as of nearly all
            self._requests.append(request)
        else:
            insort(self._requests, request, key=self._place)

    def remove(self, request: Request) -> None:
        """Raises ValueError if it does not wait."""
        self._requests.remove(request)

    def take(self, starts: Callable[[Request], bool]) -> Request | None:
        """Remove and return the first request that `starts`, or None.

        One that does not may be passed by others max_bypass times; then all behind it wait for it.
        """
        for place, request in enumerate(islice(self._requests, LOOK_AHEAD)):
            if starts(request):
                for passed in self._requests[:place]:
                    passed.num_passed += 1
                del self._requests[place]
                request.num_passed = 0
                return request
            if request.num_passed >= self.max_bypass:
                break
        return None

    def _place(self, request: Request) -> tuple[Any, ...]:
        """The sort key. What was preempted goes first in its part: it was let in before."""
        fresh = request.num_preemptions == 0
        return (self.policy.part(request), fresh, self.policy.rank(request), request.arrival)

    def check(self) -> None:
        """Raise AssertionError unless the order holds, and those that wait hold nothing."""
        assert self._requests == sorted(self._requests, key=self._place), "the queue is out of order"
        for request in self._requests:
            name = request.request_id
            assert not request.block_ids, f"{name} waits, but holds pages"
            assert request.num_computed_tokens == 0, f"{name} waits, but has been computed"
            assert request.num_passed <= self.max_bypass, f"{name} was passed too often"
