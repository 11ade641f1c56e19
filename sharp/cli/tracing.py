"""--trace-out: the trace of a command's run as a file, for ui.perfetto.dev or chrome://tracing.

Knows a path and an engine's trace; refuses to know what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sharp.cli.errors import CommandError, say

if TYPE_CHECKING:
    from sharp.llm import LLM

TraceOut = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write when each phase of the latest steps ran, for ui.perfetto.dev."),
]


def check_trace_out(path: Path | None) -> None:
    """CommandError where no file can be written, before a model is loaded for it."""
    if path is None:
        return
    from kernels_numba.files import refusal

    why_not = refusal(path)
    if why_not:
        raise CommandError(f"--trace-out is {path}, {why_not}", 2)


@contextmanager
def traced(llm: LLM, path: Path | None) -> Iterator[None]:
    """Save the engine's trace at the end, also at the end by an error or a Ctrl-C: that run is looked for."""
    try:
        yield
    finally:
        if path is not None:
            trace = llm.engine.trace
            trace.save(path)
            lost = f" (the latest; {trace.dropped:,} older spans had no room)" if trace.dropped else ""
            say(f"sharp: trace in {path}{lost}")
