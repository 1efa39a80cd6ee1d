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
    points    Point to the dog and the    <points coords="1 1 210 455">dog</points> <points
              apple.                      coords="1 1 640 480">apple</points>
    size      Which is larger, the dog    The dog.
              or the apple?
    at        What is at 210 455?         A dog.
    unknown   Is there a zebra?           I do not know that. I know these things: dog, cat, ...

Questions about two pictures are in `pairs.py`, those about videos in `clips.py`, all wordings in
`wordings.py`.

The label of points is always the singular noun, so that question and answer share its token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.example import Branch, Message
from nanomolmo2.emoji.scenes import Scene, SceneObject
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, article
from nanomolmo2.emoji.wordings import (
    BARE,
    DIRECTIONS,
    EXTREMES,
    ORDERS,
    UNKNOWN_IN_TESTS,
    UNKNOWN_IN_TRAINING,
    Direction,
    Task,
    Wordings,
)
from nanomolmo2.processor.point import Point, PointsText, join_points, tags_of
from nanomolmo2.processor.points import SCALE, format_points

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NONE_ANSWER, NOTHING_ANSWER = "There are none.", "Nothing."
EVERYTHING = "everything"  # the label of points at all objects
UNKNOWN_ANSWER = f"I do not know that. I know these things: {', '.join(CATEGORIES)}."

# Questions are asked only where the answer is beyond debate: by these factors
CLEARLY = 1.15  # a direction or a distance must win,
CLEARLY_LARGER = 1.4  # the area of a box must differ,
FREE_PX = 12  # and a place with nothing must be so far from every box.


