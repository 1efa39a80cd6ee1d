"""``nanomolmo2 ask``: a question about pictures or a video."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from nanomolmo2.checks import save_image
from nanomolmo2.cli.loading import load_pipeline, precision
from nanomolmo2.cli.options import (
    AdapterFolders,
    AtLeast,
    CacheDir,
    Debug,
    DeviceName,
    DType,
    GenerationOptions,
    Precision,
    UsageError,
)
from nanomolmo2.cli.output import (
    IMAGE_SUFFIXES,
    check_writable,
    note,
    print_json,
    say,
)
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from PIL.Image import Image

    from nanomolmo2.generation.pipeline import Answer, Pipeline
    from nanomolmo2.processor import Message, Point, Processor
    from nanomolmo2.processor.chat import ContentItem

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
LATE = 1.0  # seconds behind the last frame in which a place may still be of it
# Words that end so are names of files, and no questions.
FILE_SUFFIXES = (
    *(*IMAGE_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jfif", ".jp2", ".pgm"),
    *(".ppm", ".svg", *VIDEO_SUFFIXES, ".wmv", ".mpg", ".mpeg", ".mts", ".m2ts", ".flv", ".3gp"),
)


@dataclass(frozen=True, kw_only=True)
class Ask(GenerationOptions):
    """Ask a question about one or more pictures, or about a video.

    The answer is printed as it is written. The points in an answer are in the model's own format
    (thousandths of the picture's sides, or what it selected); --draw paints them, --json lists them
    in pixels.
    """

    inputs: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="PICTURE... QUESTION",
            help="picture files (JPEG, PNG, WebP, GIF, BMP, TIFF) in the order they are shown to "
            "the model, or one video (MP4, WebM, MOV, MKV, AVI, M4V), then the question in quotes",
            help_behavior_hint="(required)",
        ),
    ]
    max_crops: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most detail crops a picture, for models that read crops: more reads smaller "
            "text, and each adds up to 200 tokens; none = as the model was saved (8 in Molmo2)",
        ),
        AtLeast(1),
    ] = None
    video: Annotated[
        bool,
        arg(
            help="the file is a video whatever its name ends with, such as an animated GIF, of "
            "which otherwise the first picture is shown"
        ),
    ] = False
    max_frames: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most frames that are looked at in a video, each about 90 tokens; none = as the "
            "model was saved (384 in Molmo2)",
        ),
        AtLeast(1),
    ] = None
    at: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="X,Y",
            help="a place that the question is about, in pixels from the top-left corner; of "
            "several pictures X,Y@2 is in the second, of a video X,Y@12.5s at that second; "
            "several: --at X,Y --at X,Y",
        ),
    ] = ()
    draw: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="write the picture with the answer's points on it (.png, .jpg, .webp); of several "
            "pictures, FILE-1, FILE-2, ... are written; of a video, an animated .gif",
        ),
    ] = None
    json: Annotated[
        bool,
        arg(
            help="print one JSON object instead: text, count, points (pixels, thousandths, "
            "picture or time, label, confidence where it is known), picture sizes, tokens, "
            "timings in seconds"
        ),
    ] = False
    no_lookup: Annotated[
        bool,
        arg(
            help="write each token in a step of its own; without it, tokens that can be guessed "
            "are checked several in a step, where that is faster; the answer is the same"
        ),
    ] = False
    device: DeviceName = None
    dtype: DType = None
    quantize: Precision = None
    adapter: AdapterFolders = ()
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        paths, question = self._split_inputs()
        generation = self.generation()
        shows_video = self._shows_video(paths)
        places = [read_place(text, len(paths), shows_video) for text in self.at]
        from nanomolmo2.processor import load_image
        from nanomolmo2.processor.inputs import local_path

        targets = [] if self.draw is None else overlay_paths(self.draw, len(paths))
        read = [local_path(path, "video" if shows_video else "picture") for path in paths]
        for target in targets:
            check_writable(target, (".gif",) if shows_video else IMAGE_SUFFIXES, read)

        # Images first: the model takes longer.
        images = [] if shows_video else [load_image(path) for path in paths]
        for text, place in zip(self.at, places, strict=True):
            if images:
                check_inside(text, place, images[place["image"] - 1].size)
        start = time.perf_counter()
        options = precision(self.dtype, self.quantize, self.device, self.adapter)
        pipeline = load_pipeline(self.model, self.cache_dir, **options)
        load_seconds = time.perf_counter() - start
        if shows_video:
            set_max_frames(pipeline, self.max_frames, self.model)
        if self.max_crops is not None:
            set_max_crops(pipeline, self.max_crops, self.model)
        answer = pipeline.ask(
            images,
            with_places(question, places),
            video=paths[0] if shows_video else None,
            **generation,
            lookup=not self.no_lookup,
            on_text=None if self.json else print_piece,
        )
        if self.json:
            answer.timings["load"] = load_seconds
            asked: dict[str, Any] = {"model": self.model, "question": question}
            if places:
                asked["at"] = [
                    {name: value for name, value in place.items() if name != "type"}
                    for place in places
                ]
            print_json({**asked, **answer_report(answer, paths)})
        else:
            say("")
            for problem in answer.problems:
                note(f"note: {problem}")
        for text, place in zip(self.at, places, strict=True):
            warn_if_late(text, place, answer.frame_times)
        for i, target in enumerate(targets):
            if shows_video:
                write_video_overlay(paths[0], answer, pipeline.processor, target)
            else:
                write_overlay(images[i], answer.points, target, number=i + 1)
            note(f"wrote {target}")
        if targets:
            print_marks(answer.points)

    def _split_inputs(self) -> tuple[list[str], str]:
        if len(self.inputs) < 2:
            raise UsageError(
                "expected at least one picture and a question, as in: nanomolmo2 ask dog.jpg "
                f'"Where is the dog?"; found {" ".join(self.inputs) or "nothing"}'
            )
        *paths, question = self.inputs
        if "" in paths:
            raise UsageError("the name of a picture is empty: leave it out, or name a file")
        if os.path.isfile(question):
            raise UsageError(
                f"the last argument, {question}, is a file where the question was expected: put "
                "the question last, in quotes"
            )
        if not any(c.isprintable() and not c.isspace() for c in question):
            raise UsageError(
                "the question is empty: put it last, in quotes, as in: nanomolmo2 ask dog.jpg "
                '"Where is the dog?"'
            )
        if question.strip().lower().endswith(FILE_SUFFIXES):
            if len(question.split()) == 1:
                raise FileNotFoundError(
                    f"there is no file {question}: check its path, and put the question last, in "
                    f"quotes"
                )
            note(f"warning: the question, {question}, ends like a file, but there is none")
        return paths, question

    def _shows_video(self, paths: Sequence[str]) -> bool:
        """Whether the one file is a video.

        Raises: UsageError for a video among other files, and options of the other kind.
        """
        from nanomolmo2.processor.inputs import is_video_file, local_path

        videos = [
            path
            for path in paths
            if self.video or path.lower().endswith(VIDEO_SUFFIXES) or is_video_file(path)
        ]
        if videos and len(paths) > 1:
            raise UsageError(
                f"expected pictures or one video, found {len(paths)} files with {videos[0]} among "
                f"them: ask about each apart"
            )
        if videos and self.max_crops is not None:
            raise UsageError("--max-crops is for pictures; --max-frames sets what a video costs")
        if not videos and self.max_frames is not None:
            raise UsageError(
                f"--max-frames is for videos ({', '.join(VIDEO_SUFFIXES)}), found {paths[0]}: "
                f"--video says that a file is one"
            )
        if videos and not local_path(paths[0], "video").exists():
            raise FileNotFoundError(f"there is no file {paths[0]}: check the path of the video")
        return bool(videos)


_PLACE = re.compile(
    r"(?P<x>-?\d{1,9}(?:\.\d{1,9})?),(?P<y>-?\d{1,9}(?:\.\d{1,9})?)"
    r"(?:@(?:(?P<image>\d{1,9})|(?P<time>\d{1,9}(?:\.\d{1,9})?)s))?"
)


def read_place(text: str, num_images: int, is_video: bool) -> ContentItem:
    """The part of a question that a value of --at stands for.

    Args:
        text: ``120,80``, ``120,80@2`` in the second picture, ``120,80@12.5s`` in a video.
    Raises: UsageError for anything else, and for a picture that is not shown.
    """
    found = _PLACE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise UsageError(
            f"--at is {text!r}, expected X,Y in pixels such as 120,80, X,Y@2 in the second "
            f"picture, or X,Y@12.5s at a second of a video"
        )
    x, y = float(found["x"]), float(found["y"])
    if is_video:
        if found["time"] is None:
            raise UsageError(f"--at {text} names no second of the video: write {text}@12.5s")
        return {"type": "point", "x": x, "y": y, "time": float(found["time"])}
    number = int(found["image"] or 1)
    if found["time"] is not None:
        raise UsageError(f"--at {text} names a second, but no video is shown: write X,Y or X,Y@2")
    if not 1 <= number <= num_images:
        shown = "1 picture is" if num_images == 1 else f"{num_images} pictures are"
        raise UsageError(
            f"--at {text} names picture {number}, but {shown} shown: they count from 1 in the "
            f"order they are given"
        )
    return {"type": "point", "x": x, "y": y, "image": number}


def check_inside(text: str, place: ContentItem, size: tuple[int, int]) -> None:
    """Raises: UsageError for a place outside of its picture of (width, height) pixels."""
    width, height = size
    if not (0 <= place["x"] <= width and 0 <= place["y"] <= height):
        raise UsageError(
            f"--at {text} lies outside of picture {place['image']}, which is {width} x {height} "
            f"pixels: give pixels from its top-left corner"
        )


def warn_if_late(text: str, place: ContentItem, frame_times: Sequence[float]) -> None:
    """Say that a place is of a second that the video does not have.

    Args:
        frame_times: seconds of the frames that were shown, of pictures none.
    """
    last = max(frame_times, default=math.inf)
    if place.get("time", 0.0) > last + LATE:
        note(f"warning: --at {text} names a second after the last frame, which is at {last:g} s")


def with_places(question: str, places: Sequence[ContentItem]) -> str | list[Message]:
    """The question, and the places it is about behind it."""
    if not places:
        return question
    return [{"role": "user", "content": [{"type": "text", "text": question}, *places]}]


def print_piece(text: str) -> None:
    """Print a piece of an answer at once."""
    print(visible(text), end="", flush=True)


def print_marks(points: Sequence[Point]) -> None:
    """Say which labels are drawn as ``label A``, since the font lacks their characters."""
    from nanomolmo2.processor.draw import label_marks

    for label, mark in label_marks(points).items():
        note(f"note: {mark} in the drawing is {label!r}, which its font cannot write")


def answer_report(answer: Answer, paths: Sequence[str]) -> dict[str, Any]:
    """What --json prints of an answer; its fields are listed in docs/cli.md."""
    from nanomolmo2.processor import points_to_json

    video = None
    if answer.video_size is not None:
        width, height = answer.video_size
        video = {"path": paths[0], "width": width, "height": height}
        video["frame_times"] = list(answer.frame_times)
    return {
        "text": answer.text,
        "count": answer.count,
        "points": points_to_json(answer.points, answer.image_sizes, video_size=answer.video_size),
        "problems": list(answer.problems),
        "images": [
            {"path": path, "width": width, "height": height}
            for path, (width, height) in zip(paths, answer.image_sizes, strict=video is None)
        ],
        "video": video,
        "finish_reason": answer.finish_reason,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "timings": {name: round(seconds, 4) for name, seconds in answer.timings.items()},
    }


def overlay_paths(path: Path, images: int) -> list[Path]:
    """``out.png`` for one image; ``out-1.png``, ``out-2.png``, ... for several."""
    if images == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(images)]


def write_overlay(image: Image, points: Sequence[Point], path: Path, *, number: int = 1) -> None:
    """Write an image with its points; complete or not at all."""
    from nanomolmo2.processor.draw import draw_points

    save_image(draw_points(image, points, number=number), path)


def write_video_overlay(source: str, answer: Answer, processor: Processor, path: Path) -> None:
    """Write a video's frames with the answer's points as an animated GIF; complete or not at all.

    Frames of a long video are smaller than those that the points are in.
    """
    from nanomolmo2.processor.draw import draw_frames, save_gif
    from nanomolmo2.processor.video import load_video

    settings = processor.config.video
    assert settings is not None and answer.video_size is not None
    video = load_video(source, max_frames=settings.max_frames, max_fps=settings.max_fps)
    across, down = (a / b for a, b in zip(video.size, answer.video_size, strict=True))
    points = [dataclasses.replace(p, x=p.x * across, y=p.y * down) for p in answer.points]
    save_gif(draw_frames(video.frames, video.times, points), video.times, path)


def set_max_frames(pipeline: Pipeline, max_frames: int | None, name: str) -> None:
    """Let a pipeline look at most at so many frames of a video; None = as many as it does.

    Raises: UsageError for a model that takes no videos.
    """
    processor = pipeline.processor
    if processor.config.video is None:
        raise UsageError(
            f"the model {name} does not take videos: choose one that does, such as "
            f"allenai/Molmo2-4B, or ask about single pictures of it"
        )
    if max_frames is not None:
        set_processor(
            pipeline, video=dataclasses.replace(processor.config.video, max_frames=max_frames)
        )


def set_max_crops(pipeline: Pipeline, max_crops: int, name: str) -> None:
    """Let a pipeline cut images into at most so many crops.

    Raises: UsageError for a model that reads an image as a whole.
    """
    processor = pipeline.processor
    if processor.config.multicrop is None:
        raise UsageError(
            f"the model {name} reads a picture as a whole, not in crops: leave --max-crops out"
        )
    multicrop = dataclasses.replace(processor.config.multicrop, max_crops=max_crops)
    set_processor(pipeline, multicrop=multicrop)


def set_processor(pipeline: Pipeline, **changes: Any) -> None:
    """Exchange a pipeline's processor for one with other settings and the same tokenizer."""
    processor = pipeline.processor
    config = dataclasses.replace(processor.config, **changes)
    pipeline.processor = type(processor)(config, processor.tokenizer)
