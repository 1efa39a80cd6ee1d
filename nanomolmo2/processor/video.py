"""Videos: whatever people have -> a few RGB frames and the second that each one stands for.

`sample_times` is the rule (which moments of a video the model looks at), `load_video` is about
people: video files, animated images, frames they already have.

Files are decoded by torchcodec or PyAV (the extra ``video``), animated images by Pillow alone.
Nothing is downloaded, and only files that begin like a video reach a decoder: FFmpeg would also
follow playlists to other files and addresses.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.processor.image import ImageSource, load_image

Frame = NDArray[np.uint8]  # (H, W, 3), RGB

_EXPECTED = "expected a video (MP4, MOV, WebM, Matroska, AVI, MPEG) or an animated GIF"
_HELP = "convert it to MP4, or copy it again"


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
            if frame.shape != self.frames[0].shape:
                height, width = frame.shape[:2]
                first = "{} x {}".format(*self.size)
                raise ValueError(
                    f"frame {number} is {width} x {height} pixels, the first is {first}: resize "
                    f"the frames to one size"
                )
        if not all(math.isfinite(time) for time in self.times) or self.times[0] < 0:
            raise ValueError(
                f"found times from {self.times[0]} to {self.times[-1]}, expected seconds from 0 on"
            )
        for number, (before, after) in enumerate(itertools.pairwise(self.times), start=2):
            if after <= before:
                raise ValueError(
                    f"frame {number} is at {after} s, the one before at {before} s: expected "
                    f"rising times; sort the frames and drop repeated ones"
                )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every frame, pixels."""
        height, width = self.frames[0].shape[:2]
        return width, height


VideoSource = (
    str | os.PathLike[str] | bytes | Video | tuple[Sequence[ImageSource], Sequence[float] | float]
)


# ---- the rule ----


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
    _check_limits(max_frames, max_fps)
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
    _check_limits(max_frames, max_fps)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"found {fps} frames a second, expected a positive number")
    if num_frames <= min(2, max_frames):
        return list(range(num_frames))
    if num_frames / fps > (max_frames - 1) / max_fps:
        return _evenly(num_frames, max_frames)
    steps = np.arange(0.0, num_frames - 1, fps / max_fps)
    return sorted({*np.round(steps).astype(int).tolist(), num_frames - 1})


def _evenly(num_frames: int, max_frames: int) -> list[int]:
    """At most ``max_frames`` of so many indices, first and last among them."""
    count = min(num_frames, max_frames)
    return np.linspace(0, num_frames - 1, num=count).astype(int).tolist()


def _check_limits(max_frames: int, max_fps: float) -> None:
    if max_frames < 1:
        raise ValueError(f"found max_frames {max_frames}, expected 1 or more")
    if not (max_fps > 0 and math.isfinite(max_fps)):
        raise ValueError(f"found max_fps {max_fps}, expected a positive number")


# ---- what people have ----


def load_video(source: VideoSource, *, max_frames: int = 384, max_fps: float = 2.0) -> Video:
    """Read any video and keep the frames at `sample_times`.

    A file (by path or as bytes) may be MP4, MOV, WebM, Matroska, AVI, MPEG, FLV or WMV, which
    needs the extra ``video``, or an animated GIF, WebP or PNG, which does not. At every sampled
    time the frame on screen is taken: the last one that began by then. Time 0 is the first frame;
    rotation is applied, sound ignored. Of a file that is cut off the frames that decode are taken.

    Frames in memory come as a pair: (frames, times) are taken as already sampled, and only if
    there are more than ``max_frames``, evenly fewer, with the first and the last; (frames, rate)
    are sampled by `sample_indices`. The frames are whatever `load_image` takes. A `Video` is
    returned as it is.

    Args:
        source: path, bytes of a file, pair of frames and seconds (or frames a second), or `Video`.
        max_frames: most frames. In memory each takes 3 x width x height bytes.
        max_fps: most frames a second.
    Returns: the frames in their original size.
    Raises: FileNotFoundError if there is no such file; ValueError, in one line, for whatever else
        keeps the source from being a video, or if neither decoder is installed.
    """
    if isinstance(source, Video):
        return source
    _check_limits(max_frames, max_fps)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _read("the given bytes", data, data[:512], max_frames, max_fps)
    if isinstance(source, (str, os.PathLike)):
        path, head = _find(source)
        return _read(str(path), path, head, max_frames, max_fps)
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], (str, bytes)):
        return _from_frames(*source, max_frames, max_fps)
    raise ValueError(
        f"cannot read a video from {type(source).__name__}: give a path, the bytes of a file, or "
        f"a tuple of two: the frames and their times in seconds"
    )


