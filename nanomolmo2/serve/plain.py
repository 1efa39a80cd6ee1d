"""Plain routes: a question, points, a count, a caption, each with pictures as JSON or a form."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nanomolmo2.processor import Point
from nanomolmo2.serve.answering import Server, answer_json, last, point_json, server_of
from nanomolmo2.serve.documents import documented
from nanomolmo2.serve.events import EventStream, event, until_left
from nanomolmo2.serve.reading import Body, conversation, system_use
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.replies import Attention, ExampleList, PlainAnswer
from nanomolmo2.serve.schemas import (
    AttentionRequest,
    CaptionRequest,
    Message,
    ObjectRequest,
    PlainRequest,
    QueryRequest,
)

if TYPE_CHECKING:
    from nanomolmo2.generation.stream import Item, Stream
    from nanomolmo2.generation.vlm import VLM

router = APIRouter()

_ANSWERS: dict[str, Any] = {"answer": PlainAnswer, "streams": True, "forms": True}

# Written by scripts/make_page_examples.py.
_EXAMPLES = Path(__file__).parent / "page" / "examples" / "examples.json"


@router.post("/v1/query", **documented(QueryRequest, **_ANSWERS))
async def query(request: Request) -> Response:
    """Answer a question, or a conversation."""
    server = server_of(request)
    body, asked = await server.read(request, QueryRequest, forms=True)
    return await _answered(request, server, body, asked, asked.question or "")


@router.post("/v1/point", **documented(ObjectRequest, **_ANSWERS))
async def point(request: Request) -> Response:
    """Point to everything of a kind."""
    from nanomolmo2.generation.vlm import POINT, about

    server = server_of(request)
    body, asked = await server.read(request, ObjectRequest, forms=True)
    return await _answered(request, server, body, asked, about(POINT, asked.what))


@router.post("/v1/count", **documented(ObjectRequest, **_ANSWERS))
async def count(request: Request) -> Response:
    """Count the things of a kind."""
    from nanomolmo2.generation.vlm import COUNT, about

    server = server_of(request)
    body, asked = await server.read(request, ObjectRequest, forms=True)
    return await _answered(request, server, body, asked, about(COUNT, asked.what))


@router.post("/v1/caption", **documented(CaptionRequest, **_ANSWERS))
async def caption(request: Request) -> Response:
    """Say what is in a picture."""
    from nanomolmo2.generation.vlm import CAPTION

    server = server_of(request)
    body, asked = await server.read(request, CaptionRequest, forms=True)
    return await _answered(request, server, body, asked, CAPTION)


async def _answered(
    request: Request, server: Server, body: Body, asked: PlainRequest, question: str
) -> Response:
    arrived, deadline = time.perf_counter(), server.deadline()
    if not isinstance(asked, QueryRequest):
        _check_shown(asked, body)

    def start(vlm: VLM) -> list[Stream]:
        messages = _messages(server, vlm, body, asked, question)
        return [server.stream(vlm, messages, asked, longest=asked.max_tokens)]

    async with AsyncExitStack() as held:
        async with asyncio.timeout_at(deadline):
            work = server.begin(held, asked, start)
            _, (stream,) = await until_left(request.receive, work)
        name = asked.model or server.models.default
        items = server.watched(stream, arrived)
        if asked.stream:
            return EventStream(
                _events(items, stream, name),
                held.pop_all(),
                deadline=deadline,
                failed=lambda error: event(error.body(), "error"),
            )
        async with asyncio.timeout_at(deadline):
            answer = await until_left(request.receive, last(items))
        return JSONResponse(answer_json(answer, name))


def _check_shown(asked: PlainRequest, body: Body) -> None:
    """Points, counts and captions are of something that is shown."""
    if not (asked.addresses or asked.video_addresses or body.images or body.videos):
        raise Refusal(
            "image is missing: send a picture as a data URL in the field image, or as a file of a "
            "form",
            param="image",
            code="missing_required_parameter",
        )


def _messages(
    server: Server, vlm: VLM, body: Body, asked: PlainRequest, question: str
) -> list[Any]:
    messages = [Message(role="user", content=question)]
    if isinstance(asked, QueryRequest) and asked.messages is not None:
        messages = asked.messages
    return conversation(
        messages,
        server.settings,
        images=[*asked.addresses, *body.images],
        videos=[*asked.video_addresses, *body.videos],
        system=system_use(vlm.processor.config),
    )


async def _events(items: AsyncIterator[Item], stream: Stream, model: str) -> AsyncIterator[str]:
    encoded = stream.encoded
    async for item in items:
        if isinstance(item, str):
            yield event({"text": item}, "text")
        elif isinstance(item, Point):
            yield event(point_json(item, encoded.image_sizes, encoded.video_size), "point")
        else:
            yield event(answer_json(item, model), "answer")


@router.get("/v1/examples", **documented(None, ExampleList))
async def examples() -> Response:
    """Pictures that come with the server, and what to ask about them."""
    return JSONResponse({"data": json.loads(_EXAMPLES.read_text(encoding="utf-8"))})


@router.post("/v1/attention", **documented(AttentionRequest, Attention))
async def attention(request: Request) -> Response:
    """Where the model looked when it wrote a token of an answer: weak evidence of why."""
    server = server_of(request)
    deadline = server.deadline()
    body, asked = await server.read(request, AttentionRequest)

    def look(vlm: VLM) -> dict[str, Any]:
        messages = _messages(server, vlm, body, asked, asked.question or "")
        vlm = server.with_crops(vlm, asked.max_crops)
        return vlm.looked(None, messages, asked.answer, asked.token).to_dict()

    async with asyncio.timeout_at(deadline), server.models.use(asked.model) as vlm:
        work = server.in_thread(lambda: look(vlm), asked)
        return JSONResponse(await until_left(request.receive, work))
