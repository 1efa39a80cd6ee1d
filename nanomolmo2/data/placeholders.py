"""Tags that stand for pictures in a question, such as ``<image>``: taken out, or named.

Pictures always stand before the first question, so a tag that opens it says nothing new. Of several
pictures, one that stands elsewhere becomes ``Image 2``: what the prompt calls that picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanomolmo2.processor.point import PointsText, tags_of

_TAG = re.compile(r"<(image|video)(?:[ _-]?(\d{1,4}))?>", re.IGNORECASE)
_OPENING = re.compile(rf"\s*(?:{_TAG.pattern}\s*)*", re.IGNORECASE)
# What other programs write in place of a picture; none of it may reach a prompt or an answer.
_ANY_TAG = re.compile(
    r"</?(?:image|video|img|audio|media)(?:[ _-]?(?:\d{1,4}|placeholder|pad|token|here))?/?>"
    r"|<\|/?(?:image|video|img|vision|media|audio)[\w ]{0,24}\|>"
    r"|\[(?:image|img|video)[ _-]?\d{0,4}\](?!\()"
    r"|<imagehere>|<(?:im_patch|im_start|im_end|im_col|low_res_im_start|image_soft_token)>"
    r"|\{\{?(?:image|video)(?:_\d{1,4})?\}\}?",
    re.IGNORECASE,
)


def find_tag(text: str) -> str | None:
    """The first tag of a picture or video in a text, by whichever program; None without one."""
    found = _ANY_TAG.search(text)
    return found[0] if found else None


def place_tags(
    contents: Sequence[Any], num_images: int, has_video: bool
) -> tuple[list[Any], str | None]:
    """The questions of one conversation without their tags.

    Args:
        contents: what the user says, turn after turn: texts, or lists of parts as
            `chat.ContentItem`, whose image and video items are tags too.
        num_images: pictures of the record; ``has_video``: whether it has a video.
    Returns: (contents, what may be a mistake or None).
    Raises: ValueError if a tag has no picture.
    """
    found = [list(_tags_of(content)) for content in contents]
    counts = [sum(kind == "image" and not number for kind, number in tags) for tags in found]
    named = {number for tags in found for kind, number in tags if kind == "image" and number}
    total, problem = sum(counts), None
    # Some data sets show their pictures again in every question.
    repeats = total > num_images and all(count in (0, num_images) for count in counts)
    if (total > num_images and not repeats) or max(named, default=0) > num_images:
        shown = max(total, *named, 0) if named else total
        raise ValueError(f"its text shows {shown} pictures, but it has {num_images}")
    shows_video = any(kind == "video" for tags in found for kind, _ in tags)
    if shows_video and not (has_video or num_images):
        problem = "its text shows a video, but it has none"
    elif repeats:
        problem = f"{total} tags stand for {num_images} pictures: taken as shown again"
    elif 0 < total + len(named) < num_images:
        problem = f"its text shows {total + len(named)} pictures, but it has {num_images}"
    number, placed = 0, []
    for turn, (content, tags) in enumerate(zip(contents, found, strict=True)):
        number = 0 if repeats else number
        opens = turn == 0 or repeats
        text = _Placer(num_images, opens, number).place(content) if tags else content
        placed.append(_with_points(content, text) if isinstance(text, str) else text)
        number += counts[turn]
    return placed, problem


def _with_points(before: Any, after: str) -> str:
    """What became of a text, with the points that it remembers."""
    kept, at = [], 0
    for tag in tags_of(before) if isinstance(before, str) else ():
        written = before[tag.start : tag.stop]
        if (at := after.find(written, at)) < 0:  # its label holds a tag of a picture
            return after
        kept.append(tag._replace(start=at, stop=at + len(written)))
        at += len(written)
    return PointsText(after, kept) if kept else after


def _tags_of(content: Any) -> Iterator[tuple[str, int]]:
    """(image or video, its number or 0) of each tag."""
    parts: Sequence[Any] = [content] if isinstance(content, str) else content
    for part in parts:
        if _is_shown(part):
            yield part["type"], 0
        text = part if isinstance(part, str) else _text_of(part)
        for tag in _TAG.finditer(text or ""):
            yield tag[1].lower(), int(tag[2] or 0)


def _is_shown(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "video")


def _text_of(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


@dataclass
class _Placer:
    """One question. ``number``: of the picture that was shown last."""

    num_images: int
    opens: bool  # the conversation: what begins or ends this question is where pictures stand
    number: int

    def place(self, content: Any) -> str | list[Any]:
        if isinstance(content, str):
            return self._text(content, self.opens, self.opens)
        parts: list[Any] = []
        texts = [i for i, part in enumerate(content) if _text_of(part)]
        first, last = (texts[0], texts[-1]) if texts else (len(content), len(content))
        shown = [i for i, part in enumerate(content) if _is_shown(part)]
        waiting = ""  # names of pictures that stand before the next text
        for place, part in enumerate(content):
            text = _text_of(part)
            if _is_shown(part):
                name = self._next(0) if part["type"] == "image" else ""
                if not self.opens or (first < place and shown[0] < last):
                    waiting = f"{waiting} {name}".strip()
                continue
            if text is None:
                parts.append(part)
                continue
            text = self._text(text, self.opens and place == first, self.opens and place == last)
            before = _text_of(parts[-1]) if parts else None
            if waiting and before is not None and "style" not in part:
                text = _beside(_beside(before, waiting), text)
                parts[-1] = {**parts[-1], "text": text}
            else:
                parts.append({**part, "text": _beside(waiting, text)})
            waiting = ""
        if waiting and parts and (text := _text_of(parts[-1])) is not None:
            parts[-1] = {**parts[-1], "text": _beside(text, waiting)}
        elif waiting:
            parts.append({"type": "text", "text": waiting})
        return parts

    def _next(self, given: int) -> str:
        """Name of the picture that a tag stands for; nothing where there is only one."""
        self.number = given or self.number + 1
        return f"Image {self.number}" if self.num_images > 1 else ""

    def _text(self, text: str, may_open: bool, may_end: bool) -> str:
        if not _TAG.search(text):
            return text
        lines = text.split("\n")
        said = [i for i, line in enumerate(lines) if _TAG.sub("", line).strip()]
        first, last = (said[0], said[-1]) if said else (len(lines), len(lines))
        # <image_2> at the beginning says which one is meant, <image_1><image_2> does not.
        every = [*range(1, self.num_images + 1)]
        opening = _OPENING.match(text)
        may_open = may_open and _numbers(opening[0] if opening else "") in ([], every)
        may_end = may_end and _numbers(text) in ([], every)
        ends = may_end and not any(_TAG.search(line) for line in lines[: last + 1])
        placed: list[str] = []
        for place, line in enumerate(lines):
            tags = list(_TAG.finditer(line))
            if not tags:
                placed.append(line)
                continue
            pieces = [line[a:b] for a, b in _between(tags, len(line))]
            names = [
                self._next(int(tag[2] or 0)) if tag[1].lower() == "image" else "" for tag in tags
            ]
            if not (first <= place <= last):  # nothing but tags, before or after what is said
                dropped = may_open if place < first else ends
                if not dropped and any(names):
                    placed.append(", ".join(filter(None, names)))
                continue
            line = self._line(pieces, names, place == first, may_open)
            if line.strip():
                placed.append(line)
        return "\n".join(placed).strip()

    def _line(self, pieces: list[str], names: list[str], is_first: bool, may_open: bool) -> str:
        leading = 0
        while is_first and leading < len(names) and not pieces[leading].strip():
            leading += 1
        opening = [] if may_open else list(filter(None, names[:leading]))
        line = "".join(pieces[: leading + 1])
        for name, piece in zip(names[leading:], pieces[leading + 1 :], strict=True):
            if name:
                line = _beside(_beside(line, name), piece)
            else:  # no two spaces where the tag was
                line += piece[1:] if line[-1:] == piece[:1] == " " else piece
        line = line.lstrip() if leading else line
        # Before a sentence it is a line of its own; "<image> or <image>?" is the sentence.
        between = "\n" if leading == len(names) else " "
        return f"{', '.join(opening)}{between}{line}" if opening else line


def _numbers(text: str) -> list[int]:
    """Those of numbered tags."""
    return [int(number) for kind, number in _TAG.findall(text) if number]


def _between(tags: Sequence[re.Match[str]], length: int) -> Iterator[tuple[int, int]]:
    starts = [0, *(tag.end() for tag in tags)]
    ends = [*(tag.start() for tag in tags), length]
    return zip(starts, ends, strict=True)


def _beside(before: str, after: str) -> str:
    """Two pieces with a space between where letters would touch."""
    touches = before[-1:].isalnum() and after[:1].isalnum()
    return f"{before} {after}" if touches else before + after
