"""A file written whole or not at all.

Knows: a part beside its target, and one rename, which a file system does at once. Refuses to know what is
written. Imports no compiler.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

UNFINISHED = ".part"  # the end of the name of a file that its writer has not renamed yet
MODE = 0o644  # mkstemp's own is 0o600: a results file belongs to whoever reads the checkout


def write_whole(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Make `path` hold `data`, or leave what was there.

    sync: return when the disk has it, so that a crash of the machine cannot leave an empty file. OSError as
    the system gives it; then nothing is left behind.
    """
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
