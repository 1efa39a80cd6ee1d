"""Addresses of strangers, asked of real servers on this computer.

Its own address is none that may be fetched: tests open it, and it alone, by `public`.
"""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from nanomolmo2 import remote

OK = b"HTTP/1.1 200 OK\r\n"
Respond = Callable[[socket.socket], None]
real_is_public = remote.is_public


def sends(*pieces: bytes) -> Respond:
    """Answer with these bytes."""
    return lambda client: [client.sendall(piece) for piece in pieces] and None


class Server(NamedTuple):
    port: int
    requests: list[bytes]

    def url(self, host: str = "pictures.test", path: str = "/a.png") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start a server that answers one connection after the other, each in its way."""
    listeners, threads = [], []

    def start(*responds: Respond) -> Server:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(10)
        server = Server(listener.getsockname()[1], [])

        def run() -> None:
            for respond in responds:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(10)
                    try:
                        server.requests.append(client.recv(65536))
                        respond(client)
                    except OSError:
                        pass  # the other side had enough

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        listeners.append(listener)
        threads.append(thread)
        monkeypatch.setattr(remote, "PORTS", remote.PORTS | {server.port})
        return server

    yield start
    for listener in listeners:
        # A thread that waits for a connection wakes up by one.
        with socket.socket() as knock:
            knock.connect_ex(listener.getsockname())
        listener.close()
    for thread in threads:
        thread.join(timeout=10)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names lead to; 127.0.0.1 counts as public, and nothing else that is not."""
    names = {"pictures.test": ["127.0.0.1"]}
    monkeypatch.setattr(remote, "_look_up", lambda host, port: names.get(host, [host]))
    monkeypatch.setattr(
        remote, "is_public", lambda address: address == "127.0.0.1" or real_is_public(address)
    )
    return names


def fetch(url: str, max_bytes: int = 1000, timeout: float = 60.0) -> bytes:
    return remote.fetch(url, max_bytes=max_bytes, timeout=timeout)


# ---- what may be fetched ----


def test_a_file_is_fetched(serve: Callable[..., Server], public: object) -> None:
    server = serve(sends(OK, b"Content-Length: 5\r\n\r\n", b"he", b"llo"))
    assert fetch(server.url(path="/ä b.png?x=1#part".replace(" ", "%20"))) == b"hello"
    line, *headers = server.requests[0].split(b"\r\n")
    assert line == b"GET /%C3%A4%20b.png?x=1 HTTP/1.1"
    assert f"Host: pictures.test:{server.port}".encode() in headers
    assert not any(header.lower().startswith((b"cookie", b"authorization")) for header in headers)


