"""Files that are written whole or not at all, and where none can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernels_numba.files import refusal, write_whole


def test_what_was_there_stays_or_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    write_whole(path, b"one")
    write_whole(path, b"two", sync=True)
    assert path.read_bytes() == b"two"

    def full(*args: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no room"):
        write_whole(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_no_device_and_no_pipe_is_replaced(tmp_path: Path) -> None:
    """A rename over /dev/null would take it away, for whoever may do that."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        write_whole(pipe, b"x")
    assert pipe.is_fifo()
    assert refusal(pipe) == "not a regular file"
    assert refusal(Path("/dev/null")) == "not a regular file"


def test_where_no_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path / "new") == ""
    (tmp_path / "old").write_text("x")
    assert refusal(tmp_path / "old") == ""
    assert refusal(tmp_path).startswith("a folder")
    assert refusal(tmp_path / "no" / "new") == f"but there is no folder {tmp_path / 'no'}"
    assert refusal(Path("new")) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert refusal(tmp_path / "new") == "which cannot be written: Permission denied"


def denied(**options: object) -> None:
    raise PermissionError(13, "Permission denied")
