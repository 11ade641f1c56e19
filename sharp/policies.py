"""Scheduling policies: who goes first, who gives way, how a step's tokens are shared. Five ship, four of them
here and latency-target in a file of its own.

Or write your own:

    class MyPolicy(SchedulingPolicy):
        name = "mine"

        def rank(self, request):
            return request.params.max_tokens  # short answers first

    LLM(model, scheduling_policy=MyPolicy())

A policy reads requests and answers questions; refuses to change one and to count pages. It knows time only
from what `observe` tells. What must hold whatever a policy says (budgets, pages, bounded bypass) is the
scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sharp.request import Request

if TYPE_CHECKING:
    from sharp.plan import BatchPlan, Int32


class SchedulingPolicy:
    """First come, first served: the base of every policy. Override what should differ."""

    name = "fcfs"
    prompts_first = False  # True: nothing decodes in a step that has any prompt to read
    readers = 4  # prompts that are let in to be read side by side, though one alone would fill the steps

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

    def budget(self, contexts: Int32, prompts: Sequence[Request], most: int) -> int:
        """Prompt tokens of this step, new prompts included, at most `most`: what the step's token budget
        leaves beside the decodes, which get a token each.

        contexts: [num_decodes] the keys that each decode has in its pages. prompts: those being read.
        0 reads nothing, which is an error while nothing decodes.
        """
        return most

    def observe(self, plan: BatchPlan, seconds: float) -> None:
        """Told after each step how long it took: StepRecord.seconds. With overlap the step after it has been
        planned by then."""

    def predict(self, plan: BatchPlan) -> float | None:
        """Seconds that a step is expected to take, if the policy knows: the watchdog asks."""
        return None

    def options(self) -> dict[str, Any]:
        """What its constructor was given, as JSON can hold it: the log of a run keeps it (see replay.py)."""
        return {}

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        """Tokens of this step for each (request, tokens it could read now), `budget` in all; in the order of
        admission.

        A quarter goes to all in equal parts, so that each gets on in each step; the rest to those that have
        the least left to read, so that short prompts are not kept by long ones.
        """
        if len(prompts) == 1:
            return [min(prompts[0][1], budget)]
        part = max(1, budget // 4 // max(1, len(prompts)))
        counts = []
        for _, most in prompts:
            counts.append(min(most, part, budget))
            budget -= counts[-1]
        left = [request.num_tokens - request.num_computed_tokens for request, _ in prompts]
        return _fill(counts, prompts, budget, sorted(range(len(prompts)), key=left.__getitem__))


def _fill(
    counts: list[int], prompts: Sequence[tuple[Request, int]], budget: int, order: Sequence[int]
) -> list[int]:
    """`counts` with `budget` more tokens, as many as the first of `order` can take, then the second, ..."""
    for index in order:
        more = min(prompts[index][1] - counts[index], budget)
        counts[index] += more
        budget -= more
    return counts


class PriorityPolicy(SchedulingPolicy):
    """Lowest `priority` number first, then the order of arrival. Strict: under endless traffic of lower
    numbers the higher ones wait endlessly, as they are asked to."""

    name = "priority"

    def part(self, request: Request) -> int:
        return request.priority

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        counts = [0] * len(prompts)
        for priority in sorted({request.priority for request, _ in prompts}):
            places = [i for i, (request, _) in enumerate(prompts) if request.priority == priority]
            for place, count in zip(places, super().share([prompts[i] for i in places], budget), strict=True):
                counts[place] = count
                budget -= count
        return counts


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

    def options(self) -> dict[str, Any]:
        return {"tokens_per_arrival": self.tokens_per_arrival}

    def rank(self, request: Request) -> int:
        return len(request.prompt_token_ids) + self.tokens_per_arrival * request.arrival

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        order = sorted(range(len(prompts)), key=lambda i: self.rank(prompts[i][0]))
        return _fill([0] * len(prompts), prompts, budget, order)


class Blocking(SchedulingPolicy):
    """Whole prompts before anybody decodes, one after the other, as engines without chunked prefill do. Here
    for comparison: every arrival stalls every answer."""

    name = "blocking"
    prompts_first = True
    readers = 1

    def share(self, prompts: Sequence[tuple[Request, int]], budget: int) -> list[int]:
        return _fill([0] * len(prompts), prompts, budget, range(len(prompts)))


def _latency_target(target_itl_ms: float | None = None) -> SchedulingPolicy:
    from sharp.latency_target import LatencyTarget

    if target_itl_ms is None:
        raise ValueError("scheduling_policy 'latency-target' needs target_itl_ms, in milliseconds")
    return LatencyTarget(target_itl_ms)


POLICIES: dict[str, Callable[[], SchedulingPolicy]] = {
    **{p.name: p for p in (SchedulingPolicy, PriorityPolicy, ShortestPromptFirst, Blocking)},
    "latency-target": _latency_target,
}


def make_policy(policy: str | SchedulingPolicy, target_itl_ms: float | None = None) -> SchedulingPolicy:
    """The policy of a name, or the given instance. target_itl_ms goes with "latency-target" and no other.
    Raises TypeError or ValueError naming value and choice."""
    if target_itl_ms is not None and policy != "latency-target":
        raise ValueError(
            f"target_itl_ms {target_itl_ms} goes with scheduling_policy 'latency-target', not with {policy!r}"
        )
    if isinstance(policy, SchedulingPolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"scheduling_policy must be a name or a SchedulingPolicy instance, not {policy!r}")
    if policy not in POLICIES:
        raise ValueError(f"scheduling_policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    return _latency_target(target_itl_ms) if policy == "latency-target" else POLICIES[policy]()


def step_budget(policy: SchedulingPolicy, contexts: Int32, prompts: Sequence[Request], most: int) -> int:
    """The prompt tokens that the policy gives a step. Raises ValueError naming the policy for more than there
    are, for none while nothing decodes, and for what is no whole number."""
    tokens = policy.budget(contexts, prompts, most)
    whole = isinstance(tokens, int) and not isinstance(tokens, bool)
    if not whole or not (0 if len(contexts) else min(1, most)) <= tokens <= most:
        raise ValueError(
            f"scheduling policy {policy.name!r} gives prompts {tokens!r} tokens of a step with "
            f"{len(contexts)} decodes: there are {most}"
        )
    return tokens


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
