"""What the model will see of an example: tokens with their roles, labels, weights and positions.

Everything is read off the same `Encoded` that training gets, so what is shown is what is learned.
`show.py` prints it and makes a page of it.

Letters: m images, M crops of N patches of P x P pixels, S side of an image that is not cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from nanomolmo2.batch import IGNORED_LABEL, PREFIX_SUBSEGMENT
from nanomolmo2.data.example import NOT_OF_A_RECORD, BadExample, Branch, Example, brief, named
from nanomolmo2.data.fields import RowLimits
from nanomolmo2.data.sources import RecordSource, Source
from nanomolmo2.processor import Encoded, Point, Processor, load_image, parse_points
from nanomolmo2.processor.chat import TURN_END, TURN_START, read_messages
from nanomolmo2.processor.draw import draw_frames, draw_points

Encode = Callable[[Example], Encoded]

# What a token is: of an image, of the chat format, other text before the branches, or said by one.
Role = Literal["image", "special", "prefix", "user", "assistant"]
LARGEST_SIDE = 640  # pixels; larger images are shown smaller


@dataclass(frozen=True)
class Token:
    """One token, or ``count`` image tokens in a row; index and position are those of the first.

    Attributes:
        index: place in the row, from 0.
        position: what RoPE gets; the branches of an example restart behind the prefix.
        learned: whether the token is a label.
        weight: of the label in the loss; 0 if nothing is learned.
    """

    text: str
    id: int
    role: Role
    index: int
    position: int
    learned: bool
    weight: float
    count: int = 1


@dataclass(frozen=True)
class BranchView:
    """A branch of the tree (or all of a conversation without branches).

    Attributes:
        subsegment: what the attention mask tells branches apart by.
        points: that its answers name, in pixels of the images.
        problems: what of its points cannot be read.
        drawn: (what it is, image or frame of the video with the points) where it has points.
    """

    task: str
    subsegment: int
    tokens: list[Token]
    points: list[Point]
    problems: list[str]
    drawn: list[tuple[str, Image.Image]]

    @property
    def num_learned(self) -> int:
        return sum(token.learned for token in self.tokens)

    @property
    def weight(self) -> float:
        """Of all its labels together."""
        return sum(token.weight for token in self.tokens)


@dataclass(frozen=True)
class View:
    """One example as the model sees it; ``record`` is its number in the source, from 0."""

    record: int
    prefix: list[Token]
    branches: list[BranchView]
    images: list[Image.Image]  # the originals, at most LARGEST_SIDE pixels a side
    sizes: list[tuple[int, int]]  # (width, height) of the originals, pixels
    crops: list[tuple[str, Image.Image]]  # what the encoder gets, with what it is

    @property
    def tokens(self) -> list[Token]:
        return [*self.prefix, *(token for branch in self.branches for token in branch.tokens)]

    @property
    def num_tokens(self) -> int:
        return sum(token.count for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the images."""
        return {
            "record": self.record,
            "tokens": self.num_tokens,
            "pictures": [{"width": width, "height": height} for width, height in self.sizes],
            "crops": [name for name, _ in self.crops],
            "prefix": [dataclasses.asdict(token) for token in self.prefix],
            "branches": [
                {
                    "task": branch.task,
                    "subsegment": branch.subsegment,
                    "learned": branch.num_learned,
                    "weight": branch.weight,
                    "points": [dataclasses.asdict(point) for point in branch.points],
                    "problems": branch.problems,
                    "tokens": [dataclasses.asdict(token) for token in branch.tokens],
                }
                for branch in self.branches
            ],
        }


@dataclass(frozen=True)
class Fault:
    """A record of which there is nothing to show."""

    record: int
    cause: str
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Read:
    """An example on its way to the model."""

    example: Example
    images: list[Image.Image]  # the originals, upright RGB
    encoded: Encoded


