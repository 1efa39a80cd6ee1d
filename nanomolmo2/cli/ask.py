"""``nanomolmo2 ask``: a question about pictures or a video."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from nanomolmo2.cli.answering import (
    VIDEO_SUFFIXES,
    Printer,
    answer_report,
    print_marks,
    set_max_crops,
    set_max_frames,
)
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
    option,
)
from nanomolmo2.cli.output import (
    IMAGE_SUFFIXES,
    check_writable,
    note,
    print_json,
    say,
)

if TYPE_CHECKING:
    from nanomolmo2.generation.pipeline import Pipeline
    from nanomolmo2.processor import Message
    from nanomolmo2.processor.chat import ContentItem

STDIN = "-"
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
            help="picture files (JPEG, PNG, WebP, GIF, BMP, TIFF; - is standard input) in the "
            "order they are shown to the model, or one video (MP4, WebM, MOV, MKV, AVI, M4V), then "
            "the question in quotes",
            help_behavior_hint="(required, but with --batch)",
        ),
    ] = ()
    batch: Annotated[
        Path | None,
        arg(
            metavar="FILE.jsonl",
            help="answer the questions of a file instead, a record a line: "
            '{"image": "dog.jpg", "question": "Where is the dog?"}; also "images", "video", '
            '"messages", and what `train` reads',
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(
            metavar="FILE.jsonl",
            help="with --batch: write the answers there, a line each; where some are there "
            "already, go on behind them; none = print them",
        ),
    ] = None
    images: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="with --batch: folder of its pictures; none = paths go out from FILE.jsonl",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        arg(
            metavar="N",
            help="with --batch: questions answered together; changes the speed only; none = 16",
        ),
        AtLeast(1),
    ] = None
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
        if self.batch is not None:
            self._run_batch(self.batch)
            return
        for name in ("out", "images", "batch_size"):
            if getattr(self, name) is not None:
                raise UsageError(f"{option(name)} is for --batch, which is not given")
        paths, question = self._split_inputs()
        generation = self.generation()
        sources = [read_stdin() if path == STDIN else path for path in paths]
        shows_video = self._shows_video(sources)
        places = [read_place(text, len(paths), shows_video) for text in self.at]
        from nanomolmo2.processor import load_image

        targets = self._targets(paths, shows_video)
        # Images first: the model takes longer.
        images = [] if shows_video else [load_image(source) for source in sources]
        for text, place in zip(self.at, places, strict=True):
            if images:
                check_inside(text, place, images[place["image"] - 1].size)
        start = time.perf_counter()
        pipeline = self._load(of_videos=shows_video)
        load_seconds = time.perf_counter() - start
        printer = Printer()
        answer = pipeline.ask(
            images,
            with_places(question, places),
            video=sources[0] if shows_video else None,
            **generation,
            lookup=not self.no_lookup,
            on_text=None if self.json else printer.piece,
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
            printer.end(answer)
            say("")
            for problem in answer.problems:
                note(f"note: {problem}")
        for text, place in zip(self.at, places, strict=True):
            warn_if_late(text, place, answer.frame_times)
        if self.draw is not None:
            answer.draw(self.draw)
        for target in targets:
            note(f"wrote {target}")
        if targets:
            print_marks(answer.points)

    def _run_batch(self, path: Path) -> None:
        from nanomolmo2.cli.batch import Batch

        if self.inputs:
            raise UsageError(
                f"--batch {path} has pictures and questions of its own: leave "
                f"{' '.join(self.inputs)} out"
            )
        for name, wants in (("draw", "its picture"), ("at", "its question"), ("video", "its file")):
            if getattr(self, name):
                raise UsageError(f"--{name} is of one question and {wants}: leave it out")
        batch = Batch(path, self.out, self.images, self.model, self.generation())
        batch.check()
        pipeline = self._load(of_videos=self.max_frames is not None)
        batch.run(pipeline, self.batch_size or 16)

    def _load(self, *, of_videos: bool) -> Pipeline:
        options = precision(self.dtype, self.quantize, self.device, self.adapter)
        pipeline = load_pipeline(self.model, self.cache_dir, **options)
        if of_videos:
            set_max_frames(pipeline, self.max_frames, self.model)
        if self.max_crops is not None:
            set_max_crops(pipeline, self.max_crops, self.model)
        return pipeline

    def _targets(self, paths: Sequence[str], shows_video: bool) -> list[Path]:
        """Where the drawings go: known to be writable, and over nothing that is read."""
        if self.draw is None:
            return []
        from nanomolmo2.generation.drawing import overlay_paths
        from nanomolmo2.processor.inputs import local_path

        targets = overlay_paths(self.draw, len(paths))
        kind = "video" if shows_video else "picture"
        read = [local_path(path, kind) for path in paths if path != STDIN]
        for target in targets:
            check_writable(target, (".gif",) if shows_video else IMAGE_SUFFIXES, read)
        return targets

    def _split_inputs(self) -> tuple[list[str], str]:
        if len(self.inputs) < 2:
            raise UsageError(
                "expected at least one picture and a question, as in: nanomolmo2 ask dog.jpg "
                f'"Where is the dog?"; found {" ".join(self.inputs) or "nothing"}'
            )
        *paths, question = self.inputs
        if "" in paths:
            raise UsageError("the name of a picture is empty: leave it out, or name a file")
        if self.inputs.count(STDIN) > 1 or question == STDIN:
            raise UsageError(
                f"found {' '.join(self.inputs)}: - is one picture, or one video, from standard "
                f"input, and the question comes last, in quotes"
            )
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

    def _shows_video(self, sources: Sequence[str | bytes]) -> bool:
        """Whether the one file is a video.

        Raises: UsageError for a video among other files, and options of the other kind.
        """
        from nanomolmo2.processor.inputs import is_video_file, local_path

        names = [STDIN if isinstance(source, bytes) else source for source in sources]
        videos = [
            name
            for name, source in zip(names, sources, strict=True)
            if self.video or name.lower().endswith(VIDEO_SUFFIXES) or is_video_file(source)
        ]
        if videos and len(names) > 1:
            raise UsageError(
                f"expected pictures or one video, found {len(names)} files with {videos[0]} among "
                f"them: ask about each apart"
            )
        if videos and self.max_crops is not None:
            raise UsageError("--max-crops is for pictures; --max-frames sets what a video costs")
        if not videos and self.max_frames is not None:
            raise UsageError(
                f"--max-frames is for videos ({', '.join(VIDEO_SUFFIXES)}), found {names[0]}: "
                f"--video says that a file is one"
            )
        if videos and videos != [STDIN] and not local_path(videos[0], "video").exists():
            raise FileNotFoundError(f"there is no file {videos[0]}: check the path of the video")
        return bool(videos)


def read_stdin() -> bytes:
    """What comes through standard input: one file, to its end.

    Raises: UsageError where a person would have to type it; ValueError for nothing and too much.
    """
    from nanomolmo2.processor.inputs import MAX_STREAM_BYTES

    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "- is a picture from standard input, and nothing is sent there: nanomolmo2 ask - "
            '"What is this?" < dog.jpg'
        )
    data = sys.stdin.buffer.read(MAX_STREAM_BYTES + 1)
    if not data:
        raise ValueError("standard input is empty, expected a picture: did its program fail?")
    if len(data) > MAX_STREAM_BYTES:
        raise ValueError(
            f"standard input has more than {MAX_STREAM_BYTES:,} bytes: save it, and name the file"
        )
    return data


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
