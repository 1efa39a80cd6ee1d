"""Photos: all questions about a picture as one example, and the picture a little other every time.

Some dozens of annotated photos are soon known by heart. So each is shown turned, mirrored, sized
and lit otherwise, its points moved along; and what is asked about it in several records is asked
at once, so that it is seen once for all of them.

A photo has `VARIANTS` looks, the first of them as it is. Look v of photo p is example v * P + p of
P photos, the same whenever it is asked for.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageEnhance

from nanomolmo2.data.example import BadExample, Branch, Example, Message, Source
from nanomolmo2.data.fields import RowLimits
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.records import Row, Rows
from nanomolmo2.data.sources import RecordSource
from nanomolmo2.data.split import pictures_of
from nanomolmo2.processor.point import Point, PointsText, tags_of
from nanomolmo2.processor.points import NOTHING_THERE, scan_tags

VARIANTS = 64
MOST_RECORDS = 20_000  # of more none needs another look
LARGEST_SIDE = 1024  # pixels; a photo is kept so large
KEPT_BYTES = 512 * 2**20  # of photos in memory
ZOOM = (0.75, 1.3)  # below 1 there is a frame around
STRETCH = 1.15  # of one side beside the other, at most
MARGIN = 0.08  # of a side: so far from the edge every point stays
LIGHT = {"Brightness": 0.25, "Contrast": 0.2, "Color": 0.3}  # 1 plus or minus at most so much
# In words that say so a picture that is turned or mirrored would be a lie.
_DIRECTIONS = re.compile(
    r"\b(?:left|right|top|bottom|above|below|upper|lower|under|over|up|down|corner|horizontal|"
    r"vertical|clockwise|north|south|east|west|read|text|letters?|says?)\b",
    re.IGNORECASE,
)

Move = Callable[[float, float], tuple[float, float]]  # of a place in pixels


class _First(Rows):
    """The first record of every photo."""

    def __init__(self, rows: Rows, groups: Sequence[Sequence[int]]) -> None:
        self.rows, self.groups = rows, groups
        self.is_cheap = getattr(rows, "is_cheap", False)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> Row:
        return self.rows[self.groups[i][0]]


class Photos(RecordSource):
    """The photos of a source of records.

    Attributes:
        source: the records.
        groups: the numbers of the records about each photo.
    """

    def __init__(self, source: RecordSource, variants: int = 1, seed: int = 0) -> None:
        self.source, self.variants, self.seed = source, variants, seed
        self.groups = group(source)
        super().__init__(_First(source.rows, self.groups), source.config)
        self.in_order = source.in_order
        self._kept: OrderedDict[int, Example] = OrderedDict()

    @staticmethod
    def suits(source: object) -> bool:
        """Whether a source is of records that name their pictures, not too many of them."""
        return (
            isinstance(source, RecordSource)
            and getattr(source.rows, "is_cheap", False)
            and not source.in_order
            and len(source) <= MOST_RECORDS
        )

    def __len__(self) -> int:
        return len(self.groups) * self.variants

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def read(self, i: int, limits: RowLimits | None = None) -> Example:
        """Look ``i // photos`` of photo ``i % photos``. See `RecordSource.read`."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has no example {i}, only {len(self)}")
        variant, number = divmod(i, len(self.groups))
        example = self._photo(number, limits)
        if not variant:
            return example
        return varied(example, np.random.default_rng([self.seed, number, variant]))

    def _photo(self, number: int, limits: RowLimits | None) -> Example:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        whole: Example | None = None
        for i in self.groups[number]:
            example = self.source.read(i, limits)
            if whole is None:
                whole = example
            else:
                whole = replace(
                    whole,
                    branches=[*whole.branches, *example.branches],
                    notes=(*whole.notes, *example.notes),
                    unread=tuple(dict.fromkeys((*whole.unread, *example.unread))),
                )
        assert whole is not None
        if self.variants > 1:
            whole = smaller(whole)
            self._kept[number] = whole
            while len(self._kept) > 1 and sum(map(_num_bytes, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return whole


def with_photos(mixture: Mixture, variants: int = 1) -> Mixture:
    """The same mixture of photos in place of records; sources of another kind stay as they are."""
    sources = photos_of(mixture.sources, variants, mixture.seed)
    return Mixture(sources, mixture.weights, mixture.seed)


def photos_of(sources: Iterable[Source], variants: int = 1, seed: int = 0) -> list[Source]:
    """Photos in place of records; sources of another kind stay as they are."""
    return [
        Photos(source, variants, seed)
        if isinstance(source, RecordSource) and Photos.suits(source)
        else source
        for source in sources
    ]


def group(source: RecordSource) -> list[list[int]]:
    """Numbers of the records that name the same pictures, photo by photo; others alone."""
    groups: dict[Any, list[int]] = {}
    for i in range(len(source)):
        key: Any = i
        try:
            row = source.rows[i]
            shown = list(pictures_of(row.values))
            if shown and all(isinstance(one, str) for one in shown) and "video" not in row.values:
                key = (str(row.folder), *shown)
        except (BadExample, ValueError, OSError, LookupError):
            pass  # it says what is wrong with it when it is read
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _num_bytes(example: Example) -> int:
    return sum(3 * image.width * image.height for image in example.images)


# ---- another look ----


class Change(NamedTuple):
    """A picture of another look, and where a place of the old one is in it."""

    image: Image.Image
    move: Move


def smaller(example: Example) -> Example:
    """The same with no side longer than `LARGEST_SIDE`."""
    return changed(example, [_resized(image, _fitting(image)) for image in example.images])


def _fitting(image: Image.Image) -> tuple[int, int]:
    by = min(1.0, LARGEST_SIDE / max(image.size))
    return max(1, round(by * image.width)), max(1, round(by * image.height))


def varied(example: Example, rng: np.random.Generator) -> Example:
    """An example whose pictures are turned, mirrored, sized and lit otherwise.

    They are turned and mirrored where no text speaks of directions, and cut at the edges where all
    that is said about them is where things are.
    """
    texts = [text for branch in example.branches for text in texts_of(branch.messages)]
    moves = example.video is None and all(_is_exact(text) for text in texts)
    if not moves:
        return replace(example, images=[lit(image, rng) for image in example.images])
    turns = not any(_DIRECTIONS.search(_bare(text)) for text in texts)
    cuts = all(_says_where(branch) for branch in example.branches)
    changes = []
    for number, image in enumerate(example.images, start=1):
        points = [(p.x, p.y) for p in points_of(example.branches) if p.image == number]
        changes.append(_look(image, points, rng, turns, cuts))
    return changed(example, changes)


def _look(
    image: Image.Image,
    points: Sequence[tuple[float, float]],
    rng: np.random.Generator,
    turns: bool,
    cuts: bool,
) -> Change:
    zoom = float(np.exp(rng.uniform(*np.log(ZOOM))))
    stretch = float(np.exp(rng.uniform(-1, 1) * np.log(STRETCH)))
    turn, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    change = Change(lit(image, rng), lambda x, y: (x, y))
    if zoom < 1:
        change = _then(change, _framed(change.image, zoom, rng))
    elif cuts:
        change = _then(change, _cut(change.image, points, zoom, rng))
    width, height = change.image.size
    change = _then(change, _resized(change.image, (max(1, round(width * stretch)), height)))
    return _then(change, _turned(change.image, turn, mirrored)) if turns else change


def lit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture in another light."""
    for name, most in LIGHT.items():
        enhance: Any = getattr(ImageEnhance, name)
        image = enhance(image).enhance(float(rng.uniform(1 - most, 1 + most)))
    return image


def _then(first: Change, second: Change) -> Change:
    return Change(second.image, lambda x, y: second.move(*first.move(x, y)))


def _resized(image: Image.Image, size: tuple[int, int]) -> Change:
    if size == image.size:
        return Change(image, lambda x, y: (x, y))
    across, down = size[0] / image.width, size[1] / image.height
    made = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Change(made, lambda x, y: (x * across, y * down))


def _framed(image: Image.Image, zoom: float, rng: np.random.Generator) -> Change:
    """On a larger ground of its mean colour, somewhere."""
    size = round(image.width / zoom), round(image.height / zoom)
    left = int(rng.integers(size[0] - image.width + 1))
    top = int(rng.integers(size[1] - image.height + 1))
    colour = tuple(int(c) for c in np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0])
    made = Image.new("RGB", size, colour)
    made.paste(image, (left, top))
    return Change(made, lambda x, y: (x + left, y + top))


def _cut(
    image: Image.Image,
    points: Sequence[tuple[float, float]],
    zoom: float,
    rng: np.random.Generator,
) -> Change:
    """A part of it in which all points are, not close to its edges; no larger than it was."""
    box = []
    for axis, side in enumerate(image.size):
        places = [point[axis] for point in points] or [side / 2]
        low = max(0.0, min(places) - MARGIN * side)
        high = min(float(side), max(places) + MARGIN * side)
        length = max(side / zoom, high - low)
        first = rng.uniform(max(0.0, high - length), min(low, side - length) + 1e-6)
        box.append((int(first), min(side, max(int(first) + 1, round(first + length)))))
    (left, right), (top, bottom) = box
    return Change(image.crop((left, top, right, bottom)), lambda x, y: (x - left, y - top))


def _turned(image: Image.Image, quarters: int, mirrored: bool) -> Change:
    """By quarters against the clock, then mirrored."""
    width, height = image.size
    ways: list[Move] = [
        lambda x, y: (x, y),
        lambda x, y: (y, width - x),
        lambda x, y: (width - x, height - y),
        lambda x, y: (height - y, x),
    ]
    kinds = (
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_180,
        Image.Transpose.ROTATE_270,
    )
    change = Change(image.transpose(kinds[quarters - 1]) if quarters else image, ways[quarters])
    if not mirrored:
        return change
    across = change.image.width
    flipped = change.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _then(change, Change(flipped, lambda x, y: (across - x, y)))


# ---- what is said about it ----


def changed(example: Example, changes: Sequence[Change]) -> Example:
    """The example with other pictures, and every point where it is in them."""

    def moved(point: Point) -> Point:
        if point.time is not None or not 1 <= point.image <= len(changes):
            return point
        change = changes[point.image - 1]
        x, y = change.move(point.x, point.y)
        width, height = change.image.size
        return replace(point, x=min(max(x, 0.0), width), y=min(max(y, 0.0), height))

    def text(value: str) -> str:
        tags = [tag._replace(points=tuple(map(moved, tag.points))) for tag in tags_of(value)]
        return PointsText(value, tags) if tags else value

    def part(value: Any) -> Any:
        if value.get("type") == "point" and "time" not in value:
            place = moved(Point(value["x"], value["y"], value.get("image", 1)))
            return {**value, "x": place.x, "y": place.y}
        return {**value, "text": text(value["text"])} if "text" in value else value

    def content(value: Any) -> Any:
        return text(value) if isinstance(value, str) else [part(one) for one in value]

    branches = [
        replace(
            branch,
            messages=[
                cast("Message", {**message, "content": content(message["content"])})
                for message in branch.messages
            ],
        )
        for branch in example.branches
    ]
    return replace(example, images=[change.image for change in changes], branches=branches)


def texts_of(messages: Iterable[Message]) -> Iterator[str]:
    """All texts of a conversation."""
    for message in messages:
        content: Any = message["content"]
        for part in [content] if isinstance(content, str) else content:
            text = part if isinstance(part, str) else part.get("text")
            if isinstance(text, str):
                yield text


def points_of(branches: Iterable[Branch]) -> Iterator[Point]:
    """All points of questions and answers."""
    for branch in branches:
        for text in texts_of(branch.messages):
            for tag in tags_of(text):
                yield from tag.points
        for message in branch.messages:
            content: Any = message["content"]
            for part in [] if isinstance(content, str) else content:
                if part.get("type") == "point" and "time" not in part:
                    yield Point(part["x"], part["y"], part.get("image", 1))


def _is_exact(text: str) -> bool:
    """Whether a text knows where all points are that it tells of."""
    return len(tags_of(text)) == len(list(scan_tags(text)))


def _bare(text: str) -> str:
    """A text without its tags."""
    for tag in reversed(tags_of(text)):
        text = text[: tag.start] + text[tag.stop :]
    return str(text)


def _says_where(branch: Branch) -> bool:
    """Whether all answers are lists of points, or say that there are none."""
    answers = [list(texts_of([m])) for m in branch.messages if m["role"] == "assistant"]
    texts = [text for answer in answers for text in answer]
    return all(tags_of(text) or text.strip() == NOTHING_THERE for text in texts)
