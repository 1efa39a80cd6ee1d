"""From a checked request to answers that are being written: what all routes share."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from starlette.requests import Request

from nanomolmo2.processor import Point, points_to_json
from nanomolmo2.serve.admission import Admission
from nanomolmo2.serve.metrics import Metrics
from nanomolmo2.serve.reading import Body, Model, is_remote, parse, read_body
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.schemas import ChatRequest, FindRequest, PlainRequest, Sampling
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore

if TYPE_CHECKING:
    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.stream import Item, Stream
    from nanomolmo2.generation.vlm import VLM
    from nanomolmo2.processor import Processor

T = TypeVar("T")

USUAL_TOKENS = 512  # longest answer where a request does not say
_PATIENCE = 5.0  # seconds for the first model, for what would like to know it
_FETCHING = 4  # requests with addresses of other computers that are read together
_SMALL = 1 << 16  # bytes of JSON that take less time than another thread


class Server:
    """The state of an app: ``app.state.server``.

    Attributes:
        started: seconds since 1970.
    """

    def __init__(self, models: ModelStore, settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.admission, self.metrics = Admission(settings), Metrics()
        self.started = int(time.time())
        self._crops: WeakKeyDictionary[VLM, dict[int, Processor]] = WeakKeyDictionary()
        # Pictures are decoded and encoded here: more at a time would only need more memory.
        cores = os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(max(2, min(cores, 8)), thread_name_prefix="nanomolmo2")
        # Requests that wait for other computers do so apart, and hold nobody else up.
        self._waiting = ThreadPoolExecutor(_FETCHING, thread_name_prefix="nanomolmo2-fetch")
        # One pass of a model takes all cores: the next waits, and pictures of others are read.
        self._passes = ThreadPoolExecutor(1, thread_name_prefix="nanomolmo2-pass")

    def deadline(self) -> float:
        """When the answer to a request that begins now must be complete, of the loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.max_seconds

    async def read(
        self, request: Request, model: type[Model], *, forms: bool = False
    ) -> tuple[Body, Model]:
        """A request's body, and the checked object in it."""
        body = await read_body(request, self.settings, forms=forms)
        if len(body.json or b"") <= _SMALL:
            return body, parse(body, model)
        return body, await self.in_thread(lambda: parse(body, model))

    async def in_thread(
        self,
        work: Callable[[], T],
        asked: ChatRequest | PlainRequest | FindRequest | None = None,
        late: Callable[[T], object] | None = None,
        *,
        alone: bool = False,
    ) -> T:
        """The result of what would stop the event loop.

        A task that is cancelled meanwhile waits until the thread is free again: who leaves gives
        the place in the queue back when its work is over, so that there is never more of it than
        the queue has places.

        Args:
            asked: whose pictures are decoded.
            late: called with a result that nobody waits for any more.
            alone: one after the other, for a pass of a model.
        """
        fetches = self.settings.allow_remote_images and asked is not None and is_remote(asked)
        threads = self._passes if alone else self._waiting if fetches else self._threads
        job = _Job(work)
        done = threads.submit(job)
        try:
            return await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            if done.cancel():
                job.work = None  # what it holds, such as pictures, is not kept until its turn
            else:
                await _ended(done)
                if late is not None and done.exception() is None:
                    late(done.result())
            raise

    async def begin(
        self,
        held: AsyncExitStack,
        asked: ChatRequest | PlainRequest,
        start: Callable[[VLM], Sequence[Stream]],
    ) -> tuple[VLM, Sequence[Stream]]:
        """Streams that a thread starts on a model; ``held`` ends them and lets the model go.

        If the task is cancelled meanwhile, the streams end as soon as they are there.
        """
        vlm = await held.enter_async_context(self.models.use(asked.model))
        streams = await self.in_thread(lambda: start(vlm), asked, late=_close_all)
        for stream in streams:
            held.callback(stream.close)
        return vlm, streams

    def stream(
        self,
        vlm: VLM,
        messages: Sequence[Any],
        asked: Sampling,
        *,
        longest: int | None,
        options: dict[str, Any] | None = None,
        well_formed: bool = False,
    ) -> Stream:
        """Submit a conversation; called in a thread.

        Args:
            longest: tokens that were asked for; None = `USUAL_TOKENS`.
            options: in place of those of ``asked``.
        Raises: ValueError for what the model does not take.
        """
        vlm = self.with_crops(vlm, asked.max_crops)
        most = self.settings.max_new_tokens
        stream = vlm.stream(
            None,
            messages,
            max_new_tokens=min(USUAL_TOKENS if longest is None else longest, most),
            well_formed_points=well_formed or bool(asked.well_formed_points),
            cut_at_context=True,
            batch_invariant=self.settings.batch_invariant,
            **(asked.options() if options is None else options),
        )
        stream.forget_images()  # many may wait, and nobody draws here
        return stream

    def with_crops(self, vlm: VLM, max_crops: int | None) -> VLM:
        """The same model, scheduler and cache behind a processor that cuts at most so many crops.

        Raises: Refusal for a model that reads a picture as a whole.
        """
        check_crops(vlm, max_crops)
        processor = vlm.processor
        if max_crops is None or processor.config.multicrop is None:
            return vlm
        known = self._crops.setdefault(vlm, {})
        if max_crops not in known:
            multicrop = replace(processor.config.multicrop, max_crops=max_crops)
            known[max_crops] = processor.with_settings(multicrop=multicrop)
        other = copy.copy(vlm)
        other.processor = known[max_crops]
        return other

    async def warmed(self, patience: float | None = _PATIENCE) -> None:
        """Wait until the first model is there, or it takes too long; it is loaded in any case."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(patience), self.models.use(None):
                pass

    async def watched(self, stream: Stream, arrived: float) -> AsyncIterator[Item]:
        """A stream whose first item is measured; ``arrived`` is of time.perf_counter.

        Raises: `EngineError` for what went wrong on the way without the request's doing: nothing of
            its text is for the client.
        """
        from nanomolmo2.generation.sampling import ChoiceError

        first = True
        try:
            async for item in stream:
                if first:
                    self.metrics.observe_first_token(time.perf_counter() - arrived)
                    first = False
                yield item
        except ChoiceError:
            raise
        except ValueError as error:
            raise EngineError from error


class EngineError(RuntimeError):
    """An answer ended with an error that is not the request's."""


