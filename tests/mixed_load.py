"""Mixed random load: callers in threads do all that callers do, and every answer is the request's own.

`python tests/mixed_load.py 480 cuda` runs so many seconds on a device and prints what was reached. Requests
come singly and in bursts, with prompts from one token to several steps' worth, greedy and sampled, one answer
and several, with shared beginnings; some end at a stop id that their answer is known to have; they are
cancelled at any moment, time out, or are no requests at all; pages and queue are far too small for them. What
a request gets alone is computed first. Afterwards nothing is left: no request, no page, no memory.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, cast

from held_memory import Held

from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.live import Sink
from sharp.meter import open_meter
from sharp.request import QueueFull, RequestOutput, RequestTooLarge, SamplingParams
from sharp.stall import Borrowed

CALLERS = 4
WAIT_S = 120.0  # for one output: then the engine hangs
PATIENCE_S = 60.0  # on a busy machine little happens in a second
FAMILIES = 3


@dataclass(frozen=True)
class Order:
    """A request, and what its n answers are when it is alone."""

    prompt: list[int]
    params: SamplingParams
    answers: tuple[tuple[int, ...], ...] = ()


def menu(count: int, vocab_size: int, longest: int, seed: int) -> list[Order]:
    """Different requests of all kinds."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(2, vocab_size) for _ in range(longest)] for _ in range(FAMILIES)]
    orders = []
    for number in range(count):
        length = min(longest, int(rng.lognormvariate(3.5, 1.2)) + 1)
        shared = rng.choice([0, length // 2, length - 1])
        prompt = rng.choice(beginnings)[:shared]
        prompt += [rng.randrange(2, vocab_size) for _ in range(length - shared)]
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 8, 24, 60]),
            temperature=rng.choice([0.0, 0.0, 0.8, 1.3]),
            seed=number,
            n=rng.choice([1, 1, 1, 2, 3]),
            ignore_eos=rng.random() < 0.7,
            stop_token_ids=[rng.randrange(vocab_size) for _ in range(rng.choice([0, 0, 20]))],
        )
        orders.append(Order(prompt, params))
    return orders


def answers_alone(model: Any, tokenizer: Any, config: EngineConfig, order: Order) -> Order:
    """The order with the answers of an engine that has nothing else to do, and keeps nothing."""
    engine = Engine(Borrowed(model), tokenizer, replace(config, prefix_caching=False))
    engine.add_request(order.prompt, order.params)
    last: list[RequestOutput] = []
    while engine.has_unfinished:
        last = engine.step() or last
    engine.close()
    return replace(order, answers=tuple(one.token_ids for one in last[-1].outputs))


