"""A connection of the server: it does not wait for ever, and says in our shape what is no HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from nanomolmo2.serve.refusal import Refusal

# Less than the files that systems let a process open by default, 1024: pictures are files too.
MOST_CONNECTIONS = 768

_NOT_HTTP = Refusal(
    "what came is no HTTP request that the server can read: send one as HTTP/1.1 has it, with a "
    "head of at most 64 KiB",
    code="invalid_request",
)
_TOO_MANY = Refusal(
    f"the server has {MOST_CONNECTIONS} connections, which is all that it takes at a time: try "
    f"again in a moment",
    status=503,
    code="too_many_connections",
)


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, beside which a client has ``head_seconds`` for the head of its next request.

    As long it has for reading what was sent last. uvicorn itself would wait for both without end,
    and each connection takes a file of the process.
    """

    head_seconds = 60.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(_TOO_MANY)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """What came cannot be read; an answer that has begun just ends."""
        if self._is_answering and self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(_NOT_HTTP)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.head_seconds, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        """A request that runs has its own limits, and is followed by the next wait."""
        if not self._is_answering:
            self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        body = json.dumps(refusal.body()).encode()
        reason = {400: "Bad Request", 503: "Service Unavailable"}[refusal.status]
        head = (
            f"HTTP/1.1 {refusal.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def connections(head_seconds: float) -> type[Connection]:
    """The kind of connections of a server, as uvicorn takes it."""
    return type("Connection", (Connection,), {"head_seconds": head_seconds})
