"""Chat formats: messages -> segments of a prompt, each marked as control, text or answer.

``qwen3`` is Qwen3's template without a default system message and without thinking, ``molmo2`` is
the format of Molmo2 (one answer, P for the pictures, / for a newline):

    qwen3   <|im_start|>user/P{text}<|im_end|>/<|im_start|>assistant/{answer}<|im_end|>/
    molmo2  <|im_end|>P<|im_start|>user/{text}<|im_end|>/<|im_start|>assistant/{answer}<|im_end|>

A picture is its start token, its image tokens and its end token. With several pictures ``molmo2``
puts the text ``Image 1``, ``Image 2``, ... directly before each. Pictures always come first,
wherever they stand in the messages. Turns follow each other with a newline between.

A rendered prompt is a prefix (what the branches of a message tree share: everything up to the end
of the pictures) and the turns. Prompt and labels come from the same segments: what is an answer is
decided here and nowhere else.

Differences from the templates that the checkpoints ship:
- qwen3: no ``<think>`` block in the last answer or the generation prompt (Qwen3's template adds an
  empty one); no tools; text is kept as it is (the template strips newlines before an answer).
- molmo2: no space before ``<|im_start|>assistant`` of a past answer (the shipped template has one;
  training did not), and one ``<|im_end|>`` between turns as the template has (training had two).
Sources: Qwen3 tokenizer_config.json; Molmo2 olmo/preprocessing/data_formatter.py and template.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

ChatFormat = Literal["qwen3", "molmo2"]

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"


class ContentItem(TypedDict):
    """A part of a message: ``{"type": "text", "text": ...}`` or ``{"type": "image", ...}``.

    ``image`` is anything that `processor.image.load_image` takes; without it the item stands for
    the next of the pictures given beside the messages.
    """

    type: Literal["text", "image"]
    text: NotRequired[str]
    image: NotRequired[Any]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Sequence[ContentItem]


class Segment(NamedTuple):
    """A piece of a prompt.

    Attributes:
        text: the characters.
        is_control: special tokens in ``text`` are meant; otherwise all of it is plain text.
        is_answer: the model learns to write it.
    """

    text: str
    is_control: bool
    is_answer: bool


@dataclass(frozen=True)
class Turn:
    """A checked message: its text in one piece and its pictures (None: given beside)."""

    role: str
    text: str
    images: tuple[Any, ...] = ()


def read_messages(messages: Sequence[Message]) -> list[Turn]:
    """Check messages and take their content apart.

    Texts of one message are joined as they are. An optional system message comes first, then user
    and assistant alternate, starting with the user.

    Raises: ValueError naming the message and what was expected.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, found "
            f"{type(messages).__name__}: put a single message into a list"
        )
    turns = [_read_message(message, number) for number, message in enumerate(messages)]
    expected = "user"
    for number, turn in enumerate(turns):
        if turn.role == "system" and number == 0:
            continue
        if turn.role != expected:
            raise ValueError(
                f"message {number} is by {turn.role!r} where {expected!r} must speak: a system "
                f"message can only be the first, then user and assistant alternate, user first"
            )
        expected = "assistant" if expected == "user" else "user"
    if not turns or turns[-1].role == "system":
        raise ValueError("a conversation needs at least one user message")
    return turns


def render_prefix(
    chat_format: ChatFormat, picture: str, num_pictures: int, system: str | None = None
) -> list[Segment]:
    """What comes before the first user's text and is shared by all branches of a message tree.

    Args:
        picture: control string of one picture: start token, image tokens, end token.
        system: text of a system message; the molmo2 format has none.
    """
    if chat_format == "qwen3":
        segments = []
        if system is not None:
            segments += [
                _control(f"{TURN_START}system\n"),
                _text(system),
                _control(f"{TURN_END}\n"),
            ]
        return [*segments, _control(f"{TURN_START}user\n" + picture * num_pictures)]
    if system is not None:
        raise ValueError(
            "the molmo2 chat format has no system message: put its text into the first user message"
        )
    if num_pictures <= 1:
        return [_control(TURN_END + picture * num_pictures)]
    segments = [_control(TURN_END)]
    for number in range(1, num_pictures + 1):
        segments += [_text(f"Image {number}"), _control(picture)]
    return segments


def render_turns(
    chat_format: ChatFormat, turns: Sequence[Turn], add_generation_prompt: bool = False
) -> list[Segment]:
    """The user and assistant turns that follow the prefix, up to the last ``<|im_end|>``.

    Args:
        turns: without a system turn; the first is the user's.
        add_generation_prompt: open an assistant turn if the user spoke last.
    """
    user = f"{TURN_START}user\n"
    segments = []
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        if turn.role == "assistant":
            segments += [_answer(turn.text), _ANSWER_END]
            continue
        if number > 0:
            segments.append(_control(f"\n{user}"))
        elif chat_format == "molmo2":  # in qwen3 the first user turn is opened by the prefix
            segments.append(_control(user))
        segments.append(_text(turn.text))
        opens_answer = not last or add_generation_prompt
        segments.append(
            _control(f"{TURN_END}\n{TURN_START}assistant\n" if opens_answer else f"{TURN_END}\n")
        )
    return segments


def render(
    chat_format: ChatFormat,
    turns: Sequence[Turn],
    picture: str,
    num_pictures: int,
    add_generation_prompt: bool = True,
) -> list[Segment]:
    """A whole conversation: prefix, turns and, in qwen3, the newline after a last answer."""
    system = None
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    segments = render_prefix(chat_format, picture, num_pictures, system)
    segments += render_turns(chat_format, turns, add_generation_prompt)
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


def _read_message(message: Message, number: int) -> Turn:
    where = f"message {number}"
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(
            f"{where} must be {{'role': ..., 'content': ...}}, found {_describe(message)}"
        )
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(
            f"{where} has the unknown role {role!r}: use 'system', 'user' or 'assistant'"
        )
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{where} has content of type {type(content).__name__}: give a string or a list of "
            f"{{'type': 'text', 'text': ...}} and {{'type': 'image', 'image': ...}}"
        )
    texts, images = [], []
    for item in content:
        part: Mapping[str, Any] = item if isinstance(item, Mapping) else {}
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image":
            images.append(part.get("image"))
        else:
            raise ValueError(
                f"{where} holds {_describe(item)}: expected {{'type': 'text', 'text': a string}} "
                f"or {{'type': 'image', 'image': a picture}}"
            )
    if images and role != "user":
        raise ValueError(f"{where} is by {role!r} and holds a picture: only users show pictures")
    return Turn(role, "".join(texts), tuple(images))


def _describe(value: Any) -> str:
    return reprlib.repr(value)
