"""Bodies of requests -> checked objects, and messages whose pictures are decoded.

What costs time (JSON of megabytes, base 64, pictures) runs in threads: call `parse` and
`conversation` there, never on the event loop.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import Request

from nanomolmo2.processor import ProcessorConfig
from nanomolmo2.processor.chat import read_messages
from nanomolmo2.processor.image import load_image
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.schemas import (
    ChatRequest,
    FindRequest,
    ImagePart,
    Loose,
    Message,
    PlainRequest,
    PointPart,
    QueryRequest,
    TextPart,
    VideoPart,
)
from nanomolmo2.serve.settings import ServeSettings

Model = TypeVar("Model", bound=Loose)

_DATA_URL = re.compile(r"data:([\w./+-]*)(?:;[\w=.+-]+)*?;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,20}):", re.IGNORECASE)
_REMOTE = re.compile(r"https?:", re.IGNORECASE)
_MAX_FIELDS = 64
FETCH_SECONDS = 20.0  # for all files of a request that lie on other computers
_JSON_FIELDS = ("messages", "stop", "like", "unlike")


@dataclass
class Body:
    """A body as it came: JSON, or the fields and files of a form.

    ``references``: files in the field of that name, which examples lie in.
    """

    json: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)
    references: list[bytes] = field(default_factory=list)


async def read_body(request: Request, settings: ServeSettings, *, forms: bool = False) -> Body:
    """Read a request to its end.

    Args:
        forms: multipart/form-data is taken too. Other forms never are: any page of the web may
            send such without asking.
    Raises: Refusal 415 for another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Body(json=await request.body())
    if not forms or kind != "multipart/form-data":
        expected = "application/json or multipart/form-data" if forms else "application/json"
        raise Refusal(
            f"the content type is {kind[:60] or 'missing'}, expected {expected}: name it in the "
            f"header Content-Type",
            status=415,
            code="unsupported_media_type",
        )
    body = Body()
    _check_charset(request.headers["content-type"])
    async with request.form(
        max_files=settings.max_images + 1,
        max_fields=_MAX_FIELDS,
        max_part_size=settings.max_body_bytes,
    ) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                is_video = name == "video" or (value.content_type or "").startswith("video/")
                pictures = body.references if name == "reference" else body.images
                (body.videos if is_video else pictures).append(await value.read())
            elif name == "images":
                body.fields.setdefault(name, []).append(value)
            elif value:
                body.fields[name] = value
    return body


def _check_charset(content_type: str) -> None:
    """A client may name any of Python's encodings, and some of them take minutes for a megabyte.

    Raises: Refusal 415.
    """
    from python_multipart.multipart import parse_options_header  # of the reader behind it

    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise Refusal(
            "the form is in another encoding than UTF-8: leave charset out of the header "
            "Content-Type, and send UTF-8",
            status=415,
            code="unsupported_media_type",
        )


def parse(body: Body, model: type[Model]) -> Model:
    """Raises: Refusal for what is no JSON; ValidationError for what is another object."""
    if body.json is not None:
        return model.model_validate(_parse_json(body.json, "the body"))
    fields = dict(body.fields)
    for name in _JSON_FIELDS:
        if isinstance(fields.get(name), str) and fields[name].lstrip()[:1] in ("[", "{"):
            fields[name] = _parse_json(fields[name].encode(), f"the field {name}")
    return model.model_validate(fields, strict=False)


