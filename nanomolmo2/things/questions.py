"""Questions about scenes of things, by example; answers in Molmo2's wording, and the truth.

    like         Point to everything like <point>.             <points ...>thing</points>
    count_like   How many things like <point> are there?       Counting the <points ...>thing
                                                               </points> shows a total of 5.
    same         Is <point> like <point>?                      Yes.
    named        This <point> is a walnut.                     A walnut.
                 Point to the walnuts.                         <points ...>walnut</points>
    count_named  This <point> is a walnut.                     A walnut.
                 How many walnuts are there?                   Counting the <points ...>walnut
                                                               </points> shows a total of 5.

A <point> is a part of the message, ``{"type": "point", "x", "y", "image"}``. Up to three examples
are given, and up to two that are not meant ("not like <point>"). With two pictures the examples lie
in the first and the second is asked about. The example itself is one of the things that are
pointed to. What counts as like is told in `scenes`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.example import Branch, Message
from nanomolmo2.emoji.questions import sentence, with_exact_points
from nanomolmo2.processor.chat import ContentItem
from nanomolmo2.processor.point import Point
from nanomolmo2.processor.points import NOTHING_THERE, format_points
from nanomolmo2.things.scenes import Kind, Scene
from nanomolmo2.things.wordings import NAMELESS, Task, Wordings

MAX_EXAMPLES, MAX_UNLIKE = 3, 2
BARE_PX = 8  # a bare place is so far from all things


@dataclass(frozen=True)
class FindMix(Config):
    """How many questions of each task an example gets, and how they are drawn.

    Attributes:
        like, count_like, same, named, count_named: questions an example.
        examples: chances of 1, 2, ... examples.
        unlike: share of the questions by example that also say what is not meant.
        in_one: share of the named questions that name and ask in one message.
        bare: share of the questions by example whose example lies on bare ground: there are none.
        invented: share of the names that are made up of syllables.
        casual: share of the questions that start in lower case and lack the final mark.
    """

    like: int = 3
    count_like: int = 1
    same: int = 4
    named: int = 1
    count_named: int = 1
    examples: tuple[float, ...] = (0.6, 0.2, 0.2)
    unlike: float = 0.25
    in_one: float = 0.4
    bare: float = 0.03
    invented: float = 0.0
    casual: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= len(self.examples) <= MAX_EXAMPLES or abs(sum(self.examples) - 1) > 1e-6:
            raise ValueError(
                f"examples are {self.examples}, expected the chances of 1 to {MAX_EXAMPLES} "
                f"examples, which sum up to 1"
            )


TEST_MIX = FindMix(2, 1, 2, 1, 1, bare=0.0, casual=0.0)


def make_branches(
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    mix: FindMix | None = None,
    *,
    for_tests: bool = False,
) -> list[Branch]:
    """Ask about one scene, or with the examples in a first scene about a second one.

    Args:
        scenes: one, or two of which the second was drawn with the kinds of the first as ``known``.
        for_tests: ask in the wordings, and with the names, that training never uses.
    Returns: branches whose ``truth`` holds ``answer`` and: of ``same`` nothing else; of the other
        tasks ``noun`` (the label of the points), ``kind`` (its id), ``count``, ``points`` (exact
        middles, pixels), ``boxes``, ``image`` (which picture these are in, from 1) and
        ``examples``, ``unlike`` (x, y, image).
    """
    mix = mix or FindMix()
    asker = _Asker(scenes, rng, mix, for_tests)
    branches: list[Branch] = []
    for task, number in (("like", mix.like), ("count_like", mix.count_like)):
        branches += [asker.like("like" if task == "like" else "count_like") for _ in range(number)]
    same = (asker.same(i % 2 == 0) for i in range(mix.same))
    branches += [branch for branch in same if branch is not None]
    branches += [asker.named("named") for _ in range(mix.named)]
    branches += [asker.named("count_named") for _ in range(mix.count_named)]
    return branches


class _Asker:
    """Questions about one or two pictures, drawn from one stream of random numbers."""

    def __init__(
        self, scenes: Sequence[Scene], rng: np.random.Generator, mix: FindMix, for_tests: bool
    ) -> None:
        if not 1 <= len(scenes) <= 2:
            raise ValueError(f"found {len(scenes)} scenes, expected one, or a reference and one")
        self.shown, self.asked = scenes[0], scenes[-1]
        self.image = len(scenes)  # the number of the picture that is asked about
        self.rng, self.mix = rng, mix
        self.wording = Wordings(rng, for_tests, mix.invented)
        self.casual = 0.0 if for_tests else mix.casual
        height, width = self.asked.image.shape[:2]
        self.sizes = [(s.image.shape[1], s.image.shape[0]) for s in scenes]
        self.size = (width, height)
        self.order: list[int] = []

    # ---- what to ask for ----

    def kind(self) -> int:
        """The next kind to ask about: each that is shown comes once before any comes again."""
        there = [k for k in range(len(self.shown.kinds)) if self.shown.of_kind(k)]
        if not self.order:
            self.order = [int(k) for k in self.rng.permutation(there)]
            if 0 in there:  # the first kind has look-alikes: it is asked about first
                self.order.sort(key=lambda k: k != 0)
        return self.order.pop(0)

    def things_of(self, kind: Kind) -> list[int]:
        """Numbers of the things of a kind in the picture that is asked about."""
        mine = [i for i, other in enumerate(self.asked.kinds) if other is kind]
        return [number for i in mine for number in self.asked.of_kind(i)]

    def examples(self, kind: int) -> list[dict[str, float]]:
        """Places on one to three things of a kind."""
        numbers = self.shown.of_kind(kind)
        chances = np.array(self.mix.examples)
        count = 1 + int(self.rng.choice(len(chances), p=chances))
        return [self._on(n) for n in self.rng.permutation(numbers)[:count].tolist()]

    def counterexamples(self, kind: int) -> list[dict[str, float]]:
        """Places on one or two things of other kinds, of look-alikes first."""
        kinds = self.shown.kinds
        others = [i for i, thing in enumerate(self.shown.things) if thing.kind != kind]
        others = [int(i) for i in self.rng.permutation(others)] if others else []

        def is_far(number: int) -> bool:
            other = kinds[self.shown.things[number].kind]
            return other.of != kind and kinds[kind].of != self.shown.things[number].kind

        others.sort(key=is_far)
        return [self._on(n) for n in others[: int(self.rng.integers(1, MAX_UNLIKE + 1))]]

    def _on(self, number: int) -> dict[str, float]:
        x, y = self.shown.point_on(self.rng, number)
        return {"x": x, "y": y, "image": 1}

    # ---- questions ----

    def like(self, task: Literal["like", "count_like"]) -> Branch:
        kind = self.kind()
        examples = self.examples(kind)
        unlike = self.counterexamples(kind) if self.rng.random() < self.mix.unlike else []
        ground = self.bare() if self.rng.random() < self.mix.bare else None
        if ground is not None:
            return self._like_nothing(task, ground)
        wording = self._casually(self.wording(task, counter=bool(unlike)))
        wording = wording.replace("{place}", self.wording.place(self.image))
        content = content_of(wording, like=examples, unlike=unlike)
        answer = self._answer(self.shown.kinds[kind], NAMELESS, task == "count_like")
        messages: list[Message] = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        return self._branch(task, messages, kind, NAMELESS, examples, unlike)

    def _like_nothing(self, task: Literal["like", "count_like"], at: dict[str, float]) -> Branch:
        wording = self._casually(self.wording(task))
        wording = wording.replace("{place}", self.wording.place(self.image))
        messages: list[Message] = [
            {"role": "user", "content": content_of(wording, like=[at])},
            {"role": "assistant", "content": NOTHING_THERE},
        ]
        truth = {"noun": NAMELESS, "kind": "", "count": 0, "points": [], "boxes": []}
        examples = [[at["x"], at["y"], at["image"]]]
        more = {"image": self.image, "examples": examples, "unlike": [], "answer": NOTHING_THERE}
        return Branch(messages, task, {**truth, **more})

    def same(self, alike: bool) -> Branch | None:
        """Two things of one picture, or none if all are, or none are, of one kind."""
        things = self.shown.things
        kind = self.kind()
        mine = [int(i) for i in self.rng.permutation(self.shown.of_kind(kind))]
        if alike:
            pair = mine[:2]
        else:
            near = [k for k, other in enumerate(self.shown.kinds) if other.of == kind]
            others = [i for i, thing in enumerate(things) if thing.kind != kind]
            close = [i for i in others if things[i].kind in near]
            pool = close if close and self.rng.random() < 0.6 else others
            pair = [*mine[:1], *(int(i) for i in self.rng.permutation(pool)[:1])]
        if len(pair) < 2:
            return None
        first, second = (self._on(i) for i in pair)
        if self.image == 2 and self.rng.random() < 0.5:  # across the pictures
            other = self._across(kind, alike)
            if other is not None:
                second = other
        wording = self._casually(self.wording("same"))
        messages: list[Message] = [
            {"role": "user", "content": content_of(wording, first=[first], second=[second])},
            {"role": "assistant", "content": "Yes." if alike else "No."},
        ]
        return Branch(messages, "same", {"answer": "Yes." if alike else "No."})

    def _across(self, kind: int, alike: bool) -> dict[str, float] | None:
        """A place on a thing of this kind, or of another one, in the second picture."""
        mine = self.things_of(self.shown.kinds[kind])
        pool = mine if alike else [i for i in range(len(self.asked.things)) if i not in mine]
        if not pool:
            return None
        x, y = self.asked.point_on(self.rng, pool[int(self.rng.integers(len(pool)))])
        return {"x": x, "y": y, "image": 2}

    def bare(self) -> dict[str, float] | None:
        """A place with nothing near it; None if a few tries find none."""
        height, width = self.shown.instance_map.shape
        for _ in range(8):
            x, y = int(self.rng.integers(width)), int(self.rng.integers(height))
            near = self.shown.instance_map[
                max(y - BARE_PX, 0) : y + BARE_PX + 1, max(x - BARE_PX, 0) : x + BARE_PX + 1
            ]
            if (near < 0).all():
                return {"x": x + 0.5, "y": y + 0.5, "image": 1}
        return None

    def named(self, task: Literal["named", "count_named"]) -> Branch:
        """What a thing is called, then a question that calls it so."""
        kind = self.kind()
        a, one, many = self.wording.name()
        examples = self.examples(kind)

        def filled(wording: str) -> str:
            place = self.wording.place(self.image)
            return wording.format(a=a, one=one, many=many, like="{like}", place=place)

        naming, asking = filled(self.wording("name")), self._casually(filled(self.wording(task)))
        answer = self._answer(self.shown.kinds[kind], one, task == "count_named")
        if self.rng.random() < self.mix.in_one:
            messages: list[Message] = [
                {"role": "user", "content": content_of(f"{naming} {asking}", like=examples)},
                {"role": "assistant", "content": answer},
            ]
        else:
            messages = [
                {"role": "user", "content": content_of(naming, like=examples)},
                {"role": "assistant", "content": sentence(a)},
                {"role": "user", "content": asking},
                {"role": "assistant", "content": answer},
            ]
        return self._branch(task, messages, kind, one, examples, [])

    # ---- pieces of the above ----

    def _casually(self, wording: str) -> str:
        if self.rng.random() < self.casual:
            return (wording[0].lower() + wording[1:]).rstrip("?.")
        return wording

    def _answer(self, kind: Kind, label: str, counted: bool) -> str:
        things = [self.asked.things[i] for i in self.things_of(kind)]
        points = [Point(*thing.center, self.image) for thing in things]
        mode: Literal["point", "point_count"] = "point_count" if counted else "point"
        text = format_points(points, label, self.sizes, mode=mode)
        return with_exact_points(text, points)

    def _branch(
        self,
        task: Task,
        messages: list[Message],
        kind: int,
        label: str,
        examples: Sequence[dict[str, float]],
        unlike: Sequence[dict[str, float]],
    ) -> Branch:
        things = [self.asked.things[i] for i in self.things_of(self.shown.kinds[kind])]
        truth: dict[str, Any] = {
            "noun": label,
            "kind": self.shown.kinds[kind].id,
            "count": len(things),
            "points": [list(thing.center) for thing in things],
            "boxes": [list(thing.box) for thing in things],
            "image": self.image,
            "examples": [[p["x"], p["y"], p["image"]] for p in examples],
            "unlike": [[p["x"], p["y"], p["image"]] for p in unlike],
            "answer": str(messages[-1]["content"]),
        }
        return Branch(messages, task, truth)


def content_of(wording: str, **slots: Sequence[dict[str, float]]) -> list[ContentItem]:
    """The parts of a message: its text, with points where its slots are.

    Several points of a slot are joined as in a sentence: "<point>, <point> and <point>".
    """
    parts: list[ContentItem] = []

    def add(text: str) -> None:
        if parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": "text", "text": text})

    for piece in re.split(r"(\{\w+\})", wording):
        points = slots.get(piece[1:-1]) if piece.startswith("{") else None
        if points is None:
            add(piece)
            continue
        for i, point in enumerate(points):
            if i:
                add(" and " if i == len(points) - 1 else ", ")
            item = {"type": "point", "x": point["x"], "y": point["y"], "image": int(point["image"])}
            parts.append(item)  # type: ignore[arg-type]
    return parts
