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
from nanomolmo2.generation.taught import TASK_WORDS, Task, merge_found, said, task_of
from nanomolmo2.generation.words import Word, Words, checked_name, key_of, with_article
from nanomolmo2.processor import Message, Point, load_image
from nanomolmo2.processor.chat import read_messages
from nanomolmo2.processor.nouns import plural, singular
from nanomolmo2.processor.points import Size

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM

MARK = "\ufffc"  # stands for a point in a text: "object replacement character"
_ONE = rf"(?:(?:this|that|these|those|here|it)\s+(?:one\s+)?)?{MARK}"
_SOME = rf"{_ONE}(?:(?:\s*,\s*|\s+and\s+|\s*,\s*and\s+){_ONE})*"
_NAME = r"(?:(?:called|named)\s+)?(?:an?|the)\s+(?P<name>[^\s,;:.!?]+(?:\s[^\s,;:.!?]+){0,3})"
_NAMES = [
    re.compile(rf"^(?:look\s*,\s*|and\s+)?{text}\s*[.!]?$", re.IGNORECASE)
    for text in (
        rf"{_SOME}\s+is\s+{_NAME}",
        rf"(?:this|that|it|here)\s+is\s+{_NAME}\s*:\s*{_SOME}",
        rf"(?:we|i)\s+call\s+{_SOME}\s+{_NAME}",
        rf"(?:the thing|what you see)\s+at\s+{_SOME}\s+is\s+{_NAME}",
    )
]
_NAMES_OF_MANY = re.compile(
    rf"^(?:look\s*,\s*|and\s+)?(?:{_SOME}\s+are|(?:we|i)\s+call\s+{_SOME})\s+(?:called\s+|named\s+)?"
    rf"(?P<name>[^\s,;:.!?]+(?:\s[^\s,;:.!?]+){{0,3}})\s*[.!]?$",
    re.IGNORECASE,
)
_NOT_IN_NAMES = ("not", "no", "and", "or", "too", "also", "this", "that", "these", "those", "it")
_CLAUSE = re.compile(
    r"(?<=[.!?;])\s+|(?:\s*,\s*(?:and\s+)?|\s+and\s+)(?=(?:this|that|these|those)\s+(?:one\s+)?"
    + MARK
    + ")"
    r"|\s*,\s*(?:and\s+)?(?=how many|where|point|count|find|show)",
    re.IGNORECASE,
)
_LIKE = (
    r"(?:(?:thing|one)s?\s+)?(?:(?:that\s+)?looks?\s+)?(?:like|similar\s+to|such\s+as|"
    r"(?:of\s+)?the\s+same(?:\s+(?:kind|sort|type|thing))?\s+as)"
)
_LISTED = rf"{_ONE}(?:(?:\s*,\s*|\s+(?:and|or)\s+|\s*,\s*(?:and|or)\s+)(?:{_LIKE}\s+)?{_ONE})*"
_SEARCH = re.compile(
    rf"(?P<before>.*?)\b{_LIKE}\s+(?P<like>{_LISTED})(?P<after>.*)", re.I | re.DOTALL
)
_BUT = re.compile(
    rf"\s*,?\s*(?:(?:but|and)\s+)?(?:not|nothing|none|no|never|except|excluding|without|unlike|other\s+than|"
    rf"ignor(?:e|ing)|leav(?:e|ing)\s+out|rather\s+than|instead\s+of|do(?:n't|\s+not)\s+(?:include|count)|exclude)"
    rf"\s+(?:(?:any|all|every)?thing\s+|those\s+|anything\s+)?(?:{_LIKE}\s+)?{_LISTED}",
    re.IGNORECASE,
)
_SAME = re.compile(
    rf"^(?:is|are|do|does)\s+{_ONE}\s+(?:and\s+{_ONE}\s+)?(?:look\s+)?(?:of\s+)?"
    rf"(?:like|alike|similar(?:\s+to)?|the\s+same(?:\s+(?:kind|sort|type|thing))?(?:\s+as)?)\s*(?:{_ONE})?\s*\?*$",
    re.IGNORECASE,
)
_KIND = re.compile(
    r"\b(?:of\s+)?(?:the\s+)?(?:same\s+)?(?:kind|sort|type)s?\b|\bmore\b", re.IGNORECASE
)
_NUMBERED = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINALS = {name: number for number, name in enumerate(_NUMBERED, start=1)}
_ORDINALS |= {"1st": 1, "2nd": 2, "3rd": 3, "other": 0, "last": -1}
_CARDINALS = {name: i for i, name in enumerate(["one", "two", "three", "four", "five", "six"], 1)}
_PICTURE = re.compile(
    rf"\b(?:in|of|on|from)\s+(?:the\s+)?(?:(?P<ordinal>{'|'.join(_ORDINALS)}|\d+th)\s+"
    r"(?:picture|image|photo|one)"
    rf"|(?:picture|image|photo)\s+(?:number\s+)?#?(?P<number>\d{{1,3}}|{'|'.join(_CARDINALS)}))\b",
    re.IGNORECASE,
)
NOT_READ = (
    "the question has points, and this model reads those that show what is meant, as in: Point to "
    "everything like <point>. Its language model does not see them"
)
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
    if not _has_points(question.question) or question.video is not None:
        return None
    context = vlm.model.config.llm_config.max_position_embeddings
    conversation = read_question(question, context, allow_remote=vlm.allow_remote)
    turns = read_messages(conversation.messages)
    images, video = conversation.shown()
    if video is not None or not images or turns[-1].role != "user":
        return None  # the language model's way says what is wrong
    told = [told_in(message) for message in conversation.messages if _is_users(message)]
    pictures = [load_image(image) for image in images]
    _check_places(told, pictures)
    names, asked = read_names(told)
    if not asked.text:
        return _understood(vlm, pictures, list(names.values()))
    wish = read_wish(asked, names, len(pictures))
    if wish is None:
        if asked.points or _words(names).mentioned(asked.text)[0]:
            warnings.warn(NOT_READ, stacklevel=4)
        return None
    return replace(_granted(vlm, pictures, wish), show=partial(Shown, pictures))


