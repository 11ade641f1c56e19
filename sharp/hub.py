"""Models from the Hugging Face Hub: which files of a repository are needed, fetching and finding them.

Knows huggingface_hub, which downloads (its endpoint, token, cache and environment variables apply; a download
that is cut goes on where it stopped, files that are complete are kept). What it does not do is done here: the
content is held against the checksums of the server's listing. Knows nothing of what is inside a model file.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.auto import tqdm

from sharp.model_config import ModelFileError

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEEDED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_CHUNK_BYTES = 1 << 20
_SHOWN = 12  # files that a message lists


class HubError(RuntimeError):
    """A model could not be fetched from the Hub; the message says why and what to do."""


def pull_from_hub(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    pattern: str | None = None,
    progress: bool = True,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Path:
    """Fetch a model ORG/NAME into Hugging Face's cache; its directory, or its file if that is one GGUF file.

    revision: branch, tag or commit; pattern: file names as the shell matches them, in place of the choice
    made here (configuration, tokenizer, safetensors); endpoint, cache: for HF_ENDPOINT and HF_HUB_CACHE.
    Raises HubError: no such model, revision or file, no access, no network, full disk, a wrong checksum.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    where = endpoint or constants.ENDPOINT
    folder = Path(cache or constants.HF_HUB_CACHE)
    (enable_progress_bars if progress else disable_progress_bars)()
    with _explained(repo, revision, where):
        api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
        info = api.model_info(repo, revision=revision, files_metadata=True)
        listed = {item.rfilename: item for item in info.siblings or []}
        names = choose_files(repo, list(listed), pattern)
        _need_space(folder, sum(listed[name].size or 0 for name in names if not _there(folder, info, name)))
        paths = []
        for name in names:
            path = huggingface_hub.hf_hub_download(
                repo, name, revision=revision, token=token, endpoint=endpoint, cache_dir=folder
            )
            paths.append(Path(path))
            snapshot = Path(path).parents[len(PurePosixPath(name).parts) - 1]
            if snapshot.name != info.sha:
                raise HubError(f"{repo} changed on {where} during the download: pull it again")
            _verify(Path(path), listed[name], progress)
    return paths[0] if len(paths) == 1 and paths[0].suffix == ".gguf" else snapshot


def choose_files(repo: str, listed: Sequence[str], pattern: str | None) -> list[str]:
    """Of a repository's files the ones to fetch. Raises HubError, listing what there is, when none fits."""
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise HubError(f"{repo} lists the file name {name!r}, which leads out of its directory")
    if pattern is not None:
        chosen = [name for name in listed if fnmatchcase(name, pattern)]
        if not chosen:
            raise HubError(f"{repo} has no file {pattern!r}; it has {_few(listed)}")
        return chosen
    chosen = [name for name in listed if name in _NEEDED or _SHARD.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in chosen):
        ggufs = [name for name in listed if name.endswith(".gguf")]
        if ggufs:
            raise HubError(f"{repo} has GGUF files: choose one with --file, of {_few(ggufs)}")
        raise HubError(
            f"{repo} has no model.safetensors, shards of one or GGUF files (pickled weights are not read); "
            f"it has {_few(listed)}"
        )
    return chosen


