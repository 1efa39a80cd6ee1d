"""Questions with points in them, for models that write coordinates and have a finder.

    "Point to everything like <point>, not like <point>."
    "This <point> is a walnut."  ...  "How many walnuts are there in the second picture?"

The language model of such a model never saw a point in a question. What is meant can be read off
the words around the points, and what is like them is found, as `VLM.find` does. A model that points
by selecting what it sees has learned to read such questions itself.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from nanomolmo2.generation.answer import Answer, Shown
from nanomolmo2.generation.find import LABEL
from nanomolmo2.generation.finding import LEAST_CONFIDENCE, LIKELY
from nanomolmo2.generation.question import Question, read_question
from nanomolmo2.generation.taught import Task, merge_found, said, task_of
from nanomolmo2.generation.words import Word, Words, checked_name, with_article
from nanomolmo2.processor import Message, Point, load_image
from nanomolmo2.processor.chat import read_messages
from nanomolmo2.processor.points import Size

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM

MARK = "\ufffc"  # stands for a point in a text: "object replacement character"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NOT = re.compile(r"\b(?:not|nothing|unlike|except|without|never|excluding)\b", re.IGNORECASE)
_NAMES = re.compile(
    r"\b(?:is|are|call(?:ed)?(?:\s+(?:this|these|it|them|that))?)\b[\s" + MARK + r"]*"
    r"(?:called\s+|named\s+)?(?:(?:an?|the)\s+)?(?P<name>[^\s.,:;!?"
    + MARK
    + r"][^.,:;!?"
    + MARK
    + r"]*)",
    re.IGNORECASE,
)
_ASKS = re.compile(r"\?|\b(?:how many|count|point|find|show|mark|locate|where|number of)\b", re.I)
_LIKE = re.compile(
    r"\b(?:like|alike|same|similar|resembl\w*|kind|sort|type|such|this|these|those|that|other|another)\b",
    re.IGNORECASE,
)
_ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "other": 0, "last": -1}
_PICTURE = re.compile(
    r"\b(?:(?P<ordinal>first|second|third|fourth|other|last)\s+(?:picture|image|photo|one)"
    r"|(?:picture|image|photo)\s+(?P<number>\d+))\b",
    re.IGNORECASE,
)
NOT_READ = (
    "the question has points, and this model reads those that show what is meant, as in: Point to "
    "everything like <point>. Its language model does not see them"
)
# Words that elsewhere compare things, or stand for a moment of a video.
_BESIDE = re.compile(rf"{_PICTURE.pattern}|\bmore\b(?= (?:like|of|such))", re.IGNORECASE)
_NEAR_SIZE, _NEAR_SHARE = 0.75, 0.02  # of a thing's size, of the picture's diagonal


class Told(NamedTuple):
    """A turn of the user: its text with a `MARK` for every point, and the points."""

    text: str
    points: list[Point]


class Meant(NamedTuple):
    """What a sentence asks for.

    Attributes:
        name: of the things. like, unlike: places on them, and on others.
    """

    name: Word
    like: list[Point]
    unlike: list[Point]


def answer_about_shown(vlm: VLM, question: Question) -> Answer | None:
    """The answer to a question that shows what it means; None for one without points.

    Raises: as `VLM.ask` and `VLM.find`.
    """
    if isinstance(question.question, str) or question.video is not None:
        return None
    told = [told_in(message) for message in question.question if _is_users(message)]
    if not any(turn.points for turn in told):
        return None
    context = vlm.model.config.llm_config.max_position_embeddings
    conversation = read_question(question, context, allow_remote=vlm.allow_remote)
    read_messages(conversation.messages)  # what is wrong with them is said as ever
    images, video = conversation.shown()
    if video is not None or not images:
        return None
    pictures = [load_image(image) for image in images]
    names, asked = read_names(told)
    if not asked.text:
        return _understood(vlm, pictures, list(names.values()))
    wish = read_wish(asked, names, len(pictures))
    if wish is None:
        if asked.points:
            warnings.warn(NOT_READ, stacklevel=4)
        return None
    return replace(_granted(vlm, pictures, wish), show=partial(Shown, pictures))


def _is_users(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "user"


def told_in(message: Message) -> Told:
    """A turn of the user."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return Told(content, [])
    text, points = "", list[Point]()
    for part in content if isinstance(content, (list, tuple)) else ():
        if not isinstance(part, Mapping):
            continue
        if part.get("type") == "point" and part.get("time") is None:
            text += f" {MARK} "
            points.append(Point(float(part["x"]), float(part["y"]), int(part.get("image", 1))))
        elif isinstance(part.get("text"), str):
            text += part["text"]
    return Told(" ".join(text.split()), points)


