"""Guard: what stands before every route of the server, and after it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nanomolmo2.serve.admission import Admission, Visit, too_long
from nanomolmo2.serve.metrics import Metrics
from nanomolmo2.serve.refusal import LOG, Refusal, closed, describe_error, failed
from nanomolmo2.serve.settings import ServeSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(LOG)

# Read without a key: a load balancer asks for health, and the page asks people for the key.
OPEN = ("/", "/health", "/favicon.ico")
OPEN_FOLDER = "/page/"

# What browsers say of a page that is not the server's own; a neighbour of its domain is one too.
OTHER_SITES = ("cross-site", "same-site")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_LEFT = 499  # nginx's number for it; nobody gets it

# Everything that the page has comes from here; nothing inline, no frame around it.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """ASGI middleware: ``app.add_middleware(Guard, settings=, admission=, metrics=)``.

    In this order: the name it was called by, the page that calls, the key, the queue, the size and
    the time of the body. A `Refusal` that a route lets through becomes an answer here; of any other
    error the log tells its kind and its place, and the answer neither.
    """

    def __init__(
        self, app: App, *, settings: ServeSettings, admission: Admission, metrics: Metrics
    ) -> None:
        self.app, self.settings = app, settings
        self.admission, self.metrics = admission, metrics
        self._keys = [_digest(key) for key in settings.api_keys]
        self._hosts = {host.lower() for host in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # of websockets there are none
                await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        reply = _Reply(scope, send)
        try:
            await self._answer(scope, receive, reply)
        except Refusal as refusal:
            await reply.refuse(refusal)
        except asyncio.CancelledError:  # the server ends before the answer did
            await reply.refuse(closed())
            raise
        except Exception as error:
            log.error("error: %s", describe_error(error))
            await reply.refuse(failed())
        finally:
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            route, seconds = route_of(scope), time.perf_counter() - start
            status = reply.status or CLIENT_LEFT
            log.info("%s %s %d %.3f s", method, route, status, seconds)
            self.metrics.observe_request(route, status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = _headers(scope)
        self._check_caller(scope, headers)
        self._check_key(scope, headers)
        if scope["method"] != "POST":
            await self.app(scope, receive, reply)
            return
        with self.admission.enter() as visit:
            body = await self._body(headers, receive, visit)
            if body is not None:
                await self.app(scope, _Replay(body, receive), reply)

    def _check_caller(self, scope: Scope, headers: dict[str, str]) -> None:
        """A name of strangers may lead to this computer, and their page may call it in a browser.

        Raises: Refusal (403).
        """
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts and name.strip("[]") not in self._hosts:
            raise Refusal(
                f"the server does not answer to the name {name[:100]!r}: call it "
                f"{' or '.join(sorted(self._hosts))}, or start it with --allowed-host",
                status=403,
                code="unknown_host",
            )
        if scope["method"] == "POST" and _is_of_another_site(headers):
            raise Refusal(
                "the request comes from the page of another site: open the server's own page, or "
                "call it from a program",
                status=403,
                code="cross_site",
            )

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises: Refusal (401)."""
        path = scope["path"]
        is_open = path in OPEN or path.startswith(OPEN_FOLDER)
        # A POST has a body, which is taken in before the route is known: it needs a key everywhere.
        if not self._keys or (is_open and scope["method"] in ("GET", "HEAD")):
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        digest = _digest(sent.strip())
        # All are compared, each in the same time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            found = "the API key is wrong" if sent.strip() else "an API key is needed"
            raise Refusal(
                f"{found}: send a key of this server as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )

    async def _body(
        self, headers: dict[str, str], receive: Receive, visit: Visit
    ) -> deque[Message] | None:
        """All of a request's body; None if its client left.

        Raises: Refusal (408, 413, 429).
        """
        most, seconds = self.settings.max_body_bytes, self.settings.max_upload_seconds
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told[:20]) > most:
            raise too_long(most)
        body: deque[Message] = deque()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    visit.hold(len(message.get("body", b"")))
                    body.append(message)
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            raise Refusal(
                f"the request did not arrive within {seconds:g} seconds: send fewer or smaller "
                f"pictures",
                status=408,
                code="request_timeout",
            ) from None


class _Replay:
    """Gives a body that has been read; behind it what comes, such as that the client left."""

    def __init__(self, body: deque[Message], receive: Receive) -> None:
        self.body, self.receive = body, receive

    async def __call__(self) -> Message:
        return self.body.popleft() if self.body else await self.receive()


class _Reply:
    """Sends an answer with the headers that all answers have.

    Attributes:
        status: of the answer; 0 before it has begun.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self.send = scope, send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = list(message.get("headers", ()))
            names = {name.lower() for name, _ in given}
            ours = {**HEADERS, "cache-control": self._cache_control}
            added = [(k.encode(), v.encode()) for k, v in ours.items() if k.encode() not in names]
            message = {**message, "headers": [*given, *added]}
        await self.send(message)

    @property
    def _cache_control(self) -> str:
        """Files of the page may be kept if they are asked for again; nothing else."""
        path = self.scope["path"]
        return "no-cache" if path == "/" or path.startswith(OPEN_FOLDER) else "no-store"

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal; an answer that has begun just ends, and the client sees it."""
        if self.status:
            return
        body = json.dumps(refusal.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **refusal.headers,
        }
        if refusal.status == 408:
            headers["connection"] = "close"  # what else drips in is not waited for
        with contextlib.suppress(OSError):  # the client left
            await self(
                {
                    "type": "http.response.start",
                    "status": refusal.status,
                    "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
                }
            )
            await self({"type": "http.response.body", "body": body})


def _is_of_another_site(headers: dict[str, str]) -> bool:
    """Whether the page of another site calls, as far as its browser says so.

    Where the server is called by an http address that is not this computer's own, browsers say only
    the page's origin.
    """
    site = headers.get("sec-fetch-site")
    if site is None and (origin := headers.get("origin")):
        return origin.lower().partition("://")[2] != headers.get("host", "").lower()
    return site in OTHER_SITES


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def route_of(scope: Scope) -> str:
    """The template of the route that answered, for logs: paths may hold what is private."""
    if scope["path"].startswith(OPEN_FOLDER):
        return f"{OPEN_FOLDER}..."
    route = scope.get("route")
    return str(getattr(route, "path", "") or "(none)")
