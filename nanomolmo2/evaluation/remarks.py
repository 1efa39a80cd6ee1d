"""What the data of an evaluation may say and hardly mean, a sentence for each kind of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from nanomolmo2.evaluation.measures import SCORERS, Thing, track_things
from nanomolmo2.evaluation.questions import Question, Questions
from nanomolmo2.evaluation.regions import Runs


def remarks(questions: Questions) -> list[str]:
    """Sentences on fields that are not read, places that no picture has, and repeated questions."""
    said = []
    if questions.unread:
        named = ", ".join(f"{name} ({n})" for name, n in questions.unread.most_common())
        said.append(f"fields that are not read, of {_records(questions.records)}: {named}")
    return said + _on_places(questions.asked) + _on_repeated(questions.asked)


def _records(number: int) -> str:
    return "1 record" if number == 1 else f"{number} records"


def _on_places(asked: Sequence[Question]) -> list[str]:
    """Boxes in another unit than pixels, or of a picture of another size."""
    placed, outside, in_corner = 0, 0, 0
    first: Question | None = None
    for question in asked:
        if SCORERS[question.scorer].kind not in ("point", "track"):
            continue
        things = track_things(question.truth, question.shown)
        placed += bool(things)
        if any(not _fits(thing, question) for thing in things):
            outside += 1
            first = first or question
        in_corner += bool(things) and all(_reach(thing) <= 1 for thing in things)
    said = []
    if first is not None:
        said.append(
            f"{outside} of {placed} questions have true places outside of their picture, or masks "
            f"of another size; the first: {first.where}: are the pictures of the size that was "
            f"labelled?"
        )
    if placed and in_corner == placed:
        said.append(
            "all true places lie within the first pixel of their pictures: if boxes and points "
            "have another unit, say so (points_scale, as in --points-scale unit)"
        )
    return said


def _corners(thing: Thing) -> list[tuple[float, float]]:
    return [corner for ring in thing.region.outline for corner in ring]


def _reach(thing: Thing) -> float:
    """How far from the top-left corner of the picture it goes, in pixels along a side."""
    return max((value for corner in _corners(thing) for value in corner), default=0)


def _fits(thing: Thing, question: Question) -> bool:
    """Whether some of it lies in the picture, and a mask has its size."""
    shown, corners = question.shown, _corners(thing)
    size = shown.video_size if thing.time is not None else None
    if size is None:
        if not 1 <= thing.image <= len(shown.image_sizes):
            return False
        size = shown.image_sizes[thing.image - 1]
    if isinstance(thing.region, Runs):
        return (thing.region.width, thing.region.height) == size
    return all(
        min(values) <= side and max(values) >= 0
        for values, side in zip(zip(*corners, strict=True), size, strict=True)
    )


def _on_repeated(asked: Sequence[Question]) -> list[str]:
    """The same question about the same picture counts as often as it is there."""
    times = Counter((one.picture, one.task, json.dumps(one.messages, default=str)) for one in asked)
    again = times.total() - len(times)
    if not again:
        return []
    number = "1 question is" if again == 1 else f"{again} questions are"
    return [
        f"{number} asked more than once about the same picture, and counted each time: are "
        f"records twice in the data?"
    ]