def read_record(
    source: Source, record: int, encode: Encode, limits: RowLimits | None = None
) -> Read:
    """One record as training gets it.

    Args:
        limits: of a row; what can never fit is refused before it is decoded.
    Raises: BadExample with the cause: the source's own, ``missing picture``, ``broken picture``,
        ``missing video``, ``too long``, or ``not encodable`` for what the processor refuses.
    """
    example = source.read(record, limits) if isinstance(source, RecordSource) else source[record]
    images = []
    for image in example.images:
        try:
            images.append(load_image(image))
        except FileNotFoundError as error:
            raise BadExample("missing picture", brief(error)) from None
        except ValueError as error:
            raise BadExample("broken picture", brief(error)) from None
    try:
        # The opened images, so that no file is decoded twice.
        return Read(example, images, encode(dataclasses.replace(example, images=[*images])))
    except FileNotFoundError as error:  # images are open by now
        raise BadExample("missing video", brief(error)) from None
    except ValueError as error:
        raise BadExample("not encodable", brief(error)) from None
    except NOT_OF_A_RECORD:
        raise
    except Exception as error:
        raise BadExample("not encodable", named(error)) from None


def look(
    source: Source,
    record: int,
    encode: Encode,
    processor: Processor,
    limits: RowLimits | None = None,
) -> View | Fault:
    """Everything there is to see of one record of a source.

    Args:
        limits: of the largest record that is shown.
    """
    try:
        read = read_record(source, record, encode, limits)
    except BadExample as bad:
        return Fault(record, bad.cause, bad.detail)
    prefix, rows = _split(read.encoded, _tokens(read.encoded, processor))
    sizes = [image.size for image in read.images]
    crops = crop_images(read.encoded, processor)
    branches = []
    for (subsegment, tokens), branch in zip(rows, read.example.branches, strict=True):
        points, problems = read_points(branch, sizes, read.encoded.video_size)
        drawn = [
            (f"picture {number}", _shrunk(draw_points(image, points, number=number)))
            for number, image in enumerate(read.images, start=1)
            if any(point.image == number and point.time is None for point in points)
        ]
        drawn += _draw_on_frames(crops, read.encoded, points)
        branches.append(BranchView(branch.task, subsegment, tokens, points, problems, drawn))
    return View(
        record=record,
        prefix=prefix,
        branches=branches,
        images=[_shrunk(image) for image in read.images],
        sizes=sizes,
        crops=crops,
    )


def read_points(
    branch: Branch, sizes: Sequence[tuple[int, int]], video_size: tuple[int, int] | None = None
) -> tuple[list[Point], list[str]]:
    """(points, problems) of a branch's answers, see `parse_points`."""
    points: list[Point] = []
    problems: list[str] = []
    for turn in read_messages(branch.messages):
        if turn.role == "assistant":
            points += parse_points(turn.text, sizes, video_size=video_size, problems=problems)
    return points, problems


def learned(encoded: Encoded) -> np.ndarray:
    """(T,) bool: the labels that count in the loss."""
    if encoded.labels is None:
        return np.zeros(len(encoded.input_ids), dtype=bool)
    known: np.ndarray = encoded.labels != IGNORED_LABEL
    return known if encoded.loss_weights is None else known & (encoded.loss_weights > 0)


