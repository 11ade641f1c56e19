"""Steps of a model on a CUDA device: launch() queues one behind the one before, land() waits for its ids.

    copy stream     words of step n+1 |                      | words of n+2 ...
    compute stream                    apply_step, copies of pages, the bucket's graph, ids to the host | ...

A step crosses as one pinned array of words (step_buffers.py) while the one before computes; every hand-over
between the streams is an event. Its launches are a bucket's (buckets.py), the same in a graph and without: so
both give the same bits. Nothing here waits for the device but land(), for its own step.
Knows: the order of a step's work, and what may be overwritten when. Refuses to know: what is launched
(model.forward), requests.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kernels_numba.ops.apply_step import HEADER, StepLayout, prepare_apply_step
from sharp import driver
from sharp.buckets import Bucket, Buckets, Decodes
from sharp.counted import counted, uncounted
from sharp.device import Array
from sharp.device_clock import DeviceClock
from sharp.graphs import Graphs
from sharp.graphs import predicted_bytes as graph_bytes
from sharp.layout import aligned
from sharp.memory import DeviceArray, PinnedBuffer, PinnedPool, download_async, upload_async
from sharp.plan import BatchPlan, Int32, Launched, SampleOutput
from sharp.sampling import draw, sample_output, say_slower
from sharp.staging import StepArrays
from sharp.step_buffers import TERM, StepBuffers, StepPacker
from sharp.trace_events import COMPUTE, COPIES

if TYPE_CHECKING:
    from sharp.model import Model

IN_FLIGHT = 2  # steps launched and not landed
WORD = 4

Forward = Callable[[StepArrays, SimpleNamespace, Any], Array]  # (arrays, ops, stream) -> logits


def predicted_bytes(layout: StepLayout, num_layers: int, decodes: Decodes = "ride") -> int:
    """What the graphs of all buckets take on the device at most; decodes: as Buckets has it."""
    return graph_bytes(num_layers, len(Buckets(layout.max_tokens, layout.max_seqs, decodes).all()))


def device_bytes(layout: StepLayout) -> int:
    """What a Runtime takes of an arena: the fixed buffers, and the words of IN_FLIGHT steps."""
    return aligned(WORD * layout.words) + IN_FLIGHT * aligned(WORD * layout.packed_words)


class _Slot:
    """Pinned and device memory of every second step: where its words are written and arrive, and its ids come
    back to; and what its time is told by. What was copied two steps ago is over as a rule, but not where
    steps were launched and never landed: so the words' event is waited for before they are written."""

    def __init__(self, buffers: StepBuffers, packed: DeviceArray, sampled: Array, pool: PinnedPool) -> None:
        self.packed, self.words = packed, pool.take(packed.nbytes)
        self.ids = pool.take(sampled.nbytes)
        self.apply = prepare_apply_step(buffers.state, packed, sampled, buffers.layout)
        self.applied = driver.Event()  # the words have been read
        self.start, self.end = driver.Event(timing=True), driver.Event(timing=True)
        self.sent, self.arrived = driver.Event(timing=True), driver.Event(timing=True)  # the words
        self.queued = 0.0  # when its step was begun, by the host's clock


@dataclass
class _Step:
    """What land() needs of a launched step: its slot, and where logits f32[number wanted, V] arrive."""

    slot: _Slot
    logits: PinnedBuffer | None
    wanted: tuple[int, ...]  # logits rows whose log-probabilities are asked for