def find_in_cache(name: str, cache: Path | None = None) -> Path | None:
    """Where a pulled ORG/NAME, ORG/NAME@REVISION or ORG/NAME/FILE is; None if `name` is not of that form.

    Raises ModelFileError when it was not pulled, or when it is several GGUF files.
    """
    repo, _, file = name, "", ""
    if name.count("/") > 1 and "@" not in name:
        organisation, short, file = name.split("/", 2)
        repo = f"{organisation}/{short}"
    match = NAME.fullmatch(repo)
    if match is None:
        return None
    from huggingface_hub import constants

    folder = Path(cache or constants.HF_HUB_CACHE) / f"models--{match['repo'].replace('/', '--')}"
    revision = match["revision"] or constants.DEFAULT_REVISION
    snapshot = _snapshot(folder, revision)
    if snapshot is None:
        other = f" --revision {revision}" if match["revision"] else ""
        raise ModelFileError(
            f"{name!r} is neither a file or directory nor a model that was pulled from the Hub: "
            f"check the path, or run `sharp pull {match['repo']}{other}`"
        )
    if file:
        if not (snapshot / file).is_file() or ".." in Path(file).parts:
            raise ModelFileError(
                f"{match['repo']} has no file {file!r} here; it has {_few(_names(snapshot))}"
            )
        return snapshot / file
    if (snapshot / "config.json").exists():
        return snapshot
    ggufs = [found for found in _names(snapshot) if found.endswith(".gguf")]
    if len(ggufs) != 1:
        raise ModelFileError(
            f"{name!r} has no config.json and {len(ggufs)} GGUF files here; "
            f"name one as {repo}/FILE: {_few(ggufs)}"
        )
    return snapshot / ggufs[0]


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The directory of a branch, tag or commit in a model's cache folder."""
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def _names(snapshot: Path) -> list[str]:
    return sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return (", ".join(names[:_SHOWN]) or "none") + (f" and {rest} more" if rest > 0 else "")


def _there(folder: Path, info: Any, name: str) -> bool:
    repo = f"models--{info.id.replace('/', '--')}"
    return (folder / repo / "snapshots" / str(info.sha) / name).exists()


def _need_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise HubError(f"{folder} has {free / 1e6:.0f} MB free, the files need {needed / 1e6:.0f} MB")


def _verify(path: Path, listed: Any, progress: bool) -> None:
    """Hold a file against the listing: SHA-256 of large files, git's own SHA-1 of small ones.

    A file that differs is deleted with its blob, so that the next pull fetches it again.
    """
    if listed.lfs is not None:
        digest, expected = hashlib.sha256(), listed.lfs.sha256
    elif listed.blob_id is not None:
        digest, expected = hashlib.sha1(b"blob %d\0" % path.stat().st_size), listed.blob_id
    else:
        raise HubError(f"{listed.rfilename}: the server gives no checksum for it")
    size = path.stat().st_size
    with path.open("rb") as file, _bar(size, f"verifying {path.name}", progress) as bar:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise HubError(
            f"{listed.rfilename}: {digest.name} is {digest.hexdigest()}, "
            f"the server's listing says {expected}; the file was deleted"
        )


def _bar(total: int, what: str, progress: bool) -> tqdm[Any]:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress, leave=False)


@contextmanager
def _explained(repo: str, revision: str | None, where: str) -> Iterator[None]:
    """The library's errors in a sentence each."""
    from huggingface_hub import errors

    try:
        yield
    except HubError:
        raise
    except errors.HFValidationError:
        raise HubError(f"{repo!r} is not ORG/NAME: letters, digits, '-', '_' and '.', up to 96") from None
    except errors.GatedRepoError:
        raise HubError(
            f"{repo} is gated: ask for access on its page at {where}/{repo}, then give a token of that "
            f"account (--token, HF_TOKEN or `hf auth login`)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"there is no model {repo} on {where}, or it is private: check the spelling, or give a token "
            f"(--token, HF_TOKEN or `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo} has no revision {revision!r}") from None
    except errors.EntryNotFoundError as error:  # also: not in the cache, and no network
        raise HubError(f"{repo} could not be fetched from {where}: {_first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        what = "the token is not accepted" if status == 401 else _first_line(error)
        raise HubError(f"{where} answered {status} for {repo}: {what}") from None
    except OSError as error:  # no connection, a size that differs, a full disk
        raise HubError(f"{repo} could not be fetched from {where}: {_first_line(error)}") from None
    except Exception as error:
        # The library's HTTP client has its own errors, which are of no common class with anything.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise HubError(f"{repo} could not be fetched from {where}: {_first_line(error)}") from None
        if isinstance(error, (ValueError, KeyError, TypeError)):
            raise HubError(f"{where} gave no listing of {repo}: {_first_line(error)}") from None
        raise


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
