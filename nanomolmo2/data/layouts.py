"""What the fields of a record mean: the layouts of several data sets -> `Example`.

A layout is a function of a `Record`; whatever keeps a record from being learned from is a
`BadExample` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from PIL import Image

from nanomolmo2.data.example import Branch, Example, Message
from nanomolmo2.data.fields import TRUTH
from nanomolmo2.data.placeholders import place_tags
from nanomolmo2.data.record import PointsScale, Prompts, Record, address_key, short
from nanomolmo2.processor.chat import read_messages
from nanomolmo2.processor.point import Point, Size, join_points
from nanomolmo2.processor.points import SCALE, PointMode, format_points

__all__ = ["LAYOUTS", "PointsScale", "Prompts", "Record", "address_key", "layout_of"]

TAG_COUNT = "picture tags and pictures differ"
# What a side of the picture is in each scale of points.
SIDES = {"unit": 1, "percent": 100, "thousandths": SCALE}

CAPTION_QUESTIONS = (
    "Describe this picture in detail.",
    "Describe what you see.",
    "Caption this picture.",
    "What does this picture show?",
)
TRANSCRIPT_QUESTIONS = (
    "Talk me through this picture.",
    "Describe this picture as you would speak.",
)
POINT_QUESTIONS = ("Point to {}.", "Where is {}?", "Show me {}.", "Find {}.")
COUNT_QUESTIONS = ("How many {} are there?", "Count {}.", "What is the number of {}?")


# ---- conversations ----


def check_branch(
    record: Record, messages: Sequence[Any], task: str = "", truth: dict[str, Any] | None = None
) -> list[Branch]:
    """Messages -> one branch, or with ``separate_turns`` one of each question and its answer."""
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        messages = _join_system(record, messages)
    try:
        turns = read_messages(messages)
    except ValueError as error:
        record.bad(str(error))
    if turns[-1].role != "assistant" and record.lacks_answer(truth):
        record.bad("it ends with a question", "no answer")
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if record.needs_truth and not all(answer.strip() for answer in answers):
        record.bad("an answer is empty", "no answer")
    if turns[0].role != "user":  # a subtitle, which would have to stand with the video
        record.bad(f"it begins with a message by {turns[0].role!r}")
    step = 2 if record.separate_turns and turns[-1].role == "assistant" else len(messages)
    return [
        Branch(list(messages[start : start + step]), task, truth or {})
        for start in range(0, len(messages), step)
    ]


def _join_system(record: Record, messages: Sequence[Any]) -> list[Any]:
    """Molmo2's format has no system message, so its text goes before the first question."""
    system, *rest = messages
    contents = [m.get("content") for m in (system, *rest[:1]) if isinstance(m, Mapping)]
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) < 2:
        record.bad("a system message and the question after it must both be plain text")
    return [{**rest[0], "content": join_points(texts, "\n\n")}, *rest[1:]]


def exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def without_tags(
    record: Record, messages: Sequence[Any], num_images: int, video: Any = None
) -> list[Any]:
    """The messages of one conversation, whose questions hold no tags of pictures any more."""
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            _refuse_images(record, message["content"])
    asked = [
        place
        for place, message in enumerate(messages)
        if isinstance(message, Mapping)
        and message.get("role") in ("user", "system")
        and isinstance(message.get("content"), (str, list))
    ]
    try:
        contents, problem = place_tags(
            [messages[place]["content"] for place in asked], num_images, video is not None
        )
    except ValueError as error:
        record.bad(str(error), "missing picture")
    if problem:
        record.notes.append((TAG_COUNT, f"{record.where}: {problem}"))
    placed = list(messages)
    for place, content in zip(asked, contents, strict=True):
        placed[place] = {**messages[place], "content": content}
    return placed


# ---- points ----


