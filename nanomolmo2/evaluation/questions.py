"""What is asked: every conversation of a source that ends with an answer, and how it is scored.

Questions are found in one pass before any of them is asked, so that what cannot be scored is said
at once. They hold no pictures: an example is read again when it is asked about.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.data.audit import digest as digest_of_pixels
from nanomolmo2.data.example import (
    NOT_OF_A_RECORD,
    BadExample,
    Branch,
    Example,
    Message,
    Source,
    brief,
)
from nanomolmo2.data.example import named as named_error
from nanomolmo2.data.layouts import CAPTION_QUESTIONS, SIDES
from nanomolmo2.data.sources import RecordSource
from nanomolmo2.evaluation.measures import (
    SCORERS,
    Thing,
    categories_of,
    references_of,
    track_things,
)
from nanomolmo2.evaluation.regions import read_box
from nanomolmo2.evaluation.scorers import Shown
from nanomolmo2.processor.chat import read_messages
from nanomolmo2.processor.counts import stated_count
from nanomolmo2.processor.image import load_image
from nanomolmo2.processor.points import (
    NO_TRACKS,
    NOTHING_THERE,
    Point,
    Size,
    format_points,
    parse_count,
    parse_points,
)
from nanomolmo2.processor.video import load_video

MANY_ANSWERS = 10  # as many people answered each question of VQA
LONG_ANSWER = 20  # words; nobody is expected to say the same ones

# Ways to score that a question leaves open, the best first.
Ways = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One question, with what is known about its answer.

    Attributes:
        number: among all questions, from 0.
        source, record, branch: where it stands, by number.
        where: the same, for people.
        messages: up to the question.
        truth: plain JSON that fits the scorer.
        reference: a right answer in words; "" where only places are known.
        shown: sizes of its pictures or video.
        picture: the same for questions about the same picture.
        files: where its pictures lie; empty where they are in no files of their own.
    """

    number: int
    source: int
    record: int
    branch: int
    where: str
    task: str
    scorer: str
    messages: list[Message]
    truth: dict[str, Any]
    reference: str
    shown: Shown
    picture: str
    files: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last question."""
        return read_messages(self.messages)[-1].text.strip()


@dataclass
class Questions:
    """All questions of some sources, and what was left out.

    Attributes:
        bad: bad records by cause; ``first_bad``: the first of each cause.
        unscored: captions and free texts without anything to score them by.
        unread: fields that nothing reads, by name.
    """

    asked: list[Question] = field(default_factory=list)
    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    unscored: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def leave_out(self, bad: BadExample) -> None:
        self.bad[bad.cause] += 1
        self.first_bad.setdefault(bad.cause, bad.detail)


Choice = str | Mapping[str, str] | None  # a scorer for all tasks, or one for each


def find_questions(
    sources: Sequence[Source],
    scorer: Choice = None,
    limit: int | None = None,
    radius: float | None = None,
) -> Questions:
    """Read all examples and choose how each of their questions is scored.

    Args:
        scorer: in place of what the fields say.
        limit: only the first records of each source.
        radius: in pixels around true points that have none of their own.
    Raises: ValueError for an unknown scorer, one that does not fit, and where nothing can be
        scored.
    """
    _check_scorer(scorer)
    found = Questions()
    drafts: list[tuple[Question, Ways]] = []
    for number, source in enumerate(sources):
        for record in range(min(len(source), limit or len(source))):
            found.records += 1
            try:
                example = source[record]
                found.unread.update(example.unread)
                drafts += list(_read(example, source, number, record, scorer, radius, found))
            except BadExample as bad:
                found.leave_out(bad)
    found.asked = _settled(drafts)
    if not found.asked:
        raise ValueError(_nothing_to_score(found, sources))
    return found


def _check_scorer(scorer: Choice) -> None:
    names = [scorer] if isinstance(scorer, str) else list((scorer or {}).values())
    for name in names:
        if name not in SCORERS:
            raise ValueError(f"there is no scorer {name!r}: choose from {', '.join(SCORERS)}")


def _nothing_to_score(found: Questions, sources: Sequence[Source]) -> str:
    names = ", ".join(source.name for source in sources)
    if found.unscored:
        return (
            f"{names}: none of {found.unscored.total()} answers can be scored, they are captions "
            f"or long texts: give 'categories' (names that a caption should hold), or choose a "
            f"scorer, such as anls"
        )
    if found.bad:
        cause, _ = found.bad.most_common(1)[0]
        return (
            f"{names}: none of {found.records} records can be asked about; the first is "
            f"{brief(found.first_bad[cause])} ({cause})"
        )
    return f"{names}: there are no questions with a known answer"


# ---- one example ----


def _read(
    example: Example,
    source: Source,
    number: int,
    record: int,
    scorer: Choice,
    radius: float | None,
    found: Questions,
) -> Iterator[tuple[Question, Ways]]:
    where = f"{source.name}, record {record}"
    shown = shown_in(example)
    picture = picture_of(example) or f"{number}:{record}"
    files = files_of(source, record) if shown.image_sizes else ()
    for place, branch in enumerate(example.branches):
        messages, said = split(branch)
        text = read_messages(messages)[-1].text.strip()
        named = scorer.get(branch.task) if isinstance(scorer, Mapping) else scorer
        try:
            truth, ways = choose(branch, text, said, shown, named)
            if ways and radius is not None and "points" in truth:
                truth.setdefault("radius", radius)
            if ways:
                SCORERS[ways[0]].check(truth, shown)
        except NOT_OF_A_RECORD:
            raise
        except Exception as error:  # nobody can foresee what stands in the truths of the world
            reason = brief(error) if isinstance(error, ValueError) else named_error(error)
            if named is not None:
                raise ValueError(
                    f"the scorer {named} does not fit {where}, {short_text(text)}: {reason}; "
                    f"choose another, or name its task: --scorer TASK={named}"
                ) from None
            raise BadExample("bad truth", f"{where}: {reason}") from None
        task = branch.task
        if not ways:
            found.unscored[task or "caption"] += 1
            continue
        yield (
            Question(
                number=0,
                source=number,
                record=record,
                branch=place,
                where=where,
                task=task or SCORERS[ways[0]].kind,
                scorer=ways[0],
                messages=messages,
                truth=truth,
                reference=_reference(truth, said, shown),
                shown=shown,
                picture=picture,
                files=files,
            ),
            ways,
        )


def short_text(text: str) -> str:
    """A question in an error."""
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False)


def split(branch: Branch) -> tuple[list[Message], str | None]:
    """(messages up to the last question, what the last assistant message says or None)."""
    turns = read_messages(branch.messages)
    if turns[-1].role == "assistant":
        return list(branch.messages[:-1]), turns[-1].text.strip()
    return list(branch.messages), None


def shown_in(example: Example) -> Shown:
    """Sizes of an example's images or of its video."""
    sizes = tuple(_size(image) for image in example.images)
    video = example.video
    if video is None:
        return Shown(sizes)
    return Shown(sizes, (load_video(video, max_frames=1) if _is_file(video) else video).size)