def _from_frames(
    frames: Iterable[ImageSource],
    times: Iterable[float] | float,
    max_frames: int,
    max_fps: float,
) -> Video:
    images = list(frames)
    if isinstance(times, (int, float)):
        chosen = sample_indices(len(images), times, max_frames, max_fps)
        seconds = [index / times for index in range(len(images))]
    else:
        chosen = _evenly(len(images), max_frames)
        seconds = [float(time) for time in times]
        if len(seconds) != len(images):
            raise ValueError(
                f"found {len(images)} frames and {len(seconds)} times, expected one time, in "
                f"seconds, for each frame"
            )
    arrays = []
    for index in chosen:
        try:
            arrays.append(np.asarray(load_image(images[index])))
        except ValueError as error:
            raise ValueError(f"frame {index + 1}: {error}") from None
    return Video(tuple(arrays), tuple(seconds[index] for index in chosen))


def _find(source: str | os.PathLike[str]) -> tuple[Path, bytes]:
    """The file and its beginning."""
    if isinstance(source, str) and re.match(r"(https?|ftp|data|s3|gs|rtsp):", source):
        raise ValueError(
            f"found the address {source[:60]!r}: nothing is downloaded here; give a local file"
        )
    path = Path(os.path.expanduser(source)).absolute()
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(
                f"{path} is a folder: give the path of a video, or its frames as (frames, times)"
            )
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file: give the path of a video")
        with path.open("rb") as stream:
            return path, stream.read(512)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}: check the path of the video") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


def _read(name: str, file: Path | bytes, head: bytes, max_frames: int, max_fps: float) -> Video:
    """Decode a file; ``head`` is its beginning, which decides how."""
    if not head:
        raise ValueError(f"{name}: found an empty file (0 bytes), {_EXPECTED}: copy it again")
    if _is_image(head):
        return _read_animation(name, file, max_frames, max_fps)
    if _is_video(head):
        return _decode(name, file, max_frames, max_fps)
    text = head.decode("utf-8", "ignore")
    if sum(c.isprintable() or c.isspace() for c in text) > 0.95 * len(head):
        found = f"text ({text[:20]!r}...)"
    else:
        found = f"unknown data ({head[:8].hex(' ')} ...)"
    raise ValueError(f"{name}: found {found}, {_EXPECTED}: {_HELP}")


def _is_image(head: bytes) -> bool:
    return head.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