def _has_points(question: Any) -> bool:
    parts = [
        part
        for message in (question if isinstance(question, (list, tuple)) else ())
        if _is_users(message) and isinstance(message.get("content"), (list, tuple))
        for part in message["content"]
    ]
    return any(isinstance(part, Mapping) and part.get("type") == "point" for part in parts)


def _check_places(told: Sequence[Told], pictures: Sequence[Image.Image]) -> None:
    """Raises: ValueError for a place in a picture that is not shown, or outside of its picture."""
    for point in (point for turn in told for point in turn.points):
        place, number = f"({point.x:g}, {point.y:g})", len(pictures)
        if not 1 <= point.image <= number:
            shown = "1 is shown" if number == 1 else f"{number} are shown"
            raise ValueError(
                f"the place {place} is in picture {point.image}, but {shown}: they count from 1"
            )
        width, height = pictures[point.image - 1].size
        if not (0 <= point.x <= width and 0 <= point.y <= height):
            raise ValueError(
                f"the place {place} lies outside of the picture, which is {width} x {height} "
                f"pixels: give pixels from its top-left corner"
            )


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
    """Its clauses, each with its own points."""
    found, left = [], list(turn.points)
    text = re.sub(rf"{MARK}\s+([.,;:!?])", rf"{MARK}\1", turn.text)
    for clause in filter(None, map(str.strip, _CLAUSE.split(text))):
        number = clause.count(MARK)
        found.append(Told(clause.rstrip(";,"), left[:number]))
        del left[:number]
    return found


def named_in(sentence: Told) -> Meant | None:
    """What a sentence gives a name to: ``This <point> is a walnut.``"""
    for pattern in _NAMES:
        if found := pattern.match(sentence.text):
            name = _name(found["name"])
            return None if name is None else Meant(Word(name, plural(name)), sentence.points, [])
    found = _NAMES_OF_MANY.match(sentence.text)
    many = None if found is None else _name(found["name"])
    if many is None or plural(one := singular(many)) != many:
        return None
    return Meant(Word(one, many), sentence.points, [])


def _name(text: str) -> str | None:
    """A name; None for what is none."""
    if set(_NOT_IN_NAMES) & set(key_of(text).split()) or key_of(text) in TASK_WORDS:
        return None
    try:
        return checked_name(text)
    except ValueError:
        return None


def read_names(told: Sequence[Told]) -> tuple[dict[str, Meant], Told]:
    """What was given names, and what of the last turn is the question; maybe nothing."""
    names: dict[str, Meant] = {}
    asked: list[Told] = []
    for turn in told:
        asked = []  # what was asked before was answered before
        for sentence in sentences(turn):
            if (meant := named_in(sentence)) is None:
                asked.append(sentence)
                continue
            key = key_of(meant.name.name)
            before = names.get(key, meant._replace(like=[]))
            names[key] = before._replace(like=[*before.like, *meant.like])
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
    thing = Word(LABEL, f"{LABEL}s")
    if _SAME.match(asked.text) and len(asked.points) == 2:
        first, second = asked.points
        return Wish("presence", [Meant(thing, [first], [])], second.image, same=second)
    text = _PICTURE.sub("", asked.text)
    if not asked.points:
        words = _words(names)
        about, task = words.mentioned(text)[0], task_of(words.rest(text))
        if not about or task is None:
            return None
        wanted = [_with_others(names[key_of(word.name)], names) for word in about]
        examples = [point for meant in wanted for point in meant.like]
        return Wish(task, wanted, _picture(asked.text, images, examples))
    if (found := _SEARCH.match(text)) is None:
        return None
    rest = f"{found['before']} things {_BUT.sub('', found['after'], count=1)}"
    words = Words({LABEL: thing, "everything": Word("everything", "all")}, {})
    task = task_of(_KIND.sub(" ", words.rest(rest)))
    if task is None or MARK in rest:
        return None
    number = found["like"].count(MARK)
    like, unlike = asked.points[:number], asked.points[number:]
    return Wish(task, [Meant(thing, like, unlike)], _picture(asked.text, images, like))


def _words(names: Mapping[str, Meant]) -> Words:
    return Words({meant.name.name: meant.name for meant in names.values()}, {})


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


def _picture(text: str, number: int, examples: Sequence[Point]) -> int:
    """Which picture is asked about: the one that is named, else the last that is shown."""
    if number == 1:
        return 1
    if (found := _PICTURE.search(text)) is None:
        return number
    if text_of := found["number"]:
        chosen = _CARDINALS.get(text_of.lower()) or int(text_of)
    else:
        ordinal = found["ordinal"].lower()
        chosen = _ORDINALS[ordinal] if ordinal in _ORDINALS else int(ordinal[:-2])
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
    others = sorted({point.image for point in meant.like} - {number})
    alone = {point.image for point in meant.unlike} - {number, *others}
    if alone and others:
        raise ValueError(
            f"a counter-example lies in picture {min(alone)}, where no example is: give both in "
            f"the same picture"
        )
    others = others or sorted(alone)
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
