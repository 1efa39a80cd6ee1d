"""A server on 127.0.0.1 that speaks as much of the hub's HTTP as a model download needs."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves folders as repositories with one commit; safetensors count as large files (LFS).

    Attributes:
        repositories: folder by ``owner/name``.
        gated: names that answer like a gated repository without a token.
        cut_after: once, stop sending a large file after so many bytes and drop the connection.
        tamper: send large files with their first byte changed.
        sent: (method, path, Range header, status) of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.cut_after: int | None = None
        self.tamper = False
        self.sent: list[tuple[str, str, str | None, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._listing(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._listing(match.group(1), "revision", "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._fail(404, "NotFound")

    def _repository(self, name: str, revision: str) -> Path | None:
        if name in self.server.gated and "Authorization" not in self.headers:
            self._fail(403, "GatedRepo")
        elif name not in self.server.repositories:
            self._fail(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._fail(404, "RevisionNotFound")
        else:
            return self.server.repositories[name]
        return None

    def _listing(self, name: str, kind: str, revision: str) -> None:
        folder = self._repository(name, revision)
        if folder is None:
            return
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if kind == "revision":
            siblings = [
                {
                    "rfilename": p.name,
                    "size": p.stat().st_size,
                    "blobId": "0" * 40,
                    **_lfs(p, "sha256"),
                }
                for p in files
            ]
            answer: object = {"id": name, "sha": COMMIT, "siblings": siblings}
        else:
            answer = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": "0" * 40,
                    **_lfs(p, "oid"),
                }
                for p in files
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str) -> None:
        folder = self._repository(name, revision)
        if folder is None:
            return
        path = folder / file
        if not path.is_file():
            return self._fail(404, "EntryNotFound")
        data, digest = path.read_bytes(), _sha256(path)
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        large = path.suffix == ".safetensors"
        headers["ETag"] = f'"{digest if large else digest[:40]}"'
        if large and self.server.tamper:
            data = bytes([data[0] ^ 1]) + data[1:]
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        cut = self.server.cut_after if large and self.command == "GET" else None
        if cut is not None:
            self.server.cut_after = None
        self._send(status, data, headers, cut)

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.server.sent.append((self.command, self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Keep the test output quiet."""


def _lfs(path: Path, key: str) -> dict[str, dict[str, object]]:
    if path.suffix != ".safetensors":
        return {}
    size = path.stat().st_size
    return {"lfs": {key: _sha256(path), "size": size, "pointerSize": 134}}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
