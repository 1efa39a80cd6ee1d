"""What an evaluation found: scores by task, beside what they would be without looking."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanomolmo2.evaluation.answers import plain
from nanomolmo2.evaluation.breakdown import (
    HEAD,
    Tally,
    by_count,
    by_size,
    figures,
    part_line,
    part_lines,
)
from nanomolmo2.evaluation.intervals import bootstrap_interval
from nanomolmo2.evaluation.measures import (
    SCORERS,
    count_of,
    matched,
    median_side,
    says_nothing,
    things_of,
)
from nanomolmo2.evaluation.questions import Question, Questions
from nanomolmo2.evaluation.report import format_score, markdown_table
from nanomolmo2.processor.points import points_to_json
from nanomolmo2.terminal import visible

FREQUENT, NONE, UNTRAINED = "most frequent answer", "none", "untrained model"
MOST_PAIRS = 200  # of questions about one picture


@dataclass(frozen=True)
class Prediction:
    """A question and what was answered.

    Attributes:
        readable: whether the answer says anything that can be scored.
        complete: whether it ended by itself.
    """

    question: Question
    answer: str
    score: float
    readable: bool = True
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        question = self.question
        truth = {name: value for name, value in question.truth.items() if name != "vocabulary"}
        return {
            "number": question.number,
            "record": question.where,
            "images": [
                {"path": path, "width": width, "height": height}
                for path, (width, height) in zip(
                    question.files, question.shown.image_sizes, strict=False
                )
            ],
            "task": question.task,
            "scorer": question.scorer,
            "question": question.text,
            "answer": self.answer,
            "truth": truth,
            "reference": question.reference,
            "score": self.score,
            **({"points": points} if (points := self._points()) else {}),
            "readable": self.readable,
            "complete": self.complete,
        }

    def _points(self) -> list[dict[str, Any]]:
        """Those of the answer, in pixels, for programs that read no answers."""
        shown = self.question.shown
        points = shown.points(self.answer)
        return points_to_json(points, shown.image_sizes, video_size=shown.video_size)


def judge(question: Question, answer: str, complete: bool = True) -> Prediction:
    """Score an answer."""
    measure = SCORERS[question.scorer]
    value = measure(question.truth, answer, question.shown)
    readable = measure.is_readable(question.truth, answer.strip(), question.shown)
    return Prediction(question, answer, value, readable, complete)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measure: what the score is.
        interval: of 95 %, pictures resampled.
        further: other numbers, such as ``within_one``.
        baselines: scores of others on the same questions, by name.
        unreadable, cut_off: shares of the answers.
        blind: share of the pairs of questions with different truths that got the same answer; None
            where there are no pairs. ``pairs``: how many there are.
        parts: of points and counts: figures of all answers (``all``), and of those ``by_count`` and
            ``by_size`` of the things, see `breakdown`.
    """

    task: str
    scorer: str
    measure: str
    score: float
    interval: tuple[float, float]
    questions: int
    pictures: int
    unreadable: float
    cut_off: float
    further: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    blind: float | None = None
    pairs: int = 0
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Scores by task.

    Attributes:
        rows: one for each task.
        about: what was evaluated and how.
        left_out: bad records by cause. ``unscored``: answers that nothing can be compared with.
        worst: bad answers, the worst first within each task. predictions: all answers.
    """

    rows: list[Row]
    about: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unscored: dict[str, int] = field(default_factory=dict)
    worst: list[Prediction] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list, repr=False)

    @property
    def scores(self) -> dict[str, float]:
        """The main score of every task, 0 to 1, more is better."""
        return {row.task: row.score for row in self.rows}

    @property
    def mean_score(self) -> float:
        """The mean of these; of all tasks alike."""
        return sum(self.scores.values()) / len(self.scores)

    def flat(self) -> dict[str, float]:
        """``scores``, and further numbers as ``task_name``."""
        further = {
            f"{row.task}_{name}": value for row in self.rows for name, value in row.further.items()
        }
        return {**further, **self.scores}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the answers, as plain JSON types."""
        rows = {
            row.task: {
                "score": row.score,
                "interval": list(row.interval),
                "measure": row.measure,
                "scorer": row.scorer,
                "questions": row.questions,
                "pictures": row.pictures,
                **row.further,
                "unreadable": row.unreadable,
                "cut_off": row.cut_off,
                "blind": row.blind,
                "pairs": row.pairs,
                "baselines": row.baselines,
                **row.parts,
            }
            for row in self.rows
        }
        left = {"left_out": self.left_out, "unscored": self.unscored}
        return {**self.about, **left, "scores": self.scores, "tasks": rows}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(head, lines) of the table: one line a number, with what it measures."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.baselines))
        head = ["task", "measure", "score [95 %]", *names, "unreadable", "blind", "questions"]
        lines = []
        for row in self.rows:
            low, high = map(format_score, row.interval)
            cells = [row.task, row.measure, f"{format_score(row.score)} [{low}, {high}]"]
            for name in names:
                value = row.baselines.get(name)
                cells.append("-" if value is None else format_score(value))
            cells.append(format_score(row.unreadable))
            cells.append("-" if row.blind is None else format_score(row.blind))
            lines.append([*cells, str(row.questions)])
            for name, value in row.further.items():
                digits = f"{value:.2f}" if name == "mae" else format_score(value)
                title = FURTHER.get(name, name.replace("_", " "))
                lines.append([row.task, title, digits, *["-"] * (len(head) - 3)])
        return head, lines

    def table(self) -> str:
        """The same in Markdown."""
        head, lines = self.cells()
        clean = [
            [" ".join(visible(cell).replace("|", "/").split()) for cell in line] for line in lines
        ]
        return markdown_table(head, clean, left=2)

    def part_cells(self) -> tuple[list[str], list[list[str]]]:
        """(head, lines) of a second table: the points and counts of every task with more than one
        question, in all, by how many things there are and by size."""
        lines = []
        for row in self.rows:
            if row.parts and row.questions > 1:
                lines.append(part_line(row.task, "all", row.parts["all"]))
                lines += part_lines(row.task, row.parts["by_count"], row.parts["by_size"])
        return ["task", "things", "questions", *HEAD], lines

    def part_table(self) -> str:
        """The same in Markdown; empty if nobody was asked for points or counts."""
        head, lines = self.part_cells()
        clean = [[visible(cell).replace("|", "/") for cell in line] for line in lines]
        return markdown_table(head, clean, left=2) if lines else ""


