"""The scheduler: which tokens of which requests make up the next step. plan() and commit(), pure Python.

A step is a list of (request, number of tokens) under one token budget: first one token for every sequence
that is decoding, so that no prompt ever stalls an answer, then chunks of prompts in what remains. Who goes
first and who gives way is a SchedulingPolicy's to say (policies.py); that budgets and pages hold is settled
here. Admission "reserve" books a request's worst case in pages, so nothing running can lack one; "optimistic"
books what is known of it, and when a page is missing a running request gives all of its own back, waits, and
reads prompt and answer so far again. Pages are found, booked and given back by the PageBook (pagebook.py).
Nobody but this class (and, for a simulator, quiet.py) changes a Request: plan() reserves and advances
lengths, commit() appends token values and lets pages be found, rollback() undoes a plan that did not run. A
step may be planned while the one before it runs (flights.py): who ends by a token that is still to come goes
one step too far, and that step's token is dropped. Refuses to know text, devices, time, and what a model
computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from sharp.batching import Rows, build_plan
from sharp.blocks import BlockAllocator
from sharp.config import EngineConfig
from sharp.flights import MOST, Flights
from sharp.pagebook import PageBook
from sharp.plan import BatchPlan, SampleOutput
from sharp.policies import make_policy, share_out, step_budget
from sharp.request import QueueFull, Request, Status
from sharp.running import RunningTable
from sharp.sizes import Sizes
from sharp.waiting import WaitingQueue

NO_ROWS = np.empty(0, np.int32)


class Scheduler:
    """Continuous batching with chunked prompts over `num_blocks` KV pages."""

    def __init__(
        self, config: EngineConfig, num_blocks: int, max_model_len: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        self.config = config
        self.policy = make_policy(config.scheduling_policy, config.target_itl_ms)
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self._eos = np.array(sorted(self.eos_token_ids), np.int32)
        self.sizes = Sizes(config, num_blocks, max_model_len)
        self.blocks = BlockAllocator(num_blocks)
        self.waiting = WaitingQueue(self.policy, config.max_bypass)
        self.table = RunningTable()
        self.pages = PageBook(config, self.sizes, self.blocks, self.table)
        self.step = 0
        self.arrivals = 0
        self.preemptions = 0
        self.flights = Flights(self.table)
        # Of the latest plan(), for people: why a running or preempted request got no token, by id, and what
        # the waiting ones wait for ("pages", "token budget", "max_num_seqs", "preemption").
        self.not_scheduled: dict[str, str] = {}
        self.waiting_for: str | None = None

    @property
    def running(self) -> list[Request]:
        """What runs, in order of admission."""
        return self.table.requests()

    @property
    def in_flight(self) -> tuple[BatchPlan, ...]:
        """Plans that are neither committed nor rolled back, oldest first."""
        return self.flights.plans

    # Admission ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request, and with it the samples that will fork from it.

        Raises RequestTooLarge for what can never fit, QueueFull at max_queue_len.
        """
        self.sizes.refuse_if_too_large(request)
        if len(self.waiting) >= self.config.max_queue_len:
            raise QueueFull(len(self.waiting), self.config.max_queue_len)
        for sample in (request, *request.samples):
            sample.arrival = self.arrivals
        self.arrivals += 1
        self.pages.extend_keys(request)
        self.waiting.add(request)

    def preempt(self, request: Request) -> None:
        """Take all pages from a running request and put it back in the queue; its answer so far is kept.

        When it is admitted again, prompt and answer so far are read again, in chunks, but for those pages
        that are still in the prefix cache. Tokens of its steps in flight are dropped (and will be sampled
        again, the same). Raises ValueError for what does not run.
        """
        if request.status is not Status.RUNNING:
            raise ValueError(f"request {request.request_id} is {request.status.value}, not running")
        self.pages.release(request)
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.preemptions += 1
        self.waiting.add(request)

    # A step ---------------------------------------------------------------------------------------

    def plan(self) -> BatchPlan | None:
        """The next step, or None if there is nothing to compute before a step in flight has landed. Advances
        `num_computed_tokens` of its requests.

        Raises RuntimeError while two plans are in flight, and ValueError or RuntimeError for a policy that
        shares out what there is not, or nothing.
        """
        if len(self.flights) == MOST:
            steps = " and ".join(str(plan.step) for plan in self.in_flight)
            raise RuntimeError(f"the plans of steps {steps} are neither committed nor rolled back")
        self.not_scheduled, self.waiting_for = {}, None
        table, rows = self.table, self.table.rows
        if self.flights:
            last = self._last_is_coming(rows)
            if last.any():
                names = table.name[rows[last]].tolist()
                self.not_scheduled.update(dict.fromkeys(names, "last token in flight"))
                rows = rows[~last]
        computed = table.computed[rows]
        decoding = table.known[rows] + table.coming[rows] - computed == 1
        decoding &= computed >= table.prompt[rows]
        decodes, reading = rows[decoding], rows[~decoding]
        budget = self.config.max_num_batched_tokens
        chunks: list[tuple[Request, int]] = []
        if self.policy.prompts_first:
            chunks = self._read(table.request[reading].tolist(), budget)
            if chunks:
                self.not_scheduled.update(dict.fromkeys(table.name[decodes].tolist(), "prompts first"))
                decodes = NO_ROWS
        if not chunks:
            if self._grow(decodes):  # pages are short: admitting in the same step would ask for more
                decodes, reading = decodes[table.live[decodes]], reading[table.live[reading]]
                decodes = decodes[~self._short(decodes)]
                self.waiting_for = "preemption"
            prompts, budget = table.request[reading].tolist(), budget - len(decodes)
            if prompts or self.waiting:
                budget = step_budget(self.policy, table.computed[decodes], prompts, budget)
            chunks = self._read(prompts, budget)
        if not len(decodes) and not chunks:
            if len(table) and not self.flights:
                raise RuntimeError(f"scheduling policy {self.policy.name!r} gives no prompt any token")
            return None
        self.step += 1
        plan, planned, sampled = build_plan(
            self.step, table, decodes, chunks, self.pages.forks.take(), self.config
        )
        self.flights.add(plan, planned, sampled)
        return plan

    def _last_is_coming(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which rows end with "length", at the latest, when the steps in flight have landed."""
        table = self.table
        last: npt.NDArray[np.bool_] = table.known[rows] + table.coming[rows] >= table.limit[rows]
        return last

    def _short(self, decodes: Rows) -> npt.NDArray[np.bool_]:
        """Which rows have no page for their next token."""
        table = self.table
        short: npt.NDArray[np.bool_] = (
            table.num_pages[decodes] * self.config.block_size <= table.computed[decodes]
        )
        return short

    def _grow(self, decodes: Rows) -> bool:
        """A page for every decode whose next token has none; True if there were too few.

        Then somebody is preempted, unless the one to give way gives its pages back when the step in flight
        lands: what lacks a page waits so long.
        """
        scarce = False
        for request in self.table.request[decodes[self._short(decodes)]].tolist():
            while request.status is Status.RUNNING and (
                len(request.block_ids) * self.config.block_size <= request.num_computed_tokens
            ):
                if self.pages.grow(request):
                    continue
                scarce = True
                victim = self.policy.victim(self.running)
                if self._last_is_coming(np.array([victim.row], np.int32))[0]:
                    self.not_scheduled[request.request_id] = "pages"
                    break
                self.preempt(victim)
                self.not_scheduled[victim.request_id] = "preempted"
        return scarce

    def _read(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        """Chunks of prompts: of those that run, and of new ones as long as some of the budget remains, or
        few are being read (the policy says how many: a short one need not wait for a long one's end).
        """
        longest = self.config.long_prefill_token_threshold or budget
        readers = [(r, min(r.num_tokens - r.num_computed_tokens, longest)) for r in prompts]
        wanted, refused = sum(most for _, most in readers), False
        while self.waiting and budget > 0 and self.waiting_for != "preemption":
            if wanted >= budget and len(readers) >= self.policy.readers:
                break
            full = len(self.table) >= self.config.max_num_seqs
            self.waiting_for = "max_num_seqs" if full else "pages"
            request = None if full else self.waiting.take(self.pages.start)
            if request is None:
                refused = True
                break
            readers.append((request, min(request.num_tokens - request.num_computed_tokens, longest)))
            wanted += readers[-1][1]
        work = share_out(self.policy, readers, budget)
        if len(work) < len(readers):
            served = {request.request_id for request, _ in work}
            left = (request.request_id for request, _ in readers if request.request_id not in served)
            self.not_scheduled.update((name, "token budget") for name in left)
        if not refused and self.waiting_for != "preemption":
            self.waiting_for = "token budget" if self.waiting else None
        return work

    def commit(self, plan: BatchPlan, sampled: SampleOutput) -> list[Request]:
        """Append the tokens of the oldest step in flight; returns the requests that got one. Those that ended
        have given their pages back.

        A request that was ended or preempted since the step was planned is passed over. Raises ValueError for
        another plan than the oldest, or another number of tokens than it samples, and FloatingPointError for
        a token that could not be sampled; nothing is changed then.
        """
        flight = self.flights.oldest(plan)
        if not len(sampled.token_ids) == len(sampled.logprobs) == len(plan.logits_rows):
            raise ValueError(
                f"{len(sampled.token_ids)} tokens sampled for {len(plan.logits_rows)} logits rows"
            )
        table, none = self.table, sampled.token_ids < 0
        if none.any() and (none := none & flight.alive(table)[flight.sampled]).any():
            name = plan.request_ids[flight.sampled[none][0]]
            raise FloatingPointError(f"request {name}: no token sampled, its logits are not finite")
        alive = self.flights.land(plan)
        self.pages.forks.made(plan.page_copies)
        kept = alive[flight.sampled].nonzero()[0]
        rows, token_ids = flight.rows[flight.sampled[kept]], sampled.token_ids[kept]
        updated = table.append_tokens(rows, token_ids)
        for place in (plan.num_logprobs[kept] >= 0).nonzero()[0].tolist():
            logprobs = sampled.logprobs[kept[place]]
            assert logprobs is not None
            updated[place][0].logprobs.append(logprobs)
        self.pages.publish(flight.rows[alive], plan.context_lens[alive])
        for place in table.num_samples[rows].nonzero()[0].tolist():
            self.pages.forks.fork(updated[place][0])
        may_end = table.known[rows] >= table.limit[rows]
        may_end |= table.has_stop_ids[rows]
        if len(self._eos):
            may_end |= table.obeys_eos[rows] & (token_ids[:, None] == self._eos).any(axis=1)
        for place in may_end.nonzero()[0].tolist():
            self._end_if_over(*updated[place])
        return [request for request, _ in updated]

    def _end_if_over(self, request: Request, token_id: int) -> None:
        if token_id in request.params.stop_token_ids:
            self.finish(request, "stop", token_id)
        elif token_id in self.eos_token_ids and not request.params.ignore_eos:
            self.finish(request, "stop")
        elif request.num_tokens >= self.sizes.worst_tokens(request):
            self.finish(request, "length")

    def rollback(self, plan: BatchPlan) -> list[Request]:
        """Undo the newest plan in flight, whose step did not happen or does not count: the same tokens are
        planned again. Returns its requests that still run.

        K and V already written by it are written again with the same values, and copies made again. Raises
        ValueError for another plan than the newest.
        """
        flight, alive = self.flights.undo(plan)
        self.pages.forks.undo(plan.page_copies)
        requests: list[Request] = self.table.request[flight.rows[alive]].tolist()
        return requests

    # The end of a request -------------------------------------------------------------------------

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a running or waiting request and free its pages; samples that have not forked from it end with
        it. Ending it twice is an error of the caller."""
        if request.status is Status.RUNNING:
            self.pages.release(request)
        elif request.status is Status.FINISHED:
            raise ValueError(f"request {request.request_id} has finished already ({request.finish_reason})")
        elif request.first is None:
            self.waiting.remove(request)
        else:
            request.first.samples.remove(request)
            if request.first.table is not None:
                request.first.table.promise(request.first)
        request.status, request.first = Status.FINISHED, None
        request.finish_reason, request.stop_reason = reason, stop_reason
        for sample in request.samples[:]:
            self.finish(sample, reason)

    def fail(self, request: Request) -> None:
        """End a request whose step failed. Its pages are found by nobody any more: what made the step fail
        may be in them, and would come back with every prompt that begins alike."""
        self.blocks.unpublish(request.block_ids)
        self.finish(request, "error")

    def stop_on_text(self, request: Request, stop: str) -> None:
        """End a request because its text holds a stop string, also when its last token has just ended it."""
        if request.status is Status.FINISHED:
            request.finish_reason, request.stop_reason = "stop", stop
        else:
            self.finish(request, "stop", stop)

    # For people and tests -------------------------------------------------------------------------

    def tokens_ahead(self) -> int:
        """Tokens still to compute for all that has not finished, if every answer takes its max_tokens."""
        done = (
            r.num_computed_tokens if r.first is None else len(r.prompt_token_ids) for r in self.requests()
        )
        most = (self.sizes.worst_tokens(r) - 1 for r in self.requests())
        return sum(most) - sum(done)

    def requests(self) -> list[Request]:
        """All that has not finished: running first, then waiting, samples after what they fork from."""
        heads = [*self.running, *self.waiting]
        return [request for head in heads for request in (head, *head.samples)]

    def check(self) -> None:
        """Raise AssertionError unless pages, sequences and lengths agree."""
        self.table.check()
        self.flights.check()
        self.waiting.check()
        self.pages.check()
        assert len(self.table) + self.table.promised <= self.config.max_num_seqs, "too many sequences run"
