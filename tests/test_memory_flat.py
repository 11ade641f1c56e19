"""Many requests leave nothing behind: no object, no key, no row (a million of them: many_requests.py)."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from many_requests import run

from sharp import event_log, trace


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(
    ("admission", "overlap"), [("reserve", False), ("optimistic", False), ("optimistic", True)]
)
def test_memory_is_flat(monkeypatch: pytest.MonkeyPatch, admission: str, overlap: bool) -> None:
    """Python's own memory from the third tenth of 4,000 requests to the ninth: 2,400 requests later. The keys
    of one request's pages alone take 200 bytes; at the end of all of them little is left running."""
    monkeypatch.setattr(trace, "HISTORY", 16)
    monkeypatch.setattr(event_log, "LOG_BYTES", 20_000)
    tracemalloc.start()
    try:
        found = run(4000, traced_bytes, admission, overlap)
    finally:
        tracemalloc.stop()
    print(found)
    assert found[8][1] - found[2][1] < 100_000
