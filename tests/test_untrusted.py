"""Names, links and sizes in a model directory, and safetensors headers, before anything is opened."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from model_files import copy_tiny

from sharp import untrusted
from sharp.model_config import ModelFileError
from sharp.safetensors_header import MAX_HEADER_BYTES, read_header
from sharp.untrusted import SIZE_LIMITS, check_directory, file_inside
from sharp.weights import open_checkpoint


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "a\0b", "sub/../x"])
def test_only_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match="is not a plain file name"):
        file_inside(tmp_path, name)


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    """Found by fuzzing: JSON may hold half of a surrogate pair."""
    with pytest.raises(ModelFileError, match="cannot be opened"):
        file_inside(tmp_path, "\ud800")


def test_no_link_out_of_the_directory(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m")
    outside = tmp_path / "secret"
    outside.write_text("{}")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        path = folder / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to("../secret")
        with pytest.raises(ModelFileError, match="is a link out of the model's directory") as error:
            open_checkpoint(folder)
        assert name in str(error.value)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    open_checkpoint(folder)


def test_links_inside_and_to_the_directory_are_followed(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m")
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(tmp_path / "link").names == open_checkpoint(folder).names


def test_a_loop_of_links_and_a_pipe(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(ModelFileError, match=r"config\.json cannot be opened|config\.json does not exist"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # opening it would wait for ever
    with pytest.raises(ModelFileError, match=r"config\.json is not a regular file"):
        open_checkpoint(folder)


def hub_cache(root: Path) -> Path:
    """weights/tiny as Hugging Face's cache lays it out: links in snapshots/COMMIT into blobs."""
    model = root / "models--org--tiny"
    (model / "blobs").mkdir(parents=True)
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.parent.mkdir()
    copy_tiny(snapshot)
    for index, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(model / "blobs" / f"blob{index}")
        path.symlink_to(f"../../blobs/blob{index}")
    return snapshot


def test_the_hubs_cache_layout(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    open_checkpoint(snapshot).tokenizer()
    other = tmp_path / "models--org--other" / "blobs" / "b"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--org--other/blobs/b")
    with pytest.raises(ModelFileError, match="is a link out of the model's directory"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("name", SIZE_LIMITS)
def test_size_limits(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(SIZE_LIMITS[name] + 1)  # sparse: takes no disk
    with pytest.raises(ModelFileError, match=rf"{name} has [\d,]+ bytes, over the limit of [\d,]+"):
        check_directory(tmp_path)


def test_a_shard_may_be_larger_than_any_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "SIZE_LIMITS", dict.fromkeys(SIZE_LIMITS, 0))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert file_inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"


# ---- headers of safetensors files


def header(path: Path, tensors: Any, num_data_bytes: int, length: int | None = None) -> Path:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    path.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_data_bytes)
    )
    return path


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_right_header(tmp_path: Path) -> None:
    tensors = {"__metadata__": {"format": "pt"}, "b": entry([2, 3], 8, 32), "a": entry([2], 0, 8)}
    infos = read_header(header(tmp_path / "f", tensors | {"none": entry([0, 7], 8, 8)}, 32))
    assert {name: (info.shape, info.data_offsets) for name, info in infos.items()} == {
        "a": ([2], (0, 8)),
        "b": ([2, 3], (8, 32)),
        "none": ([0, 7], (8, 8)),
    }


@pytest.mark.parametrize(
    ("tensors", "num_data_bytes", "message"),
    [
        ({"a": entry([2], 0, 8)}, 7, r"tensor a lies at bytes 0 to 8 of 7: damaged or truncated"),
        ({"a": entry([2], 0, 8)}, 9, r"the tensors end at byte 8 of 9"),
        ({"a": entry([2], 1, 9)}, 9, r"tensor a at byte 1 leaves a gap"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, r"tensor b at byte 4 overlaps"),
        ({"a": entry([3], 0, 8)}, 8, r"tensor a of shape \[3\] and dtype F32 has 8 bytes"),
        ({"a": entry([2], 8, 0)}, 8, "tensor a lies at bytes 8 to 0"),
        ({"a": entry([2**62, 2**62, 16], 0, 0)}, 0, r"has 0 bytes"),
        ({"a": entry([2**62, 4], 0, 0)}, 0, r"has 0 bytes"),
        ({"a": entry([-2, -1], 0, 8)}, 8, "impossible shape"),
        ({"a": entry([1] * 9, 0, 4)}, 4, "impossible shape"),
        ({"a": entry([2**70], 0, 8)}, 8, "tensor a"),
        ({"a": entry([2], 0, 2**80)}, 8, "tensor a"),
        ({"a": entry([2], -8, 0)}, 8, "tensor a"),
        ({"a": entry([2.5], 0, 8)}, 8, r"tensor a: Expected `int`, got `float`"),
        ({"a": entry("2", 0, 8)}, 8, "tensor a: Expected `array`"),
        ({"a": entry([2], 0, 8, "F99")}, 8, "tensor a has the unknown dtype 'F99'"),
        ({"a": entry([2], 0, 8, 5)}, 8, "tensor a: Expected `str`"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor a: .*data_offsets"),
        ({"a": 3}, 8, "tensor a: Expected `object`"),
        ([1], 8, "Expected `object`"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": '
         b'{"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', 8, "leaves a gap"),
        (b"\xff\xfe", 8, "not a readable safetensors file"),
        (b"[" * 100_000, 8, "not a readable safetensors file"),
        (b"", 8, "not a readable safetensors file"),
    ],
)  # fmt: skip
def test_wrong_headers(tmp_path: Path, tensors: Any, num_data_bytes: int, message: str) -> None:
    path = header(tmp_path / "f.safetensors", tensors, num_data_bytes)
    with pytest.raises(ModelFileError, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path} is not a readable safetensors file: ")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 100])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    path = header(tmp_path / "f", {}, 0, length)
    with pytest.raises(ModelFileError, match=rf"a header of {length} bytes; the file has 10"):
        read_header(path)
    path.write_bytes(b"1234567")
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        read_header(path)
