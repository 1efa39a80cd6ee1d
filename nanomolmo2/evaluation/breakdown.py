"""What lists of points and numbers were worth: in all, by how many things there are, by size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanomolmo2.evaluation.intervals import bootstrap_interval
from nanomolmo2.evaluation.report import format_score
from nanomolmo2.evaluation.scorers import f1

COUNTS = (0, 1, 2, 6, 11, 21, 41)  # where groups of true numbers begin
SIZES = (0, 16, 32, 64, 128)  # and of sizes, pixels


@dataclass(frozen=True)
class Tally:
    """What one answer was worth.

    Attributes:
        picture: the same for answers about the same picture, which are resampled together.
        true: how many things there are.
        said: the number that the answer gives; None if it gives none.
        points: how many points it has; ``hits``: those that lie in a thing of their own. None where
            nobody was asked for points.
        px: median of the things' longer sides, pixels; None where they have none.
    """

    picture: int
    true: int
    said: int | None
    points: int | None = None
    hits: int | None = None
    px: float | None = None

    @property
    def f1(self) -> float | None:
        """Of points against things; 1 where there is nothing and the answer says so."""
        if self.points is None or self.hits is None:
            return None
        if self.said is None:
            return 0.0
        return f1(self.hits, self.points, self.true)

    @property
    def is_exact(self) -> bool:
        return self.said == self.true

    @property
    def error(self) -> int | None:
        return None if self.said is None else abs(self.said - self.true)

    @property
    def relative_error(self) -> float | None:
        """By the true number, or by 1 where that is 0."""
        return None if self.error is None else self.error / max(self.true, 1)


def figures(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The numbers of some answers, by name, as plain JSON types; without what nobody knows.

    ``f1``, ``exact``, ``mae`` (mean absolute error of the count) and ``relative`` (the same by the
    true number) are means over the answers, the last two over those that give a number; each has
    its 95 % interval beside it, such as ``f1_interval``. ``precision`` and ``recall`` are of all
    points and all things together.
    """
    found: dict[str, Any] = {"questions": len(tallies)}
    means: dict[str, Callable[[Tally], float | None]] = {
        "f1": lambda tally: tally.f1,
        "exact": lambda tally: float(tally.is_exact),
        "mae": lambda tally: tally.error,
        "relative": lambda tally: tally.relative_error,
    }
    for name, of in means.items():
        known = [(float(value), t.picture) for t in tallies if (value := of(t)) is not None]
        if known:
            values, pictures = zip(*known, strict=True)
            found[name] = float(np.mean(values))
            found[f"{name}_interval"] = list(bootstrap_interval(values, pictures))
    pointed = [tally for tally in tallies if tally.f1 is not None]
    if pointed:
        hits = sum(tally.hits or 0 for tally in pointed)
        points = sum(tally.points or 0 for tally in pointed)
        things = sum(tally.true for tally in pointed)
        if points:
            found["precision"] = hits / points
        if things:
            found["recall"] = hits / things
    return found


def by_count(tallies: Sequence[Tally]) -> dict[str, dict[str, Any]]:
    """`figures` of the answers with so many things."""
    return _grouped([(t.true, t) for t in tallies], COUNTS, "")


def by_size(tallies: Sequence[Tally]) -> dict[str, dict[str, Any]]:
    """`figures` of the answers whose things are so large; without those of unknown size."""
    return _grouped([(t.px, t) for t in tallies if t.px is not None], SIZES, " px")


def _grouped(
    valued: Sequence[tuple[float, Tally]], starts: Sequence[int], unit: str
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Tally]] = {_name(starts, start, unit): [] for start in starts}
    for value, tally in valued:
        groups[_name(starts, value, unit)].append(tally)
    return {name: figures(found) for name, found in groups.items() if found}


def _name(starts: Sequence[int], value: float, unit: str) -> str:
    """``"2 to 5"``, ``"16 to 31 px"``, ``"41 or more"``: the group that a value is in."""
    place = bisect_right(starts, value) - 1
    low = starts[place]
    if place + 1 == len(starts):
        return f"{low}{unit} or more"
    high = starts[place + 1] - 1
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


# ---- for people ----

NAMES = ("f1", "precision", "recall", "exact", "mae", "relative")
HEAD = ("point F1", "precision", "recall", "exact count", "error", "of the number")
LEGEND = (
    "point F1: mean over the questions; precision, recall: of all points and all things together; "
    "exact count: share of the answers whose number is right; error: mean absolute error of that "
    "number, and by the true number; [95 % interval, pictures resampled]"
)


def number(name: str, value: float) -> str:
    """A figure as the tables write it."""
    if name == "mae":
        return f"{value:.2f}"
    return f"{100 * value:.1f} %" if name == "relative" else format_score(value)


def cell(found: Mapping[str, Any], name: str) -> str:
    """``".912 [.903, .921]"``; ``"-"`` for what nobody knows."""
    if name not in found:
        return "-"
    text = number(name, found[name])
    if f"{name}_interval" in found:
        low, high = (number(name, end) for end in found[f"{name}_interval"])
        text += f" [{low}, {high}]"
    return text


def part_line(task: str, name: str, found: Mapping[str, Any]) -> list[str]:
    """A line of a table: of a part of a task's answers."""
    return [task, name, str(found["questions"]), *(cell(found, figure) for figure in NAMES)]


def part_lines(task: str, *kinds: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Of each kind of part that there is more than one of, a line a part."""
    parts = [part for kind in kinds if len(kind) > 1 for part in kind.items()]
    return [part_line(task, name, found) for name, found in parts]
