"""Scorers by name: what one answer is worth, 0 to 1, by what is known about the right one.

    points      boxes, masks, or points and a radius      F1 of a one-to-one matching
    count       count                                     exact; also within one, absolute error
    exact       answers, or answer                        the same words
    vqa         answers                                   VQA accuracy
    anls        answers                                   Levenshtein similarity of DocVQA
    relaxed     answers                                   numbers within 5 %, as ChartQA has it
    choice      choices and answer                        the letter or the text of an option
    categories  categories                                F1 of the names that a caption holds
    tracks      tracks or frames                          F1 of points over time

Those of single public benchmarks stand in `public.scorers`: click, in_mask, point_count, option,
mmmu.

Truth is plain JSON. Positions are pixels of the original image or video, times seconds.
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanomolmo2.data.record import short
from nanomolmo2.evaluation.answers import (
    LETTERS,
    anls,
    chosen_option,
    exact_match,
    multiple_choice,
    relaxed_accuracy,
    short_answer,
    vqa_accuracy,
)
from nanomolmo2.evaluation.regions import (
    Disc,
    Region,
    largest_matching,
    read_box,
    read_mask,
)
from nanomolmo2.evaluation.scorers import NEAR_SECONDS, Shown, Truth, f1
from nanomolmo2.processor.points import Point, Size, parse_count
from nanomolmo2.registry import Registry

DEFAULT_RADIUS = 0.05  # of the diagonal, around points of which nothing else is known


@dataclass(frozen=True)
class Thing:
    """Something that a point should lie in."""

    region: Region
    image: int = 1
    time: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        is_time = isinstance(self.time, (int, float)) and math.isfinite(self.time)
        is_image = isinstance(self.image, int) and self.image >= 1
        if not is_image or not (self.time is None or is_time):
            raise ValueError(
                f"found a thing in picture {short(self.image)} at {short(self.time)} s, expected "
                f"a number from 1, and seconds or nothing"
            )
        if not isinstance(self.label, str | None):
            raise ValueError(f"found the label {short(self.label)}, expected text")

    def holds(self, point: Point) -> bool:
        """Whether a point is of the same image, or near in time, and inside."""
        if self.time is None:
            if point.time is not None or point.image != self.image:
                return False
        elif point.time is None or abs(point.time - self.time) > NEAR_SECONDS:
            return False
        return self.region.holds(point.x, point.y)


@dataclass(frozen=True)
class Measure:
    """How answers of a kind are scored.

    Attributes:
        title: what the number of a row of the table is.
        kind: of question, which names the row of questions without a task.
        score: of an answer, see `Scorer`.
        check: raises ValueError for a truth that does not fit.
        is_readable: whether an answer says anything that can be scored.
        nothing: the answer that there is nothing; None where that makes no sense.
        max_new_tokens: where an answer is cut off.
        counted: the number that an answer gives, for scorers of counts.
    """

    name: str
    title: str
    kind: str
    score: Callable[[Truth, str, Shown], float]
    check: Callable[[Truth, Shown], object]
    is_readable: Callable[[Truth, str, Shown], bool]
    nothing: str | None = None
    max_new_tokens: int = 64
    counted: Callable[[str, Shown], int | None] | None = None

    def __call__(self, truth: Truth, answer: str, shown: Shown) -> float:
        return self.score(truth, answer.strip(), shown)


# ---- points ----


def things_of(truth: Truth, shown: Shown) -> list[Thing]:
    """Where points should lie: in ``masks``, else ``boxes``, else within ``radius`` pixels (by
    default `DEFAULT_RADIUS`) of ``points``.

    Raises: ValueError for a truth without them, or with something else in their place.
    """
    if "groups" in truth:
        return [
            Thing(read_box(box), label=group.get("label", group.get("noun")))
            for group in _list(truth, "groups")
            for box in _list(group, "boxes")
        ]
    if truth.get("masks") is not None:
        return [_thing(value, "mask", read_mask, truth) for value in _list(truth, "masks")]
    if truth.get("boxes") is not None:
        boxes = [box for box in _list(truth, "boxes") if box is not None]
        return [_thing(value, "box", read_box, truth) for value in boxes]
    if truth.get("points") is not None:
        return [_disc(value, truth, shown) for value in _list(truth, "points")]
    raise ValueError("expected boxes, masks or points in the truth")


def _thing(value: Any, name: str, read: Callable[[Any], Region], truth: Truth) -> Thing:
    """Of a box or mask alone, or in an object with its image, time and label."""
    if isinstance(value, Mapping) and name in value:
        time = value.get("time", truth.get("time"))
        return Thing(read(value[name]), value.get("image", 1), time, value.get("label"))
    return Thing(read(value), truth.get("image", 1), truth.get("time"))


def _disc(value: Any, truth: Truth, shown: Shown) -> Thing:
    radius = truth.get("radius")
    x: Any
    y: Any
    if isinstance(value, Mapping):
        x, y, image = value.get("x"), value.get("y"), value.get("image", 1)
        time, label = value.get("time", truth.get("time")), value.get("label")
    else:
        is_place = isinstance(value, Sequence) and len(value) in (2, 3)
        x, y, image = (*value, 1)[:3] if is_place else (None, None, 1)
        time, label = truth.get("time"), None
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (x, y, image)):
        raise ValueError(f"found the point {short(value)}, expected [x, y] in pixels")
    if radius is None:
        radius = DEFAULT_RADIUS * math.hypot(*_size(shown, image, time))
    if not isinstance(radius, (int, float)) or not 0 <= radius < math.inf:
        raise ValueError(f"found the radius {short(radius)}, expected pixels")
    return Thing(Disc(float(x), float(y), radius), image, time, label)


def _size(shown: Shown, image: int, time: float | None) -> Size:
    if time is not None and shown.video_size is not None:
        return shown.video_size
    if time is None and 1 <= image <= len(shown.image_sizes):
        return shown.image_sizes[image - 1]
    raise ValueError(
        f"a true point lies in {'the video' if time is not None else f'picture {image}'}, which "
        f"the question does not show"
    )


def median_side(things: Sequence[Thing]) -> float | None:
    """Median of the longer sides of the boxes around things, pixels; None without any."""
    sides = []
    for thing in things:
        corners = [corner for ring in thing.region.outline for corner in ring]
        if corners:
            sides.append(max(max(v) - min(v) for v in zip(*corners, strict=True)))
    return statistics.median(sides) if sides else None


def matched(things: Sequence[Thing], points: Sequence[Point]) -> int:
    """How many points lie in a thing of their own.

    Where the things have several labels, a point must have the label of its thing.
    """
    labels = {_label(thing.label) for thing in things}
    return largest_matching(
        [
            [
                number
                for number, thing in enumerate(things)
                if (len(labels) < 2 or _label(point.label) == _label(thing.label))
                and thing.holds(point)
            ]
            for point in points
        ]
    )


def _label(label: str | None) -> str:
    return " ".join(unicodedata.normalize("NFC", (label or "").casefold()).split())


def says_nothing(answer: str, shown: Shown) -> bool:
    """Whether an answer says that there is nothing: ``There are none.``, ``0``, ``No birds``."""
    is_none = re.fullmatch(r"(?:none|nothing|no [\w -]{1,40})[.!]?", answer.strip(), re.IGNORECASE)
    return not shown.points(answer) and (bool(is_none) or parse_count(answer) == 0)


def _score_points(truth: Truth, answer: str, shown: Shown) -> float:
    return _f1_of(things_of(truth, shown), answer, shown)


def _f1_of(things: Sequence[Thing], answer: str, shown: Shown) -> float:
    if not things:
        return float(says_nothing(answer, shown))
    points = shown.points(answer)
    return f1(matched(things, points), len(points), len(things))


def _points_readable(truth: Truth, answer: str, shown: Shown) -> bool:
    return bool(shown.points(answer)) or says_nothing(answer, shown)


# ---- tracks ----


def track_things(truth: Truth, shown: Shown) -> list[Thing]:
    """Boxes of ``frames``, each ``{"time", "boxes"}``; or places of ``tracks``, each ``{"points":
    [{"x", "y", "time"}]}`` or such a list; else as `things_of`."""
    if truth.get("frames") is not None:
        return [
            Thing(read_box(box), time=frame.get("time", math.nan))
            for frame in _list(truth, "frames")
            for box in _list(frame, "boxes")
            if box is not None
        ]
    if truth.get("tracks") is not None:
        tracks = [t if isinstance(t, Mapping) else {"points": t} for t in _list(truth, "tracks")]
        places = [place for track in tracks for place in _list(track, "points")]
        return things_of({**truth, "points": places}, shown)
    return things_of(truth, shown)


def _score_tracks(truth: Truth, answer: str, shown: Shown) -> float:
    return _f1_of(track_things(truth, shown), answer, shown)


# ---- numbers and text ----


def count_of(truth: Truth) -> int:
    """Raises: ValueError for a truth without a count."""
    value = truth.get("count")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value) >= 0:
        return int(value)
    raise ValueError(f"found the count {short(value)}, expected a whole number")


def references_of(truth: Truth) -> list[str]:
    """The right answers: ``answers``, or ``answer``; each alone, or as VQA v2 has them in an
    object: ``{"answer": text, ...}``.

    Raises: ValueError where there is none.
    """
    given = truth.get("answers")
    values = given if given is not None else truth.get("answer")
    if values is None:
        raise ValueError("nothing tells the right answer, expected 'answers', or 'answer'")
    values = values if isinstance(values, list) else [values]
    values = [value.get("answer") if isinstance(value, Mapping) else value for value in values]
    texts = [
        str(value)
        for value in values
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
    ]
    if not texts or len(texts) < len(values):
        raise ValueError(f"found the answers {short(values)}, expected a list of texts")
    return texts


def options_of(truth: Truth) -> tuple[str, list[str]]:
    """(letter of the right option, options).

    Raises: ValueError where there is none, or the answer is none of them.
    """
    options = truth.get("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"found the choices {short(options)}, expected a list of 2 to 26 texts")
    options = [str(option) for option in options]
    (answer,) = references_of({"answer": truth.get("answer")})
    letter = chosen_option(answer, options)
    if letter is None:
        raise ValueError(
            f"the answer {short(answer)} is none of the choices {short(options)}: expected a "
            f"letter or one of the texts"
        )
    return letter, options


def _score_choice(truth: Truth, answer: str, shown: Shown) -> float:
    return multiple_choice(answer, *options_of(truth))


# ---- captions ----


def categories_of(truth: Truth) -> list[str]:
    """Names of what a caption should hold: ``categories``, or the keys of ``counts``."""
    names = truth.get("categories")
    if names is None and isinstance(truth.get("counts"), Mapping):
        names = list(truth["counts"])
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(f"found the categories {short(names)}, expected a list of names")
    return list(dict.fromkeys(_label(name) for name in names))


def named_in(answer: str, names: Sequence[str]) -> set[str]:
    """Those of the names that a text holds as words, in singular or plural.

    Longer names first: a ``hot dog`` is not a ``dog`` too.
    """
    found, text = set[str](), _label(answer)
    for name in sorted(names, key=len, reverse=True):
        forms = "|".join(re.escape(form) for form in sorted(_forms(name), key=len, reverse=True))
        text, times = re.subn(rf"(?<!\w)(?:{forms})(?!\w)", " | ", text)
        if times:
            found.add(name)
    return found


def _forms(name: str) -> set[str]:
    """A name, and its regular plural or singular."""
    forms = {name, f"{name}s", f"{name}es"}
    if name.endswith("y"):
        forms.add(f"{name[:-1]}ies")
    if name.endswith("ies"):
        forms.add(f"{name[:-3]}y")
    if name.endswith("es") and len(name) > 3:
        forms.add(name[:-2])
    if name.endswith("s") and len(name) > 2:
        forms.add(name[:-1])
    return forms


def _score_categories(truth: Truth, answer: str, shown: Shown) -> float:
    names = categories_of(truth)
    if not names:
        return float(says_nothing(answer, shown))
    known = truth.get("vocabulary") or ()
    named = named_in(answer, list(dict.fromkeys([*names, *known])))
    return f1(len(named & set(names)), len(named), len(names))


# ---- by name ----


def _said(truth: Truth, answer: str, shown: Shown) -> bool:
    return bool(answer.strip())


_TextScore = Callable[[str, Sequence[str]], float]


def _text(name: str, title: str, score: _TextScore) -> Measure:
    return Measure(
        name,
        title,
        "text",
        lambda truth, answer, shown: score(answer, references_of(truth)),
        lambda truth, shown: references_of(truth),
        _said,
    )


def _of_short_answer(score: _TextScore) -> _TextScore:
    return lambda answer, references: score(short_answer(answer), references)


def _list(truth: Truth, name: str) -> list[Any]:
    value = truth.get(name) if isinstance(truth, Mapping) else None
    if not isinstance(value, list):
        raise ValueError(f"found {name} {short(value)}, expected a list")
    return value


_GENERAL = {
    measure.name: measure
    for measure in (
        Measure(
            "points",
            "F1 of points",
            "point",
            _score_points,
            things_of,
            _points_readable,
            "There are none.",
            256,
        ),
        Measure(
            "count",
            "exact count",
            "count",
            lambda truth, answer, shown: float(parse_count(answer) == count_of(truth)),
            lambda truth, shown: count_of(truth),
            lambda truth, answer, shown: parse_count(answer) is not None,
            "There are none.",
            256,
            lambda answer, shown: parse_count(answer),
        ),
        _text("exact", "same words", exact_match),
        _text("vqa", "VQA accuracy", _of_short_answer(vqa_accuracy)),
        _text("anls", "ANLS", _of_short_answer(anls)),
        _text("relaxed", "relaxed accuracy", _of_short_answer(relaxed_accuracy)),
        Measure(
            "choice",
            "right choice",
            "choice",
            _score_choice,
            lambda truth, shown: options_of(truth),
            lambda truth, answer, shown: chosen_option(answer, options_of(truth)[1]) is not None,
        ),
        Measure(
            "categories",
            "F1 of categories",
            "caption",
            _score_categories,
            lambda truth, shown: categories_of(truth),
            _said,
            None,
            384,
        ),
        Measure(
            "tracks",
            "F1 of tracks",
            "track",
            _score_tracks,
            track_things,
            _points_readable,
            "No tracks available.",
            1024,
        ),
    )
}
_PUBLIC = {
    name: f"nanomolmo2.evaluation.public.scorers:{name.upper()}"
    for name in ("click", "in_mask", "point_count", "option", "mmmu")
}
SCORERS: Registry[Measure] = Registry(**_GENERAL, **_PUBLIC)