class Runtime:
    """Owns the fixed buffers, graphs and pinned memory of a model's steps."""

    def __init__(
        self,
        forward: Forward,
        ops: SimpleNamespace,
        device: Any,
        layout: StepLayout,
        logits: DeviceArray,
        sampled: DeviceArray,
        copy_pages: Callable[[Int32], None],
        *,
        graphs: bool,
        decodes: Decodes = "ride",
    ) -> None:
        """forward: the launches of a step from its arrays, into logits f32[max_seqs, V]; sampled:
        i32[max_seqs], which the ids go to; copy_pages: queues copies of (source, destination) pages; graphs:
        replay instead of launching; decodes: of mixed steps, as Buckets has it."""
        self.layout, self._device, self._forward = layout, device, forward
        self._compute, self._copy = device.compute_stream, device.copy_stream
        self.buckets = Buckets(layout.max_tokens, layout.max_seqs, decodes)
        self.buffers, self._packer = StepBuffers(device, layout), StepPacker(layout)
        self._logits, self._sampled, self._copy_pages = logits, sampled, copy_pages
        self._ops = counted(ops, self.buffers.num_tokens, self.buffers.num_rows)
        self._arrays = {bucket: self.buffers.arrays(bucket) for bucket in self.buckets.all()}
        self._pinned: PinnedPool = device.pool
        self._slots = [
            _Slot(
                self.buffers, device.empty((layout.packed_words,), np.int32, term=TERM), sampled, device.pool
            )
            for _ in range(IN_FLIGHT)
        ]
        self._steps = 0
        self._clock = DeviceClock(partial(driver.Event, timing=True), self._compute.record)
        self.graphs = Graphs(self._queue, self._compute) if graphs else None

    def _queue(self, bucket: Bucket, stream: Any) -> None:
        """The launches of a bucket: this is what a graph holds."""
        arrays = self._arrays[bucket]
        logits = self._forward(arrays, self._ops, stream)
        draw(self._sampled[: arrays.num_rows], logits, arrays, self._ops, stream)

    def capture(self, progress: bool = False) -> None:
        """Make graphs now, while no step is in flight. A bucket that has none gets it behind the launch of
        its first step, so all do where this is left out: where rungs compute whole buckets (counted.py),
        steps without tokens would take as long as full ones."""
        if self.graphs is not None and not uncounted(self._ops):
            with self._or_launch_one_by_one(), driver.during("capturing graphs"):
                self.graphs.capture_all(self.buckets.all(), self._warm, progress)

    def _warm(self, bucket: Bucket) -> None:
        """Queue a bucket's launches over no tokens at all, so that every kernel is loaded and every tensor
        map made. No page is touched."""
        slot = self._next_slot()
        packed = self._words_of(slot)
        packed[: HEADER + 1] = 0
        packed[4:6] = bucket.tokens, bucket.seqs
        self._apply(slot, HEADER + 1, launches=True)
        self._queue(bucket, self._device.stream)

    def _next_slot(self) -> _Slot:
        return self._slots[self._steps % IN_FLIGHT]

    def _words_of(self, slot: _Slot) -> Int32:
        """Where to write the next step's words."""
        if not slot.words.event.done:
            slot.words.event.synchronize()
        words: Int32 = slot.words.array.view(np.int32)
        return words

    def _apply(self, slot: _Slot, used: int, *, launches: bool) -> None:
        """Send the words and have them applied behind the step before.

        launches: single launches follow, no graph. They may begin before those before them have ended
        (programmatic dependent launch), and some read counts and lengths at once; so a copy, which is never
        part of such a chain, is put between: of the counts, where nothing is changed by it. A graph begins
        when all before it has ended.
        """
        self._steps += 1
        self._copy.wait(slot.applied)
        self._copy.record(slot.sent)
        upload_async(slot.packed, slot.words, self._copy, num_bytes=used * WORD)
        self._copy.record(slot.arrived)
        self._compute.wait(slot.arrived)  # so it has happened when the step has: land() asks when
        slot.apply(self._compute)
        if launches:
            counts, packed = self.buffers.counts, slot.packed
            driver.copy_on_device(counts.address, packed.address, counts.nbytes, self._compute, "the counts")
        self._compute.record(slot.applied)

    def launch(self, plan: BatchPlan) -> Launched:
        """Queue a step; waits for the device only where it fails, or has to capture a graph. At most one
        other step may be in flight.

        Raises ValueError for a plan larger than the workspace, CudaError naming the step for what the driver
        refuses.
        """
        bucket = self.buckets.of(plan)
        driver.refuse_if_lost()
        with driver.during(_named(plan)):
            try:
                return self._launch(plan, bucket)
            except BaseException:
                # Half a step is queued: a copy whose event was not recorded yet may use pinned memory that is
                # dropped now.
                if driver.poisoned() is None:
                    self._device.synchronize()
                raise

    def _launch(self, plan: BatchPlan, bucket: Bucket) -> Launched:
        queued = time.perf_counter()
        fresh = self.graphs is not None and bucket not in self.graphs
        slot = self._next_slot()
        used = self._packer.pack(plan, bucket, self._words_of(slot))
        slot.queued = queued
        self._apply(slot, used, launches=self.graphs is None or fresh)
        if len(plan.page_copies):
            self._copy_pages(plan.page_copies)
        self._compute.record(slot.start)
        if self.graphs is None or fresh:
            self._queue(bucket, self._device.stream)
        else:
            self.graphs.replay(bucket)
        self._compute.record(slot.end)
        step = self._bring(plan, slot)
        self._packer.launched()
        if self.graphs is not None and fresh:
            with self._or_launch_one_by_one():
                self.graphs.capture(bucket)
        return Launched(plan, step)

    @contextmanager
    def _or_launch_one_by_one(self) -> Iterator[None]:
        """A capture that fails costs no request its answer: launches can be queued one by one, with the same
        bits. Said once, as nothing is captured afterwards."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if driver.poisoned() is not None or self.graphs is None:
                raise
            self.graphs.close()
            self.graphs = None
            words = f"no graphs from here on, launches are queued one by one: {error}"
            warnings.warn(words, RuntimeWarning, stacklevel=2)

    def _bring(self, plan: BatchPlan, slot: _Slot) -> _Step:
        """Queue the way back: ids, and the logits of rows whose log-probabilities are asked for, since the
        next step overwrites them."""
        rows = len(plan.logits_rows)
        wanted = tuple((plan.num_logprobs >= 0).nonzero()[0].tolist())
        logits = None
        download_async(slot.ids, self._sampled, self._compute, num_bytes=rows * WORD)
        if wanted:
            say_slower(self._device)
            row_bytes = self._logits[0].nbytes
            logits = self._pinned.take(len(wanted) * row_bytes)
            for place, row in enumerate(wanted):
                download_async(logits, self._logits[row], self._compute, offset=place * row_bytes)
        return _Step(slot, logits, wanted)

    def land(self, launched: Launched) -> SampleOutput:
        """Wait for a step's ids and return them; launched.gpu_s: seconds of its launches on the device;
        launched.streams: when they ran, and when its words were copied.

        Raises FloatingPointError if a row has no comparable logit, CudaError naming the step for what failed
        on the device.
        """
        plan, step = launched.plan, launched.state
        with driver.during(_named(plan)):
            step.slot.end.synchronize()
            slot, interval = step.slot, self._clock.interval
            start, end = interval(slot.start, slot.end, slot.queued, more=True)
            launched.gpu_s = end - start
            words = interval(slot.sent, slot.arrived, slot.queued)
            launched.streams = ((COPIES, "words", *words), (COMPUTE, "step", start, end))
            slot.ids.event.synchronize()
            token_ids = slot.ids.array.view(np.int32)[: len(plan.logits_rows)].copy()
            values = _read(step.logits)
        each = values.reshape(len(step.wanted), -1) if step.wanted else ()
        return sample_output(plan, token_ids, dict(zip(step.wanted, each, strict=True)))

    def close(self) -> None:
        """Destroy the graphs, once what is queued is over."""
        if self.graphs is not None:
            self.graphs.close()


def _named(plan: BatchPlan) -> str:
    return f"step {plan.step} ({plan.num_tokens} tokens of {plan.num_seqs} requests)"


def _read(buffer: PinnedBuffer | None) -> npt.NDArray[np.float32]:
    """What a download brought, once it is there, as an array of its own; [0] for no buffer."""
    if buffer is None:
        return np.empty(0, np.float32)
    buffer.event.synchronize()
    array = buffer.array.view(np.float32).copy()
    buffer.release()
    return array


def open_runtime(model: Model, layout: StepLayout, graphs: bool) -> Runtime:
    """The Runtime of a model whose weights, pages and workspace are there. It does not hold the model."""
    from sharp.model import copy_pages, forward

    config, weights, kv, cos_sin, work = model.config, model.weights, model.kv, model.cos_sin, model.work
    device = model.device

    def queue(arrays: StepArrays, ops: SimpleNamespace, stream: Any) -> Array:
        return forward(config, weights, arrays, ops, kv, cos_sin, work, stream)

    def copies(pairs: Int32) -> None:
        copy_pages(device, kv, pairs)

    return Runtime(
        queue, model.ops, device, layout, work.logits, work.sampled, copies, graphs=graphs,
        decodes=model.decodes,
    )  # fmt: skip
