"""Loading is lean and fast: how much memory over the weights it takes, and how long the demo model takes."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from model_files import change_tensors, copy_tiny, write_gguf

from sharp.weights import load_weights, open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 60_000  # rows of 32: an embedding of 7.7 MB as float32, the largest tensor by far


def enlarge(tensors: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight"):
        if name in tensors:
            tensors[name] = rng.standard_normal((VOCAB, 32), dtype=np.float32).astype(tensors[name].dtype)


def large_directory(folder: Path, dtype: Any) -> Path:
    def change(tensors: dict[str, np.ndarray]) -> None:
        enlarge(tensors)
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    return change_tensors(copy_tiny(folder / "m", vocab_size=VOCAB), change)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "gguf F32", "gguf Q8_0", "gguf Q4_0", "gguf BF16"])
def test_memory_over_the_weights_is_one_tensor(tmp_path: Path, kind: str) -> None:
    """What is allocated at the worst moment, by tracemalloc, less what is kept: one tensor as float32."""
    if kind.startswith("gguf"):
        stored = GGMLQuantizationType[kind.split()[1]]
        path = write_gguf(tmp_path / "m.gguf", stored, change=enlarge)
    else:
        path = large_directory(
            tmp_path, {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
        )
    kept = []

    def upload(array: np.ndarray) -> np.ndarray:
        kept.append(array)
        return array

    checkpoint = open_checkpoint(path)
    tracemalloc.start()
    load_weights(checkpoint, upload, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    own = sum(array.nbytes for array in kept)
    assert own == 4 * checkpoint.config.num_parameters
    largest = max(array.nbytes for array in kept)
    assert largest == VOCAB * 32 * 4
    assert peak <= own + largest, f"{(peak - own) / largest:.2f} of the largest tensor"


@pytest.mark.parametrize("kind", ["F32", "gguf Q8_0"])
def test_also_where_gate_and_up_are_the_largest(tmp_path: Path, kind: str) -> None:
    inner = 40_000

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            shape = (32, inner) if "down" in name else (inner, 32) if "gate" in name or "up" in name else None
            tensors[name] = tensor.astype(np.float32) if shape is None else np.ones(shape, np.float32)

    if kind == "F32":
        path = change_tensors(copy_tiny(tmp_path / "m", intermediate_size=inner), change)
    else:
        stored = GGMLQuantizationType[kind.split()[1]]
        path = write_gguf(tmp_path / "m.gguf", stored, change=change, inner=inner)
    checkpoint = open_checkpoint(path)
    tracemalloc.start()
    weights = load_weights(checkpoint, lambda array: array, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    own, largest = 4 * checkpoint.config.num_parameters, inner * 32 * 4
    assert weights.layers[0].gate_up.nbytes == 2 * largest
    assert peak <= own + largest * 1.02, f"{(peak - own) / largest:.2f} of the largest tensor"


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """Files are mapped: what describes a model costs the same whatever the size of its tensors."""
    path = large_directory(tmp_path, np.float32)
    tracemalloc.start()
    checkpoint = open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checkpoint.num_bytes > 14_000_000
    assert peak < 500_000


def test_the_demo_model_loads_in_time(demo_model: Path) -> None:
    """Tokenizer and weights in under 3 s of processor time: waiting for other programs costs none of it."""
    code = (
        "import sys, time\n"
        "from sharp.weights import load_weights, open_checkpoint\n"
        "started = time.process_time()\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "checkpoint.tokenizer()\n"
        "load_weights(checkpoint, lambda array: array, progress=False)\n"
        "print(time.process_time() - started)\n"
    )
    times = []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(demo_model)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
    assert min(times) < 3.0, times


def test_there_is_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(open_checkpoint(ROOT / "weights" / "tiny"), lambda array: array, progress=True)
    assert "loading: 100%" in capsys.readouterr().err
