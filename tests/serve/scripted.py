"""A server in place of the real one, for the page: it says what a test tells it to say."""

from __future__ import annotations

import contextlib
import itertools
import json
import mimetypes
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nanomolmo2
from nanomolmo2.serve.security import HEADERS

PAGE = Path(nanomolmo2.__file__).parent / "serve" / "page"
TINY = {
    "id": "tiny",
    "abilities": {
        "video": True,
        "points": "text",
        "several_images": True,
        "max_crops": None,
        "conversation": True,
        "system": True,
    },
}
FINDS = {"id": "finds", "abilities": {**TINY["abilities"], "find": True}}  # type: ignore[dict-item]
LARGE = {"id": "large", "abilities": {**TINY["abilities"], "max_crops": 8}}  # type: ignore[dict-item]
Event = tuple[str, dict[str, Any]]


class Refused(Exception):
    """What the scripted server answers with instead: a status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Scripted:
    """The server's side of a test.

    Attributes:
        answer: from a request's body to the events of its answer; may raise `Refused`, and may wait
            between events.
        attention: from a request's body to the answer of /v1/attention, find: of /v1/find.
        asked: bodies of /v1/query so far, looked: of /v1/attention, sought: of /v1/find. headers:
            of the last request, names in small letters.
        left: set when a client left before its answer was complete.
        key: what requests must bring as their API key; None = nothing.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Iterable[Event]] = lambda body: written("Hello.")
        self.attention: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {}
        self.find: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {}
        self.models: list[dict[str, Any]] = [TINY, LARGE]
        self.asked: list[dict[str, Any]] = []
        self.looked: list[dict[str, Any]] = []
        self.sought: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.left = threading.Event()
        self.key: str | None = None
        self.address = ""


def point(
    x: float, y: float, size: tuple[int, int], *, id: int = 1, label: str = "dog", **place: Any
) -> dict[str, Any]:
    """A point as the server sends it; ``place``: image or time."""
    shares = {"x_share": round(x / size[0], 6), "y_share": round(y / size[1], 6)}
    return {"id": id, "label": label, "x": x, "y": y, **shares, **(place or {"image": 1})}


def written(
    text: str, points: Iterable[dict[str, Any]] = (), *, count: int | None = None, **more: Any
) -> Iterator[Event]:
    """An answer as the server streams it: word by word, its points, and the whole."""
    points = list(points)
    for word in text.replace(" ", " \0").split("\0"):
        yield "text", {"text": word}
    for one in points:
        yield "point", one
    yield "answer", whole(text, points, count=count, **more)


def whole(
    text: str, points: Iterable[dict[str, Any]] = (), *, count: int | None = None, **more: Any
) -> dict[str, Any]:
    """The last event of an answer."""
    return {
        "text": text,
        "count": count,
        "points": list(points),
        "problems": [],
        "images": [],
        "video": None,
        "finish_reason": "stop",
        "input_tokens": 50,
        "output_tokens": 7,
        "timings": {"generate": 0.25},
        **more,
    }


@contextlib.contextmanager
def scripted_server() -> Iterator[Scripted]:
    """A `Scripted` that listens at a free port of this computer."""
    script = Scripted()
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    script.address = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    script: Scripted
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0].lstrip("/")
        if path == "v1/models":
            self.guarded(lambda: self.send_json({"data": self.script.models}))
        elif path == "v1/examples":
            listed = json.loads((PAGE / "examples" / "examples.json").read_text(encoding="utf-8"))
            self.guarded(lambda: self.send_json({"data": listed}))
        else:
            file = PAGE / (path.removeprefix("page/") if path else "index.html")
            if file.is_file():
                kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
                self.send(200, kind, file.read_bytes())
            else:
                self.send(404, "text/plain", b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.script.headers = {name.lower(): value for name, value in self.headers.items()}
        if self.path == "/v1/attention":
            self.script.looked.append(body)
            self.guarded(lambda: self.send_json(self.script.attention(body)))
        elif self.path == "/v1/find":
            self.script.sought.append(body)
            self.guarded(lambda: self.send_json(self.script.find(body)))
        else:
            self.script.asked.append(body)
            self.guarded(lambda: self.stream(body))

    def guarded(self, answer: Callable[[], None]) -> None:
        try:
            if self.script.key and self.headers.get("authorization") != f"Bearer {self.script.key}":
                raise Refused(401, "This server asks for an API key.")
            answer()
        except Refused as refused:
            error = {"message": refused.message, "type": "invalid_request_error", "code": None}
            self.send(refused.status, "application/json", json.dumps({"error": error}).encode())

    def stream(self, body: dict[str, Any]) -> None:
        events = iter(self.script.answer(body))
        first = next(events)  # what refuses does so before anything is sent
        self.close_connection = True
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            for name, data in itertools.chain([first], events):
                self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
                self.wfile.flush()
        except OSError:
            self.script.left.set()

    def send_json(self, found: Any) -> None:
        self.send(200, "application/json", json.dumps(found).encode())

    def send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "content-type": kind,
            "content-length": str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
