"""Processes that have numba's compiler instead of its simulator. Knows their environment; refuses to know
what runs in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
WITH_TESTS = os.pathsep.join([str(TESTS.parent), str(TESTS)])  # a PYTHONPATH: the checkout and its tests


def environment(**more: str) -> dict[str, str]:
    """This process's, but without the simulator; `more` on top."""
    return {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"} | more


def run(code: str, *words: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -c code *words` there; what it printed is kept as text. more: of its environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, env=environment(**more), timeout=timeout,
    )  # fmt: skip


def outcome(code: str, *words: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """run(), which must succeed; the test is skipped where numba is not installed."""
    pytest.importorskip("numba")
    done = run(code, *words, timeout=timeout, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def last_line(code: str, *words: str, timeout: float = 300, **more: str) -> str:
    """The last line that outcome() printed."""
    return outcome(code, *words, timeout=timeout, **more).stdout.splitlines()[-1]
