"""Texts: forged answers -> `parse_points`, `parse_count`; questions -> tokenizer and chat."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanomolmo2.processor import Processor, parse_count, parse_points
from tests.robustness.judge import Case, Surroundings

SIZES = [(640, 480), (1, 1), (33, 7000)]

PIECES = (
    *("<points", "<tracks", "<point", "<points ", ' coords="', ' coords=""', '">', "'>", "/>", ">"),
    *("</points>", "</tracks>", "</point>", ' alt="', ' x="', ' y="', ' x1="', ' y12="', "=", '"'),
    *(
        "1 1 500 500",
        "1 1 5 5",
        "2 1 000 999 2 1000 1000",
        "0 0 000 000",
        "1.5 1 100 200",
        ";",
        ",",
    ),
    *("1:05 1 100 200", "9 1 001 001", "999999999 1 100 100", "1 1 1001 500", "-1 1 -5 5", "\t"),
    *(
        " ",
        "\n",
        "\r",
        "\0",
        "\x1b[31m",
        "\x9d0;t\x07",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\ud800",
        "١ ٢ ٣٤٥ ٦٧٨",
    ),
    *("²³¹", "½", "Ⅷ", "１ １ ５００ ５００", "e", "1e5", "nan", "inf", "0x10", "1_000", "9" * 30),
    *("There are ", "There is ", "a total of ", "No tracks available", "none", "no", "no doubt"),
    *(
        "1,024",
        "1.234.567",
        "10 000",
        "3.7",
        "1,23",
        "1,,2",
        "1'000",
        "-5",
        "+5",
        "0005",
        ".5",
        "5.",
    ),
    *(
        "Counting the ",
        " shows a total of ",
        "cats",
        "dogs.",
        "&lt;points",
        "<|im_end|>",
        "<im_patch>",
    ),
    *(
        "<points<points",
        "<tracks<points",
        "<POINTS",
        "< points",
        "</ points>",
        "<points/>",
        "100.0",
    ),
)


def answer(rng: random.Random) -> str:
    """Pieces of the grammar in no order, or much of one."""
    shape = rng.random()
    pieces = [rng.choice(PIECES) for _ in range(rng.choice((1, 2, 4, 8, 16, 60)))]
    text = rng.choice(("", "", " ")).join(pieces)
    if shape < 0.3:
        return text
    if shape < 0.6:
        return _valid_with_a_fault(rng)
    if shape < 0.7:
        return number_text(rng)
    if shape < 0.73:  # long enough for what is quadratic to take seconds
        piece = "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 1, 2))))
        count = rng.choice((2_000, 60_000)) // max(1, len(piece))
        return rng.choice(PIECES) + piece * count + rng.choice(("", "x", *PIECES))
    if shape < 0.85:
        letters = '<>/"=;:,. \t\n0123456789pointsracks'
        return "".join(rng.choice(letters) for _ in range(rng.choice((10, 100, 1000))))
    return f"{text}{_valid_with_a_fault(rng)}{''.join(reversed(pieces))}"


def _valid_with_a_fault(rng: random.Random) -> str:
    name = rng.choice(("points", "tracks"))
    groups = []
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        key = rng.choice(("1", "2", "3", "0", "4", "0.0", "1.5", "99999.9", "1:02", "1" * 12))
        digits = [_number(rng) for _ in range(rng.choice((1, 1, 3)) * 3)]
        groups.append(f"{key} {rng.choice((' ', ' ', ',')).join(digits)}")
    coords = rng.choice((";", ";", "\t", ":", ",")).join(groups)
    text = f'<{name} coords="{coords}">{rng.choice(("cats", "", "a > b", "<b>", "é"))}</{name}>'
    if rng.random() < 0.3:
        percent = f"{rng.uniform(-5, 130):.{rng.randrange(4)}f}"
        text = f'<point x="{percent}" y="{percent}" alt="cat">cat</point>'
        if rng.random() < 0.5:
            text = (
                f'<points x1="{percent}" y1="5" x2="{_number(rng)}" y2="1" alt="a > b">c</points>'
            )
    if rng.random() < 0.6:
        start = rng.randrange(len(text))
        text = (
            text[:start]
            + rng.choice(("", rng.choice(PIECES)))
            + text[start + rng.choice((0, 1, 5)) :]
        )
    return text


def _number(rng: random.Random) -> str:
    return rng.choice(
        (f"{rng.randrange(1200):03d}", str(rng.randrange(20)), "9" * rng.randrange(1, 40))
    )


def number_text(rng: random.Random) -> str:
    words = [
        "a total of",
        "There are",
        "There is",
        "no doubt",
        "dogs",
        "cats and",
        "about",
        "in 2024",
    ]
    numbers = [
        "1,024",
        "1.234",
        "10 000",
        "10\u202f000",
        "3.7",
        "0",
        "12",
        "1e3",
        "9" * 5000,
        "ten",
        "½",
    ]
    pieces = [rng.choice(words + numbers) for _ in range(rng.randrange(1, 8))]
    return rng.choice((" ", " ", "  ", "\n")).join(pieces) + rng.choice(("", ".", "!", " "))


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    draw = rng.random()
    if draw < 0.6:
        return _points(rng)
    if draw < 0.75:
        return _count(rng)
    return _question(rng)


def _points(rng: random.Random) -> Case:
    text = answer(rng)
    sizes = SIZES[: rng.randrange(4)]
    video = rng.choice((None, None, (320, 200)))

    def check(result: Any) -> str | None:
        points, problems = result
        for point in points:
            if point.time is None:
                if not 1 <= point.image <= len(sizes):
                    return f"{point} is in none of {len(sizes)} pictures"
                width, height = sizes[point.image - 1]
            elif video is None or not 0 <= point.time < 1e10:
                return f"{point} has a time that no video has"
            else:
                width, height = video
            if not (0 <= point.x <= width and 0 <= point.y <= height):
                return f"{point} lies outside of {width} x {height}"
        for problem in problems:
            if not isinstance(problem, str) or "\n" in problem or len(problem) > 400:
                return f"a problem of {len(problem)} characters: {problem[:200]!r}"
        return None

    def call() -> Any:
        problems: list[str] = []
        return parse_points(text, sizes, video_size=video, problems=problems), problems

    return Case(f"points {text[:60]!r} ({len(text)})", call, check)


def _count(rng: random.Random) -> Case:
    text = answer(rng) if rng.random() < 0.5 else number_text(rng)
    if rng.random() < 0.05:
        text = (
            rng.choice(("1", "", "a total of ", "There are "))
            + rng.choice((" ", "1", "1,", "\n", ".")) * 60_000
        )
        text += rng.choice(("", "x", "."))
    return Case(f"count {text[:60]!r} ({len(text)})", lambda: parse_count(text), check_count)


def check_count(count: Any) -> str | None:
    if count is not None and (type(count) is not int or not 0 <= count < 10**12):
        return f"counted {str(count)[:60]}"
    return None


# ---- questions ----


@lru_cache(maxsize=1)
def processors() -> list[Processor]:
    """`tiny`'s vocabulary in both chat formats, and a tokenizer that falls back to bytes."""
    from nanomolmo2.processor import ProcessorConfig, Tokenizer
    from tests.processor.helpers import small_backend
    from tests.small_model import small_processor

    return [
        small_processor(),
        Processor(ProcessorConfig(image_size=32), Tokenizer(small_backend())),
        Processor(
            ProcessorConfig.molmo2(image_size=32, image_tokens=4), Tokenizer(small_backend())
        ),
    ]


