"""An answer: its text, and the points that it holds, however the model writes them.

Most models write points as text coordinates, which `nanomolmo2.processor.points` reads. Point
models select visual tokens: their text has ``<POINT_k>``, whose numbers mean something in their
own prompt only. `in_coordinates` is the same text as other models would have written it.
"""

from __future__ import annotations

import base64
import io
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanomolmo2.generation.sampling import Sampled
from nanomolmo2.processor import Encoded, Point, parse_count, parse_points, points_to_json
from nanomolmo2.processor.grounding import find_points
from nanomolmo2.processor.point_space import CLASS_NAME, PointSpace
from nanomolmo2.processor.points import SCALE, Size

if TYPE_CHECKING:
    from PIL.Image import Image

_NOTEBOOK_SIDE = 800  # most pixels of a side of what notebooks show

Confidence = tuple[float, float, float]  # probabilities of a point's row, slot and cell


class Usage(NamedTuple):
    """What an answer took, in tokens; images and video frames count with all their visual tokens.

    ``reused_tokens`` of the prompt were known from earlier questions.
    """

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


class Shown(NamedTuple):
    """What an answer is about, for drawing: images, or a video's frames and their times."""

    images: Sequence[Any]
    times: Sequence[float] = ()


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and what it says.

    Attributes:
        text: the answer as written, points in the model's own format.
        points: points of the answer in pixels of the images, or of the video, they belong to.
        count: the number that the answer gives; None if it gives none.
        problems: what of the answer's points could not be read, one line each.
        image_sizes: (width, height) of the images, pixels.
        video_size: (width, height) of the video, pixels; None without one.
        frame_times: seconds of the frames that the model saw.
        input_tokens: length of the prompt; an image that the model expands counts as one token.
        output_tokens: length of the answer with its end token, or the tokens of a stop text.
        timings: seconds: ``prepare`` (images and text to tensors), then ``first_token`` (to the
            first token of the answer, waiting for other questions included) and ``generate`` (to
            the last).
        reused_tokens: positions of the prompt that were known from an earlier question; an image
            that the model expands counts with all its visual tokens.
        finish_reason: ``stop`` (an end token or a stop text), ``length`` (cut off at
            max_new_tokens).
        logprobs: every one of the ``output_tokens`` with its log-probabilities, if they were asked
            for.
        coordinates: the text with its points as text coordinates, which `parse_points` and other
            programs read; the text itself where nothing in it was selected.
        confidences: of each of the ``points`` the probabilities of its row, slot and cell, from
            point models; their product is `Point.confidence`.
        confidence: geometric mean of the probabilities of all tokens that were written, 0 to 1: how
            sure the model was of its words, which says little about whether they are true. Of
            `VLM.find` that of its points, or that there are none.
        token_ids: of the ``output_tokens``; parts of points that were selected have ids behind the
            vocabulary.
        prompt_tokens: positions of the prompt; an image that the model expands counts with all its
            visual tokens.
        show: loads what the answer is about; None where it is not known any more.
    """

    text: str
    points: tuple[Point, ...]
    count: int | None
    problems: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...]
    video_size: tuple[int, int] | None
    frame_times: tuple[float, ...]
    input_tokens: int
    output_tokens: int
    timings: dict[str, float]
    reused_tokens: int = 0
    finish_reason: str = "stop"
    logprobs: tuple[Sampled, ...] = ()
    coordinates: str = ""
    confidences: tuple[Confidence, ...] = ()
    confidence: float = 1.0
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    show: Callable[[], Shown] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.coordinates:
            object.__setattr__(self, "coordinates", self.text)

    @property
    def usage(self) -> Usage:
        """What the answer took, in tokens."""
        prompt = self.prompt_tokens or self.input_tokens
        return Usage(prompt, self.output_tokens, self.reused_tokens)

    def draw(self, path: str | Path | None = None) -> Image | list[Image]:
        """The image with the answer's points on it; a list for several images, or frames.

        Args:
            path: write it, complete or not at all: ``.png``, ``.jpg``, ``.webp``; of several images
                ``out-1.png``, ``out-2.png``, ...; of a video an animated ``.gif``.
        Raises: ValueError where there is nothing to draw on, or for another kind of file; OSError
            where an image that was given by its path is there no more.
        """
        from nanomolmo2.generation.drawing import draw_answer

        return draw_answer(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The answer as `json.dumps` takes it, with the fields that docs/cli.md lists."""
        video: dict[str, Any] | None = None
        if self.video_size is not None:
            width, height = self.video_size
            video = {"width": width, "height": height, "frame_times": list(self.frame_times)}
        return {
            "text": self.text,
            "count": self.count,
            "points": points_to_json(self.points, self.image_sizes, video_size=self.video_size),
            "problems": list(self.problems),
            "confidence": round(self.confidence, 4),
            "images": [{"width": width, "height": height} for width, height in self.image_sizes],
            "video": video,
            "finish_reason": self.finish_reason,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "reused_tokens": self.reused_tokens,
            "timings": {name: round(seconds, 4) for name, seconds in self.timings.items()},
        }

    def _repr_png_(self) -> bytes | None:
        """The image with the points, for notebooks; of several the first. None without one."""
        return next(iter(self._drawn()), None)

    def _repr_html_(self) -> str:
        """The images with the points and the text below, for notebooks."""
        data = [base64.b64encode(png).decode() for png in self._drawn()]
        images = [f'<img src="data:image/png;base64,{one}" alt="the points">' for one in data]
        return f"<div>{''.join(images)}<p>{escape(self.text)}</p></div>"

    def _drawn(self) -> list[bytes]:
        """PNG files for notebooks; none of a video, nor where an image is there no more."""
        if self.show is None or not self.image_sizes:
            return []
        try:
            drawn = self.draw()
        except (OSError, ValueError):
            return []
        files = []
        for image in drawn if isinstance(drawn, list) else [drawn]:
            image.thumbnail((_NOTEBOOK_SIDE, _NOTEBOOK_SIDE))
            stream = io.BytesIO()
            image.save(stream, "PNG")
            files.append(stream.getvalue())
        return files


