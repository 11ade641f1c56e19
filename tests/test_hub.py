"""Pulling from a hub on loopback: what is fetched, what is kept, and every way in which it can fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import COMMIT, Hub, serve
from model_files import TINY, write_gguf

from sharp import hub as hub_module
from sharp.hub import HubError, choose_files, find_in_cache, pull_from_hub
from sharp.model_config import ModelFileError
from sharp.weights import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
REPO = "org/tiny"


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other address is an error; in processes that are started, a proxy that is not there sees to it."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "localhost"), f"somebody wants to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING_FACE")):
            monkeypatch.delenv(name)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        hub.files[REPO] = {path.name: path.read_bytes() for path in sorted(TINY.iterdir())}
        hub.files[REPO] |= {
            "README.md": b"# read me",
            "pytorch_model.bin": b"pickle",
            "onnx/model.onnx": b"x",
        }
        yield hub


def pull(hub: Hub, cache: Path, repo: str = REPO, **options: Any) -> Path:
    return pull_from_hub(repo, endpoint=hub.url, cache=cache, progress=False, **options)


def downloads(hub: Hub) -> list[str]:
    return [
        path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/api/" not in path
    ]


def test_a_model_is_fetched_found_and_opened(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(hub, tmp_path)
    assert folder.name == COMMIT
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in TINY.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (TINY / path.name).read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in (REPO, f"{REPO}@main", f"{REPO}@{COMMIT}"):
        checkpoint = open_checkpoint(name)
        assert checkpoint.path == folder
    assert checkpoint.tokenizer().encode("hello") == open_checkpoint(TINY).tokenizer().encode("hello")
    fetched = len(downloads(hub))
    assert pull(hub, tmp_path) == folder  # a second time: nothing is fetched again
    assert len(downloads(hub)) == fetched


def test_only_what_is_needed(tmp_path: Path, hub: Hub) -> None:
    pull(hub, tmp_path)
    assert set(downloads(hub)) == {path.name for path in TINY.iterdir()}
    listed = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    listed += ["model.safetensors.index.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/model.safetensors", "model.gguf", "tokenizer.model"]
    assert choose_files(REPO, [*listed, *others], None) == listed


def test_a_gguf_file(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    hub.files["org/quants"] = {"a-Q8_0.gguf": data, "sub/a-Q4_0.gguf": data, "README.md": b""}
    with pytest.raises(
        HubError, match=r"has GGUF files: choose one with --file, of a-Q8_0\.gguf, sub/a-Q4_0\.g"
    ):
        pull(hub, tmp_path / "c", "org/quants")
    path = pull(hub, tmp_path / "c", "org/quants", pattern="*Q8_0*")
    assert path.name == "a-Q8_0.gguf"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "c"))
    assert open_checkpoint("org/quants").path == path
    second = pull(hub, tmp_path / "c", "org/quants", pattern="sub/*")
    assert second.parent.name == "sub"
    with pytest.raises(
        ModelFileError, match=r"has no config\.json and 2 GGUF files here; name one as org/quants/F"
    ):
        open_checkpoint("org/quants")
    assert open_checkpoint("org/quants/sub/a-Q4_0.gguf").path == second
    with pytest.raises(
        ModelFileError, match=r"org/quants has no file 'b\.gguf' here; it has a-Q8_0\.gguf, sub"
    ):
        open_checkpoint("org/quants/b.gguf")
    with pytest.raises(ModelFileError, match="has no file"):
        open_checkpoint("org/quants/../x")


def test_a_cut_download_goes_on_where_it_stopped(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library keeps whole chunks of 10 MB, more than this file has.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    size = len(hub.files[REPO]["model.safetensors"])
    hub.cuts["model.safetensors"] = [30_000, 20_000]
    folder = pull(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == hub.files[REPO]["model.safetensors"]
    ranges = [r for m, path, r in hub.requests if m == "GET" and path.endswith("/model.safetensors")]
    assert ranges == [None, "bytes=30000-", "bytes=50000-"]
    assert size > 50_000


def test_an_interrupted_pull_keeps_what_is_complete(tmp_path: Path, hub: Hub) -> None:
    whole = hub.files[REPO].pop("model.safetensors")
    hub.files[REPO]["model.safetensors"] = whole
    hub.tampered["model.safetensors"] = whole[:-5]  # shorter than listed: a lost connection at the end
    with pytest.raises(HubError, match="could not be fetched"):
        pull_patched(hub, tmp_path, whole)
    hub.tampered.clear()
    before = len(downloads(hub))
    pull(hub, tmp_path)
    assert downloads(hub)[before:] == ["model.safetensors"]


def pull_patched(hub: Hub, cache: Path, whole: bytes) -> None:
    """The listing and the HEAD request tell the true size, the body is shorter."""
    import huggingface_hub.file_download as file_download

    real = file_download.http_get

    def checked(url: str, file: Any, **options: Any) -> None:
        if url.endswith("model.safetensors"):
            options["expected_size"] = len(whole)
        real(url, file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "http_get", checked)
        pull(hub, cache)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])  # by SHA-256, and by git's SHA-1
def test_a_wrong_checksum(tmp_path: Path, hub: Hub, name: str) -> None:
    right = hub.files[REPO][name]
    hub.tampered[name] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(
        HubError, match=rf"{name}: sha\d+ is [0-9a-f]+, the server's listing says [0-9a-f]+; the fi"
    ):
        pull(hub, tmp_path)
    assert not list(tmp_path.rglob(name))
    hub.tampered.clear()
    assert (pull(hub, tmp_path) / name).read_bytes() == right


def test_access(tmp_path: Path, hub: Hub) -> None:
    hub.gated.add(REPO)
    with pytest.raises(
        HubError, match=rf"{REPO} is gated: ask for access on its page at {hub.url}/{REPO}, then"
    ):
        pull(hub, tmp_path)
    with pytest.raises(
        HubError, match=r"answered 401 for org/tiny: the token is not accepted|or it is private"
    ):
        pull(hub, tmp_path, token="wrong")
    assert pull(hub, tmp_path, token="right").name == COMMIT
    hub.gated.clear()
    hub.private.add("org/secret")
    hub.files["org/secret"] = hub.files[REPO]
    with pytest.raises(
        HubError, match=r"there is no model org/secret on http.*, or it is private: check the spelling"
    ):
        pull(hub, tmp_path, "org/secret")
    assert pull(hub, tmp_path, "org/secret", token="right").name == COMMIT


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("org/tyni", {}, "there is no model org/tyni on http://127.0.0.1"),
        (REPO, {"revision": "v9"}, "org/tiny has no revision 'v9'"),
        (
            REPO,
            {"pattern": "*.gguf"},
            r"has no file '\*\.gguf'; it has config\.json, generation_config\.json",
        ),
        ("org/a/b", {}, "'org/a/b' is not ORG/NAME"),
        ("org/-x--", {}, "'org/-x--' is not ORG/NAME"),
        ("../..", {}, r"'\.\./\.\.' is not ORG/NAME"),
    ],
)
def test_wrong_names(tmp_path: Path, hub: Hub, repo: str, options: Any, message: str) -> None:
    with pytest.raises(HubError, match=message):
        pull(hub, tmp_path, repo, **options)


def test_repositories_without_weights_and_with_bad_names(tmp_path: Path, hub: Hub) -> None:
    hub.files["org/pickle"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(
        HubError, match=r"no model\.safetensors.*pickled weights are not read.*pytorch_model\.bin"
    ):
        pull(hub, tmp_path, "org/pickle")
    hub.files["org/evil"] = {"../../evil.safetensors": b"x", "config.json": b"{}"}
    with pytest.raises(HubError, match=r"lists the file name '../../evil\.safetensors', which leads out"):
        pull(hub, tmp_path, "org/evil")
    hub.broken_listing = True
    with pytest.raises(HubError, match=r"gave no listing of org/tiny"):
        pull(hub, tmp_path)


def test_no_network_and_a_full_disk(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as gone:
        pass
    with pytest.raises(HubError, match=rf"org/tiny could not be fetched from {gone.url}: ConnectError"):
        pull(gone, tmp_path)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(HubError, match=r"has 0 MB free, the files need 0 MB"):
        pull(hub, tmp_path)


def test_what_was_not_pulled(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nor a model that was pulled .* or run `sharp pull org/tiny`"):
        find_in_cache("org/tiny", tmp_path)
    with pytest.raises(ModelFileError, match="run `sharp pull org/tiny --revision v1`"):
        find_in_cache("org/tiny@v1", tmp_path)
    for name in ("tiny", "./a", "/a/b", "../a/b", "a b/c"):
        assert find_in_cache(name, tmp_path) is None
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("../../../../etc")  # a cache is a directory like any other
    with pytest.raises(ModelFileError, match="run `sharp pull org/tiny`"):
        find_in_cache("org/tiny", tmp_path)


def sharp(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A proxy that is not there: whatever is not loopback cannot be reached.
    settings = {**os.environ, "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1", **environment}
    command = [sys.executable, "-m", "sharp", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings, timeout=120)


def test_the_command(tmp_path: Path, hub: Hub) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, and the model by name afterwards, with the server gone."""
    hub.gated.add(REPO)
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    refused = sharp("pull", REPO, **settings)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert [line[:24] for line in refused.stderr.splitlines()] == ["sharp: org/tiny is gated"]
    done = sharp("pull", REPO, "--revision", "v1", **settings, HF_TOKEN="right")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path)
    assert sharp("pull", REPO, "--token", "right", **settings).stdout == done.stdout
    words = ["--prompt", "hello", "--max-tokens", "2", "--device", "cpu"]
    offline = settings | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert sharp("generate", "--model", REPO, *words, **offline).returncode == 0
    assert sharp("info", f"{REPO}@v1", **offline).returncode == 0
    wrong = sharp("pull", "smollm2-135m-instruct", "--file", "x", **settings)
    assert wrong.returncode == 2
    assert "go with ORG/NAME, not with 'smollm2-135m-instruct'" in wrong.stderr
