"""How well a model answers questions about emoji: fixed test sets, three art groups.

A test set has scenes (one picture), pairs (two pictures) and clips (a video of 8 frames). Besides
the scores it measures blindness: how often an answer does not depend on what was asked.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.data.emoji.clips import test_clip as render_test_clip
from nanomolmo2.data.emoji.pairs import test_pair as render_test_pair
from nanomolmo2.data.emoji.questions import EVERYTHING, caption_counts
from nanomolmo2.data.emoji.questions import test_questions as ask_test_questions
from nanomolmo2.data.emoji.scenes import TEST_GROUPS, Scene, art_of, group_rng
from nanomolmo2.data.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.data.emoji.sprites import Sprites
from nanomolmo2.data.emoji.write import QUESTION_STREAM
from nanomolmo2.data.example import Branch, Example
from nanomolmo2.evaluation.intervals import bootstrap_interval
from nanomolmo2.evaluation.scorers import SCORERS, Shown, score_task
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor.chat import Message
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.points import parse_count
from nanomolmo2.processor.processor import Encoded, Processor

PAIR_TASKS = ("more", "difference")
CLIP_TASKS = ("track", "appears", "video_point")
SCENE_TASKS = tuple(task for task in SCORERS if task not in PAIR_TASKS + CLIP_TASKS)

# Where an answer is cut off, in tokens; true answers of `tiny` are all shorter.
# Enough for twenty objects; a refusal is known by its beginning.
MAX_NEW_TOKENS = {"track": 320, "points": 224, "point": 192, "count": 192, "unknown": 16}
DEFAULT_MAX_NEW_TOKENS = 96


class Row(NamedTuple):
    """A line of the table: its name for people, and the score to reach for each `TEST_GROUPS`."""

    title: str
    goals: tuple[float | None, float | None, float | None] = (None, None, None)

    def goal(self, group: str) -> float | None:
        return self.goals[TEST_GROUPS.index(group)]


# What is reported, in this order.
ROWS: dict[str, Row] = {
    "presence": Row("presence (balanced)", (0.98, 0.93, 0.80)),
    "count": Row("count exact, all", (0.95, 0.88, 0.70)),
    "count_many": Row("count exact, two or more", (0.92, None, None)),
    "count_zero": Row("count exact, none there", (0.97, None, None)),
    "number": Row("number alone, all"),
    "point_f1": Row("point F1 (inside the object's box)", (0.95, 0.88, 0.70)),
    "point_absent": Row("point at what is not there: “There are none.”", (0.97, None, None)),
    "points": Row("points at several nouns, F1"),
    "everything": Row("points at everything, F1"),
    "caption_f1": Row("caption category F1", (0.92, 0.85, 0.65)),
    "spatial": Row("spatial question", (0.90, 0.80, 0.60)),
    "size": Row("which is larger, smaller, largest, smallest"),
    "at": Row("what is at a place"),
    "unknown": Row("says that it does not know a noun"),
    "pairs": Row("two pictures: the two rows below", (0.90, 0.80, 0.60)),
    "more": Row("two pictures: which has more or fewer"),
    "difference": Row("two pictures: what is only in one, category F1"),
    "track": Row("video of 8 frames: track, F1", (0.90, 0.80, 0.60)),
    "appears": Row("video of 8 frames: when it appears"),
    "video_point": Row("video of 8 frames: point at a time, F1"),
    "blind": Row("blindness: an answer that ignores the noun"),
    "same_point": Row("blindness: same points for two different nouns"),
    "same_presence": Row("blindness: same answer for a present and an absent noun"),
    "always_one": Row("blindness: “one” where there are more"),
}


@dataclass
class Asked:
    """A question about one example of a test set, and what the model said."""

    example: int
    branch: Branch
    answer: str = ""
    probe: bool = False  # asked only to see whether the answer depends on the noun


@dataclass
class Exam:
    """Test examples of one art group, and all that is asked about them.

    Attributes:
        names: of the examples, such as ``"scene 12"``: kind and number in the fixed set.
    """

    group: str
    examples: list[Example]
    names: list[str]
    asked: list[Asked]


@dataclass(frozen=True)
class Failure:
    """An answer that is not all right: ``score`` is below 1."""

    name: str
    example: Example
    branch: Branch
    answer: str
    score: float


@dataclass
class Scores:
    """Scores of one art group by row of `ROWS`.

    Attributes:
        means: mean scores. counts: how many answers each rests on.
        intervals: 95 % intervals of the means, see `bootstrap_interval`.
        failures: some of the worst answers, by task.
    """

    group: str
    means: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


def evaluate(
    model: NanoMolmo2,
    processor: Processor,
    *,
    group: str = "seen",
    styles: Sequence[str] = (),
    scenes: int = 1000,
    pairs: int | None = None,
    clips: int | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    failures: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Ask about the first examples of the fixed test set of an art group, greedy.

    Args:
        styles: only these of the art group; none = all.
        scenes, pairs, clips: how many of each; by default half as many pairs as scenes and a tenth
            as many clips, and no clips where the processor takes no videos.
        tasks: those of `SCORERS` that are asked; None = all.
        seed: of the test set; 0 is the published one.
        failures: how many bad answers to return, shared out among the tasks, the worst first.
        on_progress: called with (answers so far, all answers).
    Raises: ValueError for an unknown group, style or task, numbers out of range, and clips for a
        processor that takes pictures only.
    """
    chosen = tuple(SCORERS if tasks is None else tasks)
    if unknown := [task for task in chosen if task not in SCORERS]:
        raise ValueError(f"no task {unknown[0]!r}: choose from {', '.join(SCORERS)}")
    if scenes < 1:
        raise ValueError(f"scenes is {scenes}, expected at least 1")
    takes_videos = processor.config.video is not None
    if not takes_videos and (clips or not set(chosen) - {*CLIP_TASKS}):
        raise ValueError(
            "videos were asked for, but this model takes pictures only: use clips=0 and tasks of "
            "pictures"
        )
    exam = make_exam(
        group,
        scenes,
        max(1, scenes // 2) if pairs is None else pairs,
        0 if not takes_videos else max(1, scenes // 10) if clips is None else clips,
        styles=styles,
        seed=seed,
        tasks=chosen,
    )
    model.eval()
    answer_all(model, processor, exam, batch_size, on_progress)
    return score(exam, failures)


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
    exam = Exam(group, [], [], [])

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


def _probe(noun: str, scene: Scene) -> Branch:
    """A second pointing question: only its difference from the first one is looked at."""
    question = f"Point to the {noun}."
    count = caption_counts(scene)[noun]
    return Branch([{"role": "user", "content": question}], "point", {"noun": noun, "count": count})


# ---- answers ----


@torch.no_grad()
def answer_all(
    model: NanoMolmo2,
    processor: Processor,
    exam: Exam,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill in the answers. Questions of one kind share a batch.

    Every picture and frame is encoded once, unless the processor cuts pictures into crops.
    """
    visual = None
    if processor.config.multicrop is None:
        visual = _encode_examples(model, processor, exam.examples, batch_size)
    device = next(model.parameters()).device
    order = sorted(exam.asked, key=lambda one: list(SCORERS).index(one.branch.task))
    done = 0
    for rows in _batches(order, batch_size):
        limits = [_max_new_tokens(row.branch.task) for row in rows]
        blank = visual is not None
        encoded = [_encode_question(processor, exam, row, blank=blank) for row in rows]
        batch = collate(encoded, processor.pad_token_id, padding_side="left").to(device)
        ids = model.generate(
            batch.input_ids,
            batch.pixel_values,
            attention_mask=batch.attention_mask,
            visual_tokens=torch.cat([visual[row.example] for row in rows]) if visual else None,
            image_token_pooling=batch.image_token_pooling,
            max_new_tokens=max(limits),
            lookup=False,  # a batch this large has nothing to gain from guesses
        )
        for row, new, limit in zip(rows, ids[:, batch.input_ids.shape[1] :], limits, strict=True):
            row.answer = processor.decode(new[:limit])
        done += len(rows)
        if on_progress is not None:
            on_progress(done, len(order))


def _max_new_tokens(task: str) -> int:
    return MAX_NEW_TOKENS.get(task, DEFAULT_MAX_NEW_TOKENS)


def _batches(asked: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Runs of questions, sorted by task; those with a limit of their own are not mixed."""
    batch: list[Asked] = []
    for one in asked:
        limits = {_max_new_tokens(row.branch.task) for row in (*batch[:1], one)}
        if len(batch) == batch_size or len(limits) > 1:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _encode_examples(
    model: NanoMolmo2, processor: Processor, examples: Sequence[Example], batch_size: int
) -> list[Tensor]:
    """Visual tokens (m, n, D) of every example of m pictures or frames."""
    weight = model.vision_encoder.patch_embedding.weight
    question: list[Message] = [{"role": "user", "content": "?"}]
    visual: list[Tensor] = []
    for start in range(0, len(examples), batch_size):
        encoded = [
            processor.encode(question, example.images, video=example.video)
            for example in examples[start : start + batch_size]
        ]
        pixels = [torch.from_numpy(e.pixel_values).to(weight) for e in encoded]
        numbers = [len(own) for own in pixels]
        tokens = [model.encode_images(part) for part in torch.cat(pixels).split(batch_size)]
        visual += torch.cat(tokens).split(numbers)
    return visual


def _encode_question(
    processor: Processor, exam: Exam, asked: Asked, *, blank: bool = False
) -> Encoded:
    """A prompt; with ``blank`` without its pictures, which are known to be encoded already."""
    example = exam.examples[asked.example]
    images = example.images
    if blank:  # without crops all pictures stand in the prompt alike: nothing is resized for it
        side = processor.config.image_size
        images = [np.broadcast_to(np.float32(0), (3, side, side))] * len(images)
    encoded = processor.encode(asked.branch.messages[:1], images, video=example.video)
    return dataclasses.replace(encoded, pixel_values=None) if blank else encoded


# ---- scores ----


def score(exam: Exam, failures: int = 0) -> Scores:
    """Score the answers of one art group; keep some of the worst, see `evaluate`."""
    rows: dict[str, list[tuple[float, int]]] = defaultdict(list)  # values and their examples
    by_example: dict[int, list[Asked]] = defaultdict(list)
    bad: dict[str, list[Failure]] = defaultdict(list)
    for one in exam.asked:
        by_example[one.example].append(one)
        if one.probe:
            continue
        example = exam.examples[one.example]
        shown = shown_in(example)
        for name, value in score_answer(one.branch, one.answer, shown).items():
            rows[name].append((value, one.example))
        value = score_task(one.branch.task, one.branch.truth, one.answer, shown)
        if failures and value < 1:
            name = exam.names[one.example]
            bad[one.branch.task].append(Failure(name, example, one.branch, one.answer, value))
    for number, answers in by_example.items():
        for name, value in score_blindness(answers).items():
            rows[name].append((value, number))
    scores = Scores(exam.group, failures=_share_out(bad, failures))
    for name in ROWS:
        if rows[name]:
            values, numbers = zip(*rows[name], strict=True)
            scores.means[name] = float(np.mean(values))
            scores.counts[name] = len(values)
            scores.intervals[name] = bootstrap_interval(values, numbers)
    return scores


def shown_in(example: Example) -> Shown:
    """Sizes of an example's pictures, which are arrays (H, W, 3), or of its video."""
    sizes = tuple((image.shape[1], image.shape[0]) for image in example.images)
    return Shown(sizes, None if example.video is None else example.video.size)


def _share_out(bad: dict[str, list[Failure]], number: int) -> list[Failure]:
    """The worst of every task in turn, then the second worst, ...; returned by task."""
    ranked = {
        task: sorted(bad[task], key=lambda failure: failure.score)  # stable: in order of the set
        for task in SCORERS
        if task in bad
    }
    taken = dict.fromkeys(ranked, 0)
    while sum(taken.values()) < number and any(taken[t] < len(ranked[t]) for t in ranked):
        for task, failures in ranked.items():
            if taken[task] < len(failures) and sum(taken.values()) < number:
                taken[task] += 1
    return [failure for task, count in taken.items() for failure in ranked[task][:count]]


def score_answer(branch: Branch, answer: str, shown: Shown) -> dict[str, float]:
    """The rows of `ROWS` that one answer counts for."""
    task, truth = branch.task, branch.truth
    value = score_task(task, truth, answer, shown)
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