@dataclass(frozen=True)
class Read:
    """What an answer says: see the fields of `Answer`."""

    points: tuple[Point, ...]
    count: int | None
    problems: tuple[str, ...]
    coordinates: str
    confidences: tuple[Confidence, ...] = ()


def read_answer(text: str, encoded: Encoded, confidences: Sequence[Confidence] = ()) -> Read:
    """What a text says about the images or the video of its prompt.

    Args:
        confidences: of each selection of a row, a slot and a cell, in order.
    """
    space, sizes, video_size = encoded.point_space, encoded.image_sizes, encoded.video_size
    problems: list[str] = []
    if space is None or not SELECTED.search(text):
        points = parse_points(text, sizes, video_size=video_size, problems=problems)
        return Read(tuple(points), parse_count(text), tuple(problems), text)
    coordinates = in_coordinates(text, space)
    parse_points(coordinates, sizes, video_size=video_size, problems=problems)
    cut = "breaks off after "  # of what stands in the text, not in its coordinates
    problems = [f"{p[: p.index(cut)]}{cut}{text[-30:]!r}" if cut in p else p for p in problems]
    cells = [one.start() for one in re.finditer(CLASS_NAME, text) if _is_cell(one[1], space)]
    points, known = [], []
    for start, point in find_points(text, space, problems=problems):
        number = bisect_left(cells, start)
        if number < len(confidences):
            known.append(confidences[number])
            point = replace(point, confidence=math.prod(confidences[number]))
        points.append(point)
    count = parse_count(coordinates)
    return Read(tuple(points), count, tuple(problems), coordinates, tuple(known))


def in_coordinates(text: str, space: PointSpace | None) -> str:
    """A text whose selections are written as text coordinates, as models without them write.

    A list that stands in no tag gets one of its own, without a label. Where a list breaks off, a
    space marks its last number as whole.

    Args:
        space: of the prompt that it answers; None: the text has no selections.
    """
    if space is None:
        return text
    found = [*find_points(text, space)]
    parts: list[str] = []
    at = 0
    while first := SELECTED.search(text, at):
        start = first.start()
        parts.append(text[at:start])
        opening = _OPENING.search(text, max(0, start - _LONGEST_OPENING), start)
        at = _end_of_list(text, start, space, in_tag=opening is not None)
        inside = [point for place, point in found if start <= place < at]
        coords = coords_of(inside, space.image_sizes, space.video_size)
        if opening is None:
            parts.append(f'<points coords="{coords}"/>' if coords else "")
        elif text[at : at + 1] not in ('"', "'"):
            parts.append(f"{coords} ")
        elif closing := _CLOSING.match(text, at):  # </point> closes all tags in released answers
            parts.append(f"{coords}{closing['label']}</{opening['name'].lower()}>")
            at = closing.end()
        else:
            parts.append(coords)
    return "".join([*parts, text[at:]])


SELECTED = re.compile(r"(<POINT_[0-9]{1,9}>)")  # one class, as it stands in a text
_IN_TAG = re.compile(rf'{CLASS_NAME}(?:[^"<>]{{0,20}}{CLASS_NAME})*+')
_OUTSIDE = re.compile(rf"{CLASS_NAME}(?:(?: ?[0-9]+)? ?{CLASS_NAME})*+")
_NUMBER = re.compile(" ?[0-9]+")
_LONGEST_OPENING = 200
_OPENING = re.compile(r"""<(?P<name>points|tracks)\b[^<>]*\bcoords\s*=\s*["']\Z""", re.IGNORECASE)
_CLOSING = re.compile(
    r"""(?P<label>\s*["']\s*>(?:(?!</?(?:points?|tracks)\b).)*+)</(?:points?|tracks)>""",
    re.IGNORECASE | re.DOTALL,
)


def _end_of_list(text: str, start: int, space: PointSpace, *, in_tag: bool) -> int:
    """Where a list of selections ends that begins at a place, with the number of its last point.

    Outside of a tag one that says that there are no more points is the last.
    """
    whole = (_IN_TAG if in_tag else _OUTSIDE).match(text, start)
    assert whole is not None
    end = whole.end()
    for one in re.finditer(CLASS_NAME, whole[0]):
        if not in_tag and int(one[1]) == space.num_rows:
            return start + one.end()
    if _is_cell(whole[2] or whole[1], space) and (number := _NUMBER.match(text, end)):
        end = number.end()
    return end


def _is_cell(number: str, space: PointSpace) -> bool:
    return int(number) > space.num_rows + space.num_slots


def coords_of(
    points: Sequence[Point], image_sizes: Sequence[Size], video_size: Size | None = None
) -> str:
    """Value of the coords attribute, see `nanomolmo2.processor.points`; in the order given.

    Args: image_sizes, video_size: (width, height) of what is shown, pixels.
    """
    groups = []
    for key, group in groupby(points, key=_key):
        triples = []
        for point in group:
            width, height = video_size or image_sizes[point.image - 1]
            x, y = round(SCALE * point.x / width), round(SCALE * point.y / height)
            triples.append(f"{point.id} {x:03d} {y:03d}")
        groups.append(f"{key} {' '.join(triples)}")
    return ";".join(groups)


def _key(point: Point) -> str:
    return str(point.image) if point.time is None else f"{point.time:.1f}"
