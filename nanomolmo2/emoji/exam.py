"""How well a model answers questions about emoji: fixed test sets, three art groups.

A test set has scenes (one image), pairs (two images) and clips (a video of 8 frames). Besides
the scores it measures blindness: how often an answer does not depend on what was asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanomolmo2.data.example import Branch, Example
from nanomolmo2.emoji.clips import test_clip as render_test_clip
from nanomolmo2.emoji.pairs import test_pair as render_test_pair
from nanomolmo2.emoji.questions import EVERYTHING, caption_counts
from nanomolmo2.emoji.questions import test_questions as ask_test_questions
from nanomolmo2.emoji.scenes import TEST_GROUPS, Scene, art_of, group_rng
from nanomolmo2.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.emoji.scorers import SCORERS
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.emoji.write import QUESTION_STREAM
from nanomolmo2.evaluation import exam as exams
from nanomolmo2.evaluation.exam import Asked, Benchmark, Exam, Row, Scores
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor.points import parse_count
from nanomolmo2.processor.processor import Processor

PAIR_TASKS = ("more", "difference")
CLIP_TASKS = ("track", "appears", "video_point")
SCENE_TASKS = tuple(task for task in SCORERS if task not in PAIR_TASKS + CLIP_TASKS)

# What a fine-tuning asks before and after.
SHORT_SCENES = 12
SHORT_TASKS = ("presence", "count", "point", "caption", "unknown")
SHORT_ROWS = ("presence", "count", "point_f1", "point_absent", "caption_f1", "unknown")

# Where an answer is cut off, in tokens; true answers of `tiny` are all shorter.
# Enough for twenty objects; a refusal is known by its beginning.
MAX_NEW_TOKENS = {"track": 320, "points": 224, "point": 192, "count": 192, "unknown": 16}


def _row(title: str, *goals: float | None) -> Row:
    """A row with the score to reach for each of `TEST_GROUPS`."""
    found = zip(TEST_GROUPS, goals, strict=bool(goals))
    return Row(title, {group: goal for group, goal in found if goal is not None})


# What is reported, in this order.
ROWS: dict[str, Row] = {
    "presence": _row("presence (balanced)", 0.98, 0.93, 0.80),
    "count": _row("count exact, all", 0.95, 0.88, 0.70),
    "count_many": _row("count exact, two or more", 0.92, None, None),
    "count_zero": _row("count exact, none there", 0.97, None, None),
    "number": _row("number alone, all"),
    "point_f1": _row("point F1 (inside the object's box)", 0.95, 0.88, 0.70),
    "point_absent": _row("point at what is not there: “There are none.”", 0.97, None, None),
    "points": _row("points at several nouns, F1"),
    "everything": _row("points at everything, F1"),
    "caption_f1": _row("caption category F1", 0.92, 0.85, 0.65),
    "spatial": _row("spatial question", 0.90, 0.80, 0.60),
    "size": _row("which is larger, smaller, largest, smallest"),
    "at": _row("what is at a place"),
    "unknown": _row("says that it does not know a noun"),
    "pairs": _row("two pictures: the two rows below", 0.90, 0.80, 0.60),
    "more": _row("two pictures: which has more or fewer"),
    "difference": _row("two pictures: what is only in one, category F1"),
    "track": _row("video of 8 frames: track, F1", 0.90, 0.80, 0.60),
    "appears": _row("video of 8 frames: when it appears"),
    "video_point": _row("video of 8 frames: point at a time, F1"),
    "blind": _row("blindness: an answer that ignores the noun"),
    "same_point": _row("blindness: same points for two different nouns"),
    "same_presence": _row("blindness: same answer for a present and an absent noun"),
    "always_one": _row("blindness: “one” where there are more"),
}


@dataclass(frozen=True)
class ExamPlan:
    """Which part of the fixed test sets is asked: the first examples of each kind.

    Attributes:
        group: of art.
        scenes, pairs, clips: how many of each; by default half as many pairs as scenes and a tenth
            as many clips, and no clips where the processor takes no videos.
        styles: only these of the art group; none = all.
        tasks: those of `SCORERS` that are asked; None = all.
        seed: of the test set; 0 is the published one.
    """

    group: str = "seen"
    scenes: int = 1000
    pairs: int | None = None
    clips: int | None = None
    styles: Sequence[str] = ()
    tasks: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks or () if task not in SCORERS]:
            raise ValueError(f"no task {unknown[0]!r}: choose from {', '.join(SCORERS)}")
        if self.scenes < 1:
            raise ValueError(f"scenes is {self.scenes}, expected at least 1")

    def make_exam(self, takes_videos: bool = True) -> Exam:
        """The questions.

        Raises: ValueError for an unknown group or style, and clips for a model of images only.
        """
        tasks = tuple(SCORERS if self.tasks is None else self.tasks)
        if not takes_videos and (self.clips or not set(tasks) - {*CLIP_TASKS}):
            raise ValueError(
                "videos were asked for, but this model takes pictures only: use clips=0 and tasks "
                "of pictures"
            )
        pairs = max(1, self.scenes // 2) if self.pairs is None else self.pairs
        clips = max(1, self.scenes // 10) if self.clips is None else self.clips
        return make_exam(
            self.group,
            self.scenes,
            pairs,
            clips if takes_videos else 0,
            styles=self.styles,
            seed=self.seed,
            tasks=tasks,
        )


def evaluate(
    model: NanoMolmo2,
    processor: Processor,
    plan: ExamPlan | None = None,
    *,
    batch_size: int = 64,
    failures: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Ask about the first examples of the fixed test set of an art group, greedy.

    Args: as `nanomolmo2.evaluation.exam.evaluate`.
    Raises: as `ExamPlan.make_exam`.
    """
    takes_videos = processor.config.video is not None
    exam = (plan or ExamPlan()).make_exam(takes_videos)
    return exams.evaluate(
        model,
        processor,
        exam,
        batch_size=batch_size,
        failures=failures,
        on_progress=on_progress,
    )


