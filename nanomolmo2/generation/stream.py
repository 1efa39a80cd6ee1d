"""Stream: an answer while it is written."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Self, cast

import numpy as np

from nanomolmo2.generation.answer import Answer, Shown, read_answer
from nanomolmo2.generation.request import Event, Result
from nanomolmo2.generation.scheduler import Cancelled, Ticket
from nanomolmo2.generation.text_stream import PointStream, TextStream
from nanomolmo2.processor import Encoded, Point

Item = str | Point | Answer
_CLOSED = "the answer was ended before it was whole"


class Asked(NamedTuple):
    """A question on its way: its prompt, its text so far, and when it began (seconds)."""

    encoded: Encoded
    text: TextStream
    start: float
    prepared: float
    show: Callable[[], Shown] | None = None

    def answer(self, result: Result, first_token: float = 0.0) -> Answer:
        """What was written until now, as a whole."""
        whole, encoded = self.text.end(), self.encoded
        done = time.perf_counter()
        read = read_answer(whole, encoded, result.confidences)
        return Answer(
            text=whole,
            points=read.points,
            count=read.count,
            problems=read.problems,
            image_sizes=encoded.image_sizes,
            video_size=encoded.video_size,
            frame_times=tuple(encoded.frame_times),
            input_tokens=len(encoded.input_ids),
            output_tokens=len(self.text.ids),
            timings={
                "prepare": self.prepared - self.start,
                "first_token": (first_token or done) - self.prepared,
                "generate": done - self.prepared,
            },
            reused_tokens=result.reused_tokens,
            finish_reason="stop" if self.text.stopped else result.finish_reason,
            logprobs=result.sampled,
            coordinates=read.coordinates,
            confidences=read.confidences,
            confidence=result.confidence,
            prompt_tokens=result.prompt_tokens,
            token_ids=tuple(result.token_ids),
            show=self.show,
        )


class Stream:
    """Pieces of the answer as they are written, points as they become sure, last the `Answer`.

    Iterate it, with ``for`` or ``async for``. Leaving it early (``close``, the end of a ``with``
    block, the last reference) ends the answer: its row is free at the next step, and nothing more
    comes.
    """

    def __init__(
        self, ticket: Ticket, asked: Asked, then: Callable[[Answer], object] | None = None
    ) -> None:
        """
        Args:
            then: called with the answer when it is taken.
        """
        self.then = then
        self._ticket, self._asked = ticket, asked
        self._points = PointStream(asked.encoded)
        self._first_token = 0.0
        self._ready: deque[Item] = deque()
        self._closed = threading.Event()

    @property
    def encoded(self) -> Encoded:
        """The prompt, with the sizes of what it shows."""
        return self._asked.encoded

    def forget_images(self) -> None:
        """Let go of what is shown, which may be large: the answer cannot be drawn then.

        Call it before the first item is taken.
        """
        encoded = replace(self._asked.encoded, pixel_values=None)
        self._asked = self._asked._replace(encoded=encoded, show=None)
        self._points = PointStream(encoded)

    def close(self) -> None:
        """End the answer here; nothing if it has ended. Any thread may call it."""
        self._closed.set()
        self._ticket.cancel()

    cancel = close

    def answer(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Wait for the answer; ``on_text`` is called with every piece.

        Raises: `Cancelled` if another thread closes the stream.
        """
        with self:
            for item in self:
                if isinstance(item, Answer):
                    return item
                if on_text is not None and isinstance(item, str):
                    on_text(item)
        raise Cancelled(_CLOSED)

    async def answer_async(self) -> Answer:
        """`answer` for an event loop; cancelling the task ends the answer."""
        with self:
            async for item in self:
                if isinstance(item, Answer):
                    return item
        raise Cancelled(_CLOSED)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        while not (self._ready or self._closed.is_set()):
            try:
                event = next(self._ticket)
            except Cancelled:
                if self._closed.is_set():
                    break
                raise
            self._take(event)
        if self._closed.is_set():
            raise StopIteration
        return self._given()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        while not (self._ready or self._closed.is_set()):
            try:
                event = await anext(self._ticket)
            except Cancelled:
                if self._closed.is_set():
                    break
                raise
            self._take(event)
        if self._closed.is_set():
            raise StopAsyncIteration
        return self._given()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _take(self, event: Event) -> None:
        asked = self._asked
        if event.token is not None:
            self._first_token = self._first_token or time.perf_counter()
        self._put(asked.text.new_pieces())
        if event.result is not None:
            answer = asked.answer(event.result, self._first_token)
            self._put(asked.text.new_pieces())
            self._ready += self._points.end()
            self._ready.append(answer)

    def _put(self, pieces: list[str]) -> None:
        for piece in pieces:
            self._ready.append(piece)
            self._ready += self._points.put(piece)

    def _given(self) -> Item:
        item = self._ready.popleft()
        if isinstance(item, Answer) and self.then is not None:
            self.then(item)
        return item


class Said(Stream):
    """A stream of an answer that is there already: its text, its points, itself."""

    def __init__(self, answer: Answer) -> None:
        self.then = None
        self._ready = deque((answer.text, *answer.points, answer))
        self._closed = threading.Event()
        self._shown = Encoded(
            np.empty(0, np.int64),
            np.empty(0, np.int64),
            image_sizes=answer.image_sizes,
            frame_times=answer.frame_times,
            video_size=answer.video_size,
        )

    @property
    def encoded(self) -> Encoded:
        """The sizes of what was asked about; the rest is empty."""
        return self._shown

    def forget_images(self) -> None:
        """Let go of what is shown."""
        self._ready[-1] = replace(cast(Answer, self._ready[-1]), show=None)

    def close(self) -> None:
        """Nothing more comes."""
        self._closed.set()

    cancel = close

    def __next__(self) -> Item:
        if self._closed.is_set() or not self._ready:
            raise StopIteration
        return self._given()

    async def __anext__(self) -> Item:
        if self._closed.is_set() or not self._ready:
            raise StopAsyncIteration
        return self._given()


async def begun(start: Callable[..., Stream], *arguments: Any, **keywords: Any) -> Stream:
    """A stream that a thread starts; a task that is cancelled meanwhile leaves no row behind."""
    coming = asyncio.ensure_future(asyncio.to_thread(start, *arguments, **keywords))
    try:
        return await asyncio.shield(coming)
    except asyncio.CancelledError:
        coming.add_done_callback(_close_late)
        raise


def _close_late(coming: asyncio.Future[Stream]) -> None:
    if not coming.cancelled() and coming.exception() is None:
        coming.result().close()
