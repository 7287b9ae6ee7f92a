"""A small HTTP server on loopback that speaks as much of the Hugging Face hub's API as downloads need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1 << 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, served from a folder. `on_file` is called before a file's content is sent."""

    folder: Path
    repository: str = "tester/tiny-moe"
    revisions: tuple[str, ...] = ("main", COMMIT)
    token: str = ""
    gated: bool = False
    commit: str = COMMIT
    cut_after: dict[str, int] = field(default_factory=dict)
    on_file: Callable[[str], None] = lambda name: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in order, ranges left out."""
        return [path for method, path in self.requests if method == "FILE"]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server while the block lasts; `hub.url` is its address."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        repository = re.escape(self.hub.repository)
        api = re.fullmatch(rf"/api/models/{repository}(?:/revision/(.+))?", path)
        file = re.fullmatch(rf"/{repository}/resolve/([^/]+)/(.+)", path)
        if api is None and file is None:
            self._fail(404, "RepoNotFound")
        elif self.hub.token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._fail(*((403, "GatedRepo") if self.hub.gated else (401, "RepoNotFound")))
        elif (api or file)[1] not in (None, *self.hub.revisions):  # type: ignore[index]
            self._fail(404, "RevisionNotFound")
        elif api is not None:
            self._send_info(with_body)
        elif file is not None:
            self._send_file(file[2], with_body)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_info(self, with_body: bool) -> None:
        files = [
            {"rfilename": str(path.relative_to(self.hub.folder)), **_metadata(path.read_bytes())}
            for path in sorted(self.hub.folder.rglob("*"))
            if path.is_file()
        ]
        info = {"id": self.hub.repository, "sha": self.hub.commit, "siblings": files}
        body = json.dumps(info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _send_file(self, name: str, with_body: bool) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            self._fail(404, "EntryNotFound")
            return
        content = path.read_bytes()
        size = len(content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        start, end = 0, size - 1
        if span:
            start, end = int(span[1]), min(int(span[2] or size - 1), size - 1)
        self.send_response(206 if span else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{hashlib.sha1(name.encode() + content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        if not with_body:
            return
        if not span:
            self.hub.requests.append(("FILE", name))
            self.hub.on_file(name)
        cut = self.hub.cut_after.pop(name, None)
        body = content[start : end + 1]
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


def _metadata(content: bytes) -> dict[str, object]:
    """Return what the hub says of a file: with its SHA-256 if it is large enough for Git LFS."""
    size = len(content)
    blob = {"size": size, "blobId": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}
    if size < LFS_BYTES:
        return blob
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 100}
    return blob | {"lfs": lfs}
