"""`sharp kernels`: the cache of compiled kernels, shown, filled and emptied; what `sharp info` says of it."""

from __future__ import annotations

from pathlib import Path

import no_simulator
import pytest

from kernels_numba import cubins
from sharp.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The cache, moved to a folder of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cubins, "cache_directory", lambda: tmp_path / "kernels")
    cubins.write_cubin(tmp_path / "kernels" / "a-sm_90a-1.cubin", "entry", b"x" * 1000)
    cubins.write_cubin(tmp_path / "kernels" / "b-sm_90a-1.cubin", "entry", b"x" * 1000)
    return tmp_path / "kernels"


def test_what_the_cache_holds(place, capsys):
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out == f"{place}: 2 kernels, 2.1 KiB\n"
    assert main(["info"]) == 0
    assert f"{place} (2 kernels, 2.1 KiB)" in capsys.readouterr().out


def test_emptying_it(place, capsys):
    assert main(["kernels", "--clear"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{place}: 0 kernels, 0 bytes\n"
    assert shown.err == f"sharp: deleted 2 kernels (2.1 KiB) of {place}\n"
    assert list(place.iterdir()) == []
    assert main(["kernels", "--clear"]) == 0  # nothing left, nothing wrong


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--arch", "sm_90a"], 2, "--arch says what to --build for; give both"),
        (["--build", "--arch", "hopper"], 2, "target is 'hopper'; a name like sm_86 or sm_90a is required"),
    ],
)
def test_what_it_refuses(words, code, message, place, capsys, monkeypatch):
    from kernels_numba import compiler

    monkeypatch.setattr(compiler, "AVAILABLE", True)
    monkeypatch.setattr(compiler, "SIMULATOR", False)
    assert main(["kernels", *words]) == code
    assert capsys.readouterr().err == f"sharp: {message}\n"


@pytest.mark.skipif(
    "not __import__('kernels_numba.compiler').compiler.SIMULATOR", reason="needs the simulator"
)
def test_building_without_a_compiler(place, capsys):
    assert main(["kernels", "--build"]) == 1
    assert capsys.readouterr().err.startswith(
        "sharp: kernels cannot be compiled here: numba's simulator is on"
    )


# The real command with the tests' toy kernels for those of the ops.
BUILD = """
import sys
from kernels_numba import prebuild
prebuild.kernel_modules = lambda: {modules!r}
from sharp.__main__ import main
sys.exit(main({words!r}))
"""


def build(folder, modules, *words):
    pytest.importorskip("numba")
    code = BUILD.format(modules=modules, words=["kernels", *words])
    here = {"PYTHONPATH": no_simulator.WITH_TESTS, "XDG_CACHE_HOME": str(folder)}
    return no_simulator.run(code, timeout=120, **here)


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="moves the cache by XDG_CACHE_HOME")
def test_building(tmp_path):
    done = build(tmp_path, ["toy_prebuild"], "--build", "--arch", "sm_90a")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("sharp: sm_90a: 0 kernels cached, 4 compiled in ")
    assert done.stdout.startswith(f"{tmp_path}/sharp/kernels: 4 kernels, ")
    done = build(tmp_path, ["toy_prebuild"], "--build", "--arch", "sm_90a")
    assert done.stderr == "sharp: sm_90a: 4 kernels cached, 0 compiled\n"
    done = build(tmp_path, ["toy_bad"], "--build", "--arch", "sm_90a")
    assert done.returncode == 1
    assert "sharp: refused: TypingError: " in done.stderr
    assert "sharp: deadly: its compiling process ended with status 9\n" in done.stderr
    assert done.stderr.endswith(", 2 failed\n")