def points_text(
    record: Record, value: Mapping[str, Any], images: Sequence[Image.Image], video: Any
) -> str:
    """``{"points": [{"x", "y", "label"?, "image"?, "time"?}], "label"?, "mode"?}`` -> answer.

    A point may also be ``[x, y]``. Points are in pixels, unless ``points_scale`` says otherwise.
    Those of several labels become several tags, joined by commas.
    """
    given = value.get("points")
    points = [_as_object(point) for point in given] if isinstance(given, list) else []
    if not isinstance(given, list) or not all(_is_point(point) for point in points):
        record.bad(
            f"found the points {short(given)}, expected a list of {{'x': pixels, 'y': pixels}}",
            "bad points",
        )
    default = value.get("label") or "point"
    scale = _scale_of(record, value)
    sizes = [image.size for image in images]
    video_size = record.video_size(video) if points else None
    labels = [point.get("label") or default for point in points]
    for label in [default, *labels]:
        if not isinstance(label, str):
            record.bad(f"found the label {short(label)}, expected text", "bad points")
    groups: dict[str, list[Point]] = {} if points else {default: []}
    for point, label in zip(points, labels, strict=True):
        number = _number_of(record, point, video)
        size = video_size if point.get("time") is not None else None
        if size is None and 1 <= number <= len(sizes):
            size = sizes[number - 1]
        x, y = _in_pixels(record, point, scale, size)
        groups.setdefault(label, []).append(Point(x, y, number, time=point.get("time")))
    mode = value.get("mode", "point")
    tags = [_format(record, *group, sizes, mode, video_size) for group in groups.items()]
    return join_points(tags, ", ")


def _scale_of(record: Record, value: Mapping[str, Any]) -> str:
    """The scale that points have by their own word, by that of the record, or of the source."""
    stated = (value.get("points_scale"), record.values.get("points_scale"), record.points_scale)
    scale: str = next(scale for scale in stated if scale is not None)
    if scale not in get_args(PointsScale):
        known = ", ".join(get_args(PointsScale))
        record.bad(f"points_scale is {short(scale)}, expected one of {known}", "bad points")
    return scale


def _point_part(
    record: Record, part: Any, value: Mapping[str, Any], sizes: Sequence[Size], video: Any
) -> Any:
    """A part ``{"type": "point", "x", "y", "image"? or "time"?}`` in pixels; others as they are."""
    if not isinstance(part, Mapping) or part.get("type") != "point":
        return part
    if not _is_point(part):
        record.bad(f"found the point {short(part)}, expected 'x' and 'y' in pixels", "bad points")
    number = _number_of(record, part, video)
    size = record.video_size(video) if video is not None else None
    if size is None and 1 <= number <= len(sizes):
        size = sizes[number - 1]
    x, y = _in_pixels(record, part, _scale_of(record, value), size)
    return {**part, "x": x, "y": y}


def _number_of(record: Record, point: Mapping[str, Any], video: Any) -> int:
    """Of the picture that a point lies in, after a look at its time."""
    number, time = point.get("image", 1), point.get("time")
    if not isinstance(number, int) or isinstance(number, bool):
        record.bad(f"a point names the image {short(number)}, expected 1, 2, ...", "bad points")
    if not isinstance(time, int | float | None) or isinstance(time, bool):
        record.bad(
            f"a point has the time {short(time)}, expected seconds as a number", "bad points"
        )
    if time is None and video is not None:
        record.bad("a point in a video has no 'time': give seconds from its start", "bad points")
    return number


def _in_pixels(
    record: Record, point: Mapping[str, Any], scale: str, size: Size | None
) -> tuple[float, float]:
    side = SIDES.get(scale)
    if side is None or size is None:  # without a picture it is refused where it is written
        return point["x"], point["y"]
    if not (0 <= point["x"] <= side and 0 <= point["y"] <= side):
        record.bad(
            f"the point ({point['x']}, {point['y']}) is outside of 0 to {side}, which its "
            f"points_scale {scale!r} says",
            "bad points",
        )
    return point["x"] * size[0] / side, point["y"] * size[1] / side


def _format(
    record: Record,
    label: str,
    points: Iterable[Point],
    sizes: Sequence[Size],
    mode: PointMode,
    video_size: Size | None = None,
) -> str:
    try:
        return format_points(points, label, sizes, mode=mode, video_size=video_size)
    except (ValueError, TypeError) as error:
        record.bad(str(error), "bad points")


