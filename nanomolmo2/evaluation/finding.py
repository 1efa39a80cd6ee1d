"""How well a model finds by example: cases, a click each, and what the answers are worth.

    cases: FindCase, ...  ->  outcomes(vlm, cases)  ->  summarize  ->  FindRow, a line of the table

What is measured is what people call: `VLM.find`. Where the cases come from is not told here: fixed
sets are in `things.find_sets`, people's own data in `own_cases`.
"""

from __future__ import annotations

import hashlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nanomolmo2.data.example import Branch, Example, Source
from nanomolmo2.evaluation.breakdown import Tally, by_count, by_size, figures
from nanomolmo2.evaluation.exam import Failure
from nanomolmo2.evaluation.measures import Thing, matched, median_side, things_of
from nanomolmo2.evaluation.questions import Question
from nanomolmo2.generation.find import Examples, read_examples
from nanomolmo2.generation.pipeline import Answer, Pipeline
from nanomolmo2.processor import Message
from nanomolmo2.processor.points import Point, Size, format_points

Place = tuple[float, float]  # x, y in pixels
OnProgress = Callable[[int, int], None]

WRITTEN_TOKENS = 8  # of a point that is written, at most, and of the words around the points
MOST_BEYOND = 2  # times as many points as there are: no more are waited for


@dataclass(frozen=True, eq=False)
class FindCase:
    """A picture, what is shown as an example, and where the things like it are.

    Attributes:
        name: for people, such as ``"few 12"``.
        image: anything that `VLM.find` takes.
        things: in ``image``, all that are like the examples; an example in it is one of them.
        like, unlike: examples, pixels of ``reference`` if there is one, else of ``image``.
        picture: the same for cases about the same picture.
    """

    name: str
    image: Any
    things: tuple[Thing, ...]
    like: tuple[Place, ...]
    unlike: tuple[Place, ...] = ()
    reference: Any = None
    picture: int = 0

    @property
    def px(self) -> float | None:
        """Median of the things' longer sides, pixels; None without things."""
        return median_side(self.things)


class Cases(Protocol):
    """Cases that are drawn or read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> FindCase: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a case; without its pictures.

    Attributes:
        number: of the case among its `Cases`.
        points: of the answer, in pixels; ``size``: of the picture that was asked about.
        seconds: from the call to the answer.
    """

    number: int
    name: str
    tally: Tally
    points: tuple[Point, ...]
    size: Size
    seconds: float

    @property
    def score(self) -> float:
        return self.tally.f1 or 0.0


# ---- asking ----

Ask = Callable[[Pipeline, FindCase], Answer]