def _size(image: Any) -> Size:
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
        return image.shape[1], image.shape[0]
    size: Size = image.size if isinstance(image, Image.Image) else load_image(image).size
    return size


def _is_file(video: Any) -> bool:
    return isinstance(video, (str, Path))


def picture_of(example: Example) -> str:
    """A digest of what an example shows; empty where it shows nothing."""
    digest = hashlib.blake2b(digest_size=12)
    video = example.video
    if _is_file(video):
        digest.update(str(video).encode())
    elif video is not None:
        for frame in video.frames:
            digest.update(np.ascontiguousarray(frame).tobytes())
    for image in example.images:
        digest.update(digest_of_pixels(load_image(image)))
    return digest.hexdigest() if example.images or video is not None else ""


def files_of(source: Source, record: int) -> tuple[str, ...]:
    """Absolute paths of the pictures that a record names, where it names them all."""
    if not isinstance(source, RecordSource) or not getattr(source.rows, "is_cheap", False):
        return ()
    row, config = source.rows[record], source.config
    given = row.values.get("images", row.values.get("image"))
    folder = Path(config.image_folder).expanduser() if config.image_folder else row.folder
    paths = []
    for name in given if isinstance(given, list) else [given]:
        path = folder / name if isinstance(name, str) and len(name) < 4096 else None
        if path is None or not os.path.isfile(path):
            return ()
        paths.append(os.path.abspath(path))
    return tuple(paths)