def _as_object(point: Any) -> Any:
    is_pair = isinstance(point, Sequence) and not isinstance(point, str) and len(point) == 2
    return dict(zip("xy", point, strict=True)) if is_pair else point


def _is_point(point: Any) -> bool:
    return isinstance(point, Mapping) and all(
        isinstance(point.get(axis), (int, float))
        and not isinstance(point[axis], bool)
        and abs(point[axis]) < 1e9  # more is no place, and NaN is refused with it
        for axis in "xy"
    )


def percent_points(record: Record, points: Any, size: Size) -> list[Point]:
    """Points in percent of the sides: a list of ``{x, y}``, or two lists ``{x: [], y: []}``."""
    if isinstance(points, Mapping) and all(isinstance(points.get(axis), list) for axis in "xy"):
        points = [{"x": x, "y": y} for x, y in zip(points["x"], points["y"], strict=False)]
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        record.bad(f"found the points {short(points)}", "bad points")
    return [Point(point["x"] * size[0] / 100, point["y"] * size[1] / 100) for point in points]


# ---- our own layout ----


def own(record: Record) -> Example:
    """The documented format: images and ``branches``, or one conversation in a short form."""
    images = record.images()
    video = record.video()
    if images and video is not None:
        record.bad("it has pictures and a video; an example shows the one or the other")
    branches = record.get("branches", list)
    if branches is None:
        return Example(images, _own_branch(record, record.values, images, video), video)
    if not branches:
        record.bad("its list of branches is empty", "no answer")
    read = [branch for values in branches for branch in _own_branch(record, values, images, video)]
    return Example(images, read, video)


def _own_branch(record: Record, values: Any, images: list[Image.Image], video: Any) -> list[Branch]:
    if not isinstance(values, Mapping):
        record.bad(f"found {short(values)} in place of a branch")
    task, truth = values.get("task", ""), values.get("truth")
    if not isinstance(task, str) or not isinstance(truth, dict | None):
        record.bad(f"task {short(task)} must be text, truth {short(truth)} an object")

    truth = {**_truth_beside(values, record.points_scale), **(truth or {})}
    inherited = {"points_scale": values.get("points_scale")}
    examples = _examples(record, values, inherited, images, video)
    truth |= {name: [[p["x"], p["y"]] for p in places] for name, places in examples.items()}

    def content(value: Any) -> Any:
        if isinstance(value, Mapping) and "points" in value:
            return points_text(record, {**inherited, **value}, images, video)
        if isinstance(value, list):
            sizes = [image.size for image in images]
            return [_point_part(record, part, inherited, sizes, video) for part in value]
        return value

    if values.get("messages") is not None:
        messages = values["messages"]
        if not isinstance(messages, list):
            record.bad(f"messages is {short(messages)}, expected a list")
        messages = [
            {**message, "content": content(message.get("content"))}
            if isinstance(message, Mapping)
            else message
            for message in messages
        ]
        messages = without_tags(record, messages, len(images), video)
        return check_branch(record, messages, task, truth)
    question: Any = values.get("question")
    answer = values.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        if record.needs_answer:
            record.bad(f"found the answer {short(answer)}, expected text: put it in quotes")
        answer = str(answer)
    if answer is None and "points" in values:
        answer = {key: values[key] for key in _POINTS if key in values}
        if "like" in examples and "label" not in values:
            answer["label"] = NAMELESS
    if answer is None and values.get("caption") is not None:
        answer = values["caption"]
        question = question or _one_of(record, CAPTION_QUESTIONS)
    if question is None and "like" in examples:
        question = _like_question(examples, len(images))
    elif isinstance(question, list):
        question = content(question)
    if question is None:
        record.bad(
            "it has neither messages nor a question: expected 'branches', 'messages', 'question' "
            "and 'answer', or 'like' and 'points'",
            "bad record" if answer is not None else "no answer",
        )
    if answer is None and record.lacks_answer(truth):
        record.bad("its question has no answer", "no answer")
    asked: list[Message] = [{"role": "user", "content": question}]
    messages = asked if answer is None else exchange(question, content(answer))
    return check_branch(record, without_tags(record, messages, len(images), video), task, truth)


_POINTS = ("points", "label", "mode", "points_scale")
NAMELESS = "thing"  # what is found by example is called