def test_a_file_in_chunks_is_fetched(serve: Callable[..., Server], public: object) -> None:
    server = serve(
        sends(OK, b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")
    )
    assert fetch(server.url(), max_bytes=5) == b"hello"


def test_a_file_that_ends_with_its_connection_is_fetched(
    serve: Callable[..., Server], public: object
) -> None:
    assert fetch(serve(sends(OK, b"\r\nhello")).url(), max_bytes=5) == b"hello"


def test_redirects_are_followed(serve: Callable[..., Server], public: dict[str, list[str]]) -> None:
    target = serve(sends(OK, b"\r\nhello"))
    first = serve(
        sends(b"HTTP/1.1 302 Found\r\nLocation: ../b.png\r\n\r\n"),
        sends(
            f"HTTP/1.1 308 Moved\r\nLocation: {target.url('other.test', '/c.png')}\r\n\r\n".encode()
        ),
    )
    public["other.test"] = ["127.0.0.1"]
    assert fetch(first.url(path="/x/a.png")) == b"hello"
    assert first.requests[1].startswith(b"GET /b.png ")
    assert f"Host: other.test:{target.port}".encode() in target.requests[0]


def test_the_other_address_of_a_host_is_tried(
    serve: Callable[..., Server], public: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(sends(OK, b"\r\nhello"))
    public["pictures.test"] = ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first
    monkeypatch.setattr(remote, "is_public", lambda address: address.startswith("127.0.0."))
    assert fetch(server.url()) == b"hello"


# ---- what an address leads to ----


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "172.15.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses(address: str) -> None:
    assert remote.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.0.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "239.1.1.1"),
        *(
            "240.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "198.18.0.1",
            "192.88.99.1",
            "198.51.100.1",
            "203.0.113.1",
        ),
        *("::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "fd12::1", "fec0::1", "ff02::1"),
        *("::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "::ffff:0:127.0.0.1"),
        *("2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "100::1", "4000::1"),
        *("", "pictures.test", "127.1", "2130706433"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not remote.is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "0.0.0.0", "10.0.0.1"),
        *("169.254.169.254", "2130706433", "0x7f000001", "017700000001", "0x7f.1", "127.1"),
        *("0177.0.0.1", "0xa9fea9fe", "①②⑦.0.0.1", "127。0。0。1"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]"),
        *("[fe80::1]", "[64:ff9b::7f00:1]", "[fd00::1]"),
    ],
)
def test_this_computer_and_its_network_are_refused_however_they_are_written(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system's own resolver, which knows all of these without a network."""
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("it connected"))
    with pytest.raises(ValueError, match=r"not of the public internet|there is no host"):
        fetch(f"http://{host}/a.png")


def test_a_name_that_leads_to_a_private_address_is_refused(
    public: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("it connected"))
    public["inside.test"] = ["10.1.2.3"]
    public["both.test"] = ["8.8.8.8", "10.1.2.3"]
    for host in ("inside.test", "both.test"):
        with pytest.raises(ValueError, match=f"'{host}' is not of the public internet") as refused:
            fetch(f"http://{host}/a.png")
        assert "10.1.2.3" not in str(refused.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://10.0.0.1/", "not of the public internet"),
        ("http://[::1]/", "not of the public internet"),
        ("//192.168.0.1/a.png", "not of the public internet"),
        ("file:///etc/passwd", "kind 'file', expected http or https"),
        ("ftp://pictures.test/a.png", "kind 'ftp', expected http or https"),
        ("http://user:word@pictures.test/", "name or password"),
        ("http://pictures.test:22/", "port 22"),
        ("http://[::1/", "is no address"),
    ],
)
def test_a_redirect_is_checked_likewise(
    target: str, message: str, serve: Callable[..., Server], public: object
) -> None:
    server = serve(sends(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode()))
    with pytest.raises(ValueError, match=message):
        fetch(server.url())


def test_redirects_have_an_end(serve: Callable[..., Server], public: object) -> None:
    server = serve(*[sends(b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\n\r\n")] * 6)
    with pytest.raises(ValueError, match="redirected more than 5 times"):
        fetch(server.url())
    assert len(server.requests) == 6


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    serve: Callable[..., Server], public: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was public when it was checked, and private at the next look, gains nothing."""
    looks = [["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]]
    monkeypatch.setattr(remote, "_look_up", lambda host, port: looks.pop(0))
    connected, connect = [], socket.create_connection

    def recorded(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address[0])
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", recorded)
    server = serve(sends(b"HTTP/1.1 302 Found\r\nLocation: /b.png\r\n\r\n"))
    with pytest.raises(ValueError, match="not of the public internet"):
        fetch(server.url())
    assert connected == ["127.0.0.1"]
    assert len(looks) == 1  # one look for each of two requests


# ---- how an address is written ----


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "kind 'file', expected http or https"),
        ("FILE:/etc/passwd", "kind 'file'"),
        ("ftp://pictures.test/a.png", "kind 'ftp'"),
        ("gopher://pictures.test/", "kind 'gopher'"),
        ("data:image/png;base64,AAAA", "kind 'data'"),
        ("/etc/passwd", "kind 'none'"),
        ("", "kind 'none'"),
        ("http://user:word@pictures.test/a.png", "name or password before an @"),
        ("http://user@pictures.test/a.png", "name or password before an @"),
        ("http://8.8.8.8@10.0.0.1/", "name or password before an @"),
        ("http:///a.png", "names no host"),
        ("http://pictures.test:22/a.png", "port 22, expected 80, 443, 8080, 8443"),
        ("http://pictures.test:0/a.png", "port 0"),
        ("http://pictures.test:99999/a.png", "is no address"),
        ("http://pictures.test:x/a.png", "is no address"),
        ("http://[::1/a.png", "is no address"),
        ("http://pictures.test\\@10.0.0.1/", "control character"),
        ("http://pictures.test/a\r\nHost: x", "control character"),
        ("http://pictures.test/a b", "control character"),
        (" http://pictures.test/", "control character"),
        ("http://pictures.test/" + "a" * 8192, "8213 characters"),
    ],
)
def test_what_is_no_address_of_a_picture(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_look_up", lambda *_: pytest.fail("it looked the name up"))
    with pytest.raises(ValueError, match=message) as refused:
        fetch(url)
    assert "word" not in str(refused.value).replace("password", "")


# ---- sizes ----


def test_a_file_that_says_it_is_too_long_is_not_read(
    serve: Callable[..., Server], public: object
) -> None:
    server = serve(sends(OK, b"Content-Length: 1001\r\n\r\n"))  # and nothing comes
    with pytest.raises(ValueError, match="longer than 1,000 bytes"):
        fetch(server.url())


@pytest.mark.parametrize("chunked", [True, False])
def test_a_file_that_never_ends_is_left(
    chunked: bool, serve: Callable[..., Server], public: object
) -> None:
    sent = []

    def flood(client: socket.socket) -> None:
        client.sendall(OK + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
        for _ in range(10_000):
            client.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n" if chunked else b"x" * 1000)
            sent.append(1000)

    with pytest.raises(ValueError, match="longer than 100,000 bytes"):
        fetch(serve(flood).url(), max_bytes=100_000)
    assert len(sent) < 10_000


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_nothing_is_decompressed(
    encoding: str, serve: Callable[..., Server], public: object
) -> None:
    """A bomb: a thousandth of what it becomes, and within the limit as it is sent."""
    bomb = gzip.compress(bytes(500_000))
    assert len(bomb) < 1000
    header = f"Content-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    server = serve(sends(OK, header, bomb))
    with pytest.raises(ValueError, match="sent the file compressed"):
        fetch(server.url())
    assert b"Accept-Encoding: identity" in server.requests[0].split(b"\r\n")


# ---- times ----


def drip(first: bytes, each: bytes) -> Respond:
    """A byte in every twentieth of a second, for ten: each comes long before a timeout."""

    def respond(client: socket.socket) -> None:
        client.sendall(first)
        for _ in range(200):
            client.sendall(each)
            time.sleep(0.05)

    return respond


@pytest.mark.parametrize(
    "respond",
    [
        drip(OK + b"Content-Length: 500\r\n\r\n", b"x"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"", b"H"),  # a status line that never ends
        drip(OK, b"a"),  # a header that never ends
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        lambda client: client.recv(1) and None,  # nothing at all
    ],
    ids=["body", "chunks", "status", "header", "continue", "silence"],
)
def test_what_drips_has_one_time_for_all_of_it(
    respond: Respond, serve: Callable[..., Server], public: object
) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"took longer than 0\.4 seconds"):
        fetch(serve(respond).url(), timeout=0.4)
    assert 0.4 <= time.monotonic() - start < 8


def test_a_lookup_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(remote, "_look_up", lambda *_: release.wait(10) and [])
    with pytest.raises(ValueError, match=r"took longer than 0\.2 seconds"):
        fetch("http://pictures.test/", timeout=0.2)
    release.set()


def test_redirects_share_the_time(serve: Callable[..., Server], public: object) -> None:
    def slow(client: socket.socket) -> None:
        time.sleep(0.15)
        client.sendall(b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\n\r\n")

    with pytest.raises(ValueError, match=r"took longer than 0\.4 seconds"):
        fetch(serve(*[slow] * 6).url(), timeout=0.4)


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 206 Partial\r\n\r\nx", "answered 206"),
        (b"SSH-2.0-OpenSSH\r\n", "could not be fetched"),
        (b"", "could not be fetched"),
        (OK + b"a: b\r\n" * 200 + b"\r\n", "could not be fetched"),
        (OK + b"Content-Length: 9\r\n\r\nhello", "broke off"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhe", "could not be fetched"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "could not be fetched"),
    ],
)
def test_answers_that_are_no_file(
    answer: bytes, message: str, serve: Callable[..., Server], public: object
) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(serve(sends(answer)).url())


def test_a_host_that_is_not_there(public: dict[str, list[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "PORTS", {port})
        with pytest.raises(ValueError, match=r"could not be fetched \(ConnectionRefusedError\)"):
            fetch(f"http://pictures.test:{port}/")


def test_certificates_are_checked(
    serve: Callable[..., Server], public: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and by who signed them: the context that connects is Python's strict one."""
    contexts, make = [], ssl.create_default_context
    monkeypatch.setattr(
        ssl, "create_default_context", lambda: contexts.append(make()) or contexts[-1]
    )
    server = serve(sends(OK, b"\r\nhello"))  # which does not speak TLS
    with pytest.raises(ValueError, match="could not be fetched"):
        fetch(server.url().replace("http:", "https:"))
    assert contexts[0].verify_mode == ssl.CERT_REQUIRED
    assert contexts[0].check_hostname
    assert server.requests[0].startswith(b"\x16\x03")  # a handshake, with the name in it
    assert b"pictures.test" in server.requests[0]


def test_proxies_of_the_environment_are_not_asked(
    serve: Callable[..., Server], public: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would look the name up itself."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(serve(sends(OK, b"\r\nhello")).url()) == b"hello"
