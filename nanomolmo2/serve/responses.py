"""OpenAI's newer route, ``/v1/responses``: one answer, whole or as events. Nothing is stored."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nanomolmo2.serve.answering import last, points_json, server_of, usage_json
from nanomolmo2.serve.documents import documented
from nanomolmo2.serve.events import EventStream, event, merged, until_left
from nanomolmo2.serve.openai import Writer, check, start
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.replies import ResponseObject
from nanomolmo2.serve.schemas import ResponsesRequest

if TYPE_CHECKING:
    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.stream import Item

router = APIRouter()


@router.post("/v1/responses", **documented(ResponsesRequest, ResponseObject, streams=True))
async def responses(request: Request) -> Response:
    """Answer a conversation about pictures or a video, as OpenAI's newer API does."""
    server, arrived = server_of(request), time.perf_counter()
    deadline = server.deadline()
    _, asked = await server.read(request, ResponsesRequest)
    chat = asked.as_chat()
    check(chat, server)
    async with AsyncExitStack() as held:
        work = server.begin(held, chat, lambda vlm: start(vlm, chat, server))
        async with asyncio.timeout_at(deadline):
            vlm, (stream,) = await until_left(request.receive, work)
        asked.input, chat.messages = "", []  # a stream is long, and pictures in base 64 are large
        teller = _Teller(asked, Writer(chat, vlm))
        items = server.watched(stream, arrived)
        if asked.stream:
            return EventStream(
                teller.events(items), held.pop_all(), deadline=deadline, failed=teller.failed
            )
        async with asyncio.timeout_at(deadline):
            answer = await until_left(request.receive, last(items))
        return JSONResponse(teller.response(answer))


class _Teller:
    """A response as an object, and the events that lead to it."""

    def __init__(self, asked: ResponsesRequest, writer: Writer) -> None:
        self.asked, self.writer = asked, writer
        self.id, self.item_id = (f"{kind}_{secrets.token_hex(12)}" for kind in ("resp", "msg"))
        self.created = int(time.time())
        self._number = -1

    def response(self, answer: Answer | None) -> dict[str, Any]:
        """None: it is still being written."""
        is_cut = answer is not None and answer.finish_reason == "length"
        status = "in_progress" if answer is None else "incomplete" if is_cut else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": self.asked.instructions,
            "max_output_tokens": self.asked.max_output_tokens,
            "metadata": {},
            "model": self.asked.model,
            "output": [] if answer is None else [self.message(answer)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.asked.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.asked.top_p or 1.0,
            "usage": None if answer is None else _usage(answer),
        }

    def message(self, answer: Answer | None) -> dict[str, Any]:
        message: dict[str, Any] = {"id": self.item_id, "type": "message", "role": "assistant"}
        if answer is None:
            return {**message, "status": "in_progress", "content": []}
        is_cut = answer.finish_reason == "length"
        return {
            **message,
            "status": "incomplete" if is_cut else "completed",
            "content": [_part(self.writer.content(answer))],
            "points": points_json(answer),
            "count": answer.count,
        }

    async def events(self, items: AsyncIterator[Item]) -> AsyncIterator[str]:
        """In the order in which OpenAI sends them."""
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        yield self.tell("response.created", response=self.response(None))
        yield self.tell("response.in_progress", response=self.response(None))
        yield self.tell("response.output_item.added", output_index=0, item=self.message(None))
        yield self.tell("response.content_part.added", **place, part=_part(""))
        answer: Answer | None = None
        async for _, piece, found in self.writer.pieces(merged([items])):
            answer = found
            if piece:
                yield self.tell("response.output_text.delta", **place, delta=piece, logprobs=[])
        assert answer is not None
        text = self.writer.content(answer)
        yield self.tell("response.output_text.done", **place, text=text, logprobs=[])
        yield self.tell("response.content_part.done", **place, part=_part(text))
        yield self.tell("response.output_item.done", output_index=0, item=self.message(answer))
        response = self.response(answer)
        yield self.tell(f"response.{response['status']}", response=response)

    def tell(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    def failed(self, refusal: Refusal) -> str:
        """The event that says what went wrong on the way."""
        said = refusal.body()["error"]
        return self.tell("error", message=said["message"], code=said["code"], param=said["param"])


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(answer: Answer) -> dict[str, Any]:
    usage = usage_json([answer])
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
