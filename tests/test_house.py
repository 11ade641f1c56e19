"""The house around the engine: README keeps its promises, and all works where CUDA cannot be imported."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
JUSTFILE = (ROOT / "Justfile").read_text(encoding="utf-8")
RECIPES = set(re.findall(r"^([a-z][a-z-]*)(?: [^:\n]*)?:(?!=)", JUSTFILE, re.MULTILINE))
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
SHELL_LINES = [line for block in SHELL_BLOCKS for line in block.splitlines()]

# What a Mac does: these do not exist, whatever asks for them.
BLOCKER = """
import importlib.abc, sys

class NoCuda(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "numba_cuda", "llvmlite", "cuda"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
        return None

sys.meta_path.insert(0, NoCuda())
# Some installations redirect numba.cuda at start-up; on a Mac nothing of it has been imported.
for name in [n for n in sys.modules if n.partition(".")[0] in ("numba", "numba_cuda", "llvmlite", "cuda")]:
    del sys.modules[name]
"""


def without_cuda(folder: Path, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python -m WORDS` where numba, numba.cuda and cuda.* cannot be imported."""
    (folder / "block_cuda.py").write_text(BLOCKER, encoding="utf-8")
    module, *arguments = words
    code = (
        "import block_cuda, runpy, sys; "
        f"sys.argv = {[module, *arguments]!r}; runpy.run_module({module!r}, run_name='__main__')"
    )
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "PYTEST_"))}
    environment["PYTHONPATH"] = paths
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
    )


def test_readme_begins_with_the_two_commands() -> None:
    assert SHELL_LINES[0] == (
        "python3 -m venv .venv && .venv/bin/pip install rust-just && .venv/bin/just demo"
    )
    assert SHELL_LINES[1] == ".venv/bin/just test"


def test_readme_names_recipes_that_exist() -> None:
    named = re.findall(r"(?<![\w-])just (?:python=python3 )?([a-z][a-z-]*)", README)
    assert len(named) > 5
    assert set(named) <= RECIPES
    assert "python := " in JUSTFILE


def test_the_justfile_has_what_people_look_for() -> None:
    wanted = "setup demo fmt lint type test test-gpu bench bench-import nb lab loc lock pull"
    assert set(wanted.split()) <= RECIPES


def test_readme_names_commands_and_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from sharp.__main__ import main

    lines = [shlex.split(line)[1:] for line in SHELL_LINES if line.startswith(".venv/bin/sharp ")]
    assert len(lines) > 4
    for command, *words in lines:
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert f"{word} " in shown, (command, word)
    assert [main([name, "--help"]) for name in ("generate", "pull", "probe")] == [0, 0, 0]
    shown = capsys.readouterr().out
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert option in shown


def test_readme_names_files_that_exist() -> None:
    tree = README.split("## Where to read next")[1].split("```")[1]
    folder = ""
    named = []
    for line in tree.strip("\n").splitlines():
        entries = re.findall(r"(?:^|  )([\w./]+(?:\.py|\.toml|/))(?=[ :])", line)
        if not line.startswith(" "):
            folder = entries[0]
            assert (ROOT / folder).is_dir(), folder
        named += [folder + entry for entry in entries if entry != folder]
    named += re.findall(r"\b(?:sharp|kernels_numba|notebooks|tests|weights)/[\w./]*\w", README)
    named += re.findall(r"`([\w.-]+\.(?:lock|toml|md)|LICENSE)`", README)
    assert len(named) > 15
    made_by_measuring = {"notebooks/results"}
    absent = [name for name in named if not (ROOT / name).exists() and name not in made_by_measuring]
    assert not absent


def test_readmes_python_names_what_exists() -> None:
    import sharp

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    tree = ast.parse("\n".join(blocks))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.module.partition(".")[0] == "sharp"
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llm":
            assert hasattr(sharp.LLM, node.attr) or node.attr == "engine"


def test_ci_calls_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert re.search(r"^\.venv/bin/just test\b", text, re.MULTILINE)
    assert "python3 -m venv .venv && .venv/bin/pip install" in text
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)


def test_hooks_download_nothing() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: (\S+)", config) == ["local"]
    assert set(re.findall(r"language: (\S+)", config)) == {"system"}
    for path in re.findall(r"tests/\w+\.py", config):
        assert (ROOT / path).is_file(), path


def test_licence_typing_and_extras() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (ROOT / "sharp" / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) == {"cuda12", "cuda13", "notebooks", "dev", "bench"}
    assert project["requires-python"] == ">=3.11,<3.14"


def test_demo_without_cuda(tmp_path: Path) -> None:
    done = without_cuda(tmp_path, "sharp", "demo", "--model", "weights/tiny", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "sharp: on cpu" in done.stderr
    assert "padding of rectangles" in done.stdout


def test_info_without_cuda(tmp_path: Path) -> None:
    done = without_cuda(tmp_path, "sharp", "info")
    assert done.returncode == 0, done.stderr
    assert "numba-cuda cannot be imported" in done.stdout
    assert re.search(
        r"^  gemm +reference, naive, plain, mma_step, wgmma, mma_sync, hopper, gemv$",
        done.stdout,
        re.MULTILINE,
    )


def test_asking_for_cuda_without_cuda(tmp_path: Path) -> None:
    words = ["generate", "--model", "weights/tiny", "--prompt", "a", "--device", "cuda"]
    done = without_cuda(tmp_path, "sharp", *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "numba-cuda cannot be imported" in done.stderr


def test_the_reference_tests_pass_without_cuda(tmp_path: Path) -> None:
    files = [
        "test_ops.py",
        "test_model.py",
        "test_scheduler.py",
        "test_engine.py",
        "test_weights.py",
        "test_ladder.py",
    ]
    # Of the op tests those of the reference rung: the others launch kernels.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "(reference or not test_ops) and not plain"]
    done = without_cuda(tmp_path, "pytest", *options, *(f"tests/{name}" for name in files), timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 50, done.stdout[-500:]
