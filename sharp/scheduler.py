"""The scheduler: which tokens of which requests make up the next step. plan() and commit(), pure Python.

A step is a list of (request, number of tokens) under one token budget: first one token for every sequence
that is decoding, so that no prompt ever stalls an answer, then chunks of prompts in the order of arrival in
what remains. Admission books a request's worst case in pages, so nothing running can lack one. Nobody but
this class changes a Request: plan() reserves and advances lengths, commit() appends token values, rollback()
undoes a plan that did not run. Refuses to know text, devices, and what a model computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

import numpy as np

from sharp.blocks import BlockAllocator
from sharp.config import EngineConfig
from sharp.plan import BatchPlan, SampleOutput
from sharp.request import QueueFull, Request, RequestTooLarge, Status


class Scheduler:
    """FCFS continuous batching with chunked prompts over `num_blocks` KV pages."""

    def __init__(
        self, config: EngineConfig, num_blocks: int, max_model_len: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.blocks = BlockAllocator(num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.step = 0
        self.in_flight: BatchPlan | None = None  # planned, neither committed nor rolled back

    # Admission ------------------------------------------------------------------------------------

    def worst_case_tokens(self, request: Request) -> int:
        """Tokens that the request can come to hold: min(prompt + max_tokens, max_model_len)."""
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self.max_model_len)

    def pages_needed(self, request: Request) -> int:
        """Pages of its worst case. The last token is never stored: nothing is computed after it."""
        return max(1, -(-(self.worst_case_tokens(request) - 1) // self.config.block_size))

    def refuse_if_too_large(self, request: Request) -> None:
        """Raise RequestTooLarge, with needed, limit and what to change, for what could never fit."""
        length = len(request.prompt_token_ids)
        if length >= self.max_model_len:
            raise RequestTooLarge(
                f"the prompt has {length} tokens, but max_model_len {self.max_model_len} leaves "
                f"room for a prompt of {self.max_model_len - 1} and one answer token; shorten the prompt or "
                "raise max_model_len"
            )
        needed = self.pages_needed(request)
        if needed > self.blocks.num_blocks:
            raise RequestTooLarge(
                f"the request needs {needed} KV pages ({self.worst_case_tokens(request)} tokens), "
                f"but there are {self.blocks.num_blocks} in all; lower max_tokens, shorten the prompt or "
                "raise memory_limit"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestTooLarge for what can never fit, QueueFull at max_queue_len."""
        self.refuse_if_too_large(request)
        if len(self.waiting) >= self.config.max_queue_len:
            raise QueueFull(len(self.waiting), self.config.max_queue_len)
        self.waiting.append(request)

    def _admit(self) -> bool:
        """Move the head of the queue to the running ones if its pages can be booked."""
        request = self.waiting[0]
        needed = self.pages_needed(request)
        if len(self.running) >= self.config.max_num_seqs or needed > self.blocks.num_free:
            return False
        request.block_ids = self.blocks.allocate(needed)
        request.status = Status.RUNNING
        self.running.append(self.waiting.popleft())
        return True

    # A step ---------------------------------------------------------------------------------------

    def plan(self) -> BatchPlan | None:
        """The next step, or None if there is nothing to compute. Advances `num_computed_tokens` of its
        requests.

        Raises RuntimeError while a plan is in flight.
        """
        if self.in_flight is not None:
            raise RuntimeError(f"the plan of step {self.in_flight.step} is neither committed nor rolled back")
        budget = self.config.max_num_batched_tokens
        work: list[tuple[Request, int]] = []
        prompts: list[Request] = []
        for request in self.running:
            left = request.num_tokens - request.num_computed_tokens
            if request.num_computed_tokens >= len(request.prompt_token_ids) and left == 1:
                work.append((request, 1))
                budget -= 1
            elif left > 0:
                prompts.append(request)
        longest = self.config.long_prefill_token_threshold or budget
        while budget > 0:
            if not prompts:
                if not self.waiting or not self._admit():
                    break
                prompts.append(self.running[-1])
            request = prompts.pop(0)
            count = min(request.num_tokens - request.num_computed_tokens, longest, budget)
            work.append((request, count))
            budget -= count
        if not work:
            return None
        self.step += 1
        work.sort(key=lambda item: item[1] > 1)  # stable: one-token sequences first, see BatchPlan
        plan = self._build(work)
        for request, count in work:
            request.num_computed_tokens += count
        self.in_flight = plan
        return plan

    def _build(self, work: list[tuple[Request, int]]) -> BatchPlan:
        block_size = self.config.block_size
        counts = np.array([count for _, count in work], np.int32)
        starts = np.array([request.num_computed_tokens for request, _ in work], np.int32)
        cu_seqlens_q = np.zeros(len(work) + 1, np.int32)
        np.cumsum(counts, out=cu_seqlens_q[1:])
        context_lens = starts + counts
        num_pages = (-(-context_lens // block_size)).tolist()
        block_table = np.full((len(work), max(num_pages)), -1, np.int32)
        token_ids: list[int] = []
        rows: list[int] = []
        sampled: list[Request] = []
        for seq, (request, count) in enumerate(work):
            first = request.num_computed_tokens
            block_table[seq, : num_pages[seq]] = request.block_ids[: num_pages[seq]]
            token_ids += request.known_tokens(first, first + count)
            if first + count == request.num_tokens:
                rows.append(len(token_ids) - 1)
                sampled.append(request)
        # For all tokens at once: a decode has one token, and a call of numpy costs microseconds.
        owner = np.repeat(np.arange(len(work), dtype=np.int32), counts)
        positions = np.arange(len(token_ids), dtype=np.int32) + (starts - cu_seqlens_q[:-1])[owner]
        slot_mapping = block_table[owner, positions // block_size] * block_size + positions % block_size
        return BatchPlan(
            step=self.step,
            request_ids=tuple(request.request_id for request, _ in work),
            num_decodes=int((counts == 1).sum()),
            token_ids=np.array(token_ids, np.int32),
            positions=positions,
            cu_seqlens_q=cu_seqlens_q,
            context_lens=context_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            logits_rows=np.array(rows, np.int32),
            temperatures=np.array([r.params.temperature for r in sampled], np.float32),
            seeds=np.array([r.seed for r in sampled], np.uint64),
            output_indices=np.array([len(r.output_token_ids) for r in sampled], np.int32),
            num_logprobs=np.array(
                [-1 if r.params.logprobs is None else r.params.logprobs for r in sampled], np.int32
            ),
            token_budget=self.config.max_num_batched_tokens,
        )

    def commit(self, plan: BatchPlan, sampled: SampleOutput) -> list[Request]:
        """Append the step's tokens; returns the requests that got one. Those that ended have given their
        pages back.

        A request that was aborted while the step ran is passed over.
        """
        self._land(plan)
        if not len(sampled.token_ids) == len(sampled.logprobs) == len(plan.logits_rows):
            raise ValueError(
                f"{len(sampled.token_ids)} tokens sampled for {len(plan.logits_rows)} logits rows"
            )
        by_id = {request.request_id: request for request in self.running}
        updated = []
        for row, seq in enumerate(plan.logits_seqs):
            request = by_id.get(plan.request_ids[seq])
            if request is None:
                continue
            token_id = int(sampled.token_ids[row])
            if token_id < 0:
                raise FloatingPointError(
                    f"request {request.request_id}: no token sampled, its logits are not finite"
                )
            request.output_token_ids.append(token_id)
            logprobs = sampled.logprobs[row]
            if logprobs is not None:
                request.logprobs.append(logprobs)
            updated.append(request)
            if token_id in request.params.stop_token_ids:
                self.finish(request, "stop", token_id)
            elif token_id in self.eos_token_ids and not request.params.ignore_eos:
                self.finish(request, "stop")
            elif request.num_tokens >= self.worst_case_tokens(request):
                self.finish(request, "length")
        return updated

    def _land(self, plan: BatchPlan) -> None:
        if plan is not self.in_flight:
            raise ValueError(f"the plan of step {plan.step} is not the one in flight")
        self.in_flight = None

    def rollback(self, plan: BatchPlan) -> None:
        """Undo a plan whose step did not happen (it was interrupted): the same tokens are planned again.

        K and V already written by it are written again with the same values.
        """
        self._land(plan)
        by_id = {request.request_id: request for request in self.running}
        counts = np.diff(plan.cu_seqlens_q)
        for seq, request_id in enumerate(plan.request_ids):
            if request_id in by_id:
                by_id[request_id].num_computed_tokens -= int(counts[seq])

    # The end of a request -------------------------------------------------------------------------

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a running or waiting request and free its pages. Ending it twice is an error of the caller."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.blocks.free(request.block_ids)
            request.block_ids = []
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            raise ValueError(f"request {request.request_id} has finished already ({request.finish_reason})")
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason

    def stop_on_text(self, request: Request, stop: str) -> None:
        """End a request because its text holds a stop string, also when its last token has just ended it."""
        if request.status is Status.FINISHED:
            request.finish_reason, request.stop_reason = "stop", stop
        else:
            self.finish(request, "stop", stop)

    def requests(self) -> Iterable[Request]:
        """Everything that has not finished: running first, then waiting."""
        return [*self.running, *self.waiting]

    def check(self) -> None:
        """Raise AssertionError unless pages, sequences and lengths agree."""
        self.blocks.check()
        owned = [page for request in self.running for page in request.block_ids]
        assert len(owned) == len(set(owned)) == self.blocks.num_used, (
            "pages in use are not those of running requests"
        )
        for request in self.running:
            assert 0 <= request.num_computed_tokens <= request.num_tokens, f"{request.request_id}: lengths"
            assert len(request.block_ids) * self.config.block_size >= request.num_computed_tokens, (
                "pages too few"
            )
        assert len(self.running) <= self.config.max_num_seqs, "too many sequences run"