def sentences(turn: Told) -> list[Told]:
    """Its sentences, each with its own points."""
    found, left = [], list(turn.points)
    for text in _SENTENCE.split(turn.text.replace(f"{MARK} .", f"{MARK}.")):
        number = text.count(MARK)
        found.append(Told(text, left[:number]))
        del left[:number]
    return found


def named_in(sentence: Told) -> Meant | None:
    """What a sentence gives a name to: ``This <point> is a walnut.``"""
    if not sentence.points or _ASKS.search(sentence.text):
        return None
    found = _NAMES.search(sentence.text)
    if found is None:
        return None
    try:
        name = checked_name(found["name"])
    except ValueError:
        return None
    from nanomolmo2.data.labels.questions import plural

    is_plural = re.search(r"\b(?:these|those|are)\b", sentence.text, re.IGNORECASE)
    if is_plural and len(sentence.points) > 1 and name.endswith("s"):
        one = next((o for o in (name[:-1], name[:-2]) if plural(o) == name), name)
        return Meant(Word(one, name), sentence.points, [])
    return Meant(Word(name, plural(name)), sentence.points, [])


def read_names(told: Sequence[Told]) -> tuple[dict[str, Meant], Told]:
    """What was given names, and what of the last turn is the question; maybe nothing."""
    names: dict[str, Meant] = {}
    asked: list[Told] = []
    for turn in told:
        asked = []  # what was asked before was answered before
        for sentence in sentences(turn):
            if (meant := named_in(sentence)) is not None:
                names[meant.name.name] = meant
            elif sentence.text:
                asked.append(sentence)
    text = " ".join(sentence.text for sentence in asked)
    return names, Told(text, [point for sentence in asked for point in sentence.points])


class Wish(NamedTuple):
    """What is to be found, and said.

    Attributes:
        image: number of the picture that is asked about.
        same: whether it is only asked if this place is on one of them.
    """

    task: Task
    wanted: list[Meant]
    image: int
    same: Point | None = None


def read_wish(asked: Told, names: Mapping[str, Meant], images: int) -> Wish | None:
    """What a question asks for; None where it is for nothing that can be found.

    Args: names: of `read_names`. images: how many are shown.
    Raises: ValueError for a picture that is not shown.
    """
    text = asked.text.replace(MARK, "it")
    task = task_of(_BESIDE.sub("", text))
    if task is None:
        return None
    if not asked.points:
        words = Words({name: meant.name for name, meant in names.items()}, {})
        about, _ = words.mentioned(text)
        wanted = [_with_others(names[word.name], names) for word in about]
        examples = [point for meant in wanted for point in meant.like]
        return Wish(task, wanted, _picture(text, images, examples)) if wanted else None
    like, unlike = _sides(asked)
    if not like or not _LIKE.search(text):
        return None
    thing = Word(LABEL, f"{LABEL}s")
    if task == "presence" and len(like) == 2 and not unlike:
        return Wish(task, [Meant(thing, like[:1], [])], like[1].image, same=like[1])
    return Wish(task, [Meant(thing, like, unlike)], _picture(text, images, like))


def _granted(vlm: VLM, pictures: Sequence[Image.Image], wish: Wish) -> Answer:
    sizes, found = [picture.size for picture in pictures], []
    for meant in wish.wanted:
        answer, points = _found(vlm, pictures, meant, wish.image)
        points = [replace(point, image=wish.image) for point in points]
        if wish.same is not None:
            points = [point for point in points if _lies_on(wish.same, point, sizes)]
            answer = replace(answer, problems=())
        elif wish.task == "presence" and meant.name.name == LABEL:  # of others
            points = [p for p in points if not any(_lies_on(x, p, sizes) for x in meant.like)]
        found.append((answer, points))
    return said(wish.task, [meant.name for meant in wish.wanted], found, sizes, wish.image)


