"""Which files a model directory may make us open: regular ones, inside it, and no larger than such files are.

Knows names, sizes and links. Knows nothing of what is inside a file. A model directory comes from strangers:
a name in an index may say "../..", a file may be a link to anywhere, and JSON grows by 20 times when parsed.
"""

from __future__ import annotations

from pathlib import Path

from sharp.model_config import ModelFileError

MIB = 1 << 20
# Largest size that is read, in bytes; the largest known ones are half of it or less.
SIZE_LIMITS = {
    "config.json": MIB,
    "generation_config.json": MIB,
    "special_tokens_map.json": MIB,
    "tokenizer_config.json": 4 * MIB,
    "tokenizer.json": 64 * MIB,
    "model.safetensors.index.json": 24 * MIB,
    "chat_template.jinja": MIB // 8,
}


def check_directory(directory: Path) -> None:
    """Check every file of `directory` that has a fixed name and is there. Raises as `file_inside` does."""
    for name in SIZE_LIMITS:
        if (directory / name).is_symlink() or (directory / name).exists():
            file_inside(directory, name)


def file_inside(directory: Path, name: str) -> Path:
    """The path of a regular file of `directory`, links followed.

    The directory itself may be reached through links. A file may be one only inside the directory, or, where
    the directory is a snapshot in Hugging Face's cache (models--ORG--NAME/snapshots/COMMIT), into the blobs
    of the same model or those that all models share, which is how that cache is made.
    Raises ModelFileError: not a plain name, absent, not a regular file, outside, or larger than SIZE_LIMITS.
    """
    if not name or Path(name).name != name or "\\" in name or "\0" in name or name == "..":
        raise ModelFileError(f"{directory}: {name!r} is not a plain file name")
    path = directory / name
    try:
        found, home = path.resolve(strict=True), directory.resolve(strict=True)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links (up to Python 3.12), no Unicode
        raise ModelFileError(f"{path} cannot be opened: {error}") from None
    roots = [home]
    model = home.parent.parent
    if home.parent.name == "snapshots" and model.name.startswith("models--"):
        roots += [model / "blobs", model.parent / "blobs"]
    if not any(found.is_relative_to(root) for root in roots):
        raise ModelFileError(f"{path} is a link out of the model's directory, to {found}: not followed")
    if not found.is_file():
        raise ModelFileError(f"{path} is not a regular file")
    size, limit = found.stat().st_size, SIZE_LIMITS.get(name)
    if limit is not None and size > limit:
        raise ModelFileError(f"{path} has {size:,} bytes, over the limit of {limit:,} for such a file")
    return path
