"""Ctrl-C held back while state changes. Knows signals; refuses to know what is being protected."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the end of the block: lengths, pages and texts change together or not at all.

    Only the main thread can be interrupted, so elsewhere this does nothing. Keep the block short. It may
    nest.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is None:  # None: a handler that Python cannot put back
        yield
        return
    pressed: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        if callable(previous):
            previous(*pressed[0])
        elif previous is not signal.SIG_IGN:
            raise KeyboardInterrupt
