"""A file written whole or not at all.

Knows: a part beside its target, and one rename, which a file system does at once. Refuses to know what is
written. Imports no compiler.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

UNFINISHED = ".part"  # the end of the name of a file that its writer has not renamed yet
MODE = 0o644  # mkstemp's own is 0o600: a results file belongs to whoever reads the checkout


def refusal(path: Path) -> str:
    """Why write_whole could not make this file, as words behind its name; "" where it could."""
    if path.is_dir():
        return "a folder; the name of a file is required"
    if path.exists() and not path.is_file():
        return "not a regular file"
    if not path.parent.is_dir():
        return f"but there is no folder {path.parent}"
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return ""
    except OSError as error:
        return f"which cannot be written: {error.strerror or error}"


def write_whole(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Make `path` hold `data`, or leave what was there.

    sync: return when the disk has it, so that a crash of the machine cannot leave an empty file. OSError as
    the system gives it, or where `path` is a device or a pipe, which a rename would replace; then nothing is
    left behind.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(part, MODE)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
