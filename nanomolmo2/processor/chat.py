"""Chat formats: messages -> segments of a prompt, each marked as control, text or answer.

``qwen3`` is Qwen3's template without a default system message and without thinking, ``molmo2`` is
the format of Molmo2 (one answer, P for the images, / for a newline):

    qwen3   <|im_start|>user/P{text}<|im_end|>/<|im_start|>assistant/{answer}<|im_end|>/
    molmo2  <|im_end|>P<|im_start|>user/{text}<|im_end|>/<|im_start|>assistant/{answer}<|im_end|>

Images or a video always come first, wherever they stand in the messages. With several images
``molmo2`` puts the text ``Image 1``, ``Image 2``, ... directly before each; each frame of a video
follows its time: ``0.0 F 0.5 F 1.0 F``. Turns follow each other with a newline between.

A rendered prompt is a prefix (what the branches of a message tree share: everything up to the end
of the images) and the turns. Prompt and labels come from the same segments: what is an answer is
decided here and nowhere else.

The chat template that Molmo2 ships differs from Molmo2's training in what precedes the answers.
``released=True`` renders as the template does, which is what other servers send to the checkpoints:

- a space before the ``<|im_start|>assistant`` of every answer that is part of the prompt; training
  and ``released=False`` have none. The answer that is about to be generated has none in either.
- one ``<|im_end|>`` between turns; training had two in a row, which is rendered nowhere here.

A last answer ends with its ``<|im_end|>``, which is learned; the template leaves even that out.

Differences of qwen3 from its template: no ``<think>`` block in the last answer or the generation
prompt (Qwen3's template adds an empty one); no tools; text is kept as it is (the template strips
newlines before an answer).
Sources: Qwen3 tokenizer_config.json; Molmo2 olmo/preprocessing/data_formatter.py and template.
"""

from __future__ import annotations

import base64
import binascii
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from nanomolmo2.processor.point import Point, PointsTag, PointsText, join_points, tags_of

ChatFormat = Literal["qwen3", "molmo2"]

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

# Molmo2 names the style of an answer before the question, but for these, which people use and
# which have natural questions.
# fmt: off
STYLES_WITHOUT_PREFIX = frozenset({
    "user_qa", "demo", "text_sft", "correction_qa", "long_caption", "short_caption",
    "pointing", "point_count", "cosyn_point",
    "multi_image_pointing", "multi_image_counting",
    "multi_image_point_then_count", "multi_image_count_then_point",
    "video_long_caption", "video_short_caption", "video_transcript",
    "video_clip_caption_start_end", "video_clip_caption_start_end_in_seconds",
    "video_clip_transcript_start_end", "video_clip_transcript_start_end_in_seconds",
    "video_frame_caption_timestamp", "video_frame_caption_timestamp_in_seconds",
    "video_point", "video_point_count", "video_count", "video_count_point",
    "video_point_track_per_frame", "video_point_track_start_end", "video_point_track_all_frames",
    "video_single_point_track_start_end",
    "a_okvqa_mc", "ai2_diagram", "ai2_diagram_no_letter", "science_qa",
    "multi_image_mc", "multi_image_mc_exp", "mantis_instruct_mc",
    "video_multiple_choice", "video_multiple_choice_count_without_pointing",
    "video_multiple_choice_multiple_correct", "video_multiple_choice_w_subtitle",
})
# fmt: on


class ContentItem(TypedDict):
    """A part of a message: of ``type`` text, image, video or point.

    Parts as servers take them are read too: ``{"type": "image_url", "image_url": {"url": ...}}``,
    ``video_url``, ``input_text``, ``input_image``, and ``{"type": "image", "url": ...}`` or
    ``"path": ...``. An address is a data URL or that of a local file (``file:///...``).

    ``image`` is anything that `processor.image.load_image` takes, ``video`` anything that
    `processor.video.load_video` takes; without it the item stands for the next of the images, or
    for the video, given beside the messages. ``style`` is one of Molmo2's names for kinds of
    answers, such as ``vqa2`` for short ones.

    A point of a question is ``{"type": "point", "x": .., "y": .., "image": 1}``, in pixels of the
    original picture, or with ``time`` (seconds) in place of ``image``; ``label`` says what it is.
    """

    type: Literal[
        "text",
        "image",
        "video",
        "point",
        "image_url",
        "video_url",
        "input_text",
        "input_image",
    ]
    text: NotRequired[str]
    x: NotRequired[float]
    y: NotRequired[float]
    time: NotRequired[float]
    label: NotRequired[str]
    style: NotRequired[str]
    image: NotRequired[Any]
    video: NotRequired[Any]
    url: NotRequired[str]
    path: NotRequired[Any]
    image_url: NotRequired[str | Mapping[str, Any]]
    video_url: NotRequired[str | Mapping[str, Any]]


