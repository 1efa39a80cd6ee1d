"""Scores of single answers. Positions are pixels of the original picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from nanomolmo2.data.emoji.sprites import CATEGORIES, PLURALS

Box = Sequence[float]  # x0, y0, x1, y1

_FORMS = {
    form: noun for n, p in zip(CATEGORIES, PLURALS, strict=True) for form, noun in ((n, n), (p, n))
}
# Longest first: "hot dog" must not be read as "dog".
_NOUN = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, _FORMS), key=len, reverse=True)) + r")\b"
)


def f1(hits: int, predicted: int, expected: int) -> float:
    """Harmonic mean of precision and recall; 1 where nothing was expected and nothing predicted."""
    return 2 * hits / (predicted + expected) if predicted + expected else 1.0


def point_f1(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> float:
    """F1 of points against boxes: a point hits if it lies inside a box of its own."""
    return f1(count_matches(points, boxes), len(points), len(boxes))


def count_matches(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> int:
    """Size of the largest one-to-one matching of points to boxes that hold them."""
    owner: dict[int, int] = {}  # box -> point

    def place(point: int, seen: set[int]) -> bool:
        x, y = points[point]
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            if i not in seen and x0 <= x <= x1 and y0 <= y <= y1:
                seen.add(i)
                if i not in owner or place(owner[i], seen):
                    owner[i] = point
                    return True
        return False

    return sum(place(i, set()) for i in range(len(points)))


def nouns_in(text: str) -> set[str]:
    """The known nouns that a text names, in singular or plural."""
    return {_FORMS[form] for form in _NOUN.findall(text.lower())}


def caption_f1(text: str, nouns: Collection[str]) -> float:
    """F1 of the set of nouns that a caption names."""
    named = nouns_in(text)
    return f1(len(named & set(nouns)), len(named), len(nouns))