def make_exam(
    group: str,
    scenes: int,
    pairs: int = 0,
    clips: int = 0,
    *,
    styles: Sequence[str] = (),
    seed: int = 0,
    tasks: Sequence[str] = tuple(SCORERS),
) -> Exam:
    """The first examples of a test set, and the questions of some tasks about them.

    A question does not depend on which others are asked.
    """
    styles = art_of(group, styles)  # refused even where nothing is to be drawn
    sprites = Sprites.load()
    exam = Exam(EMOJI, group)

    def add(name: str, example: Example, probe: Branch | None = None) -> None:
        number = len(exam.examples)
        exam.examples.append(example)
        exam.names.append(name)
        exam.asked += [Asked(number, b) for b in example.branches if b.task in tasks]
        if probe is not None and probe.task in tasks:
            exam.asked.append(Asked(number, probe, probe=True))

    for i in range(scenes if {*SCENE_TASKS} & {*tasks} else 0):
        scene = render_test_scene(i, group, seed, sprites, styles=styles)
        rng = group_rng(seed, group, i, QUESTION_STREAM)
        branches = ask_test_questions(scene, rng)
        pointed = {b.truth["noun"] for b in branches if b.task == "point"}
        others = [noun for noun in caption_counts(scene) if noun not in pointed]
        probe = _probe(str(rng.choice(others)), scene) if others else None
        add(f"scene {i}", Example([scene.image], branches), probe)
    for i in range(pairs if {*PAIR_TASKS} & {*tasks} else 0):
        add(f"pair {i}", render_test_pair(i, group, seed, sprites, styles))
    for i in range(clips if {*CLIP_TASKS} & {*tasks} else 0):
        add(f"clip {i}", render_test_clip(i, group, seed, sprites, styles))
    return exam


def make_short_exam() -> Exam:
    """The first scenes of the published test set, and what matters most of what is asked."""
    return make_exam("seen", SHORT_SCENES, tasks=SHORT_TASKS)


def _probe(noun: str, scene: Scene) -> Branch:
    """A second pointing question: only its difference from the first one is looked at."""
    question = f"Point to the {noun}."
    count = caption_counts(scene)[noun]
    return Branch([{"role": "user", "content": question}], "point", {"noun": noun, "count": count})


# ---- rows ----


def rows_of_answer(branch: Branch, answer: str, value: float) -> dict[str, float]:
    """The rows of `ROWS` that one answer, whose score is ``value``, counts for."""
    task, truth = branch.task, branch.truth
    if task == "count":
        rows = {"count": value}
        if truth["count"] == 0:
            rows["count_zero"] = value
        elif truth["count"] >= 2:
            rows["count_many"] = value
            rows["always_one"] = float(parse_count(answer) == 1)
        return rows
    if task == "point":
        return {"point_f1" if truth["count"] else "point_absent": value}
    if task == "points":
        return {"everything" if truth["nouns"] == [EVERYTHING] else "points": value}
    if task == "caption":
        return {"caption_f1": value}
    if task in PAIR_TASKS:
        return {task: value, "pairs": value}
    return {task: value}


def score_blindness(answers: Sequence[Asked]) -> dict[str, float]:
    """Whether the answers about one scene ignore which noun was asked for.

    Two nouns that are there are pointed at, and one that is and one that is not are asked for;
    ``blind`` if either made no difference.
    """
    rows = {}
    pointed = [
        _COORDINATES.findall(a.answer)
        for a in answers
        if a.branch.task == "point" and a.branch.truth["count"]
    ]
    if len(pointed) == 2:
        rows["same_point"] = float(pointed[0] == pointed[1])
    said = {a.branch.truth["count"] > 0: a.answer for a in answers if a.branch.task == "presence"}
    if len(said) == 2:
        rows["same_presence"] = float(said[True] == said[False])
    if rows:
        rows["blind"] = max(rows.values())
    return rows


_COORDINATES = re.compile(r"\d+")


EMOJI = Benchmark(
    name="emoji",
    title="Emoji test set",
    groups=TEST_GROUPS,
    rows=ROWS,
    scorers=SCORERS,
    rows_of_answer=rows_of_answer,
    rows_of_example=score_blindness,
    make_exam=make_exam,
    max_new_tokens=MAX_NEW_TOKENS,
    make_short_exam=make_short_exam,
    short_rows=SHORT_ROWS,
)