def click(
    vlm: Pipeline, case: FindCase, max_crops: int | None = None, min_confidence: float = 0.5
) -> Answer:
    """What `VLM.find` says; its warnings, which speak to a person, are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vlm.find(
            case.image,
            case.like,
            case.unlike,
            reference=case.reference,
            max_crops=max_crops,
            min_confidence=min_confidence,
        )


def written(vlm: Pipeline, case: FindCase) -> Answer:
    """What the model writes, token by token, where it is asked the same in words."""
    images = [case.image] if case.reference is None else [case.reference, case.image]
    question = question_of(
        read_examples(case.like, case.unlike), in_second=case.reference is not None
    )
    room = WRITTEN_TOKENS * (MOST_BEYOND * max(len(case.things), 1) + 2)
    return vlm.stream(images, question, max_new_tokens=room, cut_at_context=True).answer()


def question_of(examples: Examples, *, in_second: bool = False) -> list[Message]:
    """The question as people write it and training had it, its points as parts:

        Point to everything like <point>, <point> and <point>, not like <point>.

    Args:
        in_second: the examples lie in the first of two pictures, and the second is asked about.
    """
    place = "in the second picture" if in_second else ""
    parts = [_text("Point to everything like"), *_listed(examples.like)]
    if examples.unlike:
        parts += [_text(f"{place}, not like"), *_listed(examples.unlike)]
        place = ""
    parts.append(_text(f"{place}."))
    return [{"role": "user", "content": parts}]


def _listed(points: Sequence[Point]) -> list[Any]:
    """As in a sentence: a, b and c. The chat's format has spaces between parts."""
    parts: list[Any] = []
    for i, point in enumerate(points):
        if i:
            parts.append(_text("and" if i == len(points) - 1 else ","))
        parts.append({"type": "point", "x": point.x, "y": point.y, "image": point.image})
    return parts


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def outcomes(
    vlm: Pipeline,
    cases: Cases,
    ask: Ask = click,
    on_progress: OnProgress | None = None,
    *,
    start: int = 0,
) -> Iterator[Outcome]:
    """One for each case from number ``start`` on, in order.

    Nothing that an earlier case computed is used for a later one, so that seconds are a click's.
    """
    for number in range(start, len(cases)):
        case = cases[number]
        vlm.prefix_cache.clear()
        asked_at = time.perf_counter()
        answer = ask(vlm, case)
        seconds = time.perf_counter() - asked_at
        shown = 1 if case.reference is None else 2
        points = tuple(replace(p, image=1) for p in answer.points if p.image == shown)
        tally = Tally(
            picture=case.picture,
            true=len(case.things),
            said=len(points),
            points=len(points),
            hits=matched([replace(t, label=None) for t in case.things], points),
            px=case.px,
        )
        yield Outcome(number, case.name, tally, points, answer.image_sizes[-1], seconds)
        if on_progress is not None:
            on_progress(number + 1, len(cases))


# ---- summing up ----


@dataclass(frozen=True)
class FindRow:
    """A line of the table.

    Attributes:
        name: of the set, and of how it was asked if not as always.
        goals: by name of a figure; errors are to be at most so large, all others at least.
        figures: see `breakdown.figures`; also ``pictures`` and ``seconds`` (median of a click).
        by_count, by_size: figures of parts of the answers.
        worst: the worst answers, the worst first.
    """

    name: str
    title: str
    figures: dict[str, Any]
    by_count: dict[str, dict[str, Any]]
    by_size: dict[str, dict[str, Any]]
    goals: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[Outcome, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the answers, as plain JSON types."""
        return {
            "title": self.title,
            **self.figures,
            "goals": dict(self.goals),
            "by_count": self.by_count,
            "by_size": self.by_size,
        }

    @classmethod
    def from_dict(cls, name: str, content: Mapping[str, Any]) -> FindRow:
        """What `to_dict` made, without the answers."""
        parts = {"title", "goals", "by_count", "by_size"}
        return cls(
            name=name,
            title=content["title"],
            figures={key: value for key, value in content.items() if key not in parts},
            by_count=content["by_count"],
            by_size=content["by_size"],
            goals=content["goals"],
        )


def _rounded(value: Any) -> Any:
    """Numbers with five digits, so that a table made of a file is the one that was printed."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def summarize(
    name: str,
    title: str,
    found: Sequence[Outcome],
    goals: Mapping[str, float] | None = None,
    worst: int = 12,
) -> FindRow:
    """A line of the table, of at least one outcome."""
    tallies = [outcome.tally for outcome in found]
    bad = sorted((o for o in found if o.score < 1), key=lambda o: (o.score, -(o.tally.error or 0)))
    whole = {
        "pictures": len({tally.picture for tally in tallies}),
        **figures(tallies),
        "seconds": statistics.median(outcome.seconds for outcome in found),
    }
    return FindRow(
        name,
        title,
        _rounded(whole),
        _rounded(by_count(tallies)),
        _rounded(by_size(tallies)),
        goals or {},
        tuple(bad[:worst]),
    )


