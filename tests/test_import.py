"""Layers and import time: what may import what, checked in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "numba",
    "cuda",
    "numpy",
    "tokenizers",
    "gguf",
    "safetensors",
    "jinja2",
    "tqdm",
    "typer",
    "rich",
    "torch",
)
PURE = (
    "config",
    "request",
    "plan",
    "blocks",
    "batching",
    "policies",
    "scheduler",
    "answer",
    "door",
    "interrupts",
    "live",
    "trace",
    "budget",
    "curves",
    "engine",
)


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules after `statement` in a fresh interpreter."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str], allowed: tuple[str, ...] = ()) -> set[str]:
    return {name for name in HEAVY if name in modules and name not in allowed}


def test_import_sharp_is_light() -> None:
    loaded = modules_after("import sharp; sharp.__version__; dir(sharp)")
    assert not heavy(loaded)
    assert not {name for name in loaded if name.startswith(("sharp.", "kernels_numba"))}


def test_import_sharp_is_fast() -> None:
    """Under 0.5 s, the interpreter's own start included: the best of three."""
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import sharp"], cwd=ROOT, check=True)
        best = min(best, time.perf_counter() - start)
    assert best < 0.5


@pytest.mark.parametrize("name", PURE)
def test_scheduling_needs_no_compiler(name: str) -> None:
    loaded = modules_after(f"import sharp.{name}")
    assert not heavy(loaded, allowed=("numpy",))
    assert "kernels_numba" not in loaded
    assert not loaded & {"sharp.model", "sharp.device", "sharp.weights", "sharp.staging"}


def test_public_names() -> None:
    """Every exported name resolves, and none of them pulls in a compiler."""
    loaded = modules_after("import sharp\nfor name in sharp.__all__: getattr(sharp, name)")
    assert not heavy(loaded, allowed=("numpy",))
    import sharp

    with pytest.raises(AttributeError, match="nothing"):
        _ = sharp.nothing


def test_kernels_know_nothing_of_the_engine() -> None:
    for path in (ROOT / "kernels_numba").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import sharp" not in text, path
        assert "from sharp" not in text, path
