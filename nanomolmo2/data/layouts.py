"""What the fields of a record mean: the layouts of several data sets -> `Example`.

A layout is a function of a `Record`; whatever keeps a record from being learned from is a
`BadExample` that names it. Images are decoded here, so a broken one shows here and nowhere later.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from PIL import Image

from nanomolmo2.data.example import BadExample, Branch, Example, Message
from nanomolmo2.processor.chat import read_messages
from nanomolmo2.processor.image import load_image
from nanomolmo2.processor.points import Point, PointMode, Size, format_points
from nanomolmo2.processor.video import Video, load_video

Prompts = Literal["natural", "styles"]
ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")  # of the image of an address

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


@dataclass(frozen=True)
class Record:
    """One record and how it is to be read.

    Attributes:
        values: its fields.
        where: file and place, for messages.
        folder: what its paths are relative to; images of addresses lie here too.
        rng: for whatever is drawn, such as the wording of a question; always the same for a record.
        prompts: how captions and points are asked for, where the data set has no questions.
        separate_turns: every turn is a branch of its own.
    """

    values: Mapping[str, Any]
    where: str
    folder: Path
    rng: np.random.Generator
    prompts: Prompts = "natural"
    separate_turns: bool = False

    def bad(self, detail: str, cause: str = "bad record") -> NoReturn:
        raise BadExample(cause, f"{self.where}: {detail}") from None

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A field of the right type; ``default`` where there is none."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            self.bad(f"the field {name!r} is {_short(value)}, of the type {type(value).__name__}")
        return value

    # ---- images ----

    def image(self, source: Any, sha256: str | None = None) -> Image.Image:
        """Open an image given as path, address, bytes, PIL image or ``{"bytes", "path"}``.

        Args:
            sha256: checksum of the file, where the data set has one: images behind addresses
                change, and points of another image teach nothing.
        """
        if isinstance(source, Mapping):
            source = source.get("bytes") or source.get("path")
        if isinstance(source, str):
            source = self._find(source, sha256)
        elif not isinstance(source, (bytes, Image.Image)):
            self.bad(f"found {_short(source)} in place of a picture")
        try:
            if sha256 is not None and not isinstance(source, Image.Image):
                source = source.read_bytes() if isinstance(source, Path) else source
                if hashlib.sha256(source).hexdigest() != sha256.lower():
                    self.bad(f"the picture is not the one of checksum {sha256}", "changed picture")
            return load_image(source)
        except FileNotFoundError:
            self.bad(f"there is no {source}", "missing picture")
        except (ValueError, OSError) as error:
            self.bad(str(error), "broken picture")

    def _find(self, name: str, sha256: str | None) -> Path:
        if not re.match(r"https?://", name):
            return self.folder / name
        for stem in filter(None, (sha256, address_key(name))):
            for ending in ENDINGS:
                if (path := self.folder / (stem + ending)).is_file():
                    return path
        self.bad(
            f"{name} is an address, from which nothing is downloaded here: save its picture as "
            f"{self.folder / address_key(name)}.jpg (SHA-256 of the address)",
            "missing picture",
        )

    def images(self) -> list[Image.Image]:
        """Those of the field ``image`` (one or a list) or ``images``."""
        if self.values.get("image") is not None and self.values.get("images") is not None:
            self.bad("it has both 'image' and 'images'")
        one = self.values.get("image")
        sources = one if isinstance(one, list) else [one] if one is not None else None
        return [self.image(s) for s in (sources or self.get("images", list, []))]

    def video(self) -> Path | Video | None:
        """Path of the field ``video``, or ``{"frames": [images], "times": [seconds]}`` loaded."""
        source = self.values.get("video")
        if source is None:
            return None
        if isinstance(source, str):
            path = self.folder / source
            if not path.is_file():
                self.bad(f"there is no {path}", "missing video")
            return path
        if not isinstance(source, Mapping) or not isinstance(source.get("frames"), list):
            self.bad(f"found {_short(source)} in place of a video")
        frames = [self.image(frame) for frame in source["frames"]]
        times: Any = source.get("times")
        try:
            return load_video((frames, times), max_frames=max(1, len(frames)))
        except (ValueError, TypeError) as error:
            self.bad(f"the frames and times of the video do not go together: {error}")


def address_key(address: str) -> str:
    """Name under which the image of an address is looked for: SHA-256 of the address, hex."""
    return hashlib.sha256(address.encode()).hexdigest()


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
    if turns[-1].role != "assistant":
        record.bad("it ends with a question", "no answer")
    if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
        record.bad("an answer is empty", "no answer")
    if turns[0].role != "user":  # a subtitle, which would have to stand with the video
        record.bad(f"it begins with a message by {turns[0].role!r}")
    step = 2 if record.separate_turns else len(messages)
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
    return [{**rest[0], "content": "\n\n".join(texts)}, *rest[1:]]


def exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def without_placeholders(record: Record, text: str, num_images: int) -> str:
    """Take ``<image>`` and ``<video>`` out of a text: images always stand before the first.

    Of several images those that stand within a sentence become "Image 1" and so on, which is
    what the prompt calls them.
    """
    found = len(re.findall("<image>", text))
    if found > num_images:
        record.bad(f"its text shows {found} pictures, but it has {num_images}", "missing picture")
    lines = []
    number = 0
    for line in text.split("\n"):
        alone = not re.sub(r"<(image|video)>", "", line).strip()
        pieces = line.replace("<video>", "").split("<image>")
        names = [f"Image {number + n}" for n in range(1, len(pieces))]
        number += len(names)
        if alone and line.strip():  # nothing but placeholders
            continue
        if num_images > 1 and pieces[0].strip():
            line = "".join(a + b for a, b in zip(pieces, [*names, ""], strict=True))
        else:
            line = "".join(pieces)
        lines.append(line)
    return "\n".join(lines).strip()


# ---- points ----


def points_text(
    record: Record, value: Mapping[str, Any], images: Sequence[Image.Image], video: Any
) -> str:
    """``{"points": [{"x", "y", "label"?, "image"?, "time"?}], "label"?, "mode"?}`` -> answer.

    Points are in pixels. Those of several labels become several tags, joined by commas.
    """
    points = value.get("points")
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        record.bad(
            f"found the points {_short(points)}, expected a list of {{'x': pixels, 'y': pixels}}",
            "bad points",
        )
    default = value.get("label") or "point"
    groups: dict[str, list[Point]] = {} if points else {str(default): []}
    for point in points:
        label = point.get("label") or default
        if not isinstance(label, str):
            record.bad(f"found the label {_short(label)}, expected text", "bad points")
        groups.setdefault(label, []).append(
            Point(point["x"], point["y"], point.get("image", 1), time=point.get("time"))
        )
    video_size = video.size if isinstance(video, Video) else None
    sizes = [image.size for image in images]
    mode = value.get("mode", "point")
    return ", ".join(_format(record, *group, sizes, mode, video_size) for group in groups.items())


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
        record.bad(f"found the points {_short(points)}", "bad points")
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
        record.bad(f"found {_short(values)} in place of a branch")
    task, truth = values.get("task", ""), values.get("truth")
    if not isinstance(task, str) or not isinstance(truth, dict | None):
        record.bad(f"task {_short(task)} must be text, truth {_short(truth)} an object")

    def content(value: Any) -> Any:
        if isinstance(value, Mapping) and "points" in value:
            return points_text(record, value, images, video)
        if isinstance(value, list):
            return _without_images(record, value, images, video)
        return value

    if values.get("messages") is not None:
        messages = values["messages"]
        if not isinstance(messages, list):
            record.bad(f"messages is {_short(messages)}, expected a list")
        messages = [
            {**message, "content": content(message.get("content"))}
            if isinstance(message, Mapping)
            else message
            for message in messages
        ]
        return check_branch(record, messages, task, truth)
    question, answer = values.get("question"), values.get("answer")
    if answer is None and "points" in values:
        answer = {key: values[key] for key in ("points", "label", "mode") if key in values}
    if answer is None and values.get("caption") is not None:
        answer = values["caption"]
        question = question or _one_of(record, CAPTION_QUESTIONS)
    if question is None:
        record.bad(
            "it has neither messages nor a question: expected 'branches', 'messages', or "
            "'question' and 'answer'",
            "bad record" if answer is not None else "no answer",
        )
    if answer is None:
        record.bad("its question has no answer", "no answer")
    return check_branch(record, exchange(question, content(answer)), task, truth)


def _without_images(
    record: Record, items: list[Any], images: list[Image.Image], video: Any
) -> list[Any]:
    """Content in parts without its images, which stand beside the messages in an example."""
    shown = [i for i in items if isinstance(i, Mapping) and i.get("type") in ("image", "video")]
    for item in shown:
        if item.get(item["type"]) is not None:
            record.bad(
                f"a message holds {_short(item)}: give the path in 'images' or 'video' of the line"
            )
    num_images = sum(item["type"] == "image" for item in shown)
    if num_images > len(images) or (len(shown) > num_images and video is None):
        record.bad(
            f"a message shows {num_images} pictures and {len(shown) - num_images} videos, the "
            f"record has {len(images)} pictures and {'no' if video is None else 'a'} video",
            "missing picture",
        )
    return [item for item in items if item not in shown]


# ---- layouts of others ----

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SPEAKERS["system"] = "system"


def llava(record: Record) -> Example:
    """LLaVA and ShareGPT: ``image``?, ``conversations`` of ``{"from", "value"}``."""
    images, video = record.images(), record.video()
    messages = []
    for turn in record.get("conversations", list, []):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in SPEAKERS or not isinstance(turn.get("value"), str):
            record.bad(
                f"found {_short(turn)}, expected {{'from': one of {', '.join(SPEAKERS)}, 'value': "
                f"text}}"
            )
        text = turn["value"]
        if SPEAKERS[speaker] == "user":
            text = without_placeholders(record, text, len(images))
        messages.append({"role": SPEAKERS[speaker], "content": text})
    if not messages:
        record.bad("it has no conversation", "no answer")
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
            record.bad(f"found {_short(turn)}, expected {{'user': text, 'assistant': text}}")
        messages += exchange(without_placeholders(record, question, len(images)), answer)
    if not messages:
        record.bad("it has no texts", "no answer")
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
            record.bad(f"found the question {_short(question)} named {_short(name)}")
        places = percent_points(record, points, image.size)
        answer = _format(record, name, places, [image.size], "point")
        if record.prompts == "styles":
            question = f"cosyn_point: {question.lower()}"
        branches += check_branch(record, exchange(question, answer), "cosyn_point")
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


def _short(value: Any) -> str:
    return reprlib.repr(value)
