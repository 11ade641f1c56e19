"""The setup before anything is installed: the lock file, what a machine gets, and when pip is called."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sharp import environment
from sharp.environment import Environment, SetupError, choose_sections, pin_name, read_sections

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def versions(section: str) -> dict[str, str]:
    """{package: version} of a section of the lock."""
    blocks = read_sections(LOCK)[section]
    return {pin_name(block): block.split("==")[1].split()[0] for block in blocks}


def test_the_lock_holds_no_addresses() -> None:
    for forbidden in ("://", " @ ", "--index", "--extra-index", "--find-links", "--trusted-host", "file:"):
        assert forbidden not in LOCK
    assert not re.search(r"\b(\w+\.)+(org|com|io|net)\b", LOCK)


def test_every_pin_is_exact_and_hashed() -> None:
    sections = read_sections(LOCK)
    assert tuple(sections) == environment.SECTIONS
    for blocks in sections.values():
        assert blocks
        for block in blocks:
            first, *hashes = block.split(" \\\n")
            assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+( ; .+)?", first), first
            assert hashes
            assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes), first


def test_sections_agree_on_versions() -> None:
    run, dev, notebooks = versions("run"), versions("dev"), versions("notebooks")
    cuda12, cuda13 = versions("cuda12"), versions("cuda13")
    for one, other in (
        (dev, notebooks),
        (dev, cuda12),
        (dev, cuda13),
        (notebooks, cuda12),
        (notebooks, cuda13),
    ):
        assert {name: one[name] for name in one.keys() & other.keys()} == {
            name: other[name] for name in one.keys() & other.keys()
        }
    for section in (dev, notebooks, cuda12, cuda13):
        assert not section.keys() & run.keys()
    assert cuda12["cuda-bindings"].startswith("12.")
    assert cuda13["cuda-bindings"].startswith("13.")


@pytest.mark.parametrize("section", environment.SECTIONS)
def test_the_lock_covers_pyproject(section: str) -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] if section == "run" else extras[section]
    pinned = versions("run") | versions(section)
    for requirement in wanted:
        assert re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower() in pinned  # type: ignore[union-attr]


def test_the_lock_has_no_benchmark_peers() -> None:
    names = {name for section in environment.SECTIONS for name in versions(section)}
    assert not names & {"torch", "transformers"}
    assert {re.match(r"\w+", r).group() for r in PROJECT["optional-dependencies"]["bench"]} == {  # type: ignore[union-attr]
        "torch",
        "transformers",
    }


@pytest.mark.parametrize("section", ["cuda12", "cuda13"])
def test_cuda_packages_are_not_for_macs(section: str) -> None:
    for block in read_sections(LOCK)[section]:
        marker = block.split(" \\\n")[0].partition(" ; ")[2]
        assert "sys_platform != 'darwin'" in marker or "sys_platform == 'linux'" in marker, block[:80]


@pytest.mark.parametrize(
    ("driver", "platform", "dev", "sections", "words"),
    [
        (None, "linux", False, ["run"], "no NVIDIA driver"),
        (None, "linux", True, ["run", "cuda13", "dev"], "simulator"),
        (None, "darwin", True, ["run", "dev"], "macOS"),
        (13000, "darwin", False, ["run"], "macOS"),
        (13000, "linux", False, ["run", "cuda13"], "CUDA 13.0: cuda13"),
        (14020, "linux", True, ["run", "cuda13", "dev"], "CUDA 14.2: cuda13"),
        (12080, "linux", False, ["run", "cuda12"], "CUDA 12.8: cuda12"),
        (12000, "linux", True, ["run", "cuda12", "dev"], "CUDA 12.0: cuda12"),
        (11080, "linux", False, ["run"], "older than 12"),
    ],
)
def test_choice_by_driver(
    driver: int | None, platform: str, dev: bool, sections: list[str], words: str
) -> None:
    chosen, found = choose_sections(driver, platform, dev)
    assert chosen == sections
    assert words in found
    assert choose_sections(driver, platform, dev, notebooks=True)[0] == [*sections, "notebooks"]


class FakeLibrary:
    """libcuda that answers cuDriverGetVersion."""

    def __init__(self, version: int, status: int = 0) -> None:
        self.version, self.status = version, status

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = self.version
        return self.status


def test_driver_by_libcuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(12080))
    assert environment.driver_cuda_version() == 12080


def test_driver_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(13000, status=34))  # the toolkit's stub
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.driver_cuda_version() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| Driver Version: 580.82   CUDA Version: 13.0     |'\n")
    smi.chmod(0o755)
    assert environment.driver_cuda_version() == 13000
    assert environment.parse_smi("| CUDA Version: 12.8 |") == 12080
    assert environment.parse_smi("No devices were found") is None


def test_python_versions() -> None:
    for minor in (11, 12, 13):
        environment.check_python((3, minor))
    for version in ((3, 10), (3, 14), (4, 0)):
        with pytest.raises(SetupError, match=rf"this is {version[0]}\.{version[1]}"):
            environment.check_python(version)


def test_environment_is_a_plain_file_that_old_pythons_can_read() -> None:
    source = (ROOT / "sharp" / "environment.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)
    # Beside it lie files named like modules of the standard library (trace.py): they must not get in the way.
    command = [sys.executable, "-S", str(ROOT / "sharp" / "environment.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--dev" in done.stdout


def test_another_interpreter_gets_nothing_installed(tmp_path: Path) -> None:
    (tmp_path / "sharp").mkdir()
    script = shutil.copy(ROOT / "sharp" / "environment.py", tmp_path / "sharp")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "nothing installed" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharp"]


class Recorder(Environment):
    """An Environment whose pip writes down what it was asked to install."""

    fail = False

    def __init__(self, root: Path, python: str = "3.11 linux") -> None:
        super().__init__(str(root), python)
        self.calls: list[list[str]] = []

    def pip(self, arguments: list[str], num_packages: int) -> None:
        if "-r" in arguments:
            assert "--require-hashes" in arguments
            lines = Path(arguments[-1]).read_text(encoding="utf-8").splitlines()
            self.calls.append([pin_name(line) for line in lines if not line.startswith(" ")])
            assert len(self.calls[-1]) == num_packages
        else:
            assert "--no-index" in arguments, "the package itself must not cause a download"
            assert "--no-build-isolation" in arguments
            self.calls.append(["the package"])
        if self.fail:
            raise SetupError("pip failed")


LITTLE_LOCK = """\
# [run]
a==1 \\
    --hash=sha256:0
