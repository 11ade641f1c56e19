"""Fuzzing in CI: thousands of damaged files in a process with little memory; any JSON in any place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Corpus, damage, damage_json
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import TINY, copy_tiny

from sharp import tokenizer as tokenizer_module
from sharp.model_config import ModelFileError
from sharp.tokenizer import Tokenizer
from sharp.weights import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def fuzz(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "fuzzing.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)


def test_thousands_of_damaged_files() -> None:
    done = fuzz("--cases", "4000", "--seconds", "60", "--seed", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["findings"] == []
    assert result["cases"] > 1000  # on a very busy machine the time ends it
    assert result["outcomes"]["refused"] > result["cases"] / 5
    assert result["outcomes"]["opened"] > result["cases"] / 50
    assert set(result["files"]) == {
        ".safetensors", ".gguf", ".jinja", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "model.safetensors.index.json",
    }  # fmt: skip


def test_the_fuzzer_finds_what_is_broken() -> None:
    """With the checks of a configuration taken out it must complain, or its silence means nothing."""
    code = (
        "import sys, types; sys.path[:0] = ['tests', '.']\n"
        "import fuzzing, sharp.model_config as config\n"
        "config.ModelConfig.__post_init__ = lambda self: None\n"
        "print(len(fuzzing.run(1500, 60, 0, report=lambda text: None)['findings']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_case_is_made_again_by_its_seed(tmp_path: Path) -> None:
    import random

    corpus = Corpus(tmp_path)
    for path in corpus.paths:
        made = [damage(path, corpus.bytes_of[path], random.Random(5)) for _ in range(2)]
        assert made[0] == made[1]
    assert any(
        damage_json(corpus.bytes_of[path], random.Random(1)) != corpus.bytes_of[path]
        for path in corpus.paths
        if path.suffix == ".json"
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tiny(tmp_path_factory.mktemp("fuzz") / "m")


@settings(max_examples=300, deadline=2000)
@given(data=st.data())
def test_any_value_in_any_place(folder: Path, data: st.DataObject) -> None:
    """A key of a file, at any depth, gets any JSON value."""
    name = data.draw(st.sampled_from(FILES))
    tree = json.loads((TINY / name).read_text(encoding="utf-8"))
    node: Any = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        deeper = isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans())
        if not deeper:
            break
        node = node[key]
    node[key] = data.draw(VALUES)
    try:
        (folder / name).write_text(json.dumps(tree), encoding="utf-8")
        checkpoint = open_checkpoint(folder)
        checkpoint.tokenizer().encode("hello")
    except ModelFileError as error:
        if str(folder) not in str(error):
            raise
    finally:
        (folder / name).write_bytes((TINY / name).read_bytes())


class PanicException(BaseException):
    """What a panic in Rust looks like from Python: no Exception."""


def test_a_panic_of_the_library_is_a_clean_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Tokenizer.from_hf(folder, ())

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise PanicException("index out of bounds")

        from_buffer = __getattr__

    monkeypatch.setattr("sharp.tokenizer_hf.Backend", Broken())
    with pytest.raises(
        ModelFileError, match=r"tokenizer\.json is not a tokenizer: the tokenizers library failed: in"
    ):
        Tokenizer.from_hf(folder, ())
    monkeypatch.setattr(good, "_backend", Broken())
    for call in (lambda: good.encode("a"), lambda: good.decode([1])):
        with pytest.raises(ValueError, match="the tokenizers library failed: index out of bounds"):
            call()
    with pytest.raises(KeyboardInterrupt), tokenizer_module.library_errors():
        raise KeyboardInterrupt
