"""The rungs of one op: its implementations under their names, all with one signature.

Rule for names: those an op file itself defines (its built-ins, "reference" and "plain" among them) cannot be
registered again, because tests and other rungs are judged by them. Any other name can, and the newest wins: a
notebook cell that registers its kernel may be run again after an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rung = Callable[..., None]


def make_register(op: str, rungs: dict[str, Rung]) -> Callable[[str, Rung], None]:
    """The `register(name, fn)` of an op whose built-in rungs are those in `rungs` now."""
    built_in = frozenset(rungs)

    def register(name: str, fn: Rung) -> None:
        """Add the rung `fn` under `name`; ValueError for a built-in or empty name, TypeError for no
        function."""
        if not name.isidentifier():
            raise ValueError(f"{op}: rung name is {name!r}; it must be a Python identifier")
        if name in built_in:
            raise ValueError(f"{op}: {name!r} is a built-in rung and cannot be replaced; choose another name")
        if not callable(fn):
            raise TypeError(f"{op}: rung {name!r} is a {type(fn).__name__}; it must be a function")
        rungs[name] = fn

    return register


def pick(op: str, rungs: dict[str, Rung], name: str) -> Any:
    """The rung called `name`; ValueError that lists what exists."""
    if name not in rungs:
        raise ValueError(f"{op}: no rung {name!r}; there are {', '.join(sorted(rungs))}")
    return rungs[name]