def _parse_json(text: bytes, what: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Refusal(
            f"{what} is no JSON in UTF-8: send an object such as the schema at /openapi.json has",
            code="invalid_json",
        ) from None


def is_remote(asked: ChatRequest | PlainRequest | FindRequest) -> bool:
    """Whether a request shows what lies on other computers."""
    addresses: list[str] = []
    if isinstance(asked, PlainRequest):
        addresses = [*asked.addresses, *asked.video_addresses]
    if isinstance(asked, FindRequest):
        addresses = asked.all_addresses
    messages = asked.messages if isinstance(asked, (ChatRequest, QueryRequest)) else None
    for message in messages or ():
        if not isinstance(message.content, str):
            shown = (part for part in message.content if isinstance(part, (ImagePart, VideoPart)))
            addresses += (part.address for part in shown)
    return any(_REMOTE.match(address) for address in addresses)


# ---- messages ----


_SCENES = {"emoji", "things"}  # names of the built-in sources
SystemUse = Literal["own", "in front", "left out"]


class _Undecoded(NamedTuple):
    """A picture or video of a message, until the roles and counts of all are checked."""

    source: str | bytes


def knows_scenes_alone(config: ProcessorConfig) -> bool:
    """Whether a model learned from nothing but drawn scenes and their questions."""
    return bool(config.trained_on) and set(config.trained_on) <= _SCENES


def system_use(config: ProcessorConfig) -> SystemUse:
    """What a model makes of a system message: a turn of its own, or text before the first question.

    A model that learned from drawn scenes alone knows nothing but their questions; whatever stands
    before one makes it a question that it does not know, so there it is left out.
    """
    if knows_scenes_alone(config):
        return "left out"
    return "in front" if config.chat_format == "molmo2" else "own"


def conversation(
    messages: Sequence[Message],
    settings: ServeSettings,
    *,
    images: Sequence[str | bytes] = (),
    videos: Sequence[str | bytes] = (),
    system: SystemUse = "own",
) -> list[Any]:
    """Check a conversation, then decode what it shows: the messages as `VLM.ask` takes them.

    Args:
        images, videos: beside the messages; they come first.
        system: what becomes of a system message, see `system_use`.
    Raises: ValueError, Refusal for roles out of order, too many or broken pictures, several videos.
    """
    ours: list[Any] = [_ours(message) for message in messages]
    if ours and ours[0]["role"] == "system" and system != "own":
        ours = _without_system(ours, in_front=system == "in front")
    if images or videos:
        first = next((message for message in ours if message["role"] == "user"), None)
        if first is not None:
            shown = [{"type": "image", "image": _Undecoded(image)} for image in images]
            shown += [{"type": "video", "video": _Undecoded(video)} for video in videos]
            first["content"] = [*shown, *first["content"]]
    turns = read_messages(ours)
    if ours[-1]["role"] != "user":
        raise Refusal(
            "the last message is the assistant's, expected a question: end with a message of the "
            "role user",
            param="messages",
            code="invalid_value",
        )
    if not ours[-1]["content"]:
        raise ValueError("the question is empty: expected a text")
    _check_counts(
        sum(len(turn.images) for turn in turns), sum(len(turn.videos) for turn in turns), settings
    )
    sizes: list[tuple[int, int]] = []
    deadline = time.monotonic() + FETCH_SECONDS
    for message in ours:
        for part in message["content"]:
            if part["type"] == "image":
                image = read_image(part["image"].source, settings, deadline)
                part["image"] = image
                sizes.append(image.size)
                check_pixels(sizes, settings)
            elif part["type"] == "video":
                part["video"] = read_bytes(part["video"].source, "video", settings, deadline)
    return ours


def _ours(message: Message) -> dict[str, Any]:
    """A message of OpenAI's API with parts as the processor names them, not yet decoded."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": [{"type": "text", "text": message.content}]}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
        elif isinstance(part, ImagePart):
            parts.append({"type": "image", "image": _Undecoded(part.address)})
        elif isinstance(part, VideoPart):
            parts.append({"type": "video", "video": _Undecoded(part.address)})
        elif isinstance(part, PointPart):
            place = {"x": part.x, "y": part.y, "image": part.image, "time": part.time}
            given = {name: value for name, value in place.items() if value is not None}
            parts.append({"type": "point", **given})
    return {"role": role, "content": parts}


def _without_system(messages: list[dict[str, Any]], *, in_front: bool) -> list[dict[str, Any]]:
    system, *rest = messages
    if any(part["type"] != "text" for part in system["content"]):
        raise Refusal(
            "the system message holds a picture or a video, expected text alone: show it in a "
            "message of the role user",
            param="messages",
            code="invalid_value",
        )
    text = "".join(part["text"] for part in system["content"])
    if in_front and rest and rest[0]["role"] == "user" and text.strip():
        content = [{"type": "text", "text": f"{text.strip()}\n"}, *rest[0]["content"]]
        rest[0] = {**rest[0], "content": content}
    return rest


def _check_counts(images: int, videos: int, settings: ServeSettings) -> None:
    if videos > 1:
        raise Refusal(
            f"the conversation holds {videos} videos, expected one at most: ask about each apart",
            param="messages",
            code="too_many_videos",
        )
    if videos and images:
        raise Refusal(
            "the conversation holds a video and pictures, expected one kind: ask about each apart",
            param="messages",
            code="invalid_value",
        )
    if images > settings.max_images:
        raise Refusal(
            f"the conversation holds {images} pictures, expected at most {settings.max_images}: "
            f"send fewer",
            param="messages",
            code="too_many_images",
        )


def check_pixels(sizes: Sequence[tuple[int, int]], settings: ServeSettings) -> None:
    """Raises: Refusal for pictures that have too many pixels together."""
    pixels = sum(width * height for width, height in sizes)
    if pixels > settings.max_request_pixels:
        raise Refusal(
            f"the first {len(sizes)} pictures have {pixels:,} pixels together, expected at most "
            f"{settings.max_request_pixels:,}: send fewer or smaller ones",
            param="messages",
            code="too_many_pixels",
        )


def read_image(source: str | bytes, settings: ServeSettings, deadline: float) -> Image.Image:
    """A picture of a request, decoded; see `read_bytes`."""
    data = read_bytes(source, "image", settings, deadline)
    try:
        return load_image(data, max_pixels=settings.max_pixels)
    except ValueError as error:
        said = str(error).replace("the given bytes", "the picture")
        raise Refusal(said, param="image", code="invalid_image") from None


def read_bytes(source: str | bytes, kind: str, settings: ServeSettings, deadline: float) -> bytes:
    """The file behind an address of a request: a data URL, or what may be fetched.

    Args:
        deadline: of time.monotonic, for fetching all of a request's files.
    Raises: Refusal in one sentence, which never opens a file of this computer.
    """
    if isinstance(source, bytes):
        return source
    if source[:5].lower() == "data:":
        return _decoded(source, kind)
    scheme = _SCHEME.match(source)
    if scheme is None and (data := _base64(source)):
        return data
    if scheme is not None and scheme[1].lower() in ("http", "https"):
        if settings.allow_remote_images:
            return _fetched(source, kind, settings, deadline)
        raise Refusal(
            f"addresses of other computers are not fetched here: send the {kind} as a data URL, or "
            f"start the server with --allow-remote-images",
            param=kind,
            code="remote_images_not_allowed",
        )
    raise Refusal(
        f"the {kind} is neither a data URL nor an http address: send 'data:{kind}/...;base64,' and "
        f"the file in base 64",
        param=kind,
        code=f"invalid_{kind}",
    )


def _decoded(address: str, kind: str) -> bytes:
    header = _DATA_URL.match(address[:200])
    data = None if header is None else _base64(address[header.end() :])
    if not data:
        cut = (
            ""
            if "," in address
            else " (curl -F ends a text at its first semicolon, --form-string does not)"
        )
        raise Refusal(
            f"the data URL of the {kind} cannot be read: send 'data:{kind}/...;base64,' and the "
            f"file in base 64{cut}",
            param=kind,
            code=f"invalid_{kind}",
        )
    return data


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _fetched(address: str, kind: str, settings: ServeSettings, deadline: float) -> bytes:
    from nanomolmo2.remote import fetch

    left = deadline - time.monotonic()
    try:
        if left <= 0:
            raise ValueError(
                f"the {kind}s behind addresses took longer than {FETCH_SECONDS:g} seconds "
                f"together: send them as data URLs"
            )
        return fetch(address, max_bytes=settings.max_body_bytes, timeout=left)
    except ValueError as error:
        raise Refusal(str(error), param=kind, code=f"invalid_{kind}") from None
