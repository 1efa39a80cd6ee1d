"""OpenAI's routes: chat completions and models.

Beside what OpenAI has, messages hold the ``points`` and the ``count`` of the answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nanomolmo2.processor import Point
from nanomolmo2.serve import shape
from nanomolmo2.serve.answering import Server, last, points_json, server_of, usage_json
from nanomolmo2.serve.documents import documented
from nanomolmo2.serve.events import EventStream, event, merged, until_left
from nanomolmo2.serve.finding import finds
from nanomolmo2.serve.logprobs import logprobs_json
from nanomolmo2.serve.reading import conversation, knows_scenes_alone, system_use
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.replies import ChatCompletion, ModelCard, ModelList
from nanomolmo2.serve.schemas import ChatRequest

if TYPE_CHECKING:
    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.stream import Item, Stream
    from nanomolmo2.generation.vlm import VLM

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatRequest, ChatCompletion, streams=True))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation about pictures or a video, as OpenAI's API does."""
    server, arrived = server_of(request), time.perf_counter()
    deadline = server.deadline()
    _, asked = await server.read(request, ChatRequest)
    check(asked, server)
    async with AsyncExitStack() as held:
        work = server.begin(held, asked, lambda vlm: start(vlm, asked, server))
        async with asyncio.timeout_at(deadline):
            vlm, streams = await until_left(request.receive, work)
        asked.messages = []  # a stream is long, and pictures in base 64 are large
        writer = Writer(asked, vlm)
        watched = [server.watched(stream, arrived) for stream in streams]
        if asked.stream:
            chunks = writer.chunks(merged(watched), len(watched))
            return EventStream(
                chunks, held.pop_all(), deadline=deadline, failed=lambda e: event(e.body())
            )
        async with asyncio.timeout_at(deadline):
            answers = await until_left(request.receive, _all(watched))
        return JSONResponse(writer.completion(answers))


async def _all(streams: Sequence[Any]) -> list[Answer]:
    return list(await asyncio.gather(*map(last, streams)))


def check(asked: ChatRequest, server: Server) -> None:
    """Raises: Refusal, ValueError for what this server does not do."""
    most = server.settings.max_choices
    if (asked.n or 1) > most:
        raise Refusal(f"n must be at most {most}, found {asked.n}", param="n", code="invalid_value")
    form = asked.response_format
    if form is not None and form.json_schema is not None and form.json_schema.schema_ is not None:
        shape.check(form.json_schema.schema_)


def start(vlm: VLM, asked: ChatRequest, server: Server) -> list[Stream]:
    """Decode, encode and submit, once for each choice; the first finds out what is wrong.

    What the first choice computes of the prompt the others find in the cache.
    """
    messages = conversation(
        asked.messages,
        server.settings,
        system=system_use(vlm.processor.config),
    )
    options, form = asked.options(), asked.response_format
    seed = options.pop("seed", None)
    streams: list[Stream] = []
    try:
        for number in range(asked.n or 1):
            own = {} if seed is None else {"seed": seed + number}
            streams.append(
                server.stream(
                    vlm,
                    messages,
                    asked,
                    longest=asked.longest,
                    options={**options, **own},
                    well_formed=form is not None and form.type != "text",
                )
            )
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams


