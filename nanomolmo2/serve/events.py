"""Answers on their way to a client: server-sent events, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanomolmo2.serve.errors import as_refusal
from nanomolmo2.serve.refusal import Refusal

T = TypeVar("T")

_PARTING_SECONDS = 5.0  # for the last words to a client that may not be reading

MEDIA_TYPE = "text/event-stream"


def event(data: object, name: str | None = None) -> str:
    """One server-sent event; JSON has no line breaks of its own."""
    text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"


async def until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What some work results in; it is cancelled when the client leaves.

    Call it once the body was read: what then comes from the client is its leaving.

    Raises: Refusal 499, which nobody reads any more.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        await _end(task, left)
    raise Refusal("the client left before its answer was there", status=499, code="client_left")


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have let go of what they hold."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Events as they come; what they hold is let go when they end, or the client leaves."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        events: AsyncIterator[str],
        held: AsyncExitStack,
        *,
        deadline: float,
        failed: Callable[[Refusal], str],
    ) -> None:
        """
        Args:
            held: is closed at the end, before anything else is said.
            deadline: of the event loop's clock.
            failed: the event that says what went wrong on the way.
        """
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._held = events, held
        self._deadline, self._failed = deadline, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, left)
            await self._held.aclose()

    async def _send(self, send: Send) -> None:
        async def say(text: str, more: bool = True) -> None:
            body = text.encode("utf-8")
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = ""
        try:
            async with asyncio.timeout_at(self._deadline):
                async for text in self._events:
                    await say(text)
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return  # the client has left
            last = self._failed(as_refusal(error))
        await self._held.aclose()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PARTING_SECONDS):
                await say(last, more=False)


async def merged(streams: list[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """The items of several streams as they come, each with the number of its stream.

    Raises: what the first of them raises that fails.
    """
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def read(number: int, stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                ready.put_nowait((number, item))
            ready.put_nowait(None)
        except Exception as error:
            ready.put_nowait(error)

    tasks = [asyncio.ensure_future(read(*one)) for one in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            found = await ready.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        await _end(*tasks)
