"""The route that finds by example: places of a picture in, the places of all that is like them out.

No text is written, so nothing waits for the scheduler. The encoder sees one picture at a time,
whoever shows it; of a second click on a picture it has nothing to see. Searches run one after the
other, in a thread of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import JSONResponse, Response

from nanomolmo2.serve.answering import answer_json, server_of
from nanomolmo2.serve.documents import documented
from nanomolmo2.serve.errors import sentence
from nanomolmo2.serve.events import until_left
from nanomolmo2.serve.reading import FETCH_SECONDS, Body, check_pixels, read_image
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.replies import PlainAnswer
from nanomolmo2.serve.schemas import FindRequest, Place
from nanomolmo2.serve.settings import ServeSettings

if TYPE_CHECKING:
    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.vlm import VLM

router = APIRouter()

USUAL_CONFIDENCE = 0.5

Shown = dict[
    str, Image.Image
]  # in the order of their numbers: the reference, if any, and the image


@router.post("/v1/find", **documented(FindRequest, PlainAnswer, forms=True))
async def find(request: Request) -> Response:
    """Find everything in a picture that is like the examples."""
    server = server_of(request)
    deadline = server.deadline()
    body, asked = await server.read(request, FindRequest, forms=True)
    sources = _sources(asked, body, server.settings)

    async def work(vlm: VLM) -> Answer:
        shown = await server.in_thread(lambda: _decoded(sources, server.settings), asked)
        return await server.in_thread(lambda: _found(vlm, asked, shown), alone=True)

    async with asyncio.timeout_at(deadline), server.models.use(asked.model) as vlm:
        answer = await until_left(request.receive, work(vlm))
    return JSONResponse(answer_json(answer, asked.model or server.models.default))


def finds(vlm: VLM) -> bool:
    """Whether a model has learned to find by example."""
    return vlm.model.config.finder_dim is not None


def _sources(asked: FindRequest, body: Body, settings: ServeSettings) -> dict[str, str | bytes]:
    """The pictures of a request by the names of their fields, not yet decoded.

    Raises: Refusal for none, several, a video, or more than the server takes.
    """
    images: list[str | bytes] = [*asked.addresses, *body.images]
    references: list[str | bytes] = [
        *asked.all_addresses[len(asked.addresses) :],
        *body.references,
    ]
    if body.videos:
        raise Refusal(
            "a video was sent, expected a picture: things are found in pictures alone",
            param="image",
            code="invalid_value",
        )
    if not images:
        raise Refusal(
            "image is missing: send a picture as a data URL in the field image, or as a file of a "
            "form",
            param="image",
            code="missing_required_parameter",
        )
    for name, found in (("image", images), ("reference", references)):
        if len(found) > 1:
            raise Refusal(
                f"{name} holds {len(found)} pictures, expected one: send a request for each",
                param=name,
                code="too_many_images",
            )
    if references and settings.max_images < 2:
        raise Refusal(
            f"the request holds 2 pictures, expected at most {settings.max_images}: leave "
            f"reference out",
            param="reference",
            code="too_many_images",
        )
    return {**({"reference": references[0]} if references else {}), "image": images[0]}


def _decoded(sources: dict[str, str | bytes], settings: ServeSettings) -> Shown:
    """Called in a thread. Raises: Refusal that names the picture's field."""
    deadline = time.monotonic() + FETCH_SECONDS
    shown: Shown = {}
    for name, source in sources.items():
        try:
            shown[name] = read_image(source, settings, deadline)
            check_pixels([image.size for image in shown.values()], settings)
        except Refusal as refusal:
            refusal.param = name
            raise
    return shown


def _found(vlm: VLM, asked: FindRequest, shown: Shown) -> Answer:
    """Called in a thread. Raises: Refusal for what the model does not take, with its sentence."""
    least = asked.min_confidence
    try:
        return vlm.find(
            shown["image"],
            **{name: [_given(place) for place in all] for name, all in asked.examples.items()},
            reference=shown.get("reference"),
            max_crops=asked.max_crops,
            min_confidence=USUAL_CONFIDENCE if least is None else least,
        )
    except ValueError as error:
        param = _outside(asked, [image.size for image in shown.values()])
        raise Refusal(sentence(str(error)), param=param, code="invalid_value") from error


def _given(place: Place) -> tuple[float, float] | tuple[float, float, int]:
    """A place as `VLM.find` takes it: of the first picture, or with the number of its own."""
    x, y, image = place
    return (x, y) if image is None else (x, y, image)


def _outside(asked: FindRequest, sizes: Sequence[tuple[int, int]]) -> str | None:
    """The field with a place that lies in no picture."""
    for name, places in asked.examples.items():
        for x, y, image in places:
            number = image or 1
            width, height = sizes[number - 1] if number <= len(sizes) else (-1, -1)
            if not (0 <= x <= width and 0 <= y <= height):
                return name
    return None
