"""Animated GIF, WebP and PNG -> frames, by Pillow alone."""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.processor.headers import read_animation
from nanomolmo2.processor.image import load_image
from nanomolmo2.processor.inputs import Input
from nanomolmo2.processor.repair import without_notes
from nanomolmo2.processor.sampling import (
    EXPECTED,
    HELP,
    MAX_ANIMATION_FRAMES,
    MAX_ANIMATION_PIXELS,
    Keeper,
    Sampled,
    Sampling,
    Size,
    TooMuch,
    check_frames,
)


def sample_animation(file: Input, sampling: Sampling) -> Sampled:
    """Animated GIF, WebP or PNG."""
    size, durations = read_animation(file.stream, file.head, MAX_ANIMATION_FRAMES)
    _check_animation(file.name, size, len(durations))
    image, stream = _open_animation(file)
    # A GIF may hold one frame: writers merge equal ones. Other stills are a mistake.
    if image.format != "GIF" and not getattr(image, "is_animated", False):
        raise ValueError(
            f"{file.name}: found a still {image.format} picture, {EXPECTED}: give it as an image"
        )
    # No time given, or too short a one: what browsers do.
    durations = [duration if duration > 10 else 100 for duration in durations]
    while durations:
        begins = [0, *itertools.accumulate(durations)]
        times = sampling.times(begins[-1] / 1000)
        counts = [0] * len(durations)  # how many times show each frame
        for time in times:
            number = bisect.bisect_right(begins, round(time * 1000)) - 1
            counts[min(number, len(counts) - 1)] += 1
        kept = _kept_frames(image, counts, Keeper(file.name, sampling.keep, len(times)))
        if len(kept) == len(durations):
            return Sampled([frame for frames in kept for frame in frames], times, image.size)
        # Cut off or damaged: the frames before count, and their times end sooner.
        durations = durations[: len(kept)]
        stream.seek(0)
        image = Image.open(stream, formats=(image.format or "GIF",))
    raise ValueError(
        f"{file.name}: no frame of the {image.format} can be decoded: the file is damaged or "
        f"incomplete; copy it again"
    )


def _check_animation(name: str, size: Size, count: int) -> None:
    """Raises: TooMuch before anything is decoded."""
    width, height = size
    check_frames(name, size, 1)
    if count > MAX_ANIMATION_FRAMES or count * width * height > MAX_ANIMATION_PIXELS:
        raise TooMuch(
            f"{name}: found {count if count <= MAX_ANIMATION_FRAMES else 'too many'} frames of "
            f"{width} x {height} pixels, expected at most {MAX_ANIMATION_FRAMES} frames and "
            f"{MAX_ANIMATION_PIXELS} pixels in all: {HELP.partition(',')[0]}"
        )


def _open_animation(file: Input) -> tuple[Image.Image, Any]:
    """The image, and the file that it reads from: without its notes if Pillow chokes on them."""
    formats = ("GIF", "WEBP", "PNG", "JPEG")
    file.stream.seek(0)
    try:
        return Image.open(file.stream, formats=formats), file.stream
    except Exception as error:
        message = f"{file.name}: the picture cannot be decoded ({error}): {HELP}"
    data = without_notes(file.stream, file.head, file.size, frames=True)
    if data is not None:
        stream = io.BytesIO(data)
        with contextlib.suppress(Exception):
            return Image.open(stream, formats=formats), stream
    raise ValueError(message)


def _kept_frames(image: Image.Image, counts: Sequence[int], keep: Keeper) -> list[list[Any]]:
    """What is kept of each frame, as many times as it is shown; up to the first damaged one."""
    kept: list[list[Any]] = []
    # An animated PNG may begin with a still for programs that show only stills.
    first = 1 if image.info.get("default_image") else 0
    for number, count in enumerate(counts, start=first):
        try:
            image.seek(number)
            image.load()
        except Exception:  # the frames before count
            break
        kept.append([keep(np.asarray(load_image(image.copy())))] * count if count else [])
    return kept