LEGEND = (
    "score [95 % interval, pictures resampled]; most frequent answer: the one that is right most "
    "often for the task in these very data, given to every question; none: always that there is "
    "nothing; unreadable: share of the answers that say no place, number or option; blind: share "
    "of the pairs of questions with different truths that got the same answer"
)
FURTHER = {
    "within_one": "count within one",
    "mae": "mean absolute error",
    "average": "mean of the categories",
}


def summarize(
    questions: Questions,
    predictions: Sequence[Prediction],
    baselines: Mapping[str, Sequence[Prediction]] | None = None,
    worst: int = 24,
) -> Report:
    """Scores of all tasks.

    Args:
        baselines: predictions of others for the same questions, or some of them.
        worst: how many bad answers to keep, shared out among the tasks.
    """
    groups = _by_row(predictions)
    others = {name: _by_row(answers) for name, answers in (baselines or {}).items()}
    rows = []
    for task, answers in groups.items():
        values = [one.score for one in answers]
        numbers = np.unique([one.question.picture for one in answers], return_inverse=True)[1]
        same, pairs = _blindness(answers)
        rows.append(
            Row(
                task=task,
                scorer=answers[0].question.scorer,
                measure=SCORERS[answers[0].question.scorer].title,
                score=float(np.mean(values)),
                interval=bootstrap_interval(values, numbers.tolist()),
                questions=len(answers),
                pictures=len(set(numbers.tolist())),
                unreadable=_share(not one.readable for one in answers),
                cut_off=_share(not one.complete for one in answers),
                further=_further(answers),
                baselines={
                    name: float(np.mean([one.score for one in found[task]]))
                    for name, found in others.items()
                    if task in found
                },
                blind=same / pairs if pairs else None,
                pairs=pairs,
                parts=_parts(answers, numbers.tolist()),
            )
        )
    return Report(
        rows,
        left_out=dict(questions.bad),
        unscored=dict(questions.unscored),
        worst=_share_out(groups, worst),
    )


