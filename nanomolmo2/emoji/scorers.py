"""Scores of single answers about emoji, 0 to 1, by task.

What a task's truth holds is told where its questions are made: questions.py, pairs.py, clips.py.
"""

from __future__ import annotations

from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS
from nanomolmo2.evaluation.scorers import (
    Nouns,
    Scorer,
    Shown,
    Truth,
    count,
    exact,
    group_f1,
    points,
    track,
    video_points,
)
from nanomolmo2.processor.points import NOTHING_THERE

NOTHING = "Nothing."
DECLINED = "I do not know"
NOUNS = Nouns(CATEGORIES, PLURALS)


def score_task(task: str, truth: Truth, answer: str, shown: Shown) -> float:
    """Score of an answer, 0 to 1.

    Raises: ValueError for a task that is not in `SCORERS`.
    """
    if task not in SCORERS:
        raise ValueError(f"no score for the task {task!r}: choose from {', '.join(SCORERS)}")
    return SCORERS[task](truth, answer.strip(), shown)


def _nouns(truth: Truth, answer: str, shown: Shown) -> float:
    if not truth["counts"]:
        return float(answer == NOTHING)
    return NOUNS.f1(answer, truth["counts"])


def _declined(truth: Truth, answer: str, shown: Shown) -> float:
    return float(answer.startswith(DECLINED))


def _labelled_points(truth: Truth, answer: str, shown: Shown) -> float:
    """Points of several nouns; a point with another noun's label misses."""
    if not truth["groups"]:
        return float(answer == NOTHING_THERE)
    by_label: dict[str, list[tuple[float, float]]] = {}
    for p in shown.points(answer):
        label = (p.label or "").strip().lower()
        by_label.setdefault(NOUNS.singular(label), []).append((p.x, p.y))
    groups = [(by_label.pop(group["noun"], []), group["boxes"]) for group in truth["groups"]]
    return group_f1([*groups, *((astray, []) for astray in by_label.values())])


SCORERS: dict[str, Scorer] = {
    "presence": exact,
    "count": count,
    "number": count,
    "point": points,
    "points": _labelled_points,
    "caption": _nouns,
    "spatial": exact,
    "size": exact,
    "at": exact,
    "unknown": _declined,
    "more": exact,
    "difference": _nouns,
    "track": track,
    "appears": exact,
    "video_point": video_points,
}
