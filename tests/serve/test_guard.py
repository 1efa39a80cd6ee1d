"""What stands before the routes: keys, hosts, headers, the queue, sizes, logs."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from PIL import Image

from nanomolmo2.serve.admission import Admission
from nanomolmo2.serve.metrics import Metrics
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.security import Guard
from nanomolmo2.serve.settings import ServeSettings
from tests.serve.conftest import picture_sizes


class Server:
    """An app with a guard before it, and a client."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ServeSettings(**settings)
        self.admission, self.metrics = Admission(self.settings), Metrics()
        self.app = FastAPI()
        self.app.add_middleware(
            Guard, settings=self.settings, admission=self.admission, metrics=self.metrics
        )
        self.bodies: list[bytes] = []
        self.go = asyncio.Event()
        self._routes()

    def _routes(self) -> None:
        @self.app.post("/v1/echo/{name}")
        async def echo(name: str, request: Request) -> dict[str, int]:
            body = await request.body()
            self.bodies.append(body)
            return {"bytes": len(body), "inside": self.admission.inside}

        @self.app.post("/v1/wait")
        async def wait() -> dict[str, bool]:
            await self.go.wait()
            return {"done": True}

        @self.app.post("/v1/fail")
        async def fail(request: Request) -> None:
            raise KeyError(f"/home/somebody: {await request.body()!r}")

        @self.app.post("/v1/refuse")
        async def refuse() -> None:
            raise Refusal("no cups", status=404, code="no_cups", param="object", retry_after=3)

        @self.app.post("/v1/stream")
        async def stream() -> StreamingResponse:
            async def pieces() -> AsyncIterator[str]:
                yield "a"
                raise ValueError("in the middle")

            return StreamingResponse(pieces())

        async def nothing() -> dict[str, str]:
            return {}

        for path in ("/", "/health", "/page/app.js", "/metrics", "/v1/models"):
            self.app.get(path)(nothing)

    async def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8") as client:
            return await client.request(method, path, **arguments)

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return asyncio.run(self.call(method, path, **arguments))


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return dict(body["error"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- keys ----


@pytest.mark.parametrize("key", ["first", "second-key"])
def test_any_key_opens(key: str) -> None:
    server = Server(api_keys=("first", "second-key"))
    assert server.ask("GET", "/v1/models", headers=bearer(key)).status_code == 200
    assert server.ask("POST", "/v1/echo/x", headers=bearer(key), content=b"a").json()["bytes"] == 1


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer("firs"),
        bearer("first1"),
        bearer("FIRST"),
        bearer(""),
        {"Authorization": "first"},
        {"Authorization": "Basic first"},
        {"Authorization": "Bearer"},
        {"X-Api-Key": "first"},
        {"Authorization": "Bearer \xe9"},
        {"Authorization": "Bearer first, Bearer x"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing", "/openapi.json"])
def test_without_its_key_nothing_is_told(headers: dict[str, str], path: str) -> None:
    server = Server(api_keys=("first",))
    response = server.ask("GET", path, headers={k: v.encode("latin-1") for k, v in headers.items()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "first" not in response.text.replace("Authorization: Bearer KEY", "")


@pytest.mark.parametrize("path", ["/", "/health", "/page/app.js"])
def test_health_and_the_page_are_open(path: str) -> None:
    assert Server(api_keys=("first",)).ask("GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/echo/x", "/", "/health", "/page/app.js"])
def test_a_body_without_a_key_is_not_read(path: str) -> None:
    """Nor where a GET needs none: whoever has no key would fill the queue there."""
    server = Server(api_keys=("first",))
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    sent: list[Any] = []

    async def receive() -> Any:
        pytest.fail("it was read")

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(
        server.app, settings=server.settings, admission=server.admission, metrics=server.metrics
    )
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 401


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, by digests of one length, also behind the one that is right."""
    import hmac

    compared, compare = [], hmac.compare_digest

    def recorded(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", recorded)
    server = Server(api_keys=("first", "a-longer-one", "third"))
    assert server.ask("GET", "/v1/models", headers=bearer("first")).status_code == 200
    assert compared == [(32, 32)] * 3


# ---- who calls ----


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("127.0.0.1", 200),
        ("localhost:1", 200),
        ("LocalHost", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.test", 403),
        ("evil.test:8000", 403),
        ("127.0.0.1.evil.test", 403),
        ("localhost@evil.test", 403),
        ("[::2]", 403),
    ],
)
def test_names_of_strangers_are_not_answered(host: str, status: int) -> None:
    """A page whose name was made to lead to this computer would else be of the same origin."""
    server = Server(allowed_hosts=("127.0.0.1", "localhost", "::1"))
    for path in ("/", "/v1/models"):
        response = server.ask("GET", path, headers={"Host": host})
        assert response.status_code == status
    if status == 403:
        assert error_of(response)["code"] == "unknown_host"


def test_without_a_list_every_name_is_answered() -> None:
    assert Server().ask("GET", "/v1/models", headers={"Host": "any.test"}).status_code == 200


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200), (None, 200)],
)
def test_pages_of_other_sites_do_not_post(site: str | None, status: int) -> None:
    """A form of theirs needs no permission to be sent, and would keep the model busy."""
    headers = {} if site is None else {"Sec-Fetch-Site": site}
    server = Server()
    assert server.ask("POST", "/v1/echo/x", headers=headers).status_code == status
    assert server.ask("GET", "/", headers=headers).status_code == 200  # a link to the page


# ---- headers ----


@pytest.mark.parametrize(
    ("origin", "site", "status"),
    [
        ("http://192.168.1.5:8000", None, 200),
        ("HTTP://192.168.1.5:8000", None, 200),
        ("http://evil.test", None, 403),
        ("http://192.168.1.5:9000", None, 403),
        ("null", None, 403),
        ("https://front.test", "same-origin", 200),  # a proxy calls the server by another name
    ],
)
def test_browsers_that_say_only_the_origin(origin: str, site: str | None, status: int) -> None:
    """Those of other computers do, where there is no https."""
    headers = {"host": "192.168.1.5:8000", "origin": origin}
    if site is not None:
        headers["sec-fetch-site"] = site
    assert Server().ask("POST", "/v1/echo/x", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/nothing", 404),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/fail", 500),
        ("POST", "/v1/refuse", 404),
    ],
)
def test_every_answer_has_the_headers(method: str, path: str, status: int) -> None:
    response = Server().ask(method, path)
    assert response.status_code == status
    policy = dict(
        part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == ("no-cache" if path == "/" else "no-store")
    assert "access-control-allow-origin" not in response.headers


# ---- the queue ----


def test_a_full_queue_is_429_at_once() -> None:
    server = Server(max_running=2, max_waiting=1)

    async def run() -> None:
        inside = [asyncio.create_task(server.call("POST", "/v1/wait")) for _ in range(3)]
        while server.admission.inside < 3:
            await asyncio.sleep(0)
        refused = await server.call("POST", "/v1/wait")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "2"
        error = error_of(refused)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert (await server.call("GET", "/v1/models")).status_code == 200
        server.go.set()
        assert [(await task).status_code for task in inside] == [200] * 3
        assert (await server.call("POST", "/v1/wait")).status_code == 200

    asyncio.run(run())
    assert server.admission.inside == 0


def test_a_server_that_ends_answers_503_and_finishes_what_runs() -> None:
    server = Server()

    async def run() -> None:
        inside = asyncio.create_task(server.call("POST", "/v1/wait"))
        while not server.admission.inside:
            await asyncio.sleep(0)
        server.admission.drain()
        refused = await server.call("POST", "/v1/echo/x", content=b"x")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2"
        error = error_of(refused)
        assert (error["type"], error["code"]) == ("server_error", "shutting_down")
        assert (await server.call("GET", "/health")).status_code == 200
        server.go.set()
        assert (await inside).status_code == 200

    asyncio.run(run())
    assert server.bodies == []


def test_who_leaves_or_fails_gives_the_place_back() -> None:
    server = Server()

    async def run() -> None:
        task = asyncio.create_task(server.call("POST", "/v1/wait", content=b"12345"))
        while not server.admission.inside:
            await asyncio.sleep(0)
        assert server.admission.held_bytes == 5
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    server.ask("POST", "/v1/fail", content=b"123")
    assert (server.admission.inside, server.admission.held_bytes) == (0, 0)


# ---- bodies ----


async def in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_a_body_comes_through_as_it_was_sent() -> None:
    server = Server(max_body_bytes=10)
    assert server.ask("POST", "/v1/echo/x", content=b"0123456789").json()["bytes"] == 10
    server.ask("POST", "/v1/echo/x", content=in_pieces(b"01", b"", b"23", b"456789"))
    server.ask("POST", "/v1/echo/x")
    assert server.bodies == [b"0123456789", b"0123456789", b""]


@pytest.mark.parametrize("pieces", [(b"x" * 11,), (b"x" * 6, b"x" * 5), (b"x",) * 11])
@pytest.mark.parametrize("told", [True, False])
def test_a_body_that_is_too_long(pieces: tuple[bytes, ...], told: bool) -> None:
    server = Server(max_body_bytes=10)
    content: Any = b"".join(pieces) if told else in_pieces(*pieces)
    response = server.ask("POST", "/v1/echo/x", content=content)
    assert response.status_code == 413
    error = error_of(response)
    assert error["code"] == "request_too_large"
    assert "the 10 bytes that the server takes" in error["message"]
    assert server.bodies == []


def test_bodies_have_a_limit_together() -> None:
    server = Server(max_body_bytes=10)

    async def run() -> None:
        tasks = [
            asyncio.create_task(server.call("POST", "/v1/wait", content=b"0123456789"))
            for _ in range(8)
        ]
        while server.admission.held_bytes < 80:
            await asyncio.sleep(0)
        refused = await server.call("POST", "/v1/echo/x", content=b"x")
        assert refused.status_code == 429
        assert "80 bytes together" in error_of(refused)["message"]
        server.go.set()
        await asyncio.gather(*tasks)
        assert (await server.call("POST", "/v1/echo/x", content=b"x")).status_code == 200

    asyncio.run(run())


def test_a_body_that_drips_in() -> None:
    server = Server(max_upload_seconds=0.1)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    response = server.ask("POST", "/v1/echo/x", content=drip())
    assert response.status_code == 408
    assert response.headers["connection"] == "close"
    assert "did not arrive within 0.1 seconds" in error_of(response)["message"]


def test_pictures_have_a_limit_together() -> None:
    """Each is within its own; those behind the one that is too many are not even decoded."""
    from nanomolmo2.serve.reading import conversation
    from nanomolmo2.serve.schemas import Message

    def picture(width: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (width, 10)).save(stream, "PNG")
        return stream.getvalue()

    settings = ServeSettings(max_pixels=1000)
    messages = [Message(role="user", content="What is it?")]
    fits = [picture(100)] * 4
    read = conversation(messages, settings, images=fits)
    assert picture_sizes(read) == [(100, 10)] * 4
    with pytest.raises(Refusal, match="first 5 pictures have 4,010 pixels together") as refused:
        conversation(messages, settings, images=[*fits, picture(1), b"no picture"])
    assert (refused.value.status, refused.value.code) == (400, "too_many_pixels")


# ---- errors and logs ----


def test_a_refusal_of_a_route_is_an_answer() -> None:
    response = Server().ask("POST", "/v1/refuse")
    assert response.status_code == 404
    assert response.headers["retry-after"] == "3"
    assert error_of(response) == {
        "message": "no cups",
        "type": "invalid_request_error",
        "param": "object",
        "code": "no_cups",
    }


def test_an_error_tells_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    with caplog.at_level(logging.DEBUG):
        response = server.ask("POST", "/v1/fail", content=b"my secret question")
    assert response.status_code == 500
    error = error_of(response)
    assert error == {
        "message": "the server failed at this request, which says nothing about the request "
        "itself: try again",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    said = caplog.text + "".join(capsys.readouterr())
    assert "error: KeyError in nanomolmo2.serve.security:" in said
    for secret in ("secret", "somebody", "Traceback", "/home"):
        assert secret not in said + response.text


def test_who_waits_when_the_server_ends_is_told_so() -> None:
    """At a second signal, or when the time of the first is up, what runs is cancelled."""
    server = Server()

    sent: list[Any] = []

    async def ends() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/wait", "headers": []}
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": None}

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.create_task(server.app(scope, receive, send))
        while not server.admission.inside:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ends())
    assert sent[0]["status"] == 503
    assert b'"code": "shutting_down"' in sent[1]["body"]
    assert server.admission.inside == 0


def test_an_error_in_the_middle_breaks_the_answer_off(caplog: pytest.LogCaptureFixture) -> None:
    """Its last message is not sent, and so the server closes the connection."""
    server, sent = Server(), []
    scope = {"type": "http", "method": "POST", "path": "/v1/stream", "headers": []}
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": None}
    received = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        for message in received:
            return message
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(server.app(scope, receive, send))
    assert [message.get("body") for message in sent] == [None, b"a"]
    assert sent[1]["more_body"] is True
    assert "error: ValueError in " in caplog.text
    assert "in the middle" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "line"),
    [
        ("POST", "/v1/echo/my-name?q=my-query", "POST /v1/echo/{name} 200 "),
        ("GET", "/my/own/path", "GET (none) 404 "),
        ("GET", "/page/my-file.js", "GET /page/... 404 "),
        ("GET", "/v1/models?key=my-key", "GET /v1/models 200 "),
        ("POST", "/v1/refuse", "POST /v1/refuse 404 "),
        ("my-method", "/v1/models", "OTHER /v1/models 405 "),
    ],
)
def test_a_line_of_the_log(
    method: str, path: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nanomolmo2.serve"):
        Server().ask(method, path, headers=bearer("my-key"), content=b"my question")
    (message,) = [
        record.getMessage() for record in caplog.records if record.name == "nanomolmo2.serve"
    ]
    assert message.startswith(line)
    seconds, unit = message.removeprefix(line).split()
    assert 0 <= float(seconds) < 10
    assert unit == "s"
    assert "my-" not in message


def test_websockets_are_not_answered() -> None:
    async def run() -> None:
        server = Server()
        guard = Guard(
            lambda *_: pytest.fail("it was called"),  # type: ignore[arg-type]
            settings=server.settings,
            admission=server.admission,
            metrics=server.metrics,
        )
        await guard({"type": "websocket"}, None, None)  # type: ignore[arg-type]

    asyncio.run(run())


# ---- settings ----


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_running": 0}, "max_running must be 1 or more, found 0"),
        ({"max_waiting": -1}, "max_waiting must be 0 or more, found -1"),
        ({"memory_bytes": 0}, "memory_bytes must be 1 or more, found 0"),
        ({"max_seconds": -0.1}, r"max_seconds must be 0 or more, found -0\.1"),
        ({"max_seconds": float("nan")}, "max_seconds must be 0 or more, found nan"),
        ({"port": 65536}, "port must be 0"),
        ({"shutdown_seconds": -1.0}, "shutdown_seconds must be 0 or more"),
        ({"api_keys": ("",)}, "an API key must be of visible ASCII"),
        ({"api_keys": ("a b",)}, "an API key must be of visible ASCII"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeSettings(**wrong)


def test_settings_do_not_print_keys() -> None:
    assert "my-key" not in repr(ServeSettings(api_keys=("my-key",)))
