"""Scheduling policies: who goes first, who gives way, how a step's tokens are shared. Four ship.

Or write your own:

    class MyPolicy(SchedulingPolicy):
        name = "mine"

        def rank(self, request):
            return request.params.max_tokens  # short answers first

    LLM(model, scheduling_policy=MyPolicy())

A policy reads requests and answers three questions; refuses to change one, to count pages and to know time.
What must hold whatever a policy says (budgets, pages, bounded bypass) is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sharp.request import Request


class SchedulingPolicy:
    """First come, first served: the base of every policy. Override what should differ."""

    name = "fcfs"
    prompts_first = False  # True: nothing decodes in a step that has any prompt to read

    def part(self, request: Request) -> int:
        """The part of the waiting queue that the request belongs to; lower parts go first."""
        return 0

    def rank(self, request: Request) -> Any:
        """Its place within its part, lowest first; ties by arrival.

        Asked when the request is queued, and again when it was preempted: then it goes to the front of its
        part, before all that never ran.
        """
        return request.arrival

    def victim(self, running: Sequence[Request]) -> Request:
        """Which of the running requests to preempt when a page is missing: the lowest priority, then the
        youngest.

        So the oldest of the highest priority is never a victim while another runs, and always gets on.
        """
        return max(running, key=lambda request: (request.priority, request.arrival))

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        """Tokens of this step for each (request, tokens it could read now), `budget` in all; in the order of
        admission.

        Asked for the prompts that run already, then for each that is admitted into what remains.
        """
        counts = []
        for _, most in prompts:
            counts.append(min(most, budget))
            budget -= counts[-1]
        return counts


class PriorityPolicy(SchedulingPolicy):
    """Lowest `priority` number first, then the order of arrival. Strict: under endless traffic of lower
    numbers the higher ones wait endlessly, as they are asked to."""

    name = "priority"

    def part(self, request: Request) -> int:
        return request.priority


class ShortestPromptFirst(SchedulingPolicy):
    """Short prompts first, also among those that are being read; long ones age, so that none waits for ever.

    A prompt of n tokens is passed by at most n / tokens_per_arrival of those that came after it.
    """

    name = "shortest-prompt-first"

    def __init__(self, tokens_per_arrival: int = 16) -> None:
        """tokens_per_arrival: how much shorter a prompt must be for each place that it jumps. Raises
        ValueError under 1."""
        if tokens_per_arrival < 1:
            raise ValueError(f"tokens_per_arrival must be at least 1, not {tokens_per_arrival}")
        self.tokens_per_arrival = tokens_per_arrival

    def rank(self, request: Request) -> int:
        return len(request.prompt_token_ids) + self.tokens_per_arrival * request.arrival

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        counts = [0] * len(prompts)
        for index in sorted(range(len(prompts)), key=lambda i: self.rank(prompts[i][0])):
            counts[index] = min(prompts[index][1], budget)
            budget -= counts[index]
        return counts


class Blocking(SchedulingPolicy):
    """Whole prompts before anybody decodes, as engines without chunked prefill do. Here for comparison: every
    arrival stalls every answer."""

    name = "blocking"
    prompts_first = True


POLICIES = {p.name: p for p in (SchedulingPolicy, PriorityPolicy, ShortestPromptFirst, Blocking)}


def make_policy(policy: str | SchedulingPolicy) -> SchedulingPolicy:
    """The policy of a name, or the given instance. Raises TypeError or ValueError naming value and choice."""
    if isinstance(policy, SchedulingPolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"scheduling_policy must be a name or a SchedulingPolicy instance, not {policy!r}")
    if policy not in POLICIES:
        raise ValueError(f"scheduling_policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    return POLICIES[policy]()


def share_out(
    policy: SchedulingPolicy, prompts: Sequence[tuple[Request, int]], budget: int
) -> list[tuple[Request, int]]:
    """What the policy gives each of (request, most tokens); those that get nothing are left out. Raises
    ValueError naming the policy if it gives more than there is."""
    if not prompts:
        return []
    counts, most = policy.share(prompts, budget), [cap for _, cap in prompts]
    fair = len(counts) == len(most) and sum(counts) <= budget
    if not fair or any(not 0 <= count <= cap for count, cap in zip(counts, most, strict=True)):
        raise ValueError(
            f"scheduling policy {policy.name!r} shares out {counts} tokens: the prompts can take {most}, "
            f"the budget is {budget}"
        )
    return [(request, count) for (request, _), count in zip(prompts, counts, strict=True) if count]