def _examples(
    record: Record, values: Mapping[str, Any], inherited: Mapping[str, Any], images: Any, video: Any
) -> dict[str, list[Any]]:
    """The examples that are shown, ``like``, and those that are not meant, ``unlike``: each a list
    of [x, y] in the first picture. As parts of a message, in pixels."""
    found: dict[str, list[Any]] = {}
    sizes = [image.size for image in images]
    for name in ("like", "unlike"):
        if (places := values.get(name)) is None:
            continue
        pairs = [p for p in places if isinstance(p, list) and len(p) == 2] if places else []
        if not isinstance(places, list) or not places or len(pairs) < len(places):
            record.bad(f"found {name} {short(places)}, expected places [[x, y], ...]", "bad points")
        parts = [{"type": "point", "x": x, "y": y, "image": 1} for x, y in pairs]
        found[name] = [_point_part(record, part, inherited, sizes, video) for part in parts]
    return found


def _like_question(examples: Mapping[str, list[Any]], images: int) -> list[Any]:
    """ "Point to everything like <point>, not like <point>." """
    parts: list[Any] = [{"type": "text", "text": "Point to everything like "}]
    for name, places in examples.items():
        for number, place in enumerate(places):
            joint = " and " if number else ", not like " if name == "unlike" else ""
            parts += [{"type": "text", "text": joint}] if joint else []
            parts.append(place)
        if name == "like" and images > 1:
            parts.append({"type": "text", "text": " in the second picture"})
    return [*parts, {"type": "text", "text": "."}]