def failure(outcome: Outcome, case: FindCase) -> Failure:
    """An answer for a page of the worst: where the things are, and what was pointed at."""
    masks = [list(map(list, ring)) for t in case.things for ring in t.region.outline]
    said = format_points(outcome.points, "thing", [outcome.size], mode="point_count")
    question = f"Point to everything like {_places(case.like)}"
    question += f", not like {_places(case.unlike)}" if case.unlike else ""
    question += " of another picture" if case.reference is not None else ""
    truth = {"masks": masks, "answer": f"{len(case.things)} things"}
    branch = Branch([{"role": "user", "content": f"{question}."}], "find", truth)
    return Failure(outcome.name, Example([case.image], [branch]), branch, said, outcome.score)


def _places(places: Sequence[Place]) -> str:
    return " and ".join(f"({x:.0f}, {y:.0f})" for x, y in places)


# ---- people's own data ----


class OwnCases:
    """A case for each record of some sources that says where the things are.

    The example is what the record says, ``like``; where it says nothing, the middle of its first
    thing: any labelled data can be asked about, a click each.
    """

    def __init__(self, sources: Sequence[Source], asked: Sequence[Question]) -> None:
        """
        Args: asked: of `find_questions`; those whose truth has no places are left out, and of
            several about one picture with the same places all but the first.
        Raises: ValueError where nothing is left.
        """
        self.sources = sources
        self.asked: list[tuple[Question, list[Thing]]] = []
        seen = set()
        for question in asked:
            things = things_in(question)
            shown = len(question.shown.image_sizes)
            key = (question.picture, repr(things), repr(question.truth.get("like")))
            if (shown == 1 and things) or (shown == 2 and question.truth.get("like")):
                if key not in seen:
                    self.asked.append((question, things))
                seen.add(key)
        if not self.asked:
            names = ", ".join(source.name for source in sources)
            raise ValueError(
                f"{names}: no record says where the things of a picture are: give each 'boxes', "
                f"'masks' or 'points', and 'like' with the examples that are shown"
            )
        self.left_out = sum(not _has_places(question) for question in asked)
        numbers = dict.fromkeys(question.picture for question, _ in self.asked)
        self.pictures = {picture: number for number, picture in enumerate(numbers)}

    @property
    def digest(self) -> str:
        """The same for the same pictures, examples and things."""
        asked = [(q.picture, q.truth.get("like"), q.truth.get("unlike")) for q, _ in self.asked]
        things = [repr(things) for _, things in self.asked]
        return hashlib.blake2b(repr((asked, things)).encode(), digest_size=12).hexdigest()

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, number: int) -> FindCase:
        question, things = self.asked[number]
        images = self.sources[question.source][question.record].images
        like = question.truth.get("like") or [inside_of(things[0])]
        return FindCase(
            name=question.where,
            image=images[-1],
            things=tuple(replace(thing, image=1) for thing in things),
            like=tuple((float(x), float(y)) for x, y in like),
            unlike=tuple((float(x), float(y)) for x, y in question.truth.get("unlike", ())),
            reference=images[0] if len(images) == 2 else None,
            picture=self.pictures[question.picture],
        )


def things_in(question: Question) -> list[Thing]:
    """Where the things are that a question asks for, in the last of its pictures; empty where it
    does not say."""
    truth = dict(question.truth)
    if not _has_places(question):
        return []
    last = len(question.shown.image_sizes)
    if "like" in truth and truth.get("image") is None:
        truth["image"] = last
    things = things_of(truth, question.shown)
    return [replace(t, label=None) for t in things if t.image == last and t.region.outline]


def _has_places(question: Question) -> bool:
    return any(question.truth.get(name) is not None for name in ("masks", "boxes", "points"))


def inside_of(thing: Thing) -> Place:
    """The middle of a thing's outline, or, if that is beside it, the first corner."""
    ring = thing.region.outline[0]
    x, y = ((min(values) + max(values)) / 2 for values in zip(*ring, strict=True))
    return (x, y) if thing.region.holds(x, y) else ring[0]
