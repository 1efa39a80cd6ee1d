"""Questions about emoji scenes, with answers in Molmo2's wording and the truth behind them.

Tasks, each a message branch of one picture:

    presence  Is there a dog?             Yes.
    count     How many dogs are there?    Counting the <points coords="1 1 210 455 2 640
                                          480">dog</points> shows a total of 2.
    number    How many dogs are there?    2
              Answer with a number.
    point     Point to the dog.           <points coords="1 1 210 455">dog</points>
    caption   Describe this picture.      A dog, two cats and an apple.
    spatial   What is left of the apple?  A dog.

The label of points is always the singular noun, so that question and answer share its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.emoji.scenes import Scene, SceneObject
from nanomolmo2.data.emoji.sprites import CATEGORIES, PLURALS, article
from nanomolmo2.data.example import Branch, Message
from nanomolmo2.processor.points import SCALE, Point, format_points

Task = Literal["presence", "count", "number", "point", "caption", "spatial"]
Direction = Literal["left", "right", "above", "below"]

# {a}: noun with article, {one}: noun, {many}: its plural, {where}: direction and "the".
QUESTIONS: dict[Task, tuple[str, ...]] = {
    "presence": (
        "Is there {a}?",
        "Is there {a} in the picture?",
        "Is there {a} here?",
        "Do you see {a}?",
        "Can you see {a}?",
        "Does the picture show {a}?",
        "Does this picture have {a}?",
        "Are there any {many}?",
        "Do you see any {many}?",
    ),
    "count": (
        "How many {many} are there?",
        "How many {many} are in the picture?",
        "How many {many} do you see?",
        "How many {many} can you see?",
        "How many {many}?",
        "Count the {many}.",
        "Please count the {many}.",
        "Count all the {many} in the picture.",
        "What is the number of {many}?",
    ),
    "number": (
        "How many {many}? Answer with a number.",
        "How many {many} are there? Answer with a number.",
        "How many {many} are in the picture? Answer with a number.",
        "How many {many} do you see? Just the number.",
        "Count the {many}. Answer with a number.",
        "Count the {many}. Just the number.",
        "What is the number of {many}? Just the number.",
    ),
    "point": (
        "Point to the {one}.",
        "Point to the {many}.",
        "Point to all the {many}.",
        "Point at the {one}.",
        "Where is the {one}?",
        "Where are the {many}?",
        "Show me the {one}.",
        "Show me the {many}.",
        "Find the {one}.",
        "Locate the {many}.",
    ),
    "caption": (
        "Describe this picture.",
        "Describe the picture.",
        "Caption this picture.",
        "What is in this picture?",
        "What is in the picture?",
        "What do you see?",
        "What can you see here?",
        "What does the picture show?",
    ),
    "spatial": (
        "What is {where} {one}?",
        "What do you see {where} {one}?",
        "What can you see {where} {one}?",
        "What lies {where} {one}?",
        "Which thing is {where} {one}?",
        "What is there {where} {one}?",
        "Name the thing {where} {one}.",
    ),
}
BARE = "{one}?"
DIRECTIONS: dict[Direction, str] = {
    "left": "left of the",
    "right": "right of the",
    "above": "above the",
    "below": "below the",
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TASKS: tuple[Task, ...] = tuple(QUESTIONS)
NONE_ANSWER, NOTHING_ANSWER = "There are none.", "Nothing."

CLEARLY = (
    1.15  # by this factor a direction or a distance must win before a spatial question is asked
)


@dataclass(frozen=True)
class BranchMix(Config):
    """How many questions of each task a picture gets, and how they are drawn.

    Attributes:
        presence, count, number, point, caption, spatial: questions per picture; spatial ones only
            as far as the scene allows.
        absent_presence: share of the presence questions about nouns that are not in the picture.
        absent: the same for count, number and point.
        repeated_first: share of the pictures where count and number questions ask for categories
            that occur more than once before the others.
        nothing: chance that a spatial question may be one whose answer is "Nothing."
        casual: share of the questions that start in lower case and lack the final mark.
        bare: share of the presence questions that are nothing but the noun: "dog?"
    """

    presence: int = 12
    count: int = 2
    number: int = 1
    point: int = 3
    caption: int = 1
    spatial: int = 1
    absent_presence: float = 0.5
    absent: float = 0.25
    repeated_first: float = 0.6
    nothing: float = 0.2
    casual: float = 0.1
    bare: float = 0.1


def make_branches(
    scene: Scene, rng: np.random.Generator, mix: BranchMix | None = None, snap: int = 1
) -> list[Branch]:
    """Ask about a scene, the tasks in the order of `TASKS`.

    Args:
        snap: points in answers are rounded to multiples of this many thousandths of the picture's
            side; 1 writes them as exactly as the format can.
    Returns: branches whose ``truth`` holds ``answer`` and, by task:
        presence, count, number, point: ``noun, count, points, boxes``;
        caption: ``counts`` (noun -> number, in the order of the answer);
        spatial: ``noun`` (asked about), ``direction``, ``found`` (noun or None), ``nothing``;
        points are exact centres (x, y) and boxes (x0, y0, x1, y1), both in pixels.
    """
    mix = mix or BranchMix()
    asker = _Asker(scene, rng, snap, mix)
    branches: list[Branch] = []
    for noun in asker.nouns(mix.presence, mix.absent_presence):
        branches.append(asker.presence(noun))
    for task, number in (("count", mix.count), ("number", mix.number)):
        for noun in asker.nouns(number, mix.absent, rng.random() < mix.repeated_first):
            branches.append(asker.count(noun) if task == "count" else asker.number(noun))
    for noun in asker.nouns(mix.point, mix.absent):
        branches.append(asker.point(noun))
    branches += [asker.caption() for _ in range(mix.caption)]
    for reference, direction in asker.spatial_questions(mix.spatial, mix.nothing):
        branches.append(asker.spatial(reference, direction))
    return branches


def test_questions(scene: Scene, rng: np.random.Generator, snap: int = 1) -> list[Branch]:
    """Balanced questions for evaluation: every task, present and absent nouns alike.

    Presence, count, number and point each ask for one noun that is there and one that is not; half
    of the pictures ask to count a category that occurs several times, if there is one. Then a
    caption and, where the scene allows, a spatial question.
    """
    mix = BranchMix(
        2, 2, 2, 2, 1, 1, absent=0.5, repeated_first=0.5, nothing=0.25, casual=0, bare=0
    )
    return make_branches(scene, rng, mix, snap)


def spatial_answer(
    objects: Sequence[SceneObject], reference: SceneObject, direction: Direction
) -> str | None:
    """What lies in a direction of ``reference``: a noun, "" for nothing, None if it is debatable.

    An object lies left of another if its centre does and it is more left than up or down of it. Of
    several the nearest centre counts. Close calls are debatable: both rules must hold by a factor
    of `CLEARLY`.
    """
    horizontal = direction in ("left", "right")
    sign = 1 if direction in ("right", "below") else -1
    surely: list[tuple[float, str]] = []
    perhaps: list[tuple[float, str]] = []
    for other in objects:
        dx = other.center[0] - reference.center[0]
        dy = other.center[1] - reference.center[1]
        main, across = (dx, dy) if horizontal else (dy, dx)
        distance = float(np.hypot(dx, dy))
        if other is reference or sign * main <= 0:
            continue
        if abs(main) > CLEARLY * abs(across):
            surely.append((distance, other.category))
        elif CLEARLY * abs(main) > abs(across):
            perhaps.append((distance, other.category))
    if not surely:
        return None if perhaps else ""
    nearest, noun = min(surely)
    rivals = [d for d, category in surely + perhaps if category != noun]
    return noun if all(d > CLEARLY * nearest for d in rivals) else None


def caption_counts(scene: Scene) -> dict[str, int]:
    """How often each noun occurs, nouns from left to right by their leftmost centre."""
    counts: dict[str, int] = {}
    for o in sorted(scene.objects, key=lambda o: o.center):
        counts[o.category] = counts.get(o.category, 0) + 1
    return counts


def counted(noun: str, count: int) -> str:
    """``"a dog"``, ``"two dogs"``, ``"13 dogs"``."""
    if count == 1:
        return f"{article(noun)} {noun}"
    number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)
    return f"{number} {_PLURAL[noun]}"


_PLURAL = dict(zip(CATEGORIES, PLURALS, strict=True))


class _Asker:
    """Questions about one scene, drawn from one stream of random numbers."""

    def __init__(self, scene: Scene, rng: np.random.Generator, snap: int, mix: BranchMix) -> None:
        if not 1 <= snap <= SCALE:
            raise ValueError(f"snap is {snap} thousandths; use 1 (exact) to {SCALE}, e.g. 50 or 10")
        self.scene, self.rng, self.snap = scene, rng, snap
        self.casual, self.bare = mix.casual, mix.bare
        height, width = scene.image.shape[:2]
        self.image_size = (width, height)
        self.objects: dict[str, list[SceneObject]] = {}
        for o in scene.objects:
            self.objects.setdefault(o.category, []).append(o)

    # ---- what to ask for ----

    def nouns(self, number: int, absent: float, repeated_first: bool = False) -> list[str]:
        """``number`` nouns, a share of them absent; present ones come again when they run out."""
        num_absent = int(number * absent + self.rng.random())  # the share holds on average
        present = [str(noun) for noun in self.rng.permutation(list(self.objects))]
        if repeated_first:
            present.sort(key=lambda noun: len(self.objects[noun]) < 2)
        if not present:
            num_absent = number
        others = [noun for noun in CATEGORIES if noun not in self.objects]
        nouns = [present[i % len(present)] for i in range(number - num_absent)]
        return nouns + [str(noun) for noun in self.rng.permutation(others)[:num_absent]]

    def spatial_questions(self, number: int, nothing: float) -> list[tuple[str, Direction]]:
        """(noun, direction) pairs whose answer is beyond debate."""
        found: list[tuple[str, Direction]] = []
        empty: list[tuple[str, Direction]] = []
        for noun, objects in self.objects.items():
            if len(objects) > 1:
                continue
            for direction in DIRECTIONS:
                answer = spatial_answer(self.scene.objects, objects[0], direction)
                if answer is not None:
                    (found if answer else empty).append((noun, direction))
        chosen: list[tuple[str, Direction]] = []
        for _ in range(number):
            pool = empty if self.rng.random() < nothing else found
            if pool:
                chosen.append(pool.pop(int(self.rng.integers(len(pool)))))
        return chosen

    # ---- question, answer and truth of each task ----

    def presence(self, noun: str) -> Branch:
        answer = "Yes." if noun in self.objects else "No."
        return self._branch("presence", noun, answer)

    def count(self, noun: str) -> Branch:
        return self._branch("count", noun, self._points(noun, "point_count"))

    def number(self, noun: str) -> Branch:
        return self._branch("number", noun, str(len(self.objects.get(noun, ()))))

    def point(self, noun: str) -> Branch:
        return self._branch("point", noun, self._points(noun, "point"))

    def caption(self) -> Branch:
        counts = caption_counts(self.scene)
        parts = [counted(noun, count) for noun, count in counts.items()]
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if parts[1:] else parts[0]
        return self._exchange("caption", self._wording("caption"), _sentence(listed), counts=counts)

    def spatial(self, noun: str, direction: Direction) -> Branch:
        found = spatial_answer(self.scene.objects, self.objects[noun][0], direction)
        answer = _sentence(counted(found, 1)) if found else NOTHING_ANSWER
        question = self._wording("spatial").format(one=noun, where=DIRECTIONS[direction])
        truth = {"noun": noun, "direction": direction, "found": found or None}
        return self._exchange("spatial", question, answer, nothing=not found, **truth)

    # ---- pieces of the above ----

    def _points(self, noun: str, mode: Literal["point", "point_count"]) -> str:
        points = [Point(*self._snapped(o.center)) for o in self.objects.get(noun, ())]
        return format_points(points, noun, [self.image_size], mode=mode)

    def _snapped(self, center: tuple[float, float]) -> tuple[float, float]:
        step_x, step_y = (self.snap * side / SCALE for side in self.image_size)
        return round(center[0] / step_x) * step_x, round(center[1] / step_y) * step_y

    def _wording(self, task: Task) -> str:
        wording = QUESTIONS[task][self.rng.integers(len(QUESTIONS[task]))]
        if self.rng.random() < self.casual:
            wording = (wording[0].lower() + wording[1:]).rstrip("?.")
        return wording

    def _branch(self, task: Task, noun: str, answer: str) -> Branch:
        if task == "presence" and self.rng.random() < self.bare:
            wording = BARE
        else:
            wording = self._wording(task)
        question = wording.format(a=f"{article(noun)} {noun}", one=noun, many=_PLURAL[noun])
        objects = self.objects.get(noun, [])
        return self._exchange(
            task,
            question,
            answer,
            noun=noun,
            count=len(objects),
            points=[list(o.center) for o in objects],
            boxes=[list(o.box) for o in objects],
        )

    def _exchange(self, task: Task, question: str, answer: str, **truth: Any) -> Branch:
        messages: list[Message] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return Branch(messages, task, {**truth, "answer": answer})


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
