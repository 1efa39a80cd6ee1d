"""The number of things that a text states: ``There are 1,024 birds.`` -> 1024.

A number that cannot be a count (``3.7``, ``-3``, ``2 or 3``, ``50%``) is left out, never cut to its
first digits. Every pattern takes time in proportion to the text.
"""

from __future__ import annotations

import re

_MOST_DIGITS = 15

_SPACES = " \u00a0\u2007\u2009\u202f"  # also those that do not break, and thin ones
_MARKS = ".,'\u2019\u066b\u066c\uff0c"  # the last three: of Arabic, and of wide digits
_DIGITS = rf"\d++(?:[{_MARKS}]\d++|[{_SPACES}]\d{{3}}(?!\d))*+"

_VALUES = {
    name: value
    for value, name in enumerate(
        re.findall(
            r"\w+",
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen",
        )
    )
}
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_VALUES |= {name: 10 * value for value, name in enumerate(_TENS, start=2)}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALE = "|".join(_SCALES)
_WORD = rf"(?:{'|'.join(reversed(_VALUES))}|{_SCALE})"  # seventeen before seven
_WORDS = rf"(?:an?\s++)?{_WORD}\b(?:(?:\s++and\s++|\s++|-){_WORD}\b){{0,12}}+|a\s++single\b"

# Another number in reach makes a range or a fraction; signs and endings make something else.
_OTHER = (
    rf"\w|[-\u2013\u2014/:]\w|\s*+[%\u00b0]|\s++(?:percent|per\s++cent|[ap]\.?m\b|o['\u2019]clock)"
    rf"|\s*+[-\u2013\u2014/\u00d7]\s*+\d|\s++(?:(?:or|to)\s++)?(?:\d|{_WORD}\b)"
)
_NUMBER = re.compile(
    rf"(?:(?P<digits>{_DIGITS})(?:\s++(?P<scale>{_SCALE})\b)?|(?P<words>{_WORDS}))(?!{_OTHER})",
    re.IGNORECASE,
)

_TOTAL = re.compile(r"\ba\s++total\s++of\s++", re.IGNORECASE)
_THERE = re.compile(r"\bthere(?:\s++(?:are|is)|['\u2019](?:s|re))\b\s*+", re.IGNORECASE)
# What may stand before the number. "More than 5" is not among it: that says which it is not.
_HEDGES = re.compile(
    r"(?:(?:(?:only|just|exactly|precisely|about|approximately|around|roughly|nearly|almost|some|"
    r"likely|probably|undoubtedly|(?:no|without(?:\s++a)?)\s++doubt|definitely|certainly|currently|clearly|still|also|now|in\s++total|at\s++(?:least|most)|up\s++to|"
    r"as\s++many\s++as|no\s++(?:fewer|less|more)\s++than|not\s[^.;:<>]{1,40}?\sbut|"
    r"an?\s++estimated)\b,?\s++)|[~\u2248]\s*+){0,4}+",
    re.IGNORECASE,
)
# "No doubt" counts nothing, nor does "no chance that there are more".
_NOTHING = re.compile(
    r"(?:none|no|(?:not|n['\u2019]t)\s++(?:any|a\s++single))\b(?!\s++(?:(?:real|good|easy|clear|obvious|"
    r"reliable|possible|further)\s++)?(?:doubts?|questions?|denying|way|telling|reasons?|need|"
    r"point|mistak\w++|wonder|guarantee|information|answer|certainty|consensus|longer)\b"
    r"|\s++(?:\w++\s++){1,3}that\s++there\b)",
    re.IGNORECASE,
)
_NOT_THERE = re.compile(r"\bthere\s++(?:are|is)(?=n['\u2019]t\b)", re.IGNORECASE)
_NO_TRACKS = re.compile(r"\bno\s++tracks\s++available\b", re.IGNORECASE)
_NONE = re.compile(r"none\s*+[.!]?", re.IGNORECASE)
# What may follow where the answer is a number and what was counted: "1,234 red birds."
_COUNTED = re.compile(r"(?:\s++(?!of\b)[^\W\d_][\w'\u2019-]*+){0,4}\s*+[.!]?")


def stated_count(text: str) -> int | None:
    """The number that a text states, as `points.parse_count` documents; None if it states none."""
    for phrase in _TOTAL.finditer(text):
        if (number := _number(text, phrase.end())) is not None:
            return number[0]
    places = [*_THERE.finditer(text), *_NOT_THERE.finditer(text)]
    for phrase in sorted(places, key=lambda found: found.start()):
        if (number := _number(text, phrase.end())) is not None:
            return number[0]
        if _NOTHING.match(text, phrase.end()):
            return 0
    if _NO_TRACKS.search(text):
        return 0
    bare = text.strip()
    if _NONE.fullmatch(bare):
        return 0
    number = _number(bare, 0)
    if number is not None and _COUNTED.fullmatch(bare, number[1]):
        return number[0]
    return None


def _number(text: str, start: int) -> tuple[int, int] | None:
    """(value, end) of the count that begins at a place, after words such as ``about``."""
    hedges = _HEDGES.match(text, start)
    found = _NUMBER.match(text, hedges.end() if hedges else start)
    if found is None:
        return None
    if found["words"]:
        value = _of_words(found["words"].lower())
    else:
        value = _of_digits(found["digits"])
        if value is not None and found["scale"]:
            value *= _SCALES[found["scale"].lower()]
    return None if value is None else (value, found.end())


def _of_digits(text: str) -> int | None:
    """``1,024``, ``10 000``, ``1'024``, ``1.000.000``, ``1,00,000`` and ``5.0`` are counts.

    ``3.7`` and ``12,5`` are none, and ``1.024`` may be a thousand or one.
    """
    text = re.sub(r"\.0{1,2}\Z", "", text)
    plain = re.sub(f"[{_SPACES}]", " ", text).replace("\u2019", "'").replace("\uff0c", ",")
    marks = set(re.sub(r"\d", "", plain))
    if sum(map(str.isdecimal, plain)) > _MOST_DIGITS or len(marks) > 1:
        return None
    if marks:
        mark = marks.pop()
        first, *rest = plain.split(mark)
        *inner, last = map(len, rest)
        by_three = all(length == 3 for length in (*inner, last)) and len(first) <= 3
        by_two = mark == "," and bool(inner) and {*inner} == {2} and last == 3 and len(first) <= 2
        if int(first[0]) == 0 or not (by_three or by_two) or mark == "\u066b":
            return None
        if mark == "." and not inner:
            return None
        plain = plain.replace(mark, "")
    return int(plain)


def _of_words(text: str) -> int | None:
    """``twenty-one``, ``two hundred and five``, ``a dozen``; None for what is no single number."""
    if text.endswith("single"):
        return 1
    words = [word for word in re.split(r"[\s-]+", text) if word != "and"]
    if words[0] in ("a", "an"):
        words[0] = "one"
        if words[1] not in _SCALES:
            return None
    whole = part = 0
    below = 10**12  # what comes next must be smaller
    for word in words:
        if word in _VALUES:
            value = _VALUES[word]
            if value >= below or (value == 0 and len(words) > 1):
                return None
            part += value
            below = 10 if value >= 20 else 1
        elif word == "dozen" or _SCALES[word] == 100:
            part = max(part, 1) * _SCALES[word]
            below = 1 if word == "dozen" else 100
        else:
            whole += max(part, 1) * _SCALES[word]
            part, below = 0, _SCALES[word]
    return whole + part
