"""What is known of a picture -> a record: questions, answers, and the truth to score answers by.

    point      Point to the stop sign.            points; truth: points, boxes, masks
    count      How many stop signs are there?     points and their number; truth: count
    presence   Is there a stop sign?              Yes.; truth: answers
    class      What does this picture show?       truth: answers
    caption    Caption this picture.              truth: answers, categories
    question   as it is given                     truth: answers

Things that are not there are asked for too, or a model learns that there is always something.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nanomolmo2.data.labels.labelled import Labelled, Thing
from nanomolmo2.data.layouts import COUNT_QUESTIONS, POINT_QUESTIONS
from nanomolmo2.processor.nouns import plural
from nanomolmo2.processor.points import NOTHING_THERE

Ask = Literal["point", "count", "presence", "class", "caption", "question"]
DEFAULT_ASK: tuple[Ask, ...] = ("point", "count", "class", "caption", "question")

# Of captions of a picture each gets another one.
CAPTION_QUESTIONS = (
    "Caption this picture.",
    "Describe this picture in one sentence.",
    "What does this picture show?",
    "Write a caption for this picture.",
    "What can be seen in this picture?",
)


@dataclass(frozen=True)
class Asking:
    """What is asked of each picture.

    Attributes:
        negatives: labels that a picture has nothing of, of which so many are drawn and asked for.
        most: with more things of a label than this it is not asked about in that picture.
    """

    ask: tuple[Ask, ...] = DEFAULT_ASK
    negatives: int = 1
    most: int | None = None
    seed: int = 0


def make_branches(
    labelled: Labelled, labels: Sequence[str], asking: Asking, number: int
) -> list[dict[str, Any]]:
    """Branches of our own layout about a picture, see docs/data.md.

    Args:
        labels: all that occur in the data, in order.
        number: of the picture; with the seed it decides what is drawn.
    """
    things: dict[str, list[Thing]] = {}
    for thing in labelled.things:
        things.setdefault(thing.label, []).append(thing)
    too_many = {
        label for label, found in things.items() if len(found) > (asking.most or len(found))
    }
    for label in sorted(too_many):
        labelled.dropped.note(
            f"more than {asking.most} of a label: not asked about",
            f"{len(things[label])} of {label!r} in {labelled.picture.path}",
            len(things.pop(label)),
        )
    absent = _absent(labelled, labels, {*things, *too_many}, asking, number)
    branches = []
    for label in (*things, *absent):
        found = things.get(label, [])
        if "point" in asking.ask:
            branches.append(_point(label, found))
        if "count" in asking.ask and label not in labelled.partly | labelled.counts.keys():
            branches.append(_count(label, found))
        if "presence" in asking.ask:
            branches.append(_presence(label, bool(found)))
    if "count" in asking.ask:
        branches += [_number(label, count) for label, count in labelled.counts.items()]
    if "class" in asking.ask:
        for question, names in labelled.classes:
            branches.append(
                _told(question, ", ".join(names), "class", {"answers": [", ".join(names)]})
            )
    if "caption" in asking.ask:
        branches += _captions(labelled, list(things))
    if "question" in asking.ask:
        branches += [_told(q, a, "question", {"answers": [a]}) for q, a in labelled.exchanges]
    return branches


def _absent(
    labelled: Labelled, labels: Sequence[str], present: Collection[str], asking: Asking, number: int
) -> list[str]:
    """Labels that are said to be absent, and some that are drawn from all others."""
    said = [label for label in sorted(labelled.none) if label not in present]
    known = {*present, *said, *labelled.partly, *labelled.lost, *labelled.counts}
    others = [label for label in labels if label not in known]
    if labelled.absent is not None:
        others = [label for label in others if label in labelled.absent]
    rng = np.random.default_rng([asking.seed, number])
    drawn = rng.permutation(len(others))[: asking.negatives]
    return [*said, *(others[i] for i in sorted(drawn))]


def _point(label: str, things: Sequence[Thing]) -> dict[str, Any]:
    truth: dict[str, Any] = {"points": [_rounded(thing.point) for thing in things]}
    if things and all(thing.box is not None for thing in things):
        truth["boxes"] = [_rounded(thing.box or ()) for thing in things]
    if things and all(thing.mask is not None for thing in things):
        truth["masks"] = [thing.mask for thing in things]
    return {
        "task": "point",
        "question": POINT_QUESTIONS[0].replace("{}", f"the {label}"),
        "answer": _answer(label, things, "point"),
        "truth": truth,
    }


def _count(label: str, things: Sequence[Thing]) -> dict[str, Any]:
    return {
        "task": "count",
        "question": COUNT_QUESTIONS[0].replace("{}", plural(label)),
        "answer": _answer(label, things, "point_count"),
        "truth": {"count": len(things)},
    }


def _answer(label: str, things: Sequence[Thing], mode: str) -> dict[str, Any]:
    places = [dict(zip("xy", _rounded(thing.point), strict=True)) for thing in things]
    return {"points": places, "label": label, "mode": mode}


def _number(label: str, count: int) -> dict[str, Any]:
    answer = str(count) if count else NOTHING_THERE
    question = COUNT_QUESTIONS[0].replace("{}", plural(label))
    return _told(question, answer, "count", {"count": count})


def _presence(label: str, is_there: bool) -> dict[str, Any]:
    answer = "Yes." if is_there else "No."
    return _told(f"Is there {article(label)}?", answer, "presence", {"answers": [answer]})


def _captions(labelled: Labelled, labels: list[str]) -> list[dict[str, Any]]:
    truth: dict[str, Any] = {"answers": labelled.captions}
    if labels:
        truth["categories"] = labels
    asked = CAPTION_QUESTIONS
    return [
        _told(asked[i % len(asked)], caption, "caption", truth)
        for i, caption in enumerate(labelled.captions)
    ]


def _told(question: str, answer: str, task: str, truth: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": task, "question": question, "answer": answer, "truth": truth}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 2) for value in values]


def article(label: str) -> str:
    """``an apple``; of plurals ``any scissors``."""
    if plural(label) == label:
        return f"any {label}"
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
