"""What in the interpreter would stop a loop of steps of a millisecond, and how an engine keeps it away:
collections of garbage, and the turns of other threads.

Python's collector, now and then, looks at every object of the process: with the kernels' compiler imported,
hundreds of thousands, and tens of milliseconds. While an engine's thread runs, what was there when it started
is left out (gc.freeze), so that a collection looks at what came since. When an engine has had nothing to do
for a while after many steps, everything is looked at once, and what remains is left out again; when the last
engine ends, nothing is left out any more. Garbage among what is left out is kept so long.

A thread that computes keeps the interpreter for 5 ms before another gets it, and the loop lets go of it in
every call of the driver, a dozen a step: beside a thread that queued 512 requests, the first step was
launched when all of them were there. So turns are SWITCH_S long meanwhile. Knows: gc, sys. Refuses to know
engines.
"""

from __future__ import annotations

import gc
import sys
import threading

IDLE_S = 1.0  # without work, before all is looked at: who sends one request after another never waits for it
STEPS = 1_000  # since all was looked at last: before that there is little to find
SWITCH_S = 2e-4  # of an interpreter's turn: a call of the driver or two
_lock = threading.Lock()
_holders = 0
_switch_s = 0.0  # as it was before,
_short_s = 0.0  # and as it is meanwhile: rounded to microseconds


def hold() -> None:
    """A loop starts: until release(), what is there is left out of collections, and turns are short. May be
    nested; takes no time."""
    global _holders, _switch_s, _short_s
    with _lock:
        if not _holders:
            _switch_s = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_S, _switch_s))
            _short_s = sys.getswitchinterval()
        _holders += 1
        gc.freeze()


def release() -> None:
    """A loop has ended. After the last one all is as before."""
    global _holders
    with _lock:
        if not _holders:
            raise RuntimeError("release() without a hold()")
        _holders -= 1
        if not _holders:
            gc.unfreeze()
            if sys.getswitchinterval() == _short_s:  # else somebody has chosen another since
                sys.setswitchinterval(_switch_s)


def collect() -> None:
    """Look at everything now, and leave what remains out again while anybody holds."""
    with _lock:
        gc.unfreeze()
    gc.collect()  # not under the lock: a finalizer may close an engine, and wait for its release()
    with _lock:
        if _holders:
            gc.freeze()
