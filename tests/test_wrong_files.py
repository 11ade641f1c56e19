"""Wrong model files as a user meets them: one line on stderr that names the file, and exit code 1."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from model_files import change_tensors, copy_tiny, write_gguf
from tokenizers import Tokenizer as Backend

from sharp.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def gguf_with(folder: Path, damage: Callable[[bytes], bytes] = lambda data: data, **options: Any) -> Path:
    path = write_gguf(folder / "model.gguf", **options)
    path.write_bytes(damage(path.read_bytes()))
    return path


def directory_with(folder: Path, damage: Callable[[Path], Any], **config: Any) -> Path:
    path = copy_tiny(folder / "model", **config)
    damage(path)
    return path


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def add_token(folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["one token too many"])
    backend.save(str(folder / "tokenizer.json"))


def shard_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "stolen.safetensors")
    index = {"weight_map": {"model.norm.weight": "../stolen.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "stolen.safetensors")
    (folder / "model.safetensors").symlink_to("../stolen.safetensors")


def evil_name(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["\x1b[2J\nevil"] = header.pop("model.norm.weight")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# What is wrong -> (how it is made, what the line says)
WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no GGUF at all": (
        lambda f: gguf_with(f, lambda data: b"PK\x03\x04" + data[4:]),
        "not a readable GGUF file",
    ),
    "a truncated GGUF": (lambda f: gguf_with(f, lambda data: data[:-3000]), "ends at byte"),
    "a GGUF type that is not supported": (
        lambda f: gguf_with(f, kind=GGMLQuantizationType.MXFP4),
        "has type MXFP4, which is not supported; supported: F32, F16, BF16, Q8_0",
    ),
    "a GGUF that claims 2**40 tensors": (
        lambda f: gguf_with(f, lambda data: data[:8] + struct.pack("<Q", 2**40) + data[16:]),
        "1099511627776 tensors are over the limit",
    ),
    "a GGUF of another architecture": (
        lambda f: gguf_with(f, lambda data: data.replace(b"llama", b"bertx")),
        "general.architecture 'bertx' is not supported; supported: ",
    ),
    "a pre-tokenizer that is not supported": (
        lambda f: gguf_with(f, pre="tekken"),
        "tokenizer.ggml.pre 'tekken' is not supported; supported: llama-bpe",
    ),
    "a directory without weights": (
        lambda f: directory_with(f, lambda folder: (folder / "model.safetensors").unlink()),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "a truncated safetensors file": (
        lambda f: directory_with(f, rewrite("model.safetensors", lambda data: data[:-1])),
        "damaged or truncated",
    ),
    "a header longer than the file": (
        lambda f: directory_with(
            f, rewrite("model.safetensors", lambda data: struct.pack("<Q", 2**60) + data[8:])
        ),
        "a header of 1152921504606846976 bytes",
    ),
    "a tensor that is missing": (
        lambda f: change_tensors(copy_tiny(f / "model"), lambda tensors: tensors.pop("model.norm.weight")),
        "tensor model.norm.weight is missing",
    ),
    "a tensor of the wrong shape": (
        lambda f: change_tensors(
            copy_tiny(f / "model"),
            lambda tensors: tensors.update({"model.norm.weight": np.ones(5, np.float32)}),
        ),
        "tensor model.norm.weight has shape [5], the configuration needs [32]",
    ),
    "a shard outside the directory": (lambda f: directory_with(f, shard_outside), "is not a plain file name"),
    "a link out of the directory": (lambda f: directory_with(f, link_outside), "is a link out of"),
    "config.json is no JSON": (
        lambda f: directory_with(f, rewrite("config.json", lambda data: data[:40])),
        "config.json cannot be read as JSON",
    ),
    "a quantised checkpoint": (
        lambda f: copy_tiny(f / "model", quantization_config={"quant_method": "gptq"}),
        "quantization_config",
    ),
    "tokenizer.json is no tokenizer": (
        lambda f: directory_with(f, rewrite("tokenizer.json", lambda data: b'{"version": "1.0"}')),
        "tokenizer.json is not a tokenizer",
    ),
    "a tokenizer with more tokens than the embedding has rows": (
        lambda f: directory_with(f, add_token),
        "300: 'one token too many' has no row in the embedding",
    ),
    "a chat template that is no template": (
        lambda f: directory_with(f, lambda folder: (folder / "chat_template.jinja").write_text("{% if %}")),
        "/model: the chat template is not valid jinja2, line 1",
    ),
    "a name that clears the screen": (lambda f: directory_with(f, evil_name), "model.norm.weight is missing"),
    "a file that is not there": (lambda f: f / "nothing.gguf", "is neither a file or directory nor a known"),
}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("sharp: ")
    assert line.isprintable()
    return line


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = WRONG[name]
    path = make(tmp_path)
    capsys.readouterr()
    tracemalloc.start()
    line = refused(capsys, ["info", str(path)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in line
    assert str(path) in line
    assert peak < 20 << 20
    assert refused(capsys, ["generate", "--model", str(path), "--prompt", "a", "--device", "cpu"]) == line


@pytest.mark.parametrize("name", ["a truncated GGUF", "tokenizer.json is no tokenizer"])
def test_as_a_command(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    command = [sys.executable, "-m", "sharp", "info", str(make(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    assert message in line


def test_control_characters_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def extra(tensors: dict[str, Any]) -> None:
        tensors["\x1b[2J\nevil"] = np.ones(3, np.float32)

    path = change_tensors(copy_tiny(tmp_path / "model"), extra)
    assert "tensor \\x1b[2J\\nevil is not part of" in refused(capsys, ["info", str(path)])
