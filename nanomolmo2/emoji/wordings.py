"""How questions about emoji are put: several dozen wordings of each, some of them only for tests.

Slots: {a} noun with article, {one} noun, {many} its plural, {list} "the dog and the cat",
{where} direction and "the", {order} "larger", {most} "largest", {other} a second noun, {at} a place
in thousandths or a time in seconds, {more} "more" or "fewer", {which} "the first" or "the second".
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from nanomolmo2.emoji.sprites import ASSETS

Task = Literal[
    "presence",
    "count",
    "number",
    "point",
    "caption",
    "spatial",
    "points",
    "size",
    "at",
    "unknown",
    "more",
    "difference",
    "track",
    "appears",
    "video_point",
]
Direction = Literal["left", "right", "above", "below"]

DIRECTIONS: dict[Direction, str] = {
    "left": "left of the",
    "right": "right of the",
    "above": "above the",
    "below": "below the",
}
ORDERS = {"larger": ("larger", "bigger"), "smaller": ("smaller",)}
EXTREMES = {"larger": ("largest", "biggest"), "smaller": ("smallest",)}
AMOUNTS = {"more": ("more",), "fewer": ("fewer", "less")}
PICTURES = ("the first", "the second")
BARE = "{one}?"

TEST_SHARE = 6  # one wording out of about so many is asked in tests only

_PICTURE = ("this picture", "the picture", "this image", "the image")
_THERE = ("", " here", *(f" in {picture}" for picture in _PICTURE))
_CLIP = ("", " in this video", " in the video", " in this clip", " in the clip")


def _each(starts: Iterable[str], ends: Iterable[str], mark: str = "") -> tuple[str, ...]:
    ends = tuple(ends)
    return tuple(f"{start}{end}{mark}" for start in starts for end in ends)


_COUNTS = (
    *_each(("How many {many} are there", "How many {many} do you see"), _THERE, "?"),
    *_each(("How many {many} can you see", "How many {many} can you count"), _THERE, "?"),
    *_each(("Count the {many}", "Please count the {many}", "Count all the {many}"), _THERE, "."),
    *_each(("Tell me how many {many} there are", "Count every {one}"), _THERE, "."),
    *_each(("What is the number of {many}",), _THERE, "?"),
    "How many {many}?",
)
_FINDING = (
    *("Point to", "Point at", "Please point to", "Show me", "Find", "Please find", "Locate"),
    *("Mark", "Please show me"),
)

QUESTIONS: dict[Task, tuple[str, ...]] = {
    "presence": (
        *_each(("Is there {a}", "Do you see {a}", "Can you see {a}"), _THERE, "?"),
        *_each(("Can you find {a}", "Do you notice {a}", "Is there any {one}"), _THERE, "?"),
        *_each(("Are there any {many}", "Do you see any {many}"), _THERE, "?"),
        *_each(("Can you see any {many}", "Can you find any {many}"), _THERE, "?"),
        *(
            f"Does {picture} {shows} {{a}}?"
            for picture in _PICTURE
            for shows in ("show", "have", "contain")
        ),
    ),
    "count": _COUNTS,
    "number": _each(
        _COUNTS,
        (" Answer with a number.", " Just the number.", " Only the number.", " Just a number."),
    ),
    "point": (
        *_each(
            _each(_FINDING, (" the {one}", " the {many}", " all the {many}", " every {one}")),
            ("", " in this picture", " in the image"),
            ".",
        ),
        *_each(("Where is the {one}", "Where are the {many}"), _THERE, "?"),
        *_each(("Where do you see the {one}", "Where can you see the {many}"), _THERE, "?"),
    ),
    "caption": (
        *_each(
            (
                *("Describe ", "Please describe ", "Caption ", "Tell me what is in "),
                *("Tell me about ", "Name everything in ", "Tell me what you see in "),
            ),
            _PICTURE,
            ".",
        ),
        *_each(("What is in ", "What do you see in ", "What can you see in "), _PICTURE, "?"),
        *_each(("What is shown in ", "What things are in "), _PICTURE, "?"),
        *(f"What does {picture} show?" for picture in _PICTURE),
        *("What do you see?", "What can you see?", "What is here?", "What do you see here?"),
        *("What can you see here?", "Describe what you see.", "Tell me what you see."),
    ),
    "spatial": (
        *_each(
            (
                *("What is {where} {one}", "What do you see {where} {one}"),
                *("What can you see {where} {one}", "What lies {where} {one}"),
                *("Which thing is {where} {one}", "What is there {where} {one}"),
                *("What is shown {where} {one}",),
            ),
            _THERE,
            "?",
        ),
        *_each(("Name the thing {where} {one}", "Tell me what is {where} {one}"), _THERE, "."),
    ),
    "points": (
        *_each(_FINDING, (" {list}", " {list} here", " {list} in the picture"), "."),
        *_each(_FINDING, (" everything", " all the things", " all objects"), "."),
        *_each(_FINDING, (" everything here", " everything in the picture"), "."),
        *_each(("Where are {list}", "Where do you see {list}"), _THERE, "?"),
    ),
    "size": (
        *_each(("Which is {order}, the {one} or the {other}",), _THERE, "?"),
        *_each(("What is {order}, the {one} or the {other}",), _THERE, "?"),
        *_each(("Which one is {order}, the {one} or the {other}",), _THERE, "?"),
        *_each(("Which thing is {order}, the {one} or the {other}",), _THERE, "?"),
        *_each(("What is the {most} thing", "Which thing is the {most}"), _THERE, "?"),
        *_each(("What is the {most} object", "Which object is the {most}"), _THERE, "?"),
        *_each(("Name the {most} thing", "Tell me the {most} thing"), _THERE, "."),
    ),
    "at": (
        *_each(
            (
                *("What is ", "What do you see ", "What can you see ", "What is shown "),
                *("What lies ", "Which thing is ", "Which object is "),
            ),
            ("at {at}", "at the point {at}", "at position {at}", "at the place {at}"),
            "?",
        ),
        *_each(("Name the thing ", "Tell me what is "), ("at {at}", "at the point {at}"), "."),
    ),
    "more": _each(
        (
            *("Which picture has {more} {many}", "Which image has {more} {many}"),
            *("Which picture shows {more} {many}", "Which image shows {more} {many}"),
            *("Which one has {more} {many}", "In which picture are there {more} {many}"),
            *(
                "In which image are there {more} {many}",
                "In which picture do you see {more} {many}",
            ),
            *("In which image do you see {more} {many}", "Where are there {more} {many}"),
            *("Where do you see {more} {many}", "Which one shows {more} {many}"),
        ),
        ("?", ", the first or the second?", " of these two?"),
    ),
    "difference": tuple(
        wording.replace("PICTURE", picture)
        for picture in ("picture", "image", "one")
        for wording in (
            *("What is only in {which} PICTURE?", "What is in {which} PICTURE only?"),
            *("What does only {which} PICTURE show?", "What do you see only in {which} PICTURE?"),
            *(
                "What can you see only in {which} PICTURE?",
                "What is there only in {which} PICTURE?",
            ),
            *("Tell me what is only in {which} PICTURE.", "Name what only {which} PICTURE shows."),
            *("What has only {which} PICTURE?", "Which things are only in {which} PICTURE?"),
            *("Which things does only {which} PICTURE show?",),
        )
    ),
    "track": (
        *_each(
            _each(
                ("Track", "Please track", "Follow", "Please follow"),
                (" the {one}", " the {many}", " every {one}", " all the {many}"),
            ),
            (*_CLIP[:3], " in every frame"),
            ".",
        ),
        *_each(("Where is the {one} in every frame", "Where does the {one} go"), _CLIP, "?"),
    ),
    "appears": _each(
        (
            *("When does the {one} appear", "When does {a} appear", "When do you first see {a}"),
            *("When can you first see {a}", "When do you first see the {one}"),
            *("When is the {one} first there", "When does the {one} first appear"),
            *("When is there {a} for the first time",),
        ),
        _CLIP,
        "?",
    ),
    "video_point": (
        *_each(
            _each(_FINDING, (" the {one}", " the {many}")),
            (" at {at} seconds", " after {at} seconds"),
            ".",
        ),
        *_each(
            ("Where is the {one}", "Where are the {many}", "Where do you see the {one}"),
            (" at {at} seconds", " after {at} seconds"),
            "?",
        ),
    ),
    "unknown": (),
}
QUESTIONS["unknown"] = tuple(
    wording for task in ("presence", "count", "point") for wording in QUESTIONS[task]
)
assert set(QUESTIONS) == set(get_args(Task))


# What people ask first is learned.
EVERYDAY = frozenset(
    {
        *("Is there {a}?", "Is there {a} in the picture?", "Do you see {a}?", "Can you see {a}?"),
        *("How many {many} are there?", "How many {many}?", "Count the {many}."),
        *("How many {many} are there? Answer with a number.", "Where is the {one}?"),
        *(
            "Point to the {one}.",
            "Point to the {many}.",
            "Point at the {one}.",
            "Show me the {one}.",
        ),
        *("Find the {one}.", "Point to {list}.", "Point to everything.", "Point to all objects."),
        *("Describe this picture.", "Describe the picture.", "Describe this image."),
        *("Describe the image.", "What is in this picture?", "What do you see?"),
        *("What is {where} {one}?", "Which is {order}, the {one} or the {other}?"),
        *("What is the {most} thing?", "What is at {at}?", "Which picture has {more} {many}?"),
        *("What is only in {which} picture?", "Track the {one}.", "Track the {many}."),
        *("When does the {one} appear?", "Point to the {one} at {at} seconds."),
    }
)


def is_for_tests(wording: str) -> bool:
    """Whether training never asks in this way, or about this unknown word."""
    return wording not in EVERYDAY and zlib.crc32(wording.encode()) % TEST_SHARE == 0


TRAINING: dict[Task, tuple[str, ...]] = {
    task: tuple(w for w in wordings if not is_for_tests(w)) for task, wordings in QUESTIONS.items()
}
TESTING: dict[Task, tuple[str, ...]] = {
    task: tuple(w for w in wordings if is_for_tests(w)) for task, wordings in QUESTIONS.items()
}

# Things that `tiny` was never shown, and is asked about all the same.
_UNKNOWN = (ASSETS / "unknown.txt").read_text(encoding="utf-8").split()
UNKNOWN_IN_TRAINING = tuple(word for word in _UNKNOWN if not is_for_tests(word))
UNKNOWN_IN_TESTS = tuple(word for word in _UNKNOWN if is_for_tests(word))


class Wordings:
    """Draws how a question is put."""

    def __init__(self, rng: np.random.Generator, casual: float = 0.0, for_tests: bool = False):
        """``casual``: share in lower case without the final mark."""
        self.rng, self.casual, self.of_task = rng, casual, TESTING if for_tests else TRAINING

    def __call__(self, task: Task, slot: str = "", has_slot: bool = True) -> str:
        """A wording of the task: one that has the slot, or one that has not."""
        wordings = [w for w in self.of_task[task] if (slot in w) == has_slot]
        wording = wordings[self.rng.integers(len(wordings))]
        if self.rng.random() < self.casual:
            wording = (wording[0].lower() + wording[1:]).rstrip("?.")
        return wording