class Message(TypedDict):
    """One turn of a conversation. ``subtitle``: what is spoken in the video, first of all."""

    role: Literal["system", "subtitle", "user", "assistant"]
    content: str | Sequence[ContentItem]


class Segment(NamedTuple):
    """A piece of a prompt.

    Attributes:
        text: the characters.
        is_control: special tokens in ``text`` are meant; otherwise all of it is plain text.
        is_answer: the model learns to write it.
        targets: (row, slot, cell) of the selection that the markers in ``text`` mean.
        ends_list: whether a list of points ends with them.
    """

    text: str
    is_control: bool
    is_answer: bool
    targets: tuple[tuple[int, int, int], ...] = ()
    ends_list: bool = False


@dataclass(frozen=True)
class Turn:
    """A checked message: its text in one piece, its images and videos (None: given beside).

    Points of a question are tags of the text (`PointsText`) that take no letters of it.
    """

    role: str
    text: str
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


def read_messages(messages: Sequence[Message], *, styled: bool = False) -> list[Turn]:
    """Check messages and take their content apart.

    An optional system message or subtitle comes first, then user and assistant alternate, starting
    with the user.

    Args:
        styled: join the texts of one message as Molmo2 does: with a space between, and
            ``style: `` before one that has a ``style`` outside of `STYLES_WITHOUT_PREFIX`.
            Otherwise they are joined as they are.
    Raises: ValueError naming the message and what was expected.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, found "
            f"{type(messages).__name__}: put a single message into a list"
        )
    turns = [_read_message(message, number, styled) for number, message in enumerate(messages)]
    expected = "user"
    for number, turn in enumerate(turns):
        if turn.role in ("system", "subtitle") and number == 0:
            continue
        if turn.role != expected:
            raise ValueError(
                f"message {number} is by {turn.role!r} where {expected!r} must speak: a system "
                f"message or subtitle can only be the first, then user and assistant alternate, "
                f"user first"
            )
        expected = "assistant" if expected == "user" else "user"
    if not turns or turns[-1].role in ("system", "subtitle"):
        raise ValueError("a conversation needs at least one user message")
    return turns


def show_images(chat_format: ChatFormat, images: Sequence[str]) -> tuple[Segment, ...]:
    """Images as they stand in the prefix.

    Args:
        images: control string of each: start tokens, image tokens, end tokens.
    """
    if chat_format == "qwen3" or len(images) == 1:
        return tuple(_control(image) for image in images)
    segments: list[Segment] = []
    for number, image in enumerate(images, start=1):
        segments += [_text(f"Image {number}"), _control(image)]
    return tuple(segments)


def show_video(times: Iterable[float], frame: str) -> tuple[Segment, ...]:
    """A video as it stands in the prefix: before each frame its time, one decimal of a second.

    Args:
        frame: control string of a frame: start token, image tokens, end token.
    """
    segments: list[Segment] = []
    for number, time in enumerate(times):
        segments += [_text(f"{' ' if number else ''}{time:.1f} "), _control(frame)]
    return tuple(segments)


def render_prefix(
    chat_format: ChatFormat, visual: Sequence[Segment], opening: Turn | None = None
) -> list[Segment]:
    """What comes before the first user's text and is shared by all branches of a message tree.

    Args:
        visual: what `show_images` or `show_video` returned.
        opening: a system message, which only qwen3 has, or a subtitle, which only molmo2 has.
    """
    role = opening.role if opening is not None else None
    if chat_format == "qwen3":
        if role == "subtitle":
            raise ValueError(
                "the qwen3 chat format has no subtitle: put its text into the first user message"
            )
        segments = []
        if opening is not None:
            segments += [
                _control(f"{TURN_START}system\n"),
                _text(opening.text),
                _control(f"{TURN_END}\n"),
            ]
        return [*segments, _control(f"{TURN_START}user\n"), *visual]
    if role == "system":
        raise ValueError(
            "the molmo2 chat format has no system message: put its text into the first user message"
        )
    segments = [_control(TURN_END), *visual]
    if opening is not None:
        segments.append(_text(opening.text))
    return segments


def render_turns(
    chat_format: ChatFormat,
    turns: Sequence[Turn],
    add_generation_prompt: bool = False,
    *,
    released: bool = False,
) -> list[Segment]:
    """The user and assistant turns that follow the prefix, up to the last ``<|im_end|>``.

    Args:
        turns: without a system turn or subtitle; the first is the user's.
        add_generation_prompt: open an assistant turn if the user spoke last.
        released: in molmo2, as the released template has it; see the top of the file.
    """
    user = f"{TURN_START}user\n"
    space = " " if released and chat_format == "molmo2" else ""
    segments = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            segments += [_answer(turn.text), _ANSWER_END]
            continue
        if number > 0:
            segments.append(_control(f"\n{user}"))
        elif chat_format == "molmo2":  # in qwen3 the first user turn is opened by the prefix
            segments.append(_control(user))
        segments.append(_text(turn.text))
        if number + 1 < len(turns):
            segments.append(_control(f"{TURN_END}\n{space}{TURN_START}assistant\n"))
        elif add_generation_prompt:
            segments.append(_control(f"{TURN_END}\n{TURN_START}assistant\n"))
        else:
            segments.append(_control(f"{TURN_END}\n"))
    return segments


def render(
    chat_format: ChatFormat,
    turns: Sequence[Turn],
    visual: Sequence[Segment] = (),
    add_generation_prompt: bool = True,
    *,
    released: bool = False,
) -> list[Segment]:
    """A whole conversation: prefix, turns and, in qwen3, the newline after a last answer."""
    opening = None
    if turns[0].role in ("system", "subtitle"):
        opening, turns = turns[0], turns[1:]
    segments = render_prefix(chat_format, visual, opening)
    segments += render_turns(chat_format, turns, add_generation_prompt, released=released)
    if chat_format == "qwen3" and turns[-1].role == "assistant":
        segments.append(_control("\n"))
    return segments


def _control(text: str) -> Segment:
    return Segment(text, is_control=True, is_answer=False)


def _text(text: str) -> Segment:
    return Segment(text, is_control=False, is_answer=False)


def _answer(text: str) -> Segment:
    return Segment(text, is_control=False, is_answer=True)


_ANSWER_END = Segment(TURN_END, is_control=True, is_answer=True)


def _read_message(message: Message, number: int, styled: bool) -> Turn:
    where = f"message {number}"
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(
            f"{where} must be {{'role': ..., 'content': ...}}, found {_describe(message)}"
        )
    role, content = message["role"], message["content"]
    if role not in ("system", "subtitle", "user", "assistant"):
        raise ValueError(
            f"{where} has the unknown role {role!r}: use 'user' or 'assistant', or for the first "
            f"message 'system' or 'subtitle'"
        )
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{where} has content of type {type(content).__name__}: give a string or a list of "
            f"{{'type': 'text', 'text': ...}} and {{'type': 'image', 'image': ...}}"
        )
    texts, images, videos = [], [], []
    for item in content:
        part: Mapping[str, Any] = item if isinstance(item, Mapping) else {}
        part = _as_ours(part, where)
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            style = part.get("style") if styled else None
            has_prefix = style is not None and style not in STYLES_WITHOUT_PREFIX
            texts.append(join_points([f"{style}: " if has_prefix else "", part["text"]]))
        elif part.get("type") == "image":
            images.append(part.get("image"))
        elif part.get("type") == "video":
            videos.append(part.get("video"))
        elif part.get("type") == "point" and role == "user":
            texts.append(_read_point(part, where))
        else:
            raise ValueError(
                f"{where} holds {_describe(item)}: expected {{'type': 'text', 'text': a string}}, "
                f"{{'type': 'image', 'image': a picture}} or {{'type': 'video', 'video': a video}}"
                + (", and points only in questions" if part.get("type") == "point" else "")
            )
    if (images or videos) and role != "user":
        raise ValueError(
            f"{where} is by {role!r} and holds a picture or video: only users show them"
        )
    return Turn(role, _join(texts, styled), tuple(images), tuple(videos))


# Names of parts in the APIs of servers, and which of ours they are.
_OF_SERVERS = {"image_url": "image", "input_image": "image", "video_url": "video"}
_OF_SERVERS |= {"input_video": "video", "input_text": "text"}
_DATA_URL = re.compile(r"data:([\w./+-]*)(?:;[\w=.-]+)*?;base64,", re.IGNORECASE)


def _as_ours(part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A part of a server's API as one of ours; others as they are."""
    name = part.get("type")
    if name in ("image", "video"):
        given = part.get(name)
        if given is None and isinstance(part.get("url"), str):  # as transformers writes it
            return {"type": name, name: from_address(part["url"], name, where)}
        if given is None and part.get("path") is not None:
            return {"type": name, name: part["path"]}
        if isinstance(given, str) and given[:5].lower() == "data:":
            return {**part, name: from_address(given, name, where)}
        return part
    kind = _OF_SERVERS.get(name) if isinstance(name, str) else None
    if kind is None or kind == "text":
        return part if kind is None else {**part, "type": kind}
    found = part.get(f"{kind}_url")
    address = found.get("url") if isinstance(found, Mapping) else found
    if not isinstance(address, str) or not address:
        raise ValueError(
            f"{where} holds a part of type {name!r} without an address, expected "
            f"{{'type': {name!r}, '{kind}_url': {{'url': 'data:...;base64,...'}}}}"
        )
    return {"type": kind, kind: from_address(address, kind, where)}


