"""Turns and barriers of simt_warps.py: which warp goes on, and what it waits for.

Knows: conditions, arrivals, bytes. Refuses to know: instructions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np


class Stuck(RuntimeError):
    """Every warp waits."""


def _at_once() -> bool:
    return True


class Turns:
    """Whose turn it is among the warps of a block."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.waiting: list[tuple[Callable[[], bool], str]] = [(_at_once, "start")] * count
        self.done = [False] * count
        self.error: BaseException | None = None
        self.gates = [threading.Semaphore(0) for _ in range(count)]

    def next(self) -> None:
        """Let one go on whose wait is over; if there is none, all go on with an error."""
        able = [w for w, (over, _) in enumerate(self.waiting) if not self.done[w] and over()]
        if able:
            self.gates[int(self.rng.choice(able))].release()
        elif not all(self.done):
            waits = ", ".join(
                f"warp {w} for {self.waiting[w][1]}" for w, done in enumerate(self.done) if not done
            )
            self.fail(Stuck(f"hangs: {waits}"))

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        for gate in self.gates:
            gate.release()

    def wait(self, warp: int, over: Callable[[], bool], what: str) -> None:
        self.waiting[warp] = over, what
        self.next()
        self.gates[warp].acquire()
        if self.error is not None:
            raise self.error

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run every warp's body to its end; raises the first error."""

        def thread(warp: int) -> None:
            self.gates[warp].acquire()
            try:
                if self.error is None:
                    bodies[warp]()
                    self.done[warp] = True
                    self.next()
            except BaseException as error:  # to be raised where the block was started
                self.done[warp] = True
                self.fail(error)

        threads = [threading.Thread(target=thread, args=(warp,), daemon=True) for warp in range(len(bodies))]
        for one in threads:
            one.start()
        self.next()
        for one in threads:
            one.join()
        if self.error is not None:
            raise self.error


class Barrier:
    """An mbarrier: arrivals and bytes of a phase; copies that have not landed yet."""

    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.bytes = self.phase = 0
        self.flying: list[Callable[[], int]] = []

    def arrive(self, count: int = 1) -> None:
        if count > self.left:
            raise RuntimeError(f"{count} arrivals at a barrier whose phase waits for {self.left}")
        self.left -= count
        self.turn()

    def turn(self) -> None:
        if self.left == 0 and self.bytes == 0 and not self.flying:
            self.phase += 1
            self.left = self.count

    def ended(self, parity: int) -> bool:
        """As the instruction is: also true for who asks for a phase before the one that is under way."""
        if self.left == 0 and self.phase % 2 == parity:
            flying, self.flying = self.flying, []
            for land in flying:
                self.bytes -= land()
            self.turn()
        return self.phase % 2 != parity
