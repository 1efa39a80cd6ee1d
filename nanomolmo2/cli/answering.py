"""What `ask` and `chat` share: an answer as it is printed, reported and drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import note
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from nanomolmo2.generation.pipeline import Answer, Pipeline
    from nanomolmo2.processor import Point

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")


def print_piece(text: str) -> None:
    """Print a piece of an answer at once."""
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