def _is_video(head: bytes) -> bool:
    """Whether a file begins like one of the containers that hold videos (or only sound)."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head[:1] == b"G":
        return head[188:189] == b"G"  # MPEG transport stream: packets of 188 bytes
    starts = (
        b"\x1aE\xdf\xa3",  # Matroska, WebM
        b"\x00\x00\x01\xba",  # MPEG program stream
        b"0&\xb2u\x8ef\xcf\x11",  # WMV
        b"FLV\x01",
        b"OggS",
    )
    return head.startswith(starts) or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free")


# ---- the frame on screen ----

T = TypeVar("T")


def _on_screen(
    frames: Iterable[tuple[int, T]], ticks: Sequence[int], to_rgb: Callable[[T], Frame]
) -> list[Frame]:
    """One pass over all frames: those on screen at the given times, each converted once.

    Args:
        frames: (begin, frame) in the order shown.
        ticks: rising times, in the unit of the begins.
    Returns: a frame for each time; nothing if there are no frames.
    """
    found: list[Frame] = []
    current: T | None = None
    for begin, frame in frames:
        if current is not None:
            # At times before the next frame begins the current one is on screen.
            count = bisect.bisect_left(ticks, begin, lo=len(found)) - len(found)
            if count:
                found += [to_rgb(current)] * count
        if len(found) == len(ticks):
            return found
        current = frame
    if current is not None:
        found += [to_rgb(current)] * (len(ticks) - len(found))
    return found


# ---- animated images ----


def _read_animation(name: str, file: Path | bytes, max_frames: int, max_fps: float) -> Video:
    """Animated GIF, WebP or PNG."""
    try:
        image = Image.open(
            io.BytesIO(file) if isinstance(file, bytes) else file,
            formats=("GIF", "WEBP", "PNG", "JPEG"),
        )
    except Exception as error:
        raise ValueError(f"{name}: the picture cannot be decoded ({error}): {_HELP}") from None
    with image:
        # A GIF may hold one frame: writers merge equal ones. Other stills are a mistake.
        if image.format != "GIF" and not getattr(image, "is_animated", False):
            raise ValueError(
                f"{name}: found a still {image.format} picture, {_EXPECTED}: give it as an image"
            )
        durations = list(_frame_durations(image))
        if not durations:
            raise ValueError(
                f"{name}: no frame of the {image.format} can be decoded: the file is damaged or "
                f"incomplete; copy it again"
            )
        begins = [0, *itertools.accumulate(durations)]
        times = sample_times(begins[-1] / 1000, max_frames, max_fps)
        # The second pass goes through the same frames as the first.
        shown = (
            (begin, image.copy()) for begin, _ in zip(begins, _frame_durations(image), strict=False)
        )
        ticks = [round(time * 1000) for time in times]
        frames = _on_screen(shown, ticks, lambda frame: np.asarray(load_image(frame)))
    return Video(tuple(frames), tuple(times))


def _frame_durations(image: Image.Image) -> Iterator[int]:
    """Turn to frame after frame and give the milliseconds that each is shown."""
    # An animated PNG may begin with a still for programs that show only stills.
    for number in itertools.count(1 if image.info.get("default_image") else 0):
        try:
            image.seek(number)
            image.load()
        except EOFError:
            return
        except Exception:  # cut off or damaged: the frames before count
            return
        duration = round(image.info.get("duration", 0))
        yield duration if duration > 10 else 100  # no time given: what browsers do


# ---- video files ----


def _decode(name: str, file: Path | bytes, max_frames: int, max_fps: float) -> Video:
    """Decode with torchcodec if it works here, else with PyAV."""
    failure = None
    try:
        # Without FFmpeg's libraries it is installed, but does not import or does not decode.
        from torchcodec.decoders import VideoDecoder

        return _decode_torchcodec(VideoDecoder, file, max_frames, max_fps)
    except ImportError:
        pass
    except Exception as error:
        failure = " ".join(str(error).split())[:200]
    try:
        import_module("av")
    except ImportError:
        if failure is not None:
            raise ValueError(f"{name}: cannot be decoded ({failure}): {_HELP}") from None
        raise ValueError(
            f"{name}: video files need a decoder, and neither torchcodec nor PyAV is installed: "
            f"pip install 'nanomolmo2[video]'"
        ) from None
    # Its errors say more, and of a damaged file it gives what there is.
    return _decode_pyav(name, file, max_frames, max_fps)


def _decode_torchcodec(
    decoder_class: Any, file: Path | bytes, max_frames: int, max_fps: float
) -> Video:
    decoder = decoder_class(
        file if isinstance(file, bytes) else str(file),
        dimension_order="NHWC",
        num_ffmpeg_threads=0,  # FFmpeg decides
        seek_mode="exact",  # one scan of the file gives the true begin and end
    )
    begin = decoder.metadata.begin_stream_seconds_from_content
    end = decoder.metadata.end_stream_seconds_from_content
    times = sample_times(end - begin, max_frames, max_fps)
    # The end itself lies outside: the last frame is asked for by its number.
    inner = times[:-1] if len(times) > 1 else times
    frames = list(decoder.get_frames_played_at([begin + time for time in inner]).data.numpy())
    if len(times) > 1:
        frames.append(decoder.get_frame_at(len(decoder) - 1).data.numpy())
    return Video(tuple(frames), tuple(times))


def _decode_pyav(name: str, file: Path | bytes, max_frames: int, max_fps: float) -> Video:
    import av

    try:
        with _video_stream(name, file) as stream:
            unit = Fraction(stream.time_base or 1)
            begin, end = _span(_packets(stream))
        times = sample_times(float((end - begin) * unit), max_frames, max_fps)
        # A time means the nearest tick of the file's clock.
        ticks = [begin + round(time / unit) for time in times]
        with _video_stream(name, file) as stream:
            stream.thread_type = "AUTO"
            size = (stream.codec_context.width or None, stream.codec_context.height or None)
            frames = _on_screen(_frames(stream), ticks, lambda frame: _to_rgb(frame, *size))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{name}: cannot be decoded ({error.strerror}): the file is damaged or incomplete, or "
            f"no video; {_HELP}"
        ) from None
    if not frames:
        raise ValueError(
            f"{name}: no frame can be decoded: the file is empty, damaged or incomplete; {_HELP}"
        )
    return Video(tuple(frames), tuple(times))


@contextlib.contextmanager
def _video_stream(name: str, file: Path | bytes) -> Iterator[Any]:
    """The video stream of a file, open."""
    import av

    opened = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    with av.open(opened, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        # The cover of a song is a "video" of one image.
        if stream is None or av.stream.Disposition.attached_pic in stream.disposition:
            has_sound = bool(container.streams.audio)
            raise ValueError(
                f"{name}: found {'only sound' if has_sound else 'no video track'}, {_EXPECTED}"
            )
        if stream.codec_context is None:
            raise ValueError(f"{name}: found a video of a kind unknown to this FFmpeg: {_HELP}")
        yield stream


def _packets(stream: Any) -> Iterator[Any]:
    """The stored frames, in the order of the file, up to its end or to where it is cut off."""
    import av

    try:
        for packet in stream.container.demux(stream):
            if packet.size:  # the last one only says that it is the last
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


def _to_rgb(frame: Any, width: int | None, height: int | None) -> Frame:
    # Calls and screen recordings change their size on the way; all frames get the first one.
    image = frame.to_ndarray(format="rgb24", width=width, height=height)
    # Phones store the image as it lies on the sensor, and how far to turn it counter-clockwise.
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))
