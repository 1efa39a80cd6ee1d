"""A question as people ask it -> messages and what they show, as the processor takes them.

Images and videos may be paths, bytes, PIL images, arrays and tensors; addresses of other computers
only where that is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.processor import Message
from nanomolmo2.processor.chat import from_address, read_messages
from nanomolmo2.processor.image import ImageSource, load_image
from nanomolmo2.processor.inputs import is_file
from nanomolmo2.processor.processor import gather_images, gather_video
from nanomolmo2.processor.video import VideoSource

# A token stands for about four characters; long ones, such as runs of spaces, for a few dozen.
_CHARACTERS_PER_TOKEN = 32
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_CHANNELS = (1, 3, 4)
_NAMES = {"image": "image", "image_url": "image", "input_image": "image"}
_NAMES |= {"video": "video", "video_url": "video", "input_video": "video"}
_OF_A_QUESTION = {"image": "images", "messages": "question", "prompt": "question"}

Images = ImageSource | Tensor | Sequence[ImageSource | Tensor] | None


class Question(NamedTuple):
    """What `VLM.ask_many` and `VLM.ask_batch` take: see `VLM.ask`.

    ``max_new_tokens``: where the answer to this one is cut off; None = as the options say.
    """

    question: str | Sequence[Message]
    images: Images = None
    video: VideoSource | None = None
    max_new_tokens: int | None = None


def as_question(given: Any, number: int) -> Question:
    """A question of a batch in any of its forms; ``number`` counts from 1, for messages."""
    if isinstance(given, Question):
        return given
    if isinstance(given, Mapping):
        fields: Mapping[str, Any] = given
        named = {_OF_A_QUESTION.get(name, name): value for name, value in fields.items()}
        try:
            if len(named) < len(given):
                raise TypeError("two names of the same field")
            return Question(**named)
        except TypeError:
            raise ValueError(
                f"question {number} has the fields {', '.join(map(str, given))}: expected "
                f"{', '.join(Question._fields)}, of which only question must be there"
            ) from None
    if isinstance(given, (tuple, list)) and len(given) == 2:
        return Question(given[1], given[0])
    raise ValueError(
        f"question {number} is a {type(given).__name__}: expected a pair (images, question), a "
        f"mapping or a Question"
    )


class Conversation(NamedTuple):
    """A question that was read. Images and video stand in the messages, or beside them here."""

    messages: Sequence[Message]
    images: list[ImageSource]
    video: VideoSource | None

    def shown(self) -> tuple[list[Any], Any]:
        """(images, video) wherever they stand, in order; video None without one."""
        turns = read_messages(self.messages)
        return gather_images(turns, self.images), gather_video(turns, self.video)


def read_question(asked: Question, context: int, *, allow_remote: bool = False) -> Conversation:
    """Bring a question into the one form that the processor takes.

    Args:
        context: positions of the model's context.
        allow_remote: fetch images and videos of ``http`` and ``https`` addresses.
    Raises: ValueError for a question of nothing but spaces, texts that cannot fit, tensors that are
        no images, and what cannot be fetched.
    """
    given = asked.question
    messages: Sequence[Message]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    _check_texts(messages, context)
    if not isinstance(messages, (str, Mapping)) and isinstance(messages, Sequence):
        messages = [_fetched(message, allow_remote) for message in messages]
    images = read_images(asked.images, allow_remote=allow_remote)
    return Conversation(messages, images, _as_video(asked.video, allow_remote))


def read_images(images: Images, *, allow_remote: bool = False) -> list[ImageSource]:
    """Images in the forms that the processor takes; files are not decoded yet.

    Raises: as `read_question`.
    """
    return [_as_image(image, allow_remote) for image in as_list(images)]


def read_parts(
    images: Images, video: VideoSource | None, *, allow_remote: bool = False
) -> list[dict[str, Any]]:
    """What is shown, as parts of a message that no longer depend on files and other computers.

    Raises: as `read_question`; FileNotFoundError and ValueError as `load_image`.
    """
    parts = []
    for image in as_list(images):
        image = _as_image(image, allow_remote)
        is_array = isinstance(image, np.ndarray)  # may be normalised: no image for people
        parts.append({"type": "image", "image": image if is_array else load_image(image)})
    if video is not None:
        parts.append({"type": "video", "video": _as_video(video, allow_remote)})
    return parts


def _check_texts(messages: Sequence[Message], context: int) -> None:
    """Look at what is cheap before the texts are encoded, which takes minutes for a book."""
    given: Any = messages  # what is wrong with its form is said where messages are read
    length, last = 0, []
    for message in given if isinstance(given, Sequence) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, (list, tuple)) else [content]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        last = [text for text in texts if isinstance(text, str)]
        length += sum(map(len, last))
    if last and not any(c.isprintable() and not c.isspace() for text in last for c in text):
        raise ValueError("the question is empty: expected a text")
    if length > _CHARACTERS_PER_TOKEN * context:
        raise ValueError(
            f"the question has {length:,} characters with what was said before, which the "
            f"model's context of {context:,} tokens cannot hold: shorten it"
        )


def as_list(images: Images) -> list[Any]:
    """One image or several, in order."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        return list(images)
    return [images]