def with_stops(model: Any, tokenizer: Any, config: EngineConfig, orders: Sequence[Order]) -> list[Order]:
    """The orders with their answers, every third of those that say enough cut by a stop id from the middle of
    its first: answers of random weights never meet one that was drawn."""
    orders = [answers_alone(model, tokenizer, config, order) for order in orders]
    long = [place for place, order in enumerate(orders) if len(order.answers[0]) > 2]
    for place in long[::3]:
        order, first = orders[place], orders[place].answers[0]
        stop = first[len(first) // 2]
        params = replace(order.params, stop_token_ids=[*order.params.stop_token_ids, stop])
        orders[place] = answers_alone(model, tokenizer, config, replace(order, params=params))
        # The id itself belongs to the answer or not: that is another test's; nothing behind it does.
        assert orders[place].answers[0] in (first[: first.index(stop)], first[: first.index(stop) + 1])
    return orders


Bad = tuple[type[Exception], Callable[[Engine], Any]]


def bad_requests(vocab_size: int, max_model_len: int) -> list[Bad]:
    """What the door refuses, and with what."""
    return [
        (ValueError, lambda engine: engine.make_request([])),
        (ValueError, lambda engine: engine.make_request([vocab_size])),
        (ValueError, lambda engine: engine.make_request([-1, 3])),
        (TypeError, lambda engine: engine.make_request(cast(list[int], [1.5]))),
        (TypeError, lambda engine: engine.make_request(cast(list[int], None))),
        (ValueError, lambda engine: engine.make_request([3], SamplingParams(max_tokens=0))),
        (ValueError, lambda engine: engine.make_request([3], SamplingParams(temperature=-1.0))),
        (RequestTooLarge, lambda engine: engine.make_request([3] * (max_model_len + 1))),
        (RequestTooLarge, lambda engine: engine.make_request([3], SamplingParams(n=60_000))),
    ]


class Caller(threading.Thread):
    """One caller of many: sends, reads, cancels, and compares."""

    def __init__(
        self, engine: Engine, orders: Sequence[Order], goes_on: Callable[[], bool], seed: int
    ) -> None:
        super().__init__(name=f"caller-{seed}", daemon=True)
        self.engine, self.orders, self.goes_on = engine, orders, goes_on
        self.rng, self.reached = random.Random(seed), Counter[str]()
        self.failure: BaseException | None = None
        self.bad = bad_requests(engine.model.config.vocab_size, engine.max_model_len)

    def run(self) -> None:
        try:
            while self.goes_on():
                what = self.rng.random()
                if what < 0.15:
                    self.refused()
                elif what < 0.20:
                    time.sleep(self.rng.uniform(0, 0.05))
                else:
                    self.order(self.rng.choice([1, 1, 1, 2, 12]))
        except BaseException as error:
            self.failure = error

    def refused(self) -> None:
        kind, call = self.rng.choice(self.bad)
        try:
            call(self.engine)
        except kind:
            self.reached["refused"] += 1
        else:
            raise AssertionError(f"a request that should raise {kind.__name__} was taken")

    def order(self, count: int) -> None:
        """Send some requests, cancel some while reading, and compare all."""
        sink: Sink = SimpleQueue()
        open_orders: dict[str, Order] = {}
        cancel_after: dict[str, int] = {}
        for _ in range(count):
            order, params = self.rng.choice(self.orders), None
            if self.rng.random() < 0.1:
                params = replace(order.params, timeout_s=self.rng.choice([1e-4, 0.02, 0.2]))
            request = self.engine.make_request(
                list(order.prompt), params or order.params, priority=self.rng.randint(-1, 1)
            )
            try:
                name = self.engine.submit(request, sink, final_only=self.rng.random() < 0.2)
            except QueueFull:
                self.reached["queue full"] += 1
                time.sleep(0.01)
                continue
            open_orders[name] = order
            if self.rng.random() < 0.2:
                cancel_after[name] = self.rng.choice([0, 0, 1, 3, 10])
        for name, tokens in list(cancel_after.items()):
            if tokens == 0:
                time.sleep(self.rng.choice([0.0, 0.002, 0.02]))
                self.cancel(name, cancel_after)
        seen: dict[str, tuple[tuple[int, ...], ...]] = {}
        while open_orders:
            output = self.next_output(sink)
            name, order = output.request_id, open_orders[output.request_id]
            ids = tuple(one.token_ids for one in output.outputs)
            before = seen.get(name, ((),) * len(ids))
            assert all(new[: len(old)] == old for new, old in zip(ids, before, strict=True)), (
                "an answer shrank"
            )
            seen[name] = ids
            self.compare(order, output, ids)
            if output.finished:
                del open_orders[name]
            elif name in cancel_after and max(map(len, ids)) >= cancel_after[name]:
                self.cancel(name, cancel_after)

    def cancel(self, name: str, cancel_after: dict[str, int]) -> None:
        del cancel_after[name]
        self.reached["cancelled"] += self.engine.abort(name)

    def next_output(self, sink: Sink) -> RequestOutput:
        try:
            output = sink.get(timeout=WAIT_S)
        except Empty:
            raise TimeoutError(f"no output in {WAIT_S:.0f} s; alive: {self.engine.alive}") from None
        if isinstance(output, BaseException):
            raise output
        return output

    def compare(self, order: Order, output: RequestOutput, ids: tuple[tuple[int, ...], ...]) -> None:
        """What is whole is what it is alone; what is not is a beginning of it."""
        for one, alone in zip(output.outputs, order.answers, strict=True):
            whole = one.finish_reason in ("length", "stop")
            expected = alone if whole else alone[: len(one.token_ids)]
            assert one.token_ids == expected, (
                f"{output.request_id} ({len(order.prompt)} tokens, {order.params}): sample {one.index} has "
                f"{one.token_ids}, alone it has {alone}"
            )
            if output.finished:
                self.reached[str(one.finish_reason)] += 1


@dataclass(frozen=True)
class Found:
    """What a run reached, how many steps it took, and at each look: bytes that this process holds of the
    device, its own memory, and by how much the whole device's free memory fell (neighbours' too)."""

    reached: Counter[str]
    steps: int
    held: list[Held]
    host_bytes: list[int]
    fell_bytes: list[int]


def run_mixed(
    model: Any,
    tokenizer: Any,
    config: EngineConfig,
    orders: Sequence[Order],
    seconds: float,
    seed: int,
    wanted: Collection[str] = (),
    holds: Callable[[], Held] = lambda: Held(0, 0, None),
) -> Found:
    """Callers against one engine on its own thread. Raises the first thing that was wrong.

    wanted: what must have been reached before it ends, in PATIENCE_S more seconds at most; holds: of
    held_memory.py."""
    engine = Engine(Borrowed(model), tokenizer, config)
    meter, until = open_meter(model.device), time.monotonic() + seconds

    def goes_on() -> bool:
        now = time.monotonic()
        if any(caller.failure for caller in callers):
            return False
        return now < until or (now < until + PATIENCE_S and not set(wanted) <= set(reached()))

    def reached() -> Counter[str]:
        found = sum((caller.reached.copy() for caller in callers), Counter[str]())
        return found + Counter(preempted=engine.scheduler.preemptions)

    callers = [Caller(engine, orders, goes_on, CALLERS * seed + place) for place in range(CALLERS)]
    held: list[Held] = []
    host_bytes: list[int] = []
    fell_bytes: list[int] = []
    free = model.device.free_bytes()
    engine.start()
    for caller in callers:
        caller.start()
    looks = max(4, int(seconds / 5))
    for look in range(looks):
        time.sleep(max(0.0, until - seconds * (1 - (look + 1) / looks) - time.monotonic()))
        gc.collect()
        held.append(holds())
        fell_bytes.append(free - model.device.free_bytes())
        host_bytes.append(process_bytes(meter))
    for caller in callers:
        caller.join(timeout=PATIENCE_S + WAIT_S + 60)
        assert not caller.is_alive(), f"{caller.name} hangs"
        if caller.failure is not None:
            raise caller.failure
    assert engine.error is None
    assert engine.alive
    deadline = time.monotonic() + 30
    while engine.has_unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.has_unfinished, "requests are left"
    scheduler = engine.scheduler
    scheduler.check()
    assert not scheduler.requests()
    blocks = scheduler.blocks
    assert blocks.num_free + blocks.num_cached == blocks.num_blocks, "pages are left"
    found = Found(reached(), engine.stats.steps, held, host_bytes, fell_bytes)
    engine.close()
    return found


def process_bytes(meter: Any) -> int:
    """Of this process, whatever device its model is on."""
    from sharp.device import HostDevice
    from sharp.meter import HostMeter

    return HostMeter(HostDevice("float32")).used() if not isinstance(meter, HostMeter) else meter.used()


def main(seconds: float, device: str) -> None:
    from engine_checks import TINY, load

    model, config = load(TINY, device, "float32", **OPTIONS)
    orders = with_stops(model, model.tokenizer, config, menu(60, 300, 400, 0))
    found = run_mixed(model, model.tokenizer, config, orders, seconds, 0)
    model.close()
    print(found)


OPTIONS: dict[str, Any] = {
    "num_blocks": 10, "max_num_batched_tokens": 96, "max_num_seqs": 12, "max_queue_len": 8,
    "admission": "optimistic",
}  # fmt: skip

if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
