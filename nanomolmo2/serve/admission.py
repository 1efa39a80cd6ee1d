"""How many requests are inside at a time, and none any more once the server ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nanomolmo2.serve.refusal import RETRY_AFTER, Refusal, closed
from nanomolmo2.serve.settings import ServeSettings


class Admission:
    """A bounded queue: a request is let in, or refused at once.

    `security.Guard` asks it for every POST, before the body is read; routes have nothing to do.
    For the event loop's thread alone.

    Attributes:
        inside: requests that were let in and have not ended.
        held_bytes: of their bodies.
        draining: whether the server ends, and lets nobody in.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.inside = 0
        self.held_bytes = 0
        self.draining = False

    @property
    def most(self) -> int:
        """Requests that may be inside together."""
        return self.settings.max_running + self.settings.max_waiting

    @contextlib.contextmanager
    def enter(self) -> Iterator[Visit]:
        """Let a request in for as long as the block runs.

        Raises: Refusal (503 where the server ends, 429 where the queue is full).
        """
        if self.draining:
            raise closed()
        if self.inside >= self.most:
            raise Refusal(
                f"the server is busy with {self.inside} requests, which is all that it takes at a "
                f"time: try again in {RETRY_AFTER} seconds",
                status=429,
                code="queue_full",
                retry_after=RETRY_AFTER,
            )
        visit = Visit(self)
        self.inside += 1
        try:
            yield visit
        finally:
            self.inside -= 1
            self.held_bytes -= visit.held_bytes

    def drain(self) -> None:
        """Let nobody in any more; those inside go on."""
        self.draining = True


class Visit:
    """A request that is inside."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.held_bytes = 0

    def hold(self, count: int) -> None:
        """Bytes of its body that have arrived.

        Raises: Refusal (413, 429) if they are too many, alone or together with those of others.
        """
        settings = self._admission.settings
        self.held_bytes += count
        self._admission.held_bytes += count
        if self.held_bytes > settings.max_body_bytes:
            raise too_long(settings.max_body_bytes)
        if self._admission.held_bytes > settings.max_bodies_bytes:
            raise Refusal(
                f"the requests that the server holds have more than {settings.max_bodies_bytes:,} "
                f"bytes together: try again in {RETRY_AFTER} seconds",
                status=429,
                code="queue_full",
                retry_after=RETRY_AFTER,
            )


def too_long(most: int) -> Refusal:
    """A body of more than so many bytes."""
    return Refusal(
        f"the request is longer than the {most:,} bytes that the server takes: send fewer or "
        f"smaller pictures",
        status=413,
        code="request_too_large",
    )