def crop_images(encoded: Encoded, processor: Processor) -> list[tuple[str, Image.Image]]:
    """What the vision encoder gets, normalisation undone: [(name, image), ...]."""
    pixels, config = encoded.pixel_values, processor.config
    if pixels is None:
        return []
    counts = encoded.image_num_crops
    if pixels.ndim == 3:  # (M, N, 3*P*P), a patch runs row, column, channel
        side = math.isqrt(pixels.shape[1])
        patch = math.isqrt(pixels.shape[2] // 3)
        grid = pixels.reshape(-1, side, side, patch, patch, 3)
        pixels = grid.swapaxes(2, 3).reshape(-1, side * patch, side * patch, 3)
    else:  # (m, 3, S, S)
        pixels = pixels.transpose(0, 2, 3, 1)
    values = (pixels * config.image_std + config.image_mean) / config.rescale_factor
    images = [Image.fromarray(v) for v in np.rint(np.clip(values, 0, 255)).astype(np.uint8)]
    if encoded.video_grids is not None:
        names = [f"frame at {time:.1f} s" for time in encoded.frame_times]
    elif counts is None:
        names = [f"picture {n}" for n in range(1, len(images) + 1)]
    else:
        names = [
            f"picture {n}, {f'tile {crop}' if crop else 'overview'}"
            for n, count in enumerate(counts.tolist(), start=1)
            for crop in range(count)
        ]
    return list(zip(names, images, strict=True))


def _tokens(encoded: Encoded, processor: Processor) -> list[Token]:
    """Every token of a row; image tokens that follow each other as one."""
    tokenizer = processor.tokenizer
    special = {id: name for name, id in tokenizer.special_ids.items()}
    ids, is_learned = encoded.input_ids.tolist(), learned(encoded)
    subsegments = _subsegments(encoded)
    tokens: list[Token] = []
    in_control = False  # between the ends of a turn and the newline that opens the next
    for index, id in enumerate(ids):
        if index and subsegments[index] != subsegments[index - 1]:
            in_control = False
        text = special[id] if id in special else tokenizer.decode([id])
        if "�" in text:  # a part of a character
            text = tokenizer.backend.id_to_token(id) or text
        role: Role
        if id in processor.image_token_ids:
            role = "image"
        elif id in special:
            role = "special"
            in_control = text in (TURN_START, TURN_END)
        elif subsegments[index] == PREFIX_SUBSEGMENT:
            role = "prefix"
        elif in_control and not is_learned[index]:
            role = "special"
            in_control = "\n" not in text
        else:
            role = "assistant" if is_learned[index] else "user"
        if role == "image" and tokens and tokens[-1].role == "image":
            tokens[-1] = dataclasses.replace(tokens[-1], count=tokens[-1].count + 1)
            continue
        weights = encoded.loss_weights
        weight = 1.0 if weights is None else float(weights[index])
        tokens.append(
            Token(
                text=text,
                id=id,
                role=role,
                index=index,
                position=int(encoded.position_ids[index]),
                learned=bool(is_learned[index]),
                weight=weight if is_learned[index] else 0.0,
            )
        )
    return tokens


def _subsegments(encoded: Encoded) -> list[int]:
    if encoded.subsegment_ids is None:
        return [0] * len(encoded.input_ids)
    subsegments: list[int] = encoded.subsegment_ids.tolist()
    return subsegments


def _split(
    encoded: Encoded, tokens: Sequence[Token]
) -> tuple[list[Token], list[tuple[int, list[Token]]]]:
    """(prefix, [(subsegment, tokens), ...])."""
    subsegments = _subsegments(encoded)
    prefix: list[Token] = []
    branches: dict[int, list[Token]] = {}
    for token in tokens:
        subsegment = subsegments[token.index]
        row = prefix if subsegment == PREFIX_SUBSEGMENT else branches.setdefault(subsegment, [])
        row.append(token)
    return prefix, list(branches.items())


def _draw_on_frames(
    crops: Sequence[tuple[str, Image.Image]], encoded: Encoded, points: Sequence[Point]
) -> list[tuple[str, Image.Image]]:
    """Those frames of a video that have points, as the encoder gets them."""
    if encoded.video_size is None:
        return []
    frames = [frame for _, frame in crops]
    across, down = (
        shown / original for shown, original in zip(frames[0].size, encoded.video_size, strict=True)
    )
    scaled = [dataclasses.replace(p, x=p.x * across, y=p.y * down) for p in points]
    drawn = draw_frames(frames, encoded.frame_times, scaled)
    return [
        (name, marked)
        for (name, frame), marked in zip(crops, drawn, strict=True)
        if marked.tobytes() != frame.tobytes()
    ]


def _shrunk(image: Image.Image) -> Image.Image:
    if max(image.size) <= LARGEST_SIDE:
        return image
    small = image.copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return small