def from_address(address: str, kind: str, where: str) -> bytes | str:
    """The bytes of a data URL; a local file's address as it is.

    Raises: ValueError, which says ``where`` it stands, for other addresses and a broken data URL.
    """
    if address[:5].lower() == "file:":
        return address
    if address[:5].lower() == "data:":
        header = _DATA_URL.match(address[:200])
        try:
            if header is not None:
                return base64.b64decode("".join(address[header.end() :].split()), validate=True)
        except (binascii.Error, ValueError):
            pass
        raise ValueError(
            f"{where} holds a data URL that cannot be read, expected 'data:{kind}/...;base64,' and "
            f"the file in base 64"
        )
    raise ValueError(
        f"{where} holds the address {address[:60]!r}: nothing is downloaded here; give a data URL "
        f"('data:{kind}/...;base64,...') or a local file ('file:///...')"
    )


def _read_point(part: Mapping[str, Any], where: str) -> PointsText:
    """A point of a question: an empty text that remembers it."""
    numbers = [part.get("x"), part.get("y"), part.get("time", 0)]
    image, label = part.get("image", 1), part.get("label", "point")
    is_whole = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
    is_whole = is_whole and all(isinstance(n, float) or abs(n) < 2**53 for n in numbers)
    is_place = isinstance(image, int) and not isinstance(image, bool) and isinstance(label, str)
    if not is_whole or not is_place or ("image" in part and "time" in part):
        raise ValueError(
            f"{where} holds {_describe(part)}: expected {{'type': 'point', 'x': pixels, 'y': "
            f"pixels, 'image': its number, from 1}}, or 'time' in seconds in place of 'image'"
        )
    point = Point(float(part["x"]), float(part["y"]), image, time=part.get("time"), label=label)
    return PointsText("", [PointsTag(0, 0, "point", label, (point,))])


def _join(texts: Sequence[str], styled: bool) -> str:
    """The released template has a space before a text that does not begin the message."""
    pieces: list[str] = []
    for text in texts:
        has_begun = any(piece or tags_of(piece) for piece in pieces)
        pieces += [" ", text] if styled and has_begun else [text]
    return join_points(pieces)


def _describe(value: Any) -> str:
    return reprlib.repr(value)
