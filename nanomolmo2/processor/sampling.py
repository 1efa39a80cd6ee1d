"""The rule of which moments of a video are looked at, its limits, and what is kept of a frame.

`sample_times` is the rule. A `Sampling` carries what is wanted to whatever reads a file, and a
`Keeper` makes of each frame, as it comes, what is kept of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]  # (H, W, 3), RGB
Size = tuple[int, int]  # (width, height), pixels
Keep = Callable[[Frame], Any]  # what is kept of a frame


class Sampled(NamedTuple):
    """What was kept of a video."""

    frames: list[Any]  # neighbours may be the same object
    times: list[float]  # seconds
    size: Size  # of the original frames


# What is looked at; more is refused before it is decoded.
MAX_FRAME_PIXELS = 36_000_000  # of one frame: 8192 x 4320
MAX_KEPT_PIXELS = 4_000_000_000  # of all kept frames: 384 of 3840 x 2160
MAX_SECONDS = 10_000_000  # four months
MAX_STORED_FRAMES = 400_000  # of a file: 3.7 hours at 30 a second
MAX_ANIMATION_FRAMES = 20_000
MAX_ANIMATION_PIXELS = 500_000_000  # of all frames, since each is drawn on the one before

EXPECTED = "expected a video (MP4, MOV, WebM, Matroska, AVI, MPEG) or an animated GIF"
HELP = "convert it to MP4 (ffmpeg -i FILE out.mp4), or copy it again"


def sample_times(duration: float, max_frames: int = 384, max_fps: float = 2.0) -> list[float]:
    """The seconds at which a video is looked at: start and end, and evenly in between.

    Where ``max_frames`` at ``max_fps`` reach the end, the times are 0, 1/fps, 2/fps, ... below the
    duration, and the duration itself. In a longer video they are ``max_frames`` times at equal
    distances, both ends included.

    Args:
        duration: seconds from the first frame's begin to the last frame's end; 0 gives [0.0].
        max_frames: F, most times. Of a single one only the start is left.
        max_fps: most frames a second.
    Returns: at most F rising times in seconds.
    Source: Molmo2, olmo/hf_model/video_processing_molmo2.py (``uniform_last_frame``).
    """
    check_limits(max_frames, max_fps)
    if not math.isfinite(duration) or duration < 0:
        raise ValueError(f"found a duration of {duration} seconds, expected 0 or more")
    if (max_frames - 1) / max_fps < duration:
        return np.linspace(0, duration, num=max_frames).tolist()
    grid = (step / max_fps for step in range(max_frames))
    return [*itertools.takewhile(lambda time: time < duration, grid), float(duration)]


def sample_indices(
    num_frames: int, fps: float, max_frames: int = 384, max_fps: float = 2.0
) -> list[int]:
    """The same rule for frames in memory that come with a rate and no times.

    Args:
        num_frames: how many there are.
        fps: their frames a second.
    Returns: at most ``max_frames`` rising indices; the first and the last frame are among them.
        Frames that come slower than ``max_fps`` are listed once each, where Molmo2 repeats them.
    Source: as `sample_times`.
    """
    check_limits(max_frames, max_fps)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"found {fps} frames a second, expected a positive number")
    if num_frames <= min(2, max_frames):
        return list(range(num_frames))
    if num_frames / fps > (max_frames - 1) / max_fps:
        return evenly(num_frames, max_frames)
    steps = np.arange(0.0, num_frames - 1, fps / max_fps)
    return sorted({*np.round(steps).astype(int).tolist(), num_frames - 1})


def evenly(num_frames: int, max_frames: int) -> list[int]:
    """At most ``max_frames`` of so many indices, first and last among them."""
    count = min(num_frames, max_frames)
    return np.linspace(0, num_frames - 1, num=count).astype(int).tolist()


def check_limits(max_frames: int, max_fps: float) -> None:
    if max_frames < 1:
        raise ValueError(f"found max_frames {max_frames}, expected 1 or more")
    if not (max_fps > 0 and math.isfinite(max_fps)):
        raise ValueError(f"found max_fps {max_fps}, expected a positive number")


# ---- what is kept ----


class Sampling(NamedTuple):
    """What is wanted of a file."""

    keep: Callable[[Size, int], Keep]
    max_frames: int
    max_fps: float

    def times(self, duration: float) -> list[float]:
        """Raises: TooMuch for a duration that only a damaged file has."""
        if duration > MAX_SECONDS:
            raise TooMuch(
                f"found a video of {duration:.3g} seconds, expected at most {MAX_SECONDS:,}: the "
                f"file is damaged; write it anew (ffmpeg -i FILE out.mp4)"
            )
        return sample_times(duration, self.max_frames, self.max_fps)


class TooMuch(ValueError):
    """Not the fault of a decoder: no other is tried."""


def check_frames(name: str, size: Size, count: int) -> None:
    """Raises: TooMuch for frames that are too large, each or together."""
    width, height = size
    if width * height > MAX_FRAME_PIXELS or count * width * height > MAX_KEPT_PIXELS:
        most = MAX_KEPT_PIXELS // max(1, width * height)
        fewer = f", or take at most {most} frames" if 0 < most < count else ""
        raise TooMuch(
            f"{name}: found {count} frame{'s' * (count != 1)} of {width} x {height} pixels to look "
            f"at, expected at most {MAX_FRAME_PIXELS} pixels each and {MAX_KEPT_PIXELS} together: "
            f"make the video smaller{fewer}"
        )


class Keeper:
    """Keeps frames, all by what the first one is."""

    def __init__(self, name: str, keep: Callable[[Size, int], Keep], count: int) -> None:
        self.name, self.count = name, count
        self._keep = keep
        self._each: Keep | None = None
        self.size: Size = (0, 0)

    def __call__(self, frame: Frame) -> object:
        if self._each is None:
            height, width = frame.shape[:2]
            self.size = width, height
            check_frames(self.name, self.size, self.count)
            self._each = self._keep(self.size, self.count)
        if frame.shape[1::-1] != self.size:
            raise ValueError(
                f"{self.name}: a frame is {frame.shape[1]} x {frame.shape[0]} pixels, the first is "
                f"{self.size[0]} x {self.size[1]}: expected one size; {HELP}"
            )
        return self._each(frame)