def _as_image(image: Any, allow_remote: bool) -> Any:
    if isinstance(image, (Tensor, np.ndarray)):
        return _as_array(image)
    if isinstance(image, str):
        image = _at(image, "image", allow_remote)
    return load_image(image) if is_file(image) else image  # it may be closed when it is drawn on


def _as_video(video: Any, allow_remote: bool) -> Any:
    return _at(video, "video", allow_remote) if isinstance(video, str) else video


def _at(address: str, kind: str, allow_remote: bool) -> str | bytes:
    """The file of a data URL or of another computer; a path as it is."""
    if address[:5].lower() == "data:":
        return from_address(address, kind, "the question")
    if not _ADDRESS.match(address):
        return address
    if not allow_remote:
        raise ValueError(
            f"found the address {address[:60]!r}: nothing is downloaded here; give a local file, "
            f"or in Python allow downloads with VLM(..., allow_remote=True)"
        )
    return _fetch(address)


def _as_array(image: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Pixels in any layout as (H, W) or (H, W, C), of integers or of floats 0..1.

    Floats that leave 0..1 stay as they are: they are normalised already, as the base design takes
    them.

    Raises: ValueError for other shapes and what is not finite.
    """
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        pixels: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        pixels = image
    shape, last = pixels.shape, pixels
    if pixels.ndim == 3 and shape[0] in _CHANNELS and shape[2] not in _CHANNELS:
        last = np.moveaxis(pixels, 0, -1)
    elif pixels.ndim != 2 and not (pixels.ndim == 3 and shape[2] in _CHANNELS):
        raise ValueError(
            f"found an array of shape {shape}, expected an image: (H, W, 3), (3, H, W) or (H, W), "
            f"of uint8 or of floats 0 to 1"
        )
    if pixels.dtype.kind == "f" and pixels.size:
        low, high = float(pixels.min()), float(pixels.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("the image holds nan or inf, expected numbers from 0 to 1")
        if low < 0 or high > 1:
            return pixels
    return np.ascontiguousarray(last)


def _fetched(message: Message, allow_remote: bool) -> Message:
    """A message whose images are as those beside, and whose addresses, if allowed, are bytes."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    parts: list[Any] = []
    for part in content:
        kind = _NAMES.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if kind is None:
            parts.append(part)
            continue
        own = part.get(kind)
        address = part.get("url") if own is None else own
        found = part.get(f"{kind}_url", address)
        found = found.get("url") if isinstance(found, Mapping) else found
        if isinstance(found, str) and allow_remote and _ADDRESS.match(found):
            parts.append({"type": kind, kind: _fetch(found)})
        elif own is not None and kind == "image":
            parts.append({**part, "image": _as_image(own, allow_remote=False)})
        else:
            parts.append(part)
    return cast("Message", {**message, "content": parts})


def _fetch(address: str) -> bytes:
    from nanomolmo2.remote import fetch

    return fetch(address)
