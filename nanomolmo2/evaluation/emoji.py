"""How well a model answers questions about emoji scenes: fixed test sets, three art groups.

Besides the scores it measures blindness: how often an answer does not depend on what was asked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.data.emoji.questions import NONE_ANSWER, caption_counts
from nanomolmo2.data.emoji.questions import test_questions as ask_test_questions
from nanomolmo2.data.emoji.scenes import Scene
from nanomolmo2.data.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.data.emoji.sprites import STYLE_GROUPS, Sprites
from nanomolmo2.data.example import Branch
from nanomolmo2.evaluation.scorers import caption_f1, point_f1
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.points import parse_count, parse_points
from nanomolmo2.processor.processor import Processor

QUESTION_STREAM = 3  # first word of the questions' seeds; scenes use 1 and 2
MAX_NEW_TOKENS = 96  # six points and the words around them take about 60

# What is reported, in this order, with the floor of the first version on seen art.
ROWS: dict[str, tuple[str, float | None]] = {
    "presence": ("presence (balanced)", 0.85),
    "count": ("count exact, all", 0.70),
    "count_many": ("count exact, two or more", 0.45),
    "count_zero": ("count exact, none there", 0.75),
    "number": ("number alone, all", None),
    "point_f1": ("point F1 (inside the object's box)", 0.60),
    "point_absent": ("point at what is not there: “There are none.”", 0.75),
    "caption_f1": ("caption category F1", 0.60),
    "spatial": ("spatial question", 0.45),
    "same_point": ("blindness: same points for two different nouns", None),
    "same_presence": ("blindness: same answer for a present and an absent noun", None),
    "always_one": ("blindness: “one” where there are more", None),
}


@dataclass
class Asked:
    """A question about a scene, and what the model said."""

    scene: int
    branch: Branch
    answer: str = ""
    probe: bool = False  # asked only to see whether the answer depends on the noun


@dataclass
class Scores:
    """Mean scores of one art group by row of `ROWS`, and how many answers each rests on."""

    group: str
    means: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def evaluate(
    model: NanoMolmo2,
    processor: Processor,
    *,
    group: str = "seen",
    scenes: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Ask about the fixed test scenes 0 .. ``scenes`` - 1 of an art group, greedy.

    Args:
        seed: of the test set; 0 is the published one.
        on_progress: called with (answers so far, all answers).
    """
    if group not in STYLE_GROUPS:
        raise ValueError(f"unknown art group {group!r}, expected one of {', '.join(STYLE_GROUPS)}")
    if scenes < 1:
        raise ValueError(f"scenes is {scenes}, expected at least 1")
    pictures, asked = _questions(group, scenes, seed)
    model.eval()
    answer_all(model, processor, pictures, asked, batch_size, on_progress)
    return score(group, pictures, asked)


def _questions(group: str, scenes: int, seed: int) -> tuple[list[Scene], list[Asked]]:
    sprites = Sprites.load()
    pictures, asked = [], []
    for i in range(scenes):
        scene = render_test_scene(i, group, seed, sprites)
        rng = np.random.default_rng([QUESTION_STREAM, seed, list(STYLE_GROUPS).index(group), i])
        pictures.append(scene)
        branches = ask_test_questions(scene, rng)
        asked += [Asked(i, branch) for branch in branches]
        pointed = {b.truth["noun"] for b in branches if b.task == "point"}
        others = [noun for noun in caption_counts(scene) if noun not in pointed]
        if others:
            asked.append(Asked(i, _probe(str(rng.choice(others)), scene), probe=True))
    return pictures, asked


def _probe(noun: str, scene: Scene) -> Branch:
    """A second pointing question: only its difference from the first one is looked at."""
    question = f"Point to the {noun}."
    count = caption_counts(scene)[noun]
    return Branch([{"role": "user", "content": question}], "point", {"noun": noun, "count": count})


@torch.no_grad()
def answer_all(
    model: NanoMolmo2,
    processor: Processor,
    pictures: Sequence[Scene],
    asked: Sequence[Asked],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill in the answers. Every picture is encoded once; questions of one kind share a batch."""
    device = next(model.parameters()).device
    visual: list[Tensor] = []
    for i in range(0, len(pictures), batch_size):
        pixels, _ = processor.load_images([s.image for s in pictures[i : i + batch_size]])
        assert pixels is not None
        dtype = model.vision_encoder.patch_embedding.weight.dtype
        visual += model.encode_images(torch.from_numpy(pixels).to(device, dtype))
    order = sorted(range(len(asked)), key=lambda i: asked[i].branch.task)
    for start in range(0, len(order), batch_size):
        rows = [asked[i] for i in order[start : start + batch_size]]
        encoded = [
            processor.encode(row.branch.messages[:1], [pictures[row.scene].image]) for row in rows
        ]
        batch = collate(encoded, processor.pad_token_id, padding_side="left").to(device)
        ids = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            visual_tokens=torch.stack([visual[row.scene] for row in rows]),
            max_new_tokens=MAX_NEW_TOKENS,
            lookup=False,  # a batch this large has nothing to gain from guesses
        )
        for row, new in zip(rows, ids[:, batch.input_ids.shape[1] :], strict=True):
            row.answer = processor.decode(new)
        if on_progress is not None:
            on_progress(start + len(rows), len(order))


def score(group: str, pictures: Sequence[Scene], asked: Sequence[Asked]) -> Scores:
    """Score the answers of one art group."""
    rows: dict[str, list[float]] = defaultdict(list)
    by_scene: dict[int, list[Asked]] = defaultdict(list)
    for one in asked:
        by_scene[one.scene].append(one)
        if not one.probe:
            height, width = pictures[one.scene].image.shape[:2]
            for name, value in score_answer(one.branch, one.answer, (width, height)).items():
                rows[name].append(value)
    for answers in by_scene.values():
        for name, value in score_blindness(answers).items():
            rows[name].append(value)
    return Scores(
        group,
        {name: float(np.mean(rows[name])) for name in ROWS if rows[name]},
        {name: len(rows[name]) for name in ROWS if rows[name]},
    )


def score_answer(branch: Branch, answer: str, size: tuple[int, int]) -> dict[str, float]:
    """The rows of `ROWS` that one answer counts for.

    Args:
        size: (width, height) of the picture, pixels.
    """
    truth = branch.truth
    if branch.task == "presence":
        return {"presence": float(answer == truth["answer"])}
    if branch.task == "caption":
        return {"caption_f1": caption_f1(answer, truth["counts"])}
    if branch.task == "spatial":
        return {"spatial": float(answer == truth["answer"])}
    if branch.task == "number":
        return {"number": float(parse_count(answer) == truth["count"])}
    if branch.task == "count":
        found, count = parse_count(answer), truth["count"]
        rows = {"count": float(found == count)}
        if count == 0:
            rows["count_zero"] = rows["count"]
        elif count >= 2:
            rows["count_many"] = rows["count"]
            rows["always_one"] = float(found == 1)
        return rows
    if branch.task != "point":
        raise ValueError(f"there is no score for the task {branch.task!r}")
    if not truth["count"]:
        return {"point_absent": float(answer == NONE_ANSWER)}
    points = [(p.x, p.y) for p in parse_points(answer, [size])]
    return {"point_f1": point_f1(points, truth["boxes"])}


def score_blindness(answers: Sequence[Asked]) -> dict[str, float]:
    """Whether the answers about one scene ignore which noun was asked for."""
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
    return rows


_COORDINATES = re.compile(r"\d+")