# ---- how it is scored ----

_PLACES = ("points", "boxes", "masks", "groups")


def choose(
    branch: Branch, question: str, said: str | None, shown: Shown, named: str | None = None
) -> tuple[dict[str, Any], Ways]:
    """(truth with what is missing taken from the answer, scorers that fit, the best first).

    Args:
        said: the true answer in words, where there is one.
        named: the scorer that was asked for, in place of what the fields say.
    Returns: no scorers for captions and free texts that nothing is known of.
    Raises: ValueError where nothing is known about the answer, or for an unknown scorer.
    """
    truth = _in_pixels(dict(branch.truth), shown)
    answer = truth.get("answer")
    if isinstance(answer, (str, int, float)) and not isinstance(answer, bool):
        said = str(answer)  # before what the conversation says
    name = named or truth.get("scorer")
    if name is not None:
        if name not in SCORERS:
            raise ValueError(f"there is no scorer {name!r}: choose from {', '.join(SCORERS)}")
        return _completed(truth, said, name, shown), (name,)
    ways = _ways(truth, branch.task, question, said, shown)
    return (_completed(truth, said, ways[0], shown) if ways else truth), ways


def _ways(
    truth: Mapping[str, Any], task: str, question: str, said: str | None, shown: Shown
) -> Ways:
    has = {name for name, value in truth.items() if value is not None}
    is_caption = "caption" in task or task == "transcript" or question in CAPTION_QUESTIONS
    if has & {"tracks", "frames"} or (said or "").lstrip().startswith("<tracks"):
        return ("tracks",)
    if "categories" in has or (is_caption and "counts" in has):
        return ("categories",)
    if "choices" in has:
        return ("choice",)
    if "answers" in has:
        answers = truth["answers"]
        people = len(answers) if isinstance(answers, list) else 1
        return ("vqa",) if people >= MANY_ANSWERS else ("exact",)
    if said is None:
        if has & {*_PLACES}:
            return ("points",)
        if "count" in has:
            return ("count",)
        raise ValueError("nothing is known about its answer: give an 'answer', or a truth")
    asks_number = "count" in has and _asks_number(question)
    if _points_in(said, shown):
        is_counted = asks_number or stated_count(said) is not None
        return ("count",) if is_counted else ("points",)
    if said == NO_TRACKS:
        return ("tracks",)
    if parse_count(said) == 0 and not said.strip(". ").isdecimal():
        if asks_number or (_asks_number(question) and not has & {*_PLACES}):
            return ("count", "points", "exact")
        return ("points", "count", "exact")
    if parse_count(said) is not None and len(said.split()) <= 6:
        return ("count",) if "count" in has else ("count", "exact")
    if asks_number:
        return ("count",)
    if is_caption or len(said.split()) > LONG_ANSWER:
        return ()
    return ("exact",)


def _in_pixels(truth: dict[str, Any], shown: Shown) -> dict[str, Any]:
    """Boxes that stand beside a question have the unit of its points."""
    scale = truth.pop("boxes_scale", None)
    if scale is None:
        return truth
    boxes = []
    for given in truth["boxes"] if isinstance(truth["boxes"], list) else ():
        inner = given.get("box") if isinstance(given, Mapping) else given
        box = read_box(inner)
        image = given.get("image", 1) if isinstance(given, Mapping) else 1
        size = shown.video_size or (shown.image_sizes[image - 1 : image] or [None])[0]
        if scale not in SIDES or size is None:
            raise ValueError(f"its boxes have the scale {scale!r}, and there is no such picture")
        across, down = (side / SIDES[scale] for side in size)
        pixels = [box.x0 * across, box.y0 * down, box.x1 * across, box.y1 * down]
        boxes.append({**given, "box": pixels} if isinstance(given, Mapping) else pixels)
    return {**truth, "boxes": boxes}


