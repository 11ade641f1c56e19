"""Streams, events and asynchronous copies as the driver's documentation has them, in host memory: work runs
in a random order among those allowed, as soon or as late as they allow; some worlds favour one stream.

What has no event between it and what it needs runs too early or too late here sooner or later. It says
nothing about a GPU: only whether work that is queued asks for the order that it relies on.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque

import numpy as np

from sharp import driver, graphs, runtime
from sharp.memory import DeviceArray, PinnedPool


class World:
    """All streams; time passes only where somebody waits."""

    def __init__(self, seed: int) -> None:
        self.rng, self.streams, self.held = random.Random(seed), [], []
        self.favoured, self.frozen = self.rng.choice(["", "", "copy", "compute"]), False
        self.interrupted, self.interruptions = 0.0, 0  # chance that Ctrl-C comes where work is queued

    def allocate(self, num_bytes):
        """u8[num_bytes] of memory with an address, full of 0xAB."""
        memory = np.full(num_bytes + 256, 0xAB, np.uint8)
        self.held.append(memory)
        skip = -memory.ctypes.data % 256
        return memory[skip : skip + num_bytes]

    def turn(self, done):
        """Let work happen, one piece of a random stream after the other, until done()."""
        while not done():
            assert self.one(), "a wait for what will never happen"

    def one(self):
        """Run one piece of work, of the favoured stream if that has any; False if there is none."""
        ready = [stream for stream in self.streams if stream.ready()]
        first = [stream for stream in ready if stream.role == self.favoured]
        if ready:
            self.rng.choice(first or ready).run_one()
        return bool(ready)

    def drift(self):
        """Some time passes: anything from nothing to all of what may happen."""
        for _ in range(self.rng.choice([0, 0, 1, 3, 50])):
            if not self.frozen:
                self.one()

    def ctrl_c(self):
        if self.rng.random() < self.interrupted:
            self.interruptions += 1
            raise KeyboardInterrupt


class ModelEvent:
    def __init__(self, *, timing=False):
        self.records, self.timing, self.happened = 0, timing, 0

    @property
    def done(self):
        return self.happened == self.records

    def synchronize(self):
        wanted = self.records
        World.now.turn(lambda: self.happened >= wanted)

    def elapsed_ms(self, end):
        assert self.timing
        assert end.timing
        assert self.done, "the time since an event that has not happened"
        assert end.done, "the time until an event that has not happened"
        return 1.0


class ModelStream:
    def __init__(self, **_):
        self.work, self.handle, self.role = deque(), id(self), ""
        World.now.streams.append(self)

    def queue(self, action, ready=lambda: True):
        World.now.ctrl_c()
        World.now.drift()
        self.work.append((action, ready))

    def ready(self):
        return bool(self.work) and self.work[0][1]()

    def run_one(self):
        self.work.popleft()[0]()

    def record(self, event):
        number = event.records + 1

        def happen():
            event.happened = number

        self.queue(happen)
        event.records = number

    def wait(self, event):
        wanted = event.records  # those made so far
        self.queue(lambda: None, lambda: event.happened >= wanted)

    def synchronize(self):
        World.now.turn(lambda: not self.work)


def at(address, num_bytes):
    """The bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def array_at(array):
    """A DeviceArray's memory as a numpy array."""
    return at(array.address, array.nbytes).view(array.dtype).reshape(array.shape)


def copy(target, source, num_bytes, stream, what=""):
    def move():
        at(target, num_bytes)[:] = at(source, num_bytes)

    stream.queue(move)


class ModelDevice:
    kind, dtype = "cuda", "bfloat16"

    def __init__(self):
        self.compute_stream, self.copy_stream = ModelStream(), ModelStream()
        self.stream = self.compute_stream
        self.compute_stream.role, self.copy_stream.role = "compute", "copy"
        self.pool = PinnedPool(lambda n, event: World.now.allocate(n), ModelEvent)

    def empty(self, shape, dtype=None, *, term="other"):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return DeviceArray(World.now.allocate(max(size, 1)).ctypes.data, shape, dtype)


class ModelGraph:
    """What was queued while it was captured, to be queued again."""

    num_nodes = 1

    def __init__(self, work, stream, what):
        self.work = work

    def upload(self, stream):
        pass

    def replay(self, stream):
        self.work(stream)

    def destroy(self):
        self.work = None


def install(monkeypatch, seed, apply):
    """Put the model in the driver's place. apply(state, packed, sampled, layout): what apply_step does."""
    world = World.now = World(seed)
    for name, stand_in in {
        "Event": ModelEvent, "Stream": ModelStream, "copy_to_device": copy, "copy_to_host": copy,
        "copy_on_device": copy, "memory_info": lambda: (1 << 30, 1 << 31), "bind": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(driver, name, stand_in)
    monkeypatch.setattr(graphs, "Graph", ModelGraph)

    def prepare(state, packed, sampled, layout):
        arrays = tuple(map(array_at, (state, packed, sampled)))
        return lambda stream: stream.queue(lambda: apply(*arrays, layout))

    monkeypatch.setattr(runtime, "prepare_apply_step", prepare)
    return world
