"""A model hub on loopback for tests: listings and files of repositories in memory, and ways to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """files: repository -> file name -> bytes; over `large` bytes a file is listed as Git LFS (SHA-256).

    private, gated: repositories that need the token "right". cuts: file name -> after how many bytes each
    further download of it is cut, until the list is empty. tampered: file name -> what is sent in its place.
    requests: (method, path, Range header) of all that came in.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        self.tampered: dict[str, bytes] = {}
        self.large = 1000
        self.broken_listing = False
        self.url = ""
        self.requests: list[tuple[str, str, str | None]] = []

    def listing(self, repo: str) -> dict[str, object]:
        siblings = []
        for name, data in self.files[repo].items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if len(data) > self.large:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0}

    def etag(self, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest() if len(data) > self.large else git_sha1(data)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub; its address is `hub.url`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def allowed(self, repo: str) -> bool:
            right = self.headers.get("Authorization") == "Bearer right"
            if self.headers.get("Authorization") == "Bearer wrong":
                self.refuse(401, "")
            elif repo not in hub.files or (repo in hub.private and not right):
                self.refuse(401 if repo in hub.private else 404, "RepoNotFound")
            elif repo in hub.gated and not right:
                self.refuse(403, "GatedRepo")
            else:
                return True
            return False

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if path.startswith("/api/models/"):
                repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                if not self.allowed(repo):
                    return
                if revision not in ("", "main", "v1", COMMIT):
                    self.refuse(404, "RevisionNotFound")
                    return
                data = b"{}" if hub.broken_listing else json.dumps(hub.listing(repo)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            repo, _, rest = path[1:].partition("/resolve/")
            if not self.allowed(repo):
                return
            _, _, name = rest.partition("/")
            if name not in hub.files[repo]:
                self.refuse(404, "EntryNotFound")
                return
            data = hub.files[repo][name]
            etag = hub.etag(data)
            data = hub.tampered.get(name, data)
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body and hub.cuts.get(name):
                self.wfile.write(data[start : start + hub.cuts[name].pop(0)])
                self.wfile.flush()
                self.close_connection = True
            elif body:
                self.wfile.write(data[start:])

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