def _truth_beside(values: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """What stands beside the question in place of ``truth``; nobody but evaluation looks at it."""
    truth = {name: values[name] for name in TRUTH if values.get(name) is not None}
    stated = values.get("points_scale") or scale
    if "boxes" in truth and stated != "pixels":
        truth["boxes_scale"] = stated
    return truth


def _refuse_images(record: Record, items: list[Any]) -> None:
    """Content in parts names no pictures: those stand beside the messages in an example, where it
    is checked what a record may name.
    """
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        own = kind in ("image", "video") and item.get(kind) is not None
        if own or kind in ("image_url", "input_image", "video_url", "input_video"):
            record.bad(
                f"a message holds {short(item)}: give the path in 'images' or 'video' of the line"
            )


# ---- layouts of others ----

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SPEAKERS["system"] = "system"


def llava(record: Record) -> Example:
    """LLaVA and ShareGPT: ``image``?, ``conversations`` of ``{"from", "value"}``."""
    images, video = record.images(), record.video()
    messages = []
    for turn in record.get("conversations", list, []):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            record.bad(
                f"found {short(turn)}, expected {{'from': one of {', '.join(SPEAKERS)}, 'value': "
                f"text}}"
            )
        text = turn["value"].strip() if role == "user" else turn["value"]
        messages.append({"role": role, "content": text})
    if not messages:
        record.bad("it has no conversation", "no answer")
    messages = without_tags(record, messages, len(images), video)
    return Example(images, check_branch(record, messages), video)


def cauldron(record: Record) -> Example:
    """The Cauldron and FineVision: ``images``, ``texts`` of ``{"user", "assistant"}``."""
    images = record.images()
    messages: list[Message] = []
    for turn in record.get("texts", list, []):
        question, answer = (
            (turn.get("user"), turn.get("assistant")) if isinstance(turn, Mapping) else (None, None)
        )
        if not isinstance(question, str) or not isinstance(answer, str):
            record.bad(f"found {short(turn)}, expected {{'user': text, 'assistant': text}}")
        messages += exchange(question.strip(), answer)
    if not messages:
        record.bad("it has no texts", "no answer")
    messages = without_tags(record, messages, len(images))
    return Example(images, check_branch(record, messages))


def pixmo_cap(record: Record) -> Example:
    """PixMo-Cap: ``image_url``, ``caption``, ``transcripts``: the caption and one transcript."""
    image = _pixmo_image(record)
    answers = {"long_caption": record.get("caption", str, "").strip()}
    transcripts = [t for t in record.get("transcripts", list, []) if isinstance(t, str)]
    transcripts = [t.strip() for t in transcripts if t.strip()]
    if transcripts:
        answers["transcript"] = _one_of(record, transcripts)
    questions = {"long_caption": CAPTION_QUESTIONS, "transcript": TRANSCRIPT_QUESTIONS}
    branches = []
    for style, answer in answers.items():
        if record.prompts == "styles":
            question = f"{style}{_length_hint(record, answer)}:"
        else:
            question = _one_of(record, questions[style])
        branches += check_branch(record, exchange(question, answer), style)
    return Example([image], branches)


def _length_hint(record: Record, answer: str) -> str:
    """Roughly the length of nine answers of ten, in units of 15 characters.

    Source: Molmo2, olmo/preprocessing/data_formatter.py (``style_and_length_v2``).
    """
    noise = int(record.rng.normal(scale=25))
    has_hint = record.rng.random() < 0.9
    return f" {max(0, len(answer) + noise) // 15}" if has_hint else ""


def pixmo_points(record: Record) -> Example:
    """PixMo-Points: ``image_url``, ``label``, ``points`` in percent, ``collection_method``."""
    image = _pixmo_image(record)
    label = record.get("label", str, "").strip()
    if not label:
        record.bad("its points have no label", "bad points")
    points = percent_points(record, record.values.get("points"), image.size)
    count = record.get("count", int)
    if count is not None and count != len(points):
        record.bad(f"it counts {count}, but has {len(points)} points", "bad points")
    is_counting = record.get("collection_method", str) == "counting"
    answer = _format(record, label, points, [image.size], "point_count" if is_counting else "point")
    style = "point_count" if is_counting else "pointing"
    if record.prompts == "styles":
        question = f"{style}: {label.lower()}"
    else:
        question = _one_of(record, COUNT_QUESTIONS if is_counting else POINT_QUESTIONS)
        question = question.replace("{}", label)
    return Example([image], check_branch(record, exchange(question, answer), style))


def _pixmo_image(record: Record) -> Image.Image:
    source = record.values.get("image")
    if source is None:
        source = record.values.get("image_url")
    sha256 = record.get("image_sha256", str)
    return record.image(source, sha256 or None)


def cosyn_point(record: Record) -> Example:
    """CoSyn-point: ``image``, ``questions``, ``answer_points`` in percent, ``names``?"""
    image = record.image(record.values.get("image"))
    questions = record.get("questions", list, [])
    answers = record.get("answer_points", (list, dict), [])
    names = record.get("names", list, questions)
    if not len(questions) == len(answers) == len(names) or not isinstance(answers, list):
        record.bad(f"it has {len(questions)} questions and {len(answers)} lists of points")
    branches = []
    for question, points, name in zip(questions, answers, names, strict=True):
        if not isinstance(question, str) or not isinstance(name, str):
            record.bad(f"found the question {short(question)} named {short(name)}")
        places = percent_points(record, points, image.size)
        answer = _format(record, name, places, [image.size], "point")
        if record.prompts == "styles":
            question = f"cosyn_point: {question.lower()}"
        messages = without_tags(record, exchange(question, answer), 1)
        branches += check_branch(record, messages, "cosyn_point")
    if not branches:
        record.bad("it has no questions", "no answer")
    return Example([image], branches)


LAYOUTS: dict[str, Callable[[Record], Example]] = {
    "own": own,
    "llava": llava,
    "cauldron": cauldron,
    "pixmo_cap": pixmo_cap,
    "pixmo_points": pixmo_points,
    "cosyn_point": cosyn_point,
}


def layout_of(values: Mapping[str, Any]) -> str:
    """The layout that a record has by the names of its fields; ``own`` if it is none of others."""
    for name, fields in (
        ("llava", {"conversations"}),
        ("cauldron", {"texts"}),
        ("cosyn_point", {"answer_points"}),
        ("pixmo_points", {"image_url", "points"}),
        ("pixmo_cap", {"image_url", "caption"}),
    ):
        if fields <= values.keys():
            return name
    return "own"


def _one_of(record: Record, options: Sequence[str]) -> str:
    return options[int(record.rng.integers(len(options)))]
