"""Connections that send no request, half of one, or something else."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra: pip install 'nanomolmo2[serve]'")
import uvicorn

from nanomolmo2.serve import connection
from nanomolmo2.serve.connection import connections

HEAD_SECONDS = 0.3
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def _app(scope: dict[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    assert scope["type"] == "http"
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(
        _app, port=0, http=connections(HEAD_SECONDS), log_config=None, ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join(10)


def _until_closed(stream: socket.socket, seconds: float = 10.0) -> bytes:
    """All that comes; fails if the other side does not close."""
    stream.settimeout(seconds)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := stream.recv(1 << 16):
            found += piece
    return found


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc", GET + b"GET / HTT"])
def test_half_a_head_is_not_waited_for(sent: bytes, address: tuple[str, int]) -> None:
    start = time.monotonic()
    with socket.create_connection(address) as stream:
        stream.sendall(sent)
        answered = _until_closed(stream)
    assert answered.count(b"200 OK") == sent.count(GET)
    assert HEAD_SECONDS * 0.9 < time.monotonic() - start < HEAD_SECONDS + 3


def test_each_byte_does_not_begin_the_time_anew(address: tuple[str, int]) -> None:
    start = time.monotonic()
    with socket.create_connection(address) as stream, contextlib.suppress(OSError):
        while time.monotonic() - start < 10:
            stream.sendall(b"G")
            time.sleep(HEAD_SECONDS / 10)
    assert time.monotonic() - start < HEAD_SECONDS + 3


def test_one_request_after_the_other_each_has_its_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as stream:
        for _ in range(4):
            stream.sendall(GET[:10])
            time.sleep(HEAD_SECONDS / 2)
            stream.sendall(GET[10:])
            found = b""
            while not found.endswith(b"\r\n\r\nok"):
                found += stream.recv(1 << 16)


def test_an_endless_body_behind_an_answer_is_not_read_for_ever(address: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    start = time.monotonic()
    with socket.create_connection(address) as stream, contextlib.suppress(OSError):
        stream.sendall(head)
        while time.monotonic() - start < 10:
            stream.sendall(b"1\r\nx\r\n")
            time.sleep(HEAD_SECONDS / 10)
    assert time.monotonic() - start < HEAD_SECONDS + 3


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # of https
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    ],
)
def test_what_is_no_http_is_told_in_the_servers_shape(
    sent: bytes, address: tuple[str, int]
) -> None:
    with socket.create_connection(address) as stream:
        with contextlib.suppress(OSError):  # it is refused before its end
            stream.sendall(sent)
        stream.settimeout(10)
        head, _, body = stream.recv(1 << 16).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith("what came is no HTTP request")


def test_connections_have_a_limit_together(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 2)
    with contextlib.ExitStack() as held:
        for _ in range(2):
            stream = held.enter_context(socket.create_connection(address))
            stream.sendall(GET)
            assert stream.recv(1 << 16).startswith(b"HTTP/1.1 200")
        third = held.enter_context(socket.create_connection(address))
        answered = _until_closed(third)
    assert answered.startswith(b"HTTP/1.1 503 ")
    assert b'"code": "too_many_connections"' in answered
    deadline, answered = time.monotonic() + 10, b""
    while not answered.startswith(b"HTTP/1.1 200"):  # as soon as it is seen that they left
        assert time.monotonic() < deadline
        with socket.create_connection(address) as stream, contextlib.suppress(OSError):
            stream.sendall(GET)
            answered = stream.recv(1 << 16)
