"""How a command ends when something is wrong: one line on stderr and an exit code, never a traceback.

2: what was asked cannot be (an unknown option, a bad value, a file that is no prompts file).
1: it could be, but failed here (no such model, no GPU, no network, too little memory).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class CommandError(Exception):
    """Ends the command with this message and exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def bad_input() -> Iterator[None]:
    """ValueError and TypeError inside mean: the caller gave something wrong."""
    from sharp.model_config import ModelFileError

    try:
        yield
    except ModelFileError:
        raise
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), 2) from error


def explain(error: Exception) -> CommandError:
    """Any error as one to show: as it is where our own code worded it for people, else named as a bug."""
    from sharp.config import RungRefused
    from sharp.hub import HubError
    from sharp.model_config import ModelFileError
    from sharp.pull import PullError

    if isinstance(error, CommandError):
        return error
    if isinstance(error, ModelFileError):
        return CommandError(printable(str(error)), 1)
    if isinstance(error, RungRefused):
        return CommandError(str(error), 2)
    if isinstance(error, (PullError, HubError, OSError, MemoryError)):
        return CommandError(str(error) or type(error).__name__, 1)
    if isinstance(error, RuntimeError):  # no such device, an engine that died: worded where it was raised
        return CommandError(str(error), 1)
    what = f"{type(error).__name__}: {error}"
    return CommandError(f"{what} (unexpected; `sharp --traceback ...` shows where)", 1)


def printable(text: str) -> str:
    """One line, not endless, without control characters: a name in a model file could move the cursor."""
    text = text if len(text) <= 2000 else text[:2000] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """A line for the person, not for the pipe."""
    print(text, file=sys.stderr, flush=True)
