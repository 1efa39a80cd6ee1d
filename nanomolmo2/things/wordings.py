"""How it is asked for more of what is shown, and the names that things are given.

Slots: {like} examples, {unlike} examples that are not meant, {place} nothing or " in picture 2",
{a} a name with article, {one} a name, {many} its plural, {first} and {second} two examples.
"""

from __future__ import annotations

import zlib
from typing import Literal, get_args

import numpy as np

from nanomolmo2.emoji.sprites import article
from nanomolmo2.emoji.wordings import TEST_SHARE

Task = Literal["like", "count_like", "same", "name", "named", "count_named"]

_LIKE = (
    *("Point to everything like {like}", "Point to all things like {like}"),
    *("Point to every thing like {like}", "Find everything like {like}", "Find all like {like}"),
    *("Find more like {like}", "Show me everything like {like}", "Show me all things like {like}"),
    *(
        "Mark everything like {like}",
        "Mark all things like {like}",
        "Locate everything like {like}",
    ),
    *("Point at everything like {like}", "Please find all things like {like}"),
    *("Point to all of the same kind as {like}", "Find everything of the same kind as {like}"),
    *("Point to everything that looks like {like}", "Find all things that look like {like}"),
)
_COUNT_LIKE = (
    *("How many things like {like} are there", "How many things like {like} do you see"),
    *("How many like {like} are there", "How many things look like {like}"),
    *("How many of the same kind as {like} are there", "How many like {like} can you see"),
    *("How many like {like} can you count", "How many things like {like} can you find"),
)
UNLIKE = (
    *(", not like {unlike}", ", but not like {unlike}", " and not like {unlike}"),
    *(", nothing like {unlike}", ", but nothing like {unlike}", ", not things like {unlike}"),
)
PLACES = (
    "",
    " in the second picture",
    " in the second image",
    " in picture 2",
    " in the other one",
)

QUESTIONS: dict[Task, tuple[str, ...]] = {
    "like": tuple(f"{start}{{place}}{{but}}." for start in _LIKE),
    "count_like": (
        *(f"{start}{{place}}{{but}}?" for start in _COUNT_LIKE),
        "Count everything like {like}{place}{but}.",
        "Count all things like {like}{place}{but}.",
        "Count the things like {like}{place}{but}.",
    ),
    "same": (
        *("Is {first} like {second}?", "Are {first} and {second} alike?"),
        *("Is {first} the same as {second}?", "Are {first} and {second} of the same kind?"),
        *("Do {first} and {second} look the same?", "Is {first} of the same kind as {second}?"),
        *("Are {first} and {second} the same?", "Does {first} look like {second}?"),
    ),
    "name": (
        *("This {like} is {a}.", "Here {like} is {a}.", "{like} is {a}.", "This is {a}: {like}."),
        *("We call this {like} {a}.", "The thing at {like} is {a}.", "Look, {like} is {a}."),
        *("I call this {like} {a}.", "What you see at {like} is {a}."),
    ),
    "named": (
        *("Point to the {many}{place}.", "Point to all the {many}{place}."),
        *("Where are the {many}{place}?", "Find the {many}{place}.", "Find every {one}{place}."),
        *("Show me the {many}{place}.", "Point to every {one}{place}."),
        *("Mark all the {many}{place}.", "Locate the {many}{place}."),
    ),
    "count_named": (
        *("How many {many} are there{place}?", "How many {many} do you see{place}?"),
        *("Count the {many}{place}.", "Count all the {many}{place}."),
        *("How many {many} can you see{place}?", "How many {many} can you count{place}?"),
        *("What is the number of {many}{place}?",),
    ),
}
assert set(QUESTIONS) == set(get_args(Task))

# What people ask first is learned.
EVERYDAY = frozenset(
    {
        *(
            "Point to everything like {like}{place}{but}.",
            "Find everything like {like}{place}{but}.",
        ),
        *("How many things like {like} are there{place}{but}?", ", not like {unlike}"),
        *("This {like} is {a}.", "Is {first} like {second}?", "Point to the {many}{place}."),
        *("How many {many} are there{place}?", *PLACES[:2]),
    }
)

_NAMES = """
    walnut pill coin seed screw bolt nut washer bean grain cell log pipe bar button bead stone
    pebble shell leaf:leaves berry:berries nail pin clip key ring gear spring bottle cap lid cup
    plate spoon fork knife:knives bowl jar can box:boxes crate pallet brick tile plank board
    beam rod tube wire cable plug socket switch:switches bulb lamp battery:batteries chip
    resistor capacitor diode fuse relay sensor motor valve hinge handle knob wheel tyre chain
    rope hook anchor buoy boat ship car truck bus:buses train plane drone bird egg nest chick
    hen duck goose:geese sheep:sheep goat cow horse pig dog cat rabbit mouse:mice rat bee ant
    fly:flies moth beetle spider worm snail crab shrimp:shrimp fish:fish tree bush:bushes flower
    petal bud root bulblet mushroom nutlet almond cashew peanut hazelnut pecan pistachio
    chestnut acorn cone olive grape cherry:cherries plum peach:peaches apple pear lemon lime
    orange melon tomato:tomatoes potato:potatoes onion carrot pepper cucumber pea lentil kernel
    noodle dumpling cookie biscuit cracker candy:candies sweet chocolate:chocolates marble ball
    die:dice card token stamp badge medal tag label ticket letter envelope book pen pencil
    brush:brushes crayon eraser ruler sponge towel sock shoe glove hat helmet vest mask tablet
    capsule vial syringe:syringes droplet bubble crystal flake fossil star spot mark part piece
    thing item object widget gizmo sample specimen
"""
_SYLLABLES = [a + b for a in "bdfgklmnprstvwz" for b in "aeio"]


def _plural(name: str) -> str:
    """Of names without an irregular plural."""
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def is_for_tests(text: str) -> bool:
    """Whether training never asks in this way, or names anything so."""
    return text not in EVERYDAY and zlib.crc32(text.encode()) % TEST_SHARE == 0


NAMES: dict[str, str] = {
    one: many or _plural(one) for one, _, many in (n.partition(":") for n in _NAMES.split())
}
del NAMES["thing"]  # that is what things without a name are called
NAMELESS = "thing"


class Wordings:
    """Draws how a question is put, and names."""

    def __init__(self, rng: np.random.Generator, for_tests: bool = False, invented: float = 0.0):
        """``invented``: share of the names that are no words, such as "zotami"."""
        self.rng, self.for_tests, self.invented = rng, for_tests, invented

    def _of(self, texts: tuple[str, ...]) -> str:
        mine = [text for text in texts if is_for_tests(text) == self.for_tests]
        return str((mine or texts)[self.rng.integers(len(mine or texts))])

    def __call__(self, task: Task, *, counter: bool = False) -> str:
        """A wording; {but} in it is replaced, by a part with {unlike} where ``counter`` says."""
        return self._of(QUESTIONS[task]).replace("{but}", self._of(UNLIKE) if counter else "")

    def place(self, images: int) -> str:
        """Which picture is meant, if there are several."""
        return self._of(PLACES[1:]) if images > 1 else ""

    def name(self) -> tuple[str, str, str]:
        """A name: with article, alone, and its plural."""
        if self.rng.random() < self.invented:
            number = int(self.rng.integers(2, 4))
            one = "".join(self.rng.choice(_SYLLABLES, number).tolist())
            return f"{article(one)} {one}", one, f"{one}s"
        one = self._of(tuple(NAMES))
        return f"{article(one)} {one}", one, NAMES[one]