# [cuda12]
c==12 \\
    --hash=sha256:0
# [cuda13]
c==13 \\
    --hash=sha256:0
d==1 \\
    --hash=sha256:0
# [dev]
d==1 \\
    --hash=sha256:0
e==1 \\
    --hash=sha256:0
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".venv").mkdir()
    (tmp_path / "requirements.lock").write_text(LITTLE_LOCK, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    return tmp_path


def test_the_second_run_has_nothing_to_do(project: Path) -> None:
    first = Recorder(project)
    assert first.install(["run"], "")
    assert first.calls == [["a"], ["the package"]]
    again = Recorder(project)
    assert not again.install(["run"], "")
    assert again.calls == []
    more = Recorder(project)
    assert more.install(["run", "cuda13", "dev"], "")
    assert more.calls == [["c", "d", "e"]], "only what is missing, a shared package once"


def test_a_changed_lock_or_project_is_installed(project: Path) -> None:
    Recorder(project).install(["run", "dev"], "")
    (project / "requirements.lock").write_text(LITTLE_LOCK.replace("e==1", "e==2"), encoding="utf-8")
    changed = Recorder(project)
    assert changed.install(["run", "dev"], "")
    assert changed.calls == [["d", "e"]]
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n", encoding="utf-8")
    renamed = Recorder(project)
    assert renamed.install(["run", "dev"], "")
    assert renamed.calls == [["the package"]]
    other = Recorder(project, python="3.12 linux")
    assert other.install(["run"], "")
    assert other.calls == [["a"], ["the package"]]


def test_cuda_sections_replace_each_other(project: Path) -> None:
    Recorder(project).install(["run", "cuda13"], "")
    for section in ("cuda12", "cuda13", "cuda12"):
        switched = Recorder(project)
        assert switched.install(["run", section], "")
        assert switched.calls[0][0] == "c"


def test_a_failed_installation_is_tried_again(project: Path) -> None:
    broken = Recorder(project)
    broken.fail = True
    with pytest.raises(SetupError):
        broken.install(["run"], "")
    assert "run" not in json.loads((project / ".venv" / "sharp-setup.json").read_text(encoding="utf-8"))
    (project / ".venv" / "sharp-setup.json").write_text("{ cut off", encoding="utf-8")
    repaired = Recorder(project)
    assert repaired.install(["run"], "")
    assert repaired.calls == [["a"], ["the package"]]


def test_a_missing_section_is_named(project: Path) -> None:
    with pytest.raises(SetupError, match="no section notebooks"):
        Recorder(project).install(["run", "notebooks"], "")
    with pytest.raises(SetupError, match="line 1"):
        read_sections("a==1\n")


@pytest.mark.skipif(not os.path.exists("/bin/sh"), reason="needs a POSIX shell")
def test_pips_words_are_shown_when_it_fails(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = project / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: no such thing as a==1'\nexit 3\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setattr(environment.sys, "executable", str(fake))
    with pytest.raises(SetupError, match="no such thing as a==1"):
        Environment(str(project), "3.11 linux").install(["run"], "")
