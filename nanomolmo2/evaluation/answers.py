"""Scores of short answers in text, as the public benchmarks define them: each 0 to 1.

Every function takes the answer and what counts as right, and knows nothing of data sets. Sources:
the definitions of VQA v2 (Antol et al. 2015), ST-VQA (Biten et al. 2019), ChartQA (Masry et al.
2022) and MMMU (Yue et al. 2024).
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Sequence

# ---- words ----


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references; case, outer space and a last dot do not count."""
    return float(plain(answer) in {plain(reference) for reference in references})


def plain(text: str) -> str:
    """A text as `exact_match` compares it; a letter and its accent may be one sign or two."""
    folded = unicodedata.normalize("NFC", text.casefold())
    return " ".join(folded.split()).removesuffix(".").rstrip()


def short_answer(text: str) -> str:
    """The part of a text that is taken for its answer: what follows ``Answer:``, else the most
    frequent line, the first of equals; spaces are single ones.

    Source: Molmo2, olmo/eval (``VqaEval``).
    """
    _, mark, after = text.strip().partition("Answer:")
    if mark:
        return after.partition("Answer:")[0].strip()
    lines = [" ".join(line.split()) for line in text.strip().split("\n")]
    return max(lines, key=lines.count)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of VQA v2, TextVQA and OK-VQA: how many people gave this answer, three are enough.

    As Molmo2 has it: 1 for three of ten. The first score of VQA v2 is the mean over all ways to
    leave one of the people out, .9 for three of ten. A single reference counts for all people.
    """
    given = normalize_vqa(answer)
    matches = sum(given == normalize_vqa(reference) for reference in references)
    return min(1.0, matches / (3 if len(references) > 1 else 1))


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTED)}}
_ARTICLES = {"a", "an", "the"}
_SHORT_FORMS = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
    """,
)


def _misspellings(word: str) -> list[str]:
    """A short form without one of its apostrophes."""
    places = [i for i, letter in enumerate(word) if letter == "'"]
    return [word[:i] + word[i + 1 :] for i in places]


_CORRECTED = {wrong: word for word in _SHORT_FORMS for wrong in _misspellings(word)}
_CORRECTED["somebody'd"] = "somebodyd"  # as in the official table


def normalize_vqa(text: str) -> str:
    """Answer as VQA v2 compares it: case, punctuation, articles, number words, short forms."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result = text
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_edge else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = (_NUMBERS.get(word, word) for word in result.split())
    return " ".join(_CORRECTED.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of DocVQA, InfoVQA and ST-VQA, of one answer.

    1 minus edits by length, for the nearest reference; 0 where that is not above ``threshold``.
    Case and the number of spaces do not count.
    """
    given = " ".join(answer.lower().split())
    nearest = 0.0
    for reference in references:
        expected = " ".join(reference.lower().split())
        length = max(len(given), len(expected))
        nearest = max(nearest, 1 - edit_distance(given, expected) / length if length else 1.0)
    return nearest if nearest > threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Least number of letters to insert, delete or exchange."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, row = row, [i]
        for j, there in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != there)))
    return row[-1]


# ---- numbers ----


def relaxed_accuracy(answer: str, references: Sequence[str], tolerance: float = 0.05) -> float:
    """Relaxed accuracy of ChartQA: numbers within 5 %, everything else in the same words.

    ``12%`` is .12. A right answer of 0 must be said in the same words.
    """
    return float(any(_is_near(answer.strip(), right.strip(), tolerance) for right in references))


def _is_near(answer: str, right: str, tolerance: float) -> bool:
    given, expected = _number(answer), _number(right)
    if given is not None and expected and math.isfinite(expected):
        return abs(given - expected) <= tolerance * abs(expected)
    return answer.lower() == right.lower()


def _number(text: str) -> float | None:
    share = text.endswith("%")
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        return None
    return value / 100 if share else value


# ---- multiple choice ----

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def multiple_choice(answer: str, right: str, options: Sequence[str] = ()) -> float:
    """1 if the answer names the right one of the options.

    Args:
        right: letter of the right option.
        options: texts of the options, in order; an answer may also be one of them.
    """
    return float(chosen_option(answer, options) == right.strip().upper())


def chosen_option(answer: str, options: Sequence[str] = ()) -> str | None:
    """Letter of the option that an answer names; None if it names none, or several.

    In this order: a letter alone (``B``, ``(b)``, ``B.``, ``B: 12``); after ``answer is`` or
    ``answer:``; the text of an option alone; the only capital letter in brackets; the only option
    whose text stands in the answer.
    """
    text = answer.strip()
    letters = LETTERS[: len(options)] if options else LETTERS
    for pattern in (
        r"\(?([A-Za-z])\)?\s*[.:)]?",
        r"([A-Z])[.:)]\s.*",
        r".*?(?i:\banswer(?:\s+is)?\s*:?\s*(?:option\s+)?)\(?([A-Z])\b.*",
    ):
        found = re.fullmatch(pattern, text, re.DOTALL)
        if found and found[1].upper() in letters:
            return found[1].upper()
    texts = [plain(option) for option in options]
    if texts.count(plain(text)) == 1:
        return LETTERS[texts.index(plain(text))]
    bracketed = {letter for letter in re.findall(r"\(([A-Z])\)", text) if letter in letters}
    if len(bracketed) == 1:
        return bracketed.pop()
    named = [
        letter
        for letter, option in zip(LETTERS, texts, strict=False)
        if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", plain(text))
    ]
    return named[0] if len(named) == 1 else None


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options, a line each: ``A. red``."""
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join(itertools.chain([question], lines))