class _Job:
    """Work for a thread, which lets go of it once it is done."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work: Callable[[], Any] | None = work

    def __call__(self) -> Any:
        work, self.work = self.work, None
        return None if work is None else work()


async def _ended(done: Future[Any]) -> None:
    """Wait until a thread has ended its work, however often the task is cancelled."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(ended.set)

    done.add_done_callback(wake)
    while not ended.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await ended.wait()


def check_crops(vlm: VLM, max_crops: int | None) -> None:
    """Raises: Refusal where crops are asked for, and the model reads a picture as a whole."""
    if max_crops is not None and vlm.processor.config.multicrop is None:
        raise Refusal(
            "this model reads a picture as a whole, not in crops: leave max_crops out",
            param="max_crops",
            code="invalid_value",
        )


def _close_all(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.close()


async def last(items: AsyncIterator[Item]) -> Answer:
    """The answer at the end of a stream."""
    from nanomolmo2.generation.answer import Answer

    async for item in items:
        if isinstance(item, Answer):
            return item
    raise AssertionError("a stream ends with its answer")


def server_of(request: Request) -> Server:
    """The state of the app that a request came to."""
    server = request.app.state.server
    assert isinstance(server, Server)
    return server


# ---- answers as JSON ----


def point_json(
    point: Point,
    image_sizes: Sequence[tuple[int, int]],
    video_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A point with ``x``, ``y`` in pixels and ``x_share``, ``y_share`` in 0..1 of its picture."""
    (found,) = points_to_json([point], image_sizes, video_size=video_size)
    size = image_sizes[point.image - 1] if point.time is None else video_size
    assert size is not None
    width, height = size
    shares = {"x_share": round(point.x / width, 6), "y_share": round(point.y / height, 6)}
    return {**found, **shares}


def points_json(answer: Answer) -> list[dict[str, Any]]:
    """All points of an answer, see `point_json`."""
    return [point_json(point, answer.image_sizes, answer.video_size) for point in answer.points]


def answer_json(answer: Answer, model: str) -> dict[str, Any]:
    """An answer as the plain routes send it."""
    return {
        "model": model,
        **answer.to_dict(),
        "points": points_json(answer),
        "usage": usage_json([answer]),
    }


def usage_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """OpenAI's usage of several answers to one prompt, which counts once."""
    prompt = answers[0].usage.prompt_tokens
    written = sum(answer.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": answers[0].usage.reused_tokens},
    }
