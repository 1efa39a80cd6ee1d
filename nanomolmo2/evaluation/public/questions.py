"""What a record of each benchmark asks, in Molmo2's prompt style, and what is right.

Every function takes a record of any layout in which its benchmark is published. Sources of the
prompts: Molmo2, olmo/data (``academic_datasets.py``, ``pixmo_datasets.py``) and
``data_formatter.py``; see docs/benchmarks.md for what differs and why.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.data.labels.shapes import runs_of
from nanomolmo2.data.record import Record, short
from nanomolmo2.evaluation.answers import LETTERS, with_options

MOST_TEXT = 2**16  # characters of a list that is written as text
CHOOSE = "Only return the correct answer option."


@dataclass(frozen=True)
class Question:
    """A question, and what is right.

    Attributes:
        answer: in words, as a person would have it; empty where there are none.
        images: one, or none where the question is to be answered without.
        parts: of the benchmark that it belongs to, by what divides it: ``{"source": "human"}``.
    """

    text: str
    truth: dict[str, Any]
    images: list[Image.Image]
    answer: str = ""
    parts: dict[str, str] = field(default_factory=dict)


# ---- short answers ----


def chartqa(record: Record) -> Question:
    answers = _answers(record, "label", "answer")
    kind = str(_value(record, "type", "annotation_file", "human_or_machine"))
    is_human = kind in ("0", "human") or "human" in kind
    return Question(
        f"chart_qa: {_text(record, 'query', 'question')}",
        {"answers": answers, "scorer": "relaxed"},
        _image(record),
        answers[0],
        {"source": "human" if is_human else "augmented"},
    )


def docvqa(record: Record) -> Question:
    return _short(record, "doc_qa", "anls")


def infovqa(record: Record) -> Question:
    return _short(record, "info_qa", "anls")


def textvqa(record: Record) -> Question:
    return _short(record, "text_vqa", "vqa")


def vqav2(record: Record) -> Question:
    kind = record.values.get("answer_type")
    parts = {"kind": kind.replace("/", "_")} if isinstance(kind, str) else {}
    return _short(record, "vqa2", "vqa", parts)


def _short(
    record: Record, style: str, scorer: str, parts: dict[str, str] | None = None
) -> Question:
    answers = _answers(record, "answers")
    return Question(
        f"{style}: {_text(record, 'question')}",
        {"answers": answers, "scorer": scorer},
        _image(record),
        Counter(answers).most_common(1)[0][0],
        parts or {},
    )


def realworldqa(record: Record) -> Question:
    """Questions hold their options, or ask for a word; Molmo2 drops what they say after that."""
    asked, answer = _text(record, "question").strip(), _answers(record, "answer")[0].strip()
    options = re.findall(r"^([A-D])[.)]\s*(.+)$", asked, re.MULTILINE)
    if len(options) > 1 and answer.upper() in [letter for letter, _ in options]:
        truth = {"answer": answer.upper(), "choices": [text for _, text in options]}
        return Question(
            asked, {**truth, "scorer": "option"}, _image(record), answer, {"kind": "choice"}
        )
    first = asked.partition("\n")[0]
    truth = {"answers": [answer], "scorer": "option"}
    return Question(f"vqa2: {first}", truth, _image(record), answer, {"kind": "short"})


# ---- multiple choice ----


def aokvqa(record: Record) -> Question:
    options = _list(record, "choices")
    return _choice(record, _text(record, "question"), options, _index(record, "correct_choice_idx"))


def ai2d(record: Record) -> Question:
    """Where the options are letters in the diagram, they are not lettered once more."""
    options = _list(record, "options")
    right = _index(record, "answer")
    question = _text(record, "question")
    single = [len(option.strip()) == 1 and option.strip().isalpha() for option in options]
    if sum(single) < len(options) - 1 or right >= len(options):
        return _choice(record, question, options, right)
    options = [o.upper() if one else o for o, one in zip(options, single, strict=True)]
    return Question(
        "\n".join([question, CHOOSE, *options]),
        {"answers": [options[right]], "scorer": "option"},
        _image(record),
        options[right],
    )


def _choice(record: Record, question: str, options: list[str], right: int) -> Question:
    if not 0 <= right < len(options) <= len(LETTERS):
        record.bad(f"its answer is option {right} of {len(options)}")
    letter = LETTERS[right]
    return Question(
        with_options(f"{question}\n{CHOOSE}", options),
        {"answer": letter, "choices": options, "scorer": "option"},
        _image(record),
        f"{letter}. {options[right]}",
    )


def mmmu(record: Record) -> Question:
    """One of up to seven pictures is shown, and none where the options are pictures."""
    question, answers = _text(record, "question"), _answers(record, "answer")
    options = _list(record, "options")
    identity = re.fullmatch(r"[a-z]+_(.+)_\d+", str(record.values.get("id", "")))
    parts = {"subject": identity[1]} if identity else {}
    images = []
    as_pictures = sum(option.startswith("<img='") for option in options) > 1
    if record.values.get("image_1") is not None and not as_pictures:
        images = [record.image(record.values["image_1"])]
    if record.values.get("question_type") == "multiple-choice":
        if answers[0] not in LETTERS[: len(options)]:
            record.bad(f"its answer {short(answers[0])} is none of its {len(options)} options")
        text = with_options(f"{question}\n{CHOOSE}", options)
        truth = {"answer": answers[0], "choices": options, "scorer": "mmmu"}
    else:
        text, truth = f"vqa2: {question}", {"answers": answers, "scorer": "mmmu"}
    return Question(text, truth, images, answers[0], parts)


# ---- counts ----


def countbenchqa(record: Record) -> Question:
    return _counting(record, _text(record, "question"), _index(record, "number"))


def pixmo_count(record: Record) -> Question:
    """Molmo2 draws one of sixty wordings for each picture; this is the first of them."""
    if record.values.get("label") is not None:
        label = _text(record, "label").lower()
        return _counting(record, f"How many {label} are there?", _index(record, "count"))
    question = _text(record, "question").replace("<image>", "").strip()
    return _counting(record, question, _index(record, "answer"))


def _counting(record: Record, question: str, count: int) -> Question:
    truth = {"count": count, "scorer": "point_count"}
    return Question(question, truth, _image(record), str(count))


# ---- points ----


def pointbench(record: Record) -> Question:
    """Every point must lie in the mask, white on black."""
    images = _image(record)
    mask = np.asarray(record.image(record.values["mask"]).convert("RGB")).max(axis=2) > 127
    truth = {"masks": [runs_of(mask)], "scorer": "in_mask"}
    parts = {"category": _text(record, "category").lower()}
    return Question(_text(record, "user_input"), truth, images, parts=parts)


def screenspot_v2(record: Record) -> Question:
    """Boxes are x, y, width, height in pixels; in some copies corners, as shares of the sides."""
    images = _image(record)
    width, height = images[0].size
    x, y, third, fourth = _box(record)
    if max(x, y, third, fourth) <= 1:
        box = [x * width, y * height, third * width, fourth * height]
    else:
        box = [x, y, x + third, y + fourth]
    file = record.values.get("img_filename") or record.values.get("file_name") or ""
    stem = str(record.values.get("annotation_file", ""))
    platform = re.search(r"mobile|desktop|web", f"{stem} {file}") or re.search(
        r"mobile|desktop|web", _PLATFORMS.get(str(record.values.get("data_source")), "")
    )
    return _click(record, images, box, {"platform": platform[0] if platform else ""})


_PLATFORMS = {
    **dict.fromkeys(("ios", "android"), "mobile"),
    **dict.fromkeys(("windows", "macos"), "desktop"),
    **dict.fromkeys(("shop", "forum", "tool", "gitlab"), "web"),
}


def screenspot_pro(record: Record) -> Question:
    """Boxes are corners in pixels."""
    group = record.values.get("group")
    parts = {"group": group.lower() if isinstance(group, str) else ""}
    return _click(record, _image(record), _box(record), parts)


def _click(
    record: Record, images: list[Image.Image], box: list[float], parts: dict[str, str]
) -> Question:
    """Its parts are those given, what the target is (text or icon), and both together."""
    parts = {**parts, "target": str(_value(record, "ui_type", "data_type", default="")).lower()}
    parts = {name: part for name, part in parts.items() if part}
    if len(parts) == 2:
        parts["both"] = "_".join(parts.values())
    truth = {"boxes": [box], "scorer": "click"}
    return Question(f"Click {_text(record, 'instruction')}", truth, images, parts=parts)


def _box(record: Record) -> list[float]:
    values = _value(record, "bbox")
    if isinstance(values, str):
        values = re.findall(r"-?\d+(?:\.\d+)?", values[:MOST_TEXT])
    try:
        box = [float(value) for value in values] if isinstance(values, list) else []
    except (TypeError, ValueError):
        box = []
    if len(box) != 4:
        record.bad(f"its bbox is {short(values)}, expected four numbers")
    return box


# ---- fields ----


def _value(record: Record, *names: str, default: Any = None) -> object:
    """The first of some fields that is there."""
    for name in names:
        if record.values.get(name) is not None:
            found: object = record.values[name]
            return found
    return default


def _text(record: Record, *names: str) -> str:
    value = _value(record, *names)
    if not isinstance(value, str) or not value.strip():
        record.bad(f"its {' or '.join(names)} is {short(value)}, expected a text")
    return value


def _answers(record: Record, *names: str) -> list[str]:
    """Texts of a field: one, a list, or a list of objects with an ``answer``."""
    value = _value(record, *names)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    answers = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    if not answers:
        record.bad(
            f"it has no {' or '.join(names)}: those of a test set are often not public; choose "
            f"another split",
            "no answer",
        )
    if not all(isinstance(answer, (str, int, float)) for answer in answers):
        record.bad(f"its {' or '.join(names)} is {short(value)}, expected texts")
    return [str(answer) for answer in answers]


def _list(record: Record, name: str) -> list[str]:
    value = record.values.get(name)
    if isinstance(value, str):
        value = _read_list(record, value, name)
    if not isinstance(value, list) or not all(isinstance(one, (str, int, float)) for one in value):
        record.bad(f"its {name} is {short(value)}, expected a list of texts")
    return [str(one) for one in value]


def _read_list(record: Record, text: str, name: str) -> object:
    """A list that was written as Python writes it."""
    try:
        found: object = ast.literal_eval(text) if len(text) <= MOST_TEXT else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        record.bad(f"its {name} is {short(text)}, expected a list")
    return found


def _index(record: Record, name: str) -> int:
    value = record.values.get(name)
    if value is None:
        record.bad(f"it has no {name}: choose a split whose answers are public", "no answer")
    found = re.fullmatch(r"\s*(\d{1,9})(?:\.0)?\D{0,40}", str(value))
    if found is None:
        record.bad(f"its {name} is {short(value)}, expected a whole number")
    return int(found[1])


def _image(record: Record) -> list[Image.Image]:
    source = _value(record, "image", "image_url")
    sha256 = record.get("image_sha256", str) if source == record.values.get("image_url") else None
    return [record.image(source, sha256 or None)]