@dataclass
class Writer:
    """What is said about a request in OpenAI's words, whole or in chunks."""

    asked: ChatRequest
    vlm: VLM

    def __post_init__(self) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.selects = self.vlm.processor.config.points is not None

    @property
    def wants_json(self) -> bool:
        form = self.asked.response_format
        return form is not None and form.type != "text"

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.asked.logprobs or self.asked.top_logprobs)

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": None,
        }

    def completion(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All choices, whole."""
        choices = []
        for number, answer in enumerate(answers):
            message = {
                "role": "assistant",
                "content": self.content(answer),
                "refusal": None,
                "points": points_json(answer),
                "count": answer.count,
            }
            choices.append(
                {
                    "index": number,
                    "message": message,
                    "logprobs": self.logprobs(answer),
                    "finish_reason": answer.finish_reason,
                }
            )
        return {
            **self.head("chat.completion"),
            "choices": choices,
            "usage": usage_json(answers),
        }

    def content(self, answer: Answer) -> str:
        """The text, its points as coordinates; or the JSON that was asked for."""
        form = self.asked.response_format
        if form is None or form.type == "text":
            return answer.coordinates
        values: Any = shape.values_of(answer.coordinates, answer.count, points_json(answer))
        if form.json_schema is not None and form.json_schema.schema_ is not None:
            values = shape.fill(form.json_schema.schema_, values)
        return json.dumps(values, ensure_ascii=False)

    def logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        return logprobs_json(answer, self.vlm)

    async def pieces(
        self, items: AsyncIterator[tuple[int, Item]]
    ) -> AsyncIterator[tuple[int, str, Answer | None]]:
        """(choice, piece of its content, its answer with the last piece) as they are written.

        JSON, and what follows a selected point, is said at the end, when it is known as a whole.
        """
        said: dict[int, str] = {}
        holding: set[int] = set()
        async for number, item in items:
            if isinstance(item, str):
                if self.wants_json or (self.selects and "<POINT_" in item):
                    holding.add(number)
                if number not in holding:
                    said[number] = said.get(number, "") + item
                    yield number, item, None
            elif not isinstance(item, Point):
                yield number, self.content(item)[len(said.get(number, "")) :], item

    async def chunks(
        self, items: AsyncIterator[tuple[int, Item]], choices: int
    ) -> AsyncIterator[str]:
        """Server-sent events of all choices. Clients add up lists, so points come once, whole."""
        answers: dict[int, Answer] = {}
        for number in range(choices):
            yield self.chunk(number, {"role": "assistant", "content": ""})
        async for number, piece, answer in self.pieces(items):
            if piece:
                yield self.chunk(number, {"content": piece})
            if answer is not None:
                answers[number] = answer
                yield self.chunk(
                    number,
                    {"points": points_json(answer), "count": answer.count},
                    logprobs=self.logprobs(answer),
                    finish_reason=answer.finish_reason,
                )
        if self.includes_usage:
            usage = usage_json([answers[number] for number in sorted(answers)])
            yield event({**self.head(_CHUNK), "choices": [], "usage": usage})
        yield event("[DONE]")

    @property
    def includes_usage(self) -> bool:
        options = self.asked.stream_options
        return options is not None and bool(options.include_usage)

    def chunk(
        self,
        number: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.includes_usage else {}
        return event({**self.head(_CHUNK), "choices": [choice], **usage})


_CHUNK = "chat.completion.chunk"


# ---- models ----


@router.get("/v1/models", **documented(None, ModelList))
async def models(request: Request) -> Response:
    """The models that a request can name."""
    server = server_of(request)
    await server.warmed()
    cards = [model_card(server, name) for name in server.models.names()]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{model:path}", **documented(None, ModelCard))
async def model(request: Request, model: str) -> Response:
    """One model."""
    server = server_of(request)
    server.models.check(model)
    return JSONResponse(model_card(server, model))


def model_card(server: Server, name: str) -> dict[str, Any]:
    """A model as OpenAI lists it; its abilities are known once it is loaded."""
    vlm = server.models.loaded().get(name)
    return {
        "id": name,
        "object": "model",
        "created": server.started,
        "owned_by": "nanomolmo2",
        "loaded": vlm is not None,
        "abilities": None if vlm is None else abilities(vlm),
    }


def abilities(vlm: VLM) -> dict[str, Any]:
    """What a model takes and gives, for pages that show only what works."""
    config = vlm.processor.config
    crops = config.multicrop
    return {
        "video": config.video is not None,
        "points": "text" if config.points is None else "selected",
        "find": finds(vlm),
        "several_images": True,
        "max_crops": None if crops is None else crops.max_crops,
        # What learned from scenes alone has hardly seen a second question.
        "conversation": not knows_scenes_alone(config),
        "system": system_use(config) != "left out",
        "context": vlm.model.config.llm_config.max_position_embeddings,
    }
