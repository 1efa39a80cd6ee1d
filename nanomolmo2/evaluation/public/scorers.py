"""Scorers of single public benchmarks: see docs/benchmarks.md for their definitions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanomolmo2.evaluation.answers import (
    LETTERS,
    chosen_option,
    exact_match,
    normalize_vqa,
    short_answer,
)
from nanomolmo2.evaluation.measures import Measure, count_of, options_of, references_of, things_of
from nanomolmo2.evaluation.regions import Runs, read_mask
from nanomolmo2.evaluation.scorers import Shown, Truth
from nanomolmo2.processor.points import parse_count

# ---- points ----


def _points_at(truth: Truth, answer: str, shown: Shown) -> bool:
    return bool(shown.points(answer))


def _click(truth: Truth, answer: str, shown: Shown) -> float:
    """ScreenSpot: the first point lies in a box, edges included."""
    points = shown.points(answer)[:1]
    return float(any(thing.holds(point) for point in points for thing in things_of(truth, shown)))


CLICK = Measure("click", "right clicks", "point", _click, things_of, _points_at, None, 128)


def _in_mask(truth: Truth, answer: str, shown: Shown) -> float:
    """Point-Bench: there is a point, and all points lie in the mask.

    Coordinates are cut to whole pixels. Source: Molmo2, olmo/eval.
    """
    points, masks = shown.points(answer), [read_mask(mask) for mask in truth["masks"]]
    return float(
        bool(points)
        and all(any(_covers(mask, int(p.x), int(p.y)) for mask in masks) for p in points)
    )


def _covers(mask: object, x: int, y: int) -> bool:
    # A mask may be smaller than its picture.
    return isinstance(mask, Runs) and x < mask.width and y < mask.height and mask.holds(x, y)


def _check_masks(truth: Truth, shown: Shown) -> None:
    masks = truth.get("masks")
    if not isinstance(masks, list) or not masks:
        raise ValueError("expected masks in the truth")
    if not all(isinstance(read_mask(mask), Runs) for mask in masks):
        raise ValueError(
            "expected masks as run lengths, found polygons: the scorer points takes both"
        )


IN_MASK = Measure(
    "in_mask", "all points in the mask", "point", _in_mask, _check_masks, _points_at, None, 256
)

# ---- counts ----


def counted(answer: str, shown: Shown) -> int | None:
    """The number of points in an answer; of one without points the number that it says.

    Molmo2 takes what has no points for no answer, whatever it says; then only models that point
    could be measured.
    """
    return len(shown.points(answer)) or parse_count(answer)


POINT_COUNT = Measure(
    "point_count",
    "exact count",
    "count",
    lambda truth, answer, shown: float(counted(answer, shown) == count_of(truth)),
    lambda truth, shown: count_of(truth),
    lambda truth, answer, shown: counted(answer, shown) is not None,
    "There are none.",
    192,
    counted,
)

# ---- options, or words ----


def _option(truth: Truth, answer: str, shown: Shown) -> float:
    """RealWorldQA and AI2D: one of ``choices``, else one of ``answers`` in words, as VQA v2
    compares them."""
    answer = short_answer(answer)
    if "choices" in truth:
        letter, options = options_of(truth)
        return float(chosen_option(answer, options) == letter)
    references = references_of(truth)
    # A text of nothing but articles would be equal to any other.
    plain = normalize_vqa(answer)
    same = bool(plain) and plain in map(normalize_vqa, references)
    return max(float(same), exact_match(answer, references))


def _check_option(truth: Truth, shown: Shown) -> object:
    return options_of(truth) if "choices" in truth else references_of(truth)


def _says(truth: Truth, answer: str, shown: Shown) -> bool:
    if "choices" in truth:
        return chosen_option(short_answer(answer), options_of(truth)[1]) is not None
    return bool(answer.strip())


OPTION = Measure("option", "right answers", "choice", _option, _check_option, _says)

# ---- MMMU ----


def _mmmu(truth: Truth, answer: str, shown: Shown) -> float:
    """MMMU, of an option (``choices``, ``answer``) or of an open question (``answers``).

    Source: Yue et al. 2024, eval_utils.py of the benchmark. An answer that names no option is
    wrong; there, an option is drawn for it.
    """
    answer = short_answer(answer)
    if "choices" in truth:
        letter, options = options_of(truth)
        return float(named_option(answer, options) == letter)
    return open_answer(answer, references_of(truth))


def open_answer(answer: str, references: Sequence[str]) -> float:
    """1 if an answer states one of the references, a number to two places or a text within."""
    said = statements(answer)
    right = [form for reference in references for form in _forms(reference)]
    return float(any(_agrees(one, form) for one in said for form in right))


def named_option(answer: str, options: Sequence[str]) -> str | None:
    """Letter of the option that an answer names last; None if it names none.

    ``(B)`` goes before ``B`` and ``B.``, and the text of an option counts in answers of more than
    five words without any letter.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = LETTERS[: len(options)]
    for ending, searched in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in letters if ending.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(searched.format(letter)))
    if len(text.split()) <= 5:
        return None
    text = text.lower()
    places = {
        letter: text.rfind(option.lower())
        for letter, option in zip(letters, options, strict=False)
        if option.lower() in text
    }
    return max(places, key=places.__getitem__, default=None)


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def statements(answer: str) -> list[str | float]:
    """What an answer says: the ends of its sentences after words such as ``is``, and numbers."""
    answer = answer.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", answer)
    found = []
    for number, sentence in enumerate(sentences):
        keys = (*_KEYS, "=") if number == len(sentences) - 1 else _KEYS
        ends = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        # The shortest; the first of equals, and one that is empty gives way to the next.
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in {":", ",", ".", "!", "?", ";", "'"}:
            found.append(shortest)
    found = found or [answer]
    numbers = [n for text in found for form in _NUMBER_FORMS for n in re.findall(form, text)]
    return [form for text in (*found, *numbers) for form in _forms(text)]


def _forms(text: str) -> list[str | float]:
    """A number, to two places; a text in small letters, a single one of them with a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _agrees(said: str | float, right: str | float) -> bool:
    if isinstance(said, str):
        return isinstance(right, str) and right in said
    return said == right


def _mmmu_says(truth: Truth, answer: str, shown: Shown) -> bool:
    if "choices" in truth:
        return named_option(short_answer(answer), options_of(truth)[1]) is not None
    return bool(answer.strip())


MMMU = Measure("mmmu", "right answers", "choice", _mmmu, _check_option, _mmmu_says)
