"""Videos: whatever people have -> a few RGB frames and the second that each one stands for.

`sample_times` is the rule (which moments of a video the model looks at), `load_video` is about
people: video files, animated images, frames they already have.

Files are decoded by torchcodec or PyAV (the extra ``video``), animated images by Pillow alone.
Nothing is downloaded. FFmpeg gets the open file and no name, and only a file that begins like a
video: it would also follow playlists and patterns to other files and addresses.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import os
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from nanomolmo2.processor.animation import sample_animation
from nanomolmo2.processor.headers import Matrix, mp4_matrix
from nanomolmo2.processor.image import ImageSource, load_image
from nanomolmo2.processor.inputs import (
    BinaryFile,
    Container,
    Input,
    guess,
    is_file,
    open_input,
    video_container,
)
from nanomolmo2.processor.sampling import (
    EXPECTED,
    HELP,
    MAX_FRAME_PIXELS,
    MAX_STORED_FRAMES,
    Frame,
    Keep,
    Keeper,
    Sampled,
    Sampling,
    Size,
    TooMuch,
    check_frames,
    check_limits,
    evenly,
    sample_indices,
    sample_times,
)

__all__ = ["Frame", "Video", "VideoSource", "load_video", "sample_indices", "sample_times"]

# Frames that a `Video` holds in their own size; more of them are made smaller.
MAX_VIDEO_BYTES = 800_000_000


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames and their times.

    Args:
        frames: RGB arrays (H, W, 3) of uint8, all of one size. Neighbours may be the same object:
            a slow video shows one frame at several sampled times.
        times: seconds from the start of the video, one a frame, rising.
    Raises: ValueError if there are no frames, or sizes, times and counts do not go together.
    """

    frames: tuple[Frame, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("found a video of 0 frames, expected at least one")
        if len(self.frames) != len(self.times):
            raise ValueError(
                f"found {len(self.frames)} frames and {len(self.times)} times, expected one time, "
                f"in seconds, for each frame"
            )
        for number, frame in enumerate(self.frames, start=1):
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
                kind = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
                raise ValueError(
                    f"frame {number}: found {kind}, expected an array of uint8: give pictures of "
                    f"other kinds to load_video as (frames, times)"
                )
            if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
                raise ValueError(
                    f"frame {number}: found an array of shape {frame.shape}, expected (H, W, 3)"
                )
            _check_same_size(number, frame.shape[1::-1], self.size)
        _check_times(self.times)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every frame, pixels."""
        height, width = self.frames[0].shape[:2]
        return width, height


def _check_same_size(number: int, size: Sequence[int], first: Sequence[int]) -> None:
    if tuple(size) != tuple(first):
        raise ValueError(
            f"frame {number} is {size[0]} x {size[1]} pixels, the first is {first[0]} x "
            f"{first[1]}: resize the frames to one size"
        )


def _check_times(times: Sequence[float]) -> None:
    if not times:
        raise ValueError("found a video of 0 frames, expected at least one")
    if not all(math.isfinite(time) for time in times) or times[0] < 0:
        raise ValueError(f"found times from {times[0]} to {times[-1]}, expected seconds from 0 on")
    for number, (before, after) in enumerate(itertools.pairwise(times), start=2):
        if after <= before:
            raise ValueError(
                f"frame {number} is at {after} s, the one before at {before} s: expected rising "
                f"times; sort the frames and drop repeated ones"
            )


VideoSource = (
    str
    | os.PathLike[str]
    | bytes
    | BinaryFile
    | Video
    | tuple[Sequence[ImageSource], Sequence[float] | float]
)

# ---- what people have ----


def load_video(source: VideoSource, *, max_frames: int = 384, max_fps: float = 2.0) -> Video:
    """Read any video and keep the frames at `sample_times`.

    A file (by path or ``file:`` address, as bytes or open) may be MP4, MOV, WebM, Matroska, AVI,
    MPEG, MTS, FLV, Ogg or WMV, which needs the extra ``video``, or an animated GIF, WebP or PNG,
    which does not. At every sampled time the frame on screen is taken: the last one that began by
    then. Time 0 is the first frame; rotation and mirroring are applied, sound ignored. Of a file
    that is cut off the frames that decode are taken.

    Frames in memory come as a pair: (frames, times) are taken as already sampled, and only if
    there are more than ``max_frames``, evenly fewer, with the first and the last; (frames, rate)
    are sampled by `sample_indices`. The frames are whatever `load_image` takes. A `Video` is
    returned as it is.

    Args:
        source: path or ``file:`` address, bytes of a file, binary file (it is read from its
            beginning, gets its place back, and stays open), pair of frames and seconds (or frames
            a second), or `Video`.
        max_frames: most frames. In memory each takes 3 x width x height bytes; where all of them
            would take more than `MAX_VIDEO_BYTES`, they are made smaller as they come.
        max_fps: most frames a second.
    Returns: the frames in their original size, as long as they fit.
    Raises: FileNotFoundError if there is no such file; ValueError, in one line, for whatever else
        keeps the source from being a video, if it is larger than the limits at the top of this
        file, or if neither decoder is installed.
    """
    if isinstance(source, Video):
        return source
    sampled = sample_video(source, _fitting, max_frames=max_frames, max_fps=max_fps)
    return Video(tuple(sampled.frames), tuple(sampled.times))


def sample_video(
    source: VideoSource,
    keep: Callable[[Size, int], Keep],
    *,
    max_frames: int = 384,
    max_fps: float = 2.0,
) -> Sampled:
    """As `load_video`, but of each frame only what is needed is kept, as it comes.

    Args:
        keep: given the size and the number of the frames, what makes of a frame what is kept.
    """
    check_limits(max_frames, max_fps)
    try:
        return _sample(source, Sampling(keep, max_frames, max_fps))
    except TooMuch as error:
        raise ValueError(str(error)) from None


def _sample(source: VideoSource, sampling: Sampling) -> Sampled:
    keep = sampling.keep
    if isinstance(source, Video):
        each = keep(source.size, len(source.frames))
        return Sampled(_each_once(source.frames, each), list(source.times), source.size)
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], (str, bytes)):
        return _from_frames(*source, sampling)
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or is_file(source):
        with open_input(source, "video") as file:
            return _read(file, sampling)
    raise ValueError(
        f"cannot read a video from {type(source).__name__}: give a path, the bytes of a file, an "
        f"open file, or a tuple of two: the frames and their times in seconds"
    )


def _fitting(size: Size, count: int) -> Keep:
    """Frames as they are, or smaller where all of them would take more than `MAX_VIDEO_BYTES`."""
    width, height = size
    share = MAX_VIDEO_BYTES / (3 * width * height * count)
    if share >= 1:
        return lambda frame: frame
    return _Shrink((max(1, int(width * share**0.5)), max(1, int(height * share**0.5))))


@dataclass(frozen=True)
class _Shrink:
    """Makes frames smaller."""

    size: Size

    def __call__(self, frame: Frame) -> Frame:
        return np.asarray(Image.fromarray(frame).resize(self.size, Image.Resampling.BILINEAR))


def _each_once(frames: Iterable[Frame], keep: Keep) -> list[Any]:
    kept: list[Any] = []
    last: Frame | None = None
    for frame in frames:
        kept.append(kept[-1] if frame is last else keep(frame))
        last = frame
    return kept


def _from_frames(
    frames: Iterable[ImageSource],
    times: Iterable[float] | float,
    sampling: Sampling,
) -> Sampled:
    if not isinstance(frames, Iterable):
        raise ValueError(f"found {reprlib.repr(frames)} in place of frames: give a list of them")
    images = list(frames)
    _, max_frames, max_fps = sampling
    try:
        given = float(times) if isinstance(times, (int, float)) else [float(t) for t in times]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"found {reprlib.repr(times)} beside {len(images)} frames, expected their times in "
            f"seconds, or their frames a second"
        ) from None
    if isinstance(times, (int, float)):
        chosen = sample_indices(len(images), times, max_frames, max_fps)
        seconds = [index / times for index in range(len(images))]
    else:
        chosen = evenly(len(images), max_frames)
        assert isinstance(given, list)
        seconds = given
        if len(seconds) != len(images):
            raise ValueError(
                f"found {len(images)} frames and {len(seconds)} times, expected one time, in "
                f"seconds, for each frame"
            )
    arrays: list[Any] = []
    each: Keep = lambda frame: frame  # noqa: E731
    size = (0, 0)
    for index in chosen:
        try:
            image = load_image(images[index])
        except ValueError as error:
            raise ValueError(f"frame {index + 1}: {error}") from None
        if not arrays:
            size = image.size
            check_frames("the given frames", size, len(chosen))
            each = sampling.keep(size, len(chosen))
        _check_same_size(len(arrays) + 1, image.size, size)
        arrays.append(each(np.asarray(image)))
    shown = [seconds[index] for index in chosen]
    _check_times(shown)
    return Sampled(arrays, shown, size)


def _read(file: Input, sampling: Sampling) -> Sampled:
    """Decode a file; its beginning decides how."""
    if not file.head:
        raise ValueError(f"{file.name}: found an empty file (0 bytes), {EXPECTED}: copy it again")
    if _is_image(file.head):
        return sample_animation(file, sampling)
    if container := video_container(file.head):
        return _decode(file, container, sampling)
    raise ValueError(f"{file.name}: found {guess(file.head)}, {EXPECTED}: {HELP}")


def _is_image(head: bytes) -> bool:
    return head.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


# ---- the frame on screen ----


def _on_screen(
    frames: Iterable[tuple[int, T]], ticks: Sequence[int], keep: Callable[[T], Any]
) -> list[Any]:
    """One pass over all frames: those on screen at the given times, each kept once.

    Args:
        frames: (begin, frame) in the order shown.
        ticks: rising times, in the unit of the begins.
    Returns: a frame for each time; nothing if there are no frames.
    """
    found: list[Any] = []
    current: T | None = None
    for begin, frame in frames:
        if current is not None:
            # At times before the next frame begins the current one is on screen.
            count = bisect.bisect_left(ticks, begin, lo=len(found)) - len(found)
            if count:
                found += [keep(current)] * count
        if len(found) == len(ticks):
            return found
        current = frame
    if current is not None:
        found += [keep(current)] * (len(ticks) - len(found))
    return found


# ---- video files ----


def _decode(file: Input, container: Container, sampling: Sampling) -> Sampled:
    """Decode with torchcodec if it works here, else with PyAV."""
    failure = None
    try:
        # Without FFmpeg's libraries it is installed, but does not import or does not decode.
        from torchcodec.decoders import VideoDecoder

        return _decode_torchcodec(VideoDecoder, file, container, sampling)
    except (ImportError, TooMuch) as error:
        if isinstance(error, TooMuch):
            raise
    except Exception as error:
        failure = " ".join(str(error).split())[:200]
    try:
        import_module("av")
    except ImportError:
        if failure is not None:
            raise ValueError(f"{file.name}: cannot be decoded ({failure}): {HELP}") from None
        raise ValueError(
            f"{file.name}: found a video ({container.name}): video files need a decoder, and "
            f"neither torchcodec nor PyAV is installed: pip install 'nanomolmo2[video]'"
        ) from None
    # Its errors say more, and of a damaged file it gives what there is.
    return _decode_pyav(file, container, sampling)


def _decode_torchcodec(
    decoder_class: Any, file: Input, container: Container, sampling: Sampling
) -> Sampled:
    matrix = mp4_matrix(file.stream) if container.demuxer == "mov" else None
    file.stream.seek(0)
    decoder = decoder_class(
        file.stream,
        dimension_order="NHWC",
        num_ffmpeg_threads=0,  # FFmpeg decides
        seek_mode="exact",  # one scan of the file gives the true begin and end
    )
    metadata = decoder.metadata
    size = getattr(metadata, "width", None) or 1, getattr(metadata, "height", None) or 1
    begin = metadata.begin_stream_seconds_from_content
    end = metadata.end_stream_seconds_from_content
    times = sampling.times(end - begin)
    check_frames(file.name, size, len(times))
    keep = Keeper(file.name, sampling.keep, len(times))
    frames: list[Any] = []
    # The end itself lies outside: the last frame is asked for by its number.
    inner = times[:-1] if len(times) > 1 else times
    for start in range(0, len(inner), _TOGETHER):
        seconds = [begin + time for time in inner[start : start + _TOGETHER]]
        shown = decoder.get_frames_played_at(seconds).data.numpy()
        frames += [keep(_mirrored(frame, matrix)) for frame in shown]
    if len(times) > 1:
        last = decoder.get_frame_at(len(decoder) - 1).data.numpy()
        frames.append(keep(_mirrored(last, matrix)))
    return Sampled(frames, times, keep.size)


_TOGETHER = 8  # frames that are in memory at once


def _mirrored(frame: Frame, matrix: Matrix | None) -> Frame:
    """torchcodec turns a frame and leaves out that it is mirrored before."""
    if matrix is None or matrix[0] * matrix[3] - matrix[1] * matrix[2] >= 0:
        return frame
    is_lying = abs(matrix[1]) > abs(matrix[0])  # a quarter turn
    return np.ascontiguousarray(frame[:, ::-1] if is_lying else frame[::-1])


def _decode_pyav(file: Input, container: Container, sampling: Sampling) -> Sampled:
    import av

    try:
        with _video_stream(file, container) as stream:
            unit = Fraction(stream.time_base or 1)
            begin, end = _span(_packets(stream))
        times = sampling.times(float((end - begin) * unit))
        # A time means the nearest tick of the file's clock.
        ticks = [begin + round(time / unit) for time in times]
        with _video_stream(file, container) as stream:
            context = stream.codec_context
            size: tuple[int | None, int | None] = context.width or None, context.height or None
            check_frames(file.name, (context.width or 1, context.height or 1), len(times))
            stream.thread_type = "AUTO"
            # Frames may grow on the way.
            context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            keep = Keeper(file.name, sampling.keep, len(times))
            smaller = sampling.keep((context.width or 1, context.height or 1), len(times))
            if isinstance(smaller, _Shrink):  # FFmpeg does it on the way to RGB
                size = smaller.size
                keep = Keeper(file.name, lambda *_: lambda frame: frame, len(times))
            to_rgb = _ToRgb(*size)
            frames = _on_screen(_frames(stream), ticks, lambda frame: keep(to_rgb(frame)))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{file.name}: found a video ({container.name}) that cannot be decoded "
            f"({error.strerror}): the file is damaged or incomplete, or no video; {HELP}"
        ) from None
    if not frames:
        raise ValueError(
            f"{file.name}: found a video ({container.name}), but no frame can be decoded: the file "
            f"is empty, damaged or incomplete; {HELP}"
        )
    return Sampled(frames, times, keep.size)


@contextlib.contextmanager
def _video_stream(file: Input, container: Container) -> Iterator[Any]:
    """The video stream of a file, open."""
    import av

    file.stream.seek(0)
    # The demuxer is named: FFmpeg's own guess may fall on a playlist, which opens other files.
    opened = av.open(file.stream, format=container.demuxer, metadata_errors="replace")
    with opened as streams:
        stream = streams.streams.best("video")
        # The cover of a song is a "video" of one image.
        if stream is None or av.stream.Disposition.attached_pic in stream.disposition:
            has_sound = bool(streams.streams.audio)
            raise ValueError(
                f"{file.name}: found {'only sound' if has_sound else 'no video track'}, {EXPECTED}"
            )
        if stream.codec_context is None:
            raise ValueError(f"{file.name}: found a video of a kind unknown to this FFmpeg: {HELP}")
        yield stream


def _packets(stream: Any) -> Iterator[Any]:
    """The stored frames, in the order of the file, up to its end or to where it is cut off."""
    import av

    packets = 0
    try:
        for packet in stream.container.demux(stream):
            if packet.size:  # the last one only says that it is the last
                packets += 1
                if packets > MAX_STORED_FRAMES:
                    raise TooMuch(
                        f"found a video of more than {MAX_STORED_FRAMES} stored frames, the "
                        f"most that is looked at: cut it into parts"
                    )
                yield packet
    except av.error.FFmpegError:
        return


def _span(packets: Iterable[Any]) -> tuple[int, int]:
    """Begin of the first frame and end of the last, in ticks; headers are often wrong or silent."""
    spans = [
        (packet.pts if packet.pts is not None else packet.dts, packet.duration or 0)
        for packet in packets
        if not packet.is_discard  # helps to decode others and is not shown
    ]
    spans = [(begin, duration) for begin, duration in spans if begin is not None]
    if not spans:
        return 0, 0
    return min(begin for begin, _ in spans), max(begin + duration for begin, duration in spans)


def _frames(stream: Any) -> Iterator[tuple[int, Any]]:
    """(begin in ticks, frame) in the order shown."""
    import av

    for packet in itertools.chain(_packets(stream), [None]):  # None: what the decoder still holds
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            continue  # a damaged frame: the one before stays on screen
        for frame in frames:
            begin = frame.pts if frame.pts is not None else frame.dts
            if begin is not None:
                yield begin, frame


class _ToRgb:
    """PyAV's frames -> upright RGB."""

    def __init__(self, width: int | None, height: int | None) -> None:
        # Calls and screen recordings change their size on the way; all frames get one.
        self.width, self.height = width, height
        self._rotation: int | None = None
        self._matrix: Matrix = 1, 0, 0, 1

    def __call__(self, frame: Any) -> Frame:
        image = frame.to_ndarray(format="rgb24", width=self.width, height=self.height)
        # A frame whose matrix was asked for stays in memory until the next garbage collection.
        if frame.rotation != self._rotation:
            self._rotation, self._matrix = frame.rotation, _matrix_of(frame)
        return np.ascontiguousarray(_upright(image, self._matrix))


def _matrix_of(frame: Any) -> Matrix:
    """Phones store the image as it lies on the sensor, and how to turn and mirror it."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    return a, b, c, d


def _upright(image: Frame, matrix: Matrix) -> Frame:
    """The stored image as it is shown: all that is not a multiple of 90 degrees is the nearest."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:  # x becomes y
        image, across, down = image.swapaxes(0, 1), c, b
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
