"""Collections of garbage that do not stop a loop of steps of a millisecond.

Python's collector, now and then, looks at every object of the process: with the kernels' compiler imported,
hundreds of thousands, and tens of milliseconds. While an engine's thread runs, what was there when it started
is left out (gc.freeze), so that a collection looks at what came since. When an engine has had nothing to do
for a while after many steps, everything is looked at once, and what remains is left out again; when the last
engine ends, nothing is left out any more. Garbage among what is left out is kept so long. Knows: gc. Refuses
to know engines.
"""

from __future__ import annotations

import gc
import threading

IDLE_S = 1.0  # without work, before all is looked at: who sends one request after another never waits for it
STEPS = 1_000  # since all was looked at last: before that there is little to find
_lock = threading.Lock()
_holders = 0


def hold() -> None:
    """A loop starts: leave what is there out of collections until release(). May be nested; takes no time."""
    global _holders
    with _lock:
        _holders += 1
        gc.freeze()


def release() -> None:
    """A loop has ended. After the last one, collections look at everything again."""
    global _holders
    with _lock:
        if not _holders:
            raise RuntimeError("garbage.release() without a hold()")
        _holders -= 1
        if not _holders:
            gc.unfreeze()


def collect() -> None:
    """Look at everything now, and leave what remains out again while anybody holds."""
    with _lock:
        gc.unfreeze()
        gc.collect()
        if _holders:
            gc.freeze()