def _by_row(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """By task; where questions of a task are scored in several ways, by task and scorer."""
    scorers: dict[str, set[str]] = defaultdict(set)
    predictions = list(predictions)
    for one in predictions:
        scorers[one.question.task].add(one.question.scorer)
    rows: dict[str, list[Prediction]] = defaultdict(list)
    for one in predictions:
        task, scorer = one.question.task, one.question.scorer
        rows[task if len(scorers[task]) == 1 else f"{task}_{scorer}"].append(one)
    return dict(rows)


def _share(found: Iterable[bool]) -> float:
    return float(np.mean(list(found)))


def _further(answers: Sequence[Prediction]) -> dict[str, float]:
    """Of counts: within one, over all answers; absolute error, over those that give a number. Of
    questions that belong to a part of a benchmark (``parts``): the score of each part."""
    counted = SCORERS[answers[0].question.scorer].counted
    further: dict[str, float] = {}
    if counted is not None:
        pairs = [
            (counted(one.answer, one.question.shown), count_of(one.question.truth))
            for one in answers
        ]
        errors = [abs(said - true) for said, true in pairs if said is not None]
        further["within_one"] = sum(error <= 1 for error in errors) / len(pairs)
        if errors:
            further["mae"] = float(np.mean(errors))
    by_part: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in answers:
        parts = one.question.truth.get("parts")
        for kind, part in parts.items() if isinstance(parts, Mapping) else ():
            by_part[kind][str(part)].append(one.score)
    for kind, values in by_part.items():
        means = {part: float(np.mean(scores)) for part, scores in sorted(values.items())}
        further |= means
        if kind == "category":
            further["average"] = float(np.mean(list(means.values())))
    return further


def _parts(answers: Sequence[Prediction], pictures: Sequence[int]) -> dict[str, Any]:
    tallies = [_tally(one, picture) for one, picture in zip(answers, pictures, strict=True)]
    known = [tally for tally in tallies if tally is not None]
    if not known:
        return {}
    return {"all": figures(known), "by_count": by_count(known), "by_size": by_size(known)}


def _tally(one: Prediction, picture: int) -> Tally | None:
    """Of an answer with points in one picture, or with a number; None for any other."""
    question = one.question
    truth, shown = question.truth, question.shown
    counted = SCORERS[question.scorer].counted
    if counted is not None:
        return Tally(picture, count_of(truth), counted(one.answer, shown))
    if question.scorer != "points":
        return None
    things, points = things_of(truth, shown), shown.points(one.answer)
    said = len(points) if points or says_nothing(one.answer, shown) else None
    hits = matched(things, points)
    return Tally(picture, len(things), said, len(points), hits, median_side(things))


def _share_out(groups: Mapping[str, Sequence[Prediction]], number: int) -> list[Prediction]:
    """The worst of every task in turn, then the second worst, ...; by task."""
    ranked = {
        task: sorted((one for one in answers if one.score < 1), key=lambda one: one.score)
        for task, answers in groups.items()
    }
    turns = itertools.zip_longest(*ranked.values())
    chosen = [one for turn in turns for one in turn if one is not None][:number]
    kept = {one.question.number for one in chosen}
    return [one for bad in ranked.values() for one in bad if one.question.number in kept]


# ---- blindness ----


def _blindness(answers: Sequence[Prediction]) -> tuple[int, int]:
    """(pairs with different truths and the same answer, pairs with different truths)."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in answers:
        pair = one.question.truth.get("pair")
        key = f"pair {pair}" if pair is not None else one.question.picture
        groups[key].append((_truth_key(one.question), _answer_key(one)))
    same = pairs = 0
    for found in groups.values():
        for a, b in itertools.islice(itertools.combinations(found, 2), MOST_PAIRS):
            if a[0] != b[0]:
                pairs += 1
                same += a[1] == b[1]
    return same, pairs


_KNOWN = ("masks", "boxes", "groups", "points", "frames", "tracks", "count", "categories")


def _truth_key(question: Question) -> str:
    """The same for truths that one answer fits."""
    truth, measure = question.truth, SCORERS[question.scorer]
    if measure.counted is not None:
        return str(truth["count"])
    if question.scorer == "choice":
        return str(truth["answer"])
    if measure.kind in ("point", "track", "caption"):
        known = {name: truth[name] for name in _KNOWN if name in truth and name != "count"}
        return json.dumps(known, sort_keys=True)
    return json.dumps(sorted(plain(str(text)) for text in _texts(truth)))


def _texts(truth: Mapping[str, Any]) -> list[Any]:
    given = truth.get("answers", truth.get("answer"))
    return given if isinstance(given, list) else [given]


def _answer_key(one: Prediction) -> str:
    """The same for answers that say the same: points by their places, not their label."""
    measure = SCORERS[one.question.scorer]
    if measure.kind in ("point", "track"):
        points = one.question.shown.points(one.answer)
        if points:
            return repr(sorted((p.image, p.time or 0.0, p.x, p.y) for p in points))
    if measure.counted is not None:
        return str(measure.counted(one.answer, one.question.shown))
    return plain(one.answer)


# ---- baselines ----


def most_frequent(questions: Sequence[Question]) -> list[Prediction]:
    """Every question answered with the most frequent right answer of its task in these very data:
    the best that can be done without looking, and without knowing the question."""
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in questions:
        seen[question.task, question.scorer][question.reference] += 1
    answers = {key: counts.most_common(1)[0][0] for key, counts in seen.items()}
    return [judge(one, answers[one.task, one.scorer]) for one in questions]


def nothing_there(questions: Sequence[Question]) -> list[Prediction]:
    """Questions about things answered with "There are none."."""
    return [
        judge(question, answer)
        for question in questions
        if (answer := SCORERS[question.scorer].nothing) is not None
    ]


BASELINES: dict[str, Callable[[Sequence[Question]], list[Prediction]]] = {
    FREQUENT: most_frequent,
    NONE: nothing_there,
}