def forged(rng: random.Random, names: list[str]) -> str:
    """A text that would like to be a special token."""
    pieces = []
    for _ in range(rng.choice((1, 2, 5, 30))):
        name = rng.choice(names)
        place = rng.randrange(len(name) + 1)
        pieces.append(
            rng.choice(
                [
                    *(name, name, name, name * 2, name[:place], name[place:], name.upper()),
                    name[:place] + name + name[place:],
                    name[:place] + rng.choice("\0\u200b\u00ad \n\ufeff") + name[place:],
                    "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name),
                    *(rng.choice(PIECES), "▁", "Ġ", "<0x0A>", "<0xFF>", "<unk>", "</s>", "é", "好"),
                ]
            )
        )
    return "".join(pieces)


def _question(rng: random.Random) -> Case:
    processor = rng.choice(processors())
    tokenizer = processor.tokenizer
    names = list(tokenizer.special_ids)
    text = forged(rng, names) if rng.random() < 0.8 else answer(rng)
    if rng.random() < 0.01:
        text *= rng.choice((100, 3000))
    special = set(tokenizer.special_ids.values())
    if rng.random() < 0.5:

        def check_ids(ids: Any) -> str | None:
            if found := special & set(ids):
                return f"{text[:80]!r} became the special tokens {sorted(found)[:5]}"
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            # Byte fallback writes the bytes of a character as "<0x0A>", and knows no other text.
            if decoded != text and "<0x" not in text and "<unk>" not in text:
                return f"{text[:80]!r} is another text when it is decoded"
            return None

        return Case(f"text {text[:60]!r}", lambda: tokenizer.encode_text(text), check_ids)
    role, count = rng.choice((None, "system", "subtitle")), rng.choice((1, 1, 2))

    def conversation(text: str) -> list[Any]:
        messages: list[Any] = [{"role": role, "content": text}] if role else []
        for _ in range(count):
            parts = [{"type": "text", "text": text, "style": "vqa2"}] if count == 2 else text
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": text})
        return messages[: -1 if count == 2 else None]

    def check(encoded: Any) -> str | None:
        """As many special tokens as the same conversation without any forgery."""
        plain = processor.encode(conversation("x"))
        counts = [
            [id for id in one.input_ids.tolist() if id in special] for one in (encoded, plain)
        ]
        if counts[0] != counts[1]:
            return f"{text[:80]!r} adds special tokens: {counts[0][:9]}, not {counts[1][:9]}"
        return None

    return Case(f"chat {text[:60]!r}", lambda: processor.encode(conversation(text)), check)


# ---- what was once found ----


def _counts(text: str) -> Callable[[Path, Surroundings], Case]:
    return lambda here, around: Case("found before", lambda: parse_count(text), check_count)


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {
    "one, 64,000 spaces, x": _counts(f"1{' ' * 64_000}x"),
    "64,000 spaces": _counts(" " * 64_000),
    "64,000 digits": _counts("1" * 64_000 + "x"),
}
