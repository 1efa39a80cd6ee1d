"""What `ask` and `chat` share: an answer as it is printed, reported and drawn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import note
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from nanomolmo2.generation.pipeline import Answer, Pipeline
    from nanomolmo2.processor import Point

# A selected point, or the beginning of one at the end of what is known.
SELECTED_BEGINS = re.compile(r"<(?:$|P(?:$|O(?:$|I(?:$|N(?:$|T(?:$|_))))))")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")


class Printer:
    """Prints an answer while it is written, with its points in coordinates.

    Where a point was selected, the text has numbers that mean something in its own prompt only.
    From the first of them on it waits for the end.
    """

    def __init__(self) -> None:
        self._text = ""  # all of it
        self._printed = 0  # characters of it

    def piece(self, text: str) -> None:
        """Print a piece at once, as far as it is known how it reads."""
        self._text += text
        first = SELECTED_BEGINS.search(self._text, self._printed)
        self._print(self._text[self._printed : first.start() if first else None])

    def end(self, answer: Answer) -> None:
        """Print what is left."""
        self._print(answer.coordinates[self._printed :])

    def _print(self, text: str) -> None:
        self._printed += len(text)
        if text:
            print(visible(text), end="", flush=True)


def print_marks(points: Sequence[Point]) -> None:
    """Say which labels are drawn as ``label A``, since the font lacks their characters."""
    from nanomolmo2.processor.draw import label_marks

    for label, mark in label_marks(points).items():
        note(f"note: {mark} in the drawing is {label!r}, which its font cannot write")


def answer_report(answer: Answer, paths: Sequence[str | None]) -> dict[str, Any]:
    """What --json prints of an answer; its fields are listed in docs/cli.md.

    Args:
        paths: as they were given, of the pictures or of the video.
    """
    report = answer.to_dict()
    shown = report["images"] if report["video"] is None else [report["video"]]
    named = [{"path": path, **one} for path, one in zip(paths, shown, strict=True)]
    if report["video"] is None:
        return {**report, "images": named}
    return {**report, "video": named[0]}


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
        video = dataclasses.replace(processor.config.video, max_frames=max_frames)
        pipeline.processor = processor.with_settings(video=video)


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
    pipeline.processor = processor.with_settings(multicrop=multicrop)