def _asks_number(question: str) -> bool:
    return bool(re.search(r"\bhow many\b|\bcount\b|\bnumber of\b", question, re.IGNORECASE))


def _points_in(said: str, shown: Shown) -> bool:
    return bool(shown.points(said))


def _completed(
    truth: dict[str, Any], said: str | None, scorer: str, shown: Shown
) -> dict[str, Any]:
    """The truth with what the scorer needs, read from the true answer where it is missing."""
    has = {name for name, value in truth.items() if value is not None}
    if said is None:
        return truth
    if scorer == "points" and not has & {*_PLACES}:
        return {**truth, "points": _read_points(said, shown)}
    if scorer == "tracks" and not has & {*_PLACES, "tracks", "frames"}:
        return {**truth, "points": _read_points(said, shown)}
    if scorer == "count" and "count" not in has:
        if (count := parse_count(said)) is None:
            raise ValueError(
                f"its answer {short_text(said)} gives no number, expected a whole number"
            )
        return {**truth, "count": count}
    if scorer == "choice" and "answer" not in has:
        return {**truth, "answer": said}
    if scorer in ("exact", "vqa", "anls", "relaxed") and not has & {"answers", "answer"}:
        if _points_in(said, shown):
            raise ValueError(f"its answer {short_text(said)} is points, expected a text")
        return {**truth, "answers": [said]}
    return truth


def _read_points(said: str, shown: Shown) -> list[dict[str, Any]]:
    points = parse_points(said, shown.image_sizes, video_size=shown.video_size, problems=[])
    if not points and said not in (NOTHING_THERE, NO_TRACKS) and parse_count(said) != 0:
        raise ValueError(f"its answer {short_text(said)} holds no points")
    return [
        {
            "x": point.x,
            "y": point.y,
            **({"image": point.image} if point.time is None else {"time": point.time}),
            **({"label": point.label} if point.label else {}),
        }
        for point in points
    ]


def _reference(truth: Mapping[str, Any], said: str | None, shown: Shown) -> str:
    """A right answer in words: what was said, the most frequent of several, or points."""
    if said is not None:
        return said
    if truth.get("count") is not None and not any(truth.get(name) for name in _PLACES):
        return str(truth["count"])
    try:
        return Counter(references_of(truth)).most_common(1)[0][0]
    except ValueError:
        pass
    try:
        points = [_middle(thing) for thing in track_things(truth, shown)]
        return format_points(points, "point", shown.image_sizes, video_size=shown.video_size)
    except (ValueError, KeyError):  # names, or places outside of the picture
        return ""


def _middle(thing: Thing) -> Point:
    """Of the box around a thing."""
    corners = [corner for ring in thing.region.outline for corner in ring]
    x, y = ((min(values) + max(values)) / 2 for values in zip(*corners, strict=True))
    return Point(x, y, thing.image, time=thing.time)


# ---- all of them ----


def _settled(drafts: Sequence[tuple[Question, Ways]]) -> list[Question]:
    """One scorer for each task, where all of its questions allow it; numbered.

    A number may be a count or a text, "There are none." the answer to several kinds of question:
    what the others of the task are decides.
    """
    ways: dict[str, list[Ways]] = defaultdict(list)
    for question, possible in drafts:
        ways[question.task].append(possible)
    chosen: dict[str, str] = {}
    for task, lists in ways.items():
        narrowest = min(lists, key=len)
        common = [name for name in narrowest if all(name in possible for possible in lists)]
        if common:
            chosen[task] = common[0]
    words: dict[str, list[str]] = defaultdict(list)
    for question, _ in drafts:
        if question.scorer == "categories":
            words[question.task] += categories_of(question.truth)
    settled = []
    for number, (question, _) in enumerate(drafts):
        name = chosen.get(question.task, question.scorer)
        truth = question.truth
        if name != question.scorer:
            truth = _completed(truth, question.reference, name, question.shown)
        if name == "categories":
            truth = {**truth, "vocabulary": sorted({*words[question.task]})}
        settled.append(replace(question, number=number, scorer=name, truth=truth))
    return settled