@dataclass(frozen=True)
class BranchMix(Config):
    """How many questions of each task a picture gets, and how they are drawn.

    Attributes:
        presence, count, number, point, caption, spatial, points, size, at: questions per picture;
            spatial and size only as far as the scene allows.
        unknown: questions per picture about things that have no emoji; a fraction is a chance.
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
    points: int = 1
    size: int = 1
    at: int = 1
    unknown: float = 0.05
    absent_presence: float = 0.5
    absent: float = 0.25
    repeated_first: float = 0.6
    nothing: float = 0.2
    casual: float = 0.1
    bare: float = 0.1


def make_branches(
    scene: Scene,
    rng: np.random.Generator,
    mix: BranchMix | None = None,
    snap: int = 1,
    *,
    for_tests: bool = False,
) -> list[Branch]:
    """Ask about a scene, task by task in the order of `BranchMix`.

    Args:
        snap: points in answers are rounded to multiples of this many thousandths of the picture's
            side; 1 writes them as exactly as the format can.
        for_tests: ask in the wordings, and for the unknown things, that training never uses.
    Returns: branches whose ``truth`` holds ``answer`` and, by task:
        presence, count, number, point: ``noun, count, points, boxes``;
        caption: ``counts`` (noun -> number, in the order of the answer);
        spatial: ``noun`` (asked about), ``direction``, ``found`` (noun or None), ``nothing``;
        points: ``nouns``, ``groups`` (one ``{noun, boxes}`` for each that is there);
        size: ``nouns`` (two to compare, or all), ``order``;
        at: ``x``, ``y`` (thousandths), ``found`` (noun or None);
        unknown: ``noun``;
        points are exact centres (x, y) and boxes (x0, y0, x1, y1), both in pixels.
    """
    mix = mix or BranchMix()
    asker = _Asker(scene, rng, snap, mix, for_tests)
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
    branches += [asker.points() for _ in range(mix.points)]
    for _ in range(mix.size):
        tries = (asker.size() for _ in range(4))
        branches += list(itertools.islice((b for b in tries if b is not None), 1))
    branches += [asker.at(mix.nothing) for _ in range(mix.at)]
    branches += [asker.unknown() for _ in range(int(mix.unknown + rng.random()))]
    return branches


def test_questions(scene: Scene, rng: np.random.Generator, snap: int = 1) -> list[Branch]:
    """Balanced questions for evaluation: every task, present and absent nouns alike.

    Presence, count, number and point each ask for one noun that is there and one that is not; half
    of the pictures ask to count a category that occurs several times, if there is one. Then one
    question of each further task, a spatial one and one about sizes where the scene allows. All in
    wordings that training never uses.
    """
    mix = BranchMix(
        *(2, 2, 2, 2, 1, 1, 1, 1, 1, 1),
        absent=0.5,
        repeated_first=0.5,
        nothing=0.25,
        casual=0,
        bare=0,
    )
    return make_branches(scene, rng, mix, snap, for_tests=True)


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
    return f"{number} {PLURAL[noun]}"


PLURAL = dict(zip(CATEGORIES, PLURALS, strict=True))


class _Asker:
    """Questions about one scene, drawn from one stream of random numbers."""

    def __init__(
        self, scene: Scene, rng: np.random.Generator, snap: int, mix: BranchMix, for_tests: bool
    ) -> None:
        if not 1 <= snap <= SCALE:
            raise ValueError(f"snap is {snap} thousandths; use 1 (exact) to {SCALE}, e.g. 50 or 10")
        self.scene, self.rng, self.snap = scene, rng, snap
        self.wording = Wordings(rng, mix.casual, for_tests)
        self.bare, self.absent = mix.bare, mix.absent
        self.unknown_words = UNKNOWN_IN_TESTS if for_tests else UNKNOWN_IN_TRAINING
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
            candidates = empty if self.rng.random() < nothing else found
            if candidates:
                chosen.append(candidates.pop(int(self.rng.integers(len(candidates)))))
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
        return exchange("caption", self.wording("caption"), listed(counts), counts=counts)

    def spatial(self, noun: str, direction: Direction) -> Branch:
        found = spatial_answer(self.scene.objects, self.objects[noun][0], direction)
        answer = sentence(counted(found, 1)) if found else NOTHING_ANSWER
        question = self.wording("spatial").format(one=noun, where=DIRECTIONS[direction])
        truth = {"noun": noun, "direction": direction, "found": found or None}
        return exchange("spatial", question, answer, nothing=not found, **truth)

    def points(self) -> Branch:
        """Several nouns at once, or everything."""
        if self.rng.random() < 0.4:
            wording = self.wording("points", "{list}", False)
            centres = [o.center for o in self.scene.objects]
            answer = self._format(centres, EVERYTHING, "point")
            nouns, groups = [EVERYTHING], [self._group(EVERYTHING, self.scene.objects)]
            return exchange("points", wording, answer, nouns=nouns, groups=groups)
        number = int(self.rng.integers(2, 4))
        nouns = self.nouns(min(number, len(self.objects)), 0)
        nouns = [n for n in nouns if len(nouns) == 1 or self.rng.random() > self.absent]
        absent = [n for n in CATEGORIES if n not in self.objects]
        nouns += [str(n) for n in self.rng.permutation(absent)[: max(0, number - len(nouns))]]
        nouns = [str(n) for n in self.rng.permutation(nouns)]
        named = [f"the {noun}" for noun in nouns]
        question = self.wording("points", "{list}").format(
            list=" and ".join([", ".join(named[:-1]), named[-1]])
        )
        there = [n for n in nouns if n in self.objects]
        answer = join_points([self._points(noun, "point") for noun in there], " ") or NONE_ANSWER
        groups = [self._group(noun, self.objects[noun]) for noun in there]
        return exchange("points", question, answer, nouns=nouns, groups=groups)

    def size(self) -> Branch | None:
        """Two things to compare, or the extreme one; None where it is debatable."""
        areas = {
            noun: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])
            for noun, objects in self.objects.items()
            for o in objects[:1]
        }
        order = str(self.rng.choice(list(ORDERS)))
        single = [noun for noun in areas if len(self.objects[noun]) == 1]
        if len(areas) == len(single) >= 3 and self.rng.random() < 0.4:
            ranked = sorted(areas, key=areas.__getitem__, reverse=order == "larger")
            first, second = areas[ranked[0]], areas[ranked[1]]
            words, slot, other = EXTREMES[order], "{most}", ""
            nouns, noun = ranked, ranked[0]
        elif len(single) >= 2:
            noun, other = (str(n) for n in self.rng.permutation(single)[:2])
            first, second = areas[noun], areas[other]
            words, slot, nouns = ORDERS[order], "{order}", [noun, other]
        else:
            return None
        if max(first, second) < CLEARLY_LARGER * min(first, second):
            return None
        right = noun if slot == "{most}" or (first > second) == (order == "larger") else other
        word = str(self.rng.choice(words))
        question = self.wording("size", slot).format(order=word, most=word, one=noun, other=other)
        return exchange("size", question, f"The {right}.", nouns=nouns, order=order)

    def at(self, nothing: float) -> Branch:
        """What is at a place: near the middle of a thing, or clearly beside all of them."""
        width, height = self.image_size
        x, y, found = self.rng.uniform(0, width), self.rng.uniform(0, height), None
        if self.rng.random() >= nothing or not self._is_free(x, y):
            index = int(self.rng.integers(len(self.scene.objects)))
            o = self.scene.objects[index]
            x, y = o.center
            for _ in range(4):
                dx, dy = self.rng.uniform(-0.3, 0.3, 2)
                near = x + dx * (o.box[2] - o.box[0]), y + dy * (o.box[3] - o.box[1])
                if self.scene.instance_map[int(near[1]), int(near[0])] == index:
                    x, y = near
                    break
            else:  # the centre will do, unless something else covers it
                if self.scene.instance_map[int(y), int(x)] not in (index, -1):
                    rows, columns = np.nonzero(self.scene.instance_map == index)
                    nearest = np.argmin(np.hypot(columns + 0.5 - x, rows + 0.5 - y))
                    x, y = columns[nearest] + 0.5, rows[nearest] + 0.5
            found = o.category
        x, y = (min(SCALE - 1, round(v / side * SCALE)) for v, side in ((x, width), (y, height)))
        answer = sentence(counted(found, 1)) if found else NOTHING_ANSWER
        question = self.wording("at").format(at=f"{x:03d} {y:03d}")
        return exchange("at", question, answer, x=x, y=y, found=found)

    def unknown(self) -> Branch:
        word = str(self.rng.choice(self.unknown_words))
        question = self.wording("unknown").format(
            a=f"{article(word)} {word}", one=word, many=f"{word}s"
        )
        return exchange("unknown", question, UNKNOWN_ANSWER, noun=word)

    def _is_free(self, x: float, y: float) -> bool:
        return not any(
            o.box[0] - FREE_PX < x < o.box[2] + FREE_PX
            and o.box[1] - FREE_PX < y < o.box[3] + FREE_PX
            for o in self.scene.objects
        )

    @staticmethod
    def _group(noun: str, objects: Sequence[SceneObject]) -> dict[str, Any]:
        return {"noun": noun, "boxes": [list(o.box) for o in objects]}

    # ---- pieces of the above ----

    def _points(self, noun: str, mode: Literal["point", "point_count"]) -> str:
        return self._format([o.center for o in self.objects.get(noun, ())], noun, mode)

    def _format(
        self,
        centres: Sequence[tuple[float, float]],
        label: str,
        mode: Literal["point", "point_count"],
    ) -> str:
        points = [Point(*self._snapped(center)) for center in centres]
        text = format_points(points, label, [self.image_size], mode=mode)
        return with_exact_points(text, [Point(*center) for center in centres])

    def _snapped(self, center: tuple[float, float]) -> tuple[float, float]:
        step_x, step_y = (self.snap * side / SCALE for side in self.image_size)
        return round(center[0] / step_x) * step_x, round(center[1] / step_y) * step_y

    def _branch(self, task: Task, noun: str, answer: str) -> Branch:
        if task == "presence" and self.rng.random() < self.bare:
            wording = BARE
        else:
            wording = self.wording(task)
        question = wording.format(a=f"{article(noun)} {noun}", one=noun, many=PLURAL[noun])
        objects = self.objects.get(noun, [])
        return exchange(
            task,
            question,
            answer,
            noun=noun,
            count=len(objects),
            points=[list(o.center) for o in objects],
            boxes=[list(o.box) for o in objects],
        )


def with_exact_points(text: str, points: Sequence[Point]) -> str:
    """An answer whose coordinates are rounded, remembering where its points really are."""
    tags = [tag._replace(points=tuple(points)) for tag in tags_of(text)]
    return PointsText(text, tags) if tags else text


def exchange(task: Task, question: str, answer: str, **truth: Any) -> Branch:
    """One question and its answer."""
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return Branch(messages, task, {**truth, "answer": answer})


def listed(counts: dict[str, int]) -> str:
    """``"A dog, two cats and an apple."``; ``"Nothing."`` for nothing."""
    parts = [counted(noun, count) for noun, count in counts.items()]
    if not parts:
        return NOTHING_ANSWER
    return sentence(" and ".join([", ".join(parts[:-1]), parts[-1]]) if parts[1:] else parts[0])


def sentence(text: str) -> str:
    """A capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."