def _with_others(meant: Meant, names: Mapping[str, Meant]) -> Meant:
    """Things with other names that were shown in the same picture are not meant."""
    shown = {point.image for point in meant.like}
    others = [p for one in names.values() if one is not meant for p in one.like]
    return meant._replace(unlike=[point for point in others if point.image in shown][:2])


def _sides(asked: Told) -> tuple[list[Point], list[Point]]:
    """Which points of a question are meant, and which are not."""
    like, unlike, is_meant = list[Point](), list[Point](), True
    for before, point in zip(asked.text.split(MARK), asked.points, strict=False):
        if _NOT.search(before):
            is_meant = False
        (like if is_meant else unlike).append(point)
    return like, unlike


def _picture(text: str, number: int, examples: Sequence[Point]) -> int:
    """Which picture is asked about: the one that is named, else the last that is shown."""
    if number == 1:
        return 1
    if (found := _PICTURE.search(text)) is None:
        return number
    if found["number"]:
        chosen = int(found["number"])
    else:
        chosen = _ORDINALS[found["ordinal"].lower()]
        if chosen == 0:
            shown = {point.image for point in examples}
            chosen = next((i for i in range(number, 0, -1) if i not in shown), number)
        elif chosen < 0:
            chosen = number
    if not 1 <= chosen <= number:
        raise ValueError(f"the question names picture {chosen}, but {number} are shown")
    return chosen


def _found(
    vlm: VLM, pictures: Sequence[Image.Image], meant: Meant, number: int
) -> tuple[Answer, list[Point]]:
    """What is like some examples in picture ``number``: of every picture that has some, or of the
    picture itself, all in one search; those of several are merged."""
    image = pictures[number - 1]
    others = sorted({point.image for point in (*meant.like, *meant.unlike)} - {number})
    answers = []
    references: list[int | None] = [*others] or [None]
    for reference in references:
        like, unlike = (
            [
                (p.x, p.y, 2 if others and p.image == number else 1)
                for p in points
                if p.image in (number, reference)
            ]
            for points in (meant.like, meant.unlike)
        )
        answers.append(
            vlm.find(
                image,
                like,
                unlike,
                reference=None if reference is None else pictures[reference - 1],
                min_confidence=LIKELY if len(others) < 2 else LEAST_CONFIDENCE,
            )
        )
    return merge_found(answers, image.size)


def _lies_on(place: Point, thing: Point, sizes: Sequence[Size]) -> bool:
    """Whether a place is on a thing that was found."""
    if place.image != thing.image:
        return False
    near = max(_NEAR_SIZE * (thing.size or 0.0), _NEAR_SHARE * math.hypot(*sizes[thing.image - 1]))
    return math.hypot(place.x - thing.x, place.y - thing.y) <= near


def _understood(vlm: VLM, pictures: Sequence[Image.Image], names: Sequence[Meant]) -> Answer | None:
    """What is said to one who only gives names: what was understood, and whether anything seems to
    be there."""
    answers = []
    for meant in names:
        of_one = [point for point in meant.like if point.image == meant.like[0].image]
        places = [(point.x, point.y) for point in of_one]
        answers.append(vlm.find(pictures[of_one[0].image - 1], places))
    if not answers:
        return None
    texts = [with_article(meant.name.name) for meant in names]
    text = " ".join(f"{text[0].upper()}{text[1:]}." for text in texts)
    problems = [p for answer in answers for p in answer.problems if p.startswith("nothing seems")]
    return replace(
        answers[0],
        text=text,
        coordinates=text,
        points=(),
        count=None,
        problems=tuple(dict.fromkeys(problems)),
        show=partial(Shown, pictures),
        image_sizes=tuple(picture.size for picture in pictures),
    )
