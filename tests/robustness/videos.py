"""Videos: every container and codec that PyAV writes here, spoilt -> `load_video`."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.processor.video import Video, load_video
from tests.robustness.judge import LOUD, Case, Surroundings
from tests.robustness.mutate import EXTREMES, ODD_NAMES, some_bytes, some_chunks, write_chunks
from tests.robustness.pictures import drawn, known_files, set_jpeg_size, zeros

SIZE = (48, 32)
# container, codec, format of its pixels; those that this PyAV lacks are left out
CODECS = (
    ("mp4", "libx264", "yuv420p"),
    ("mp4", "mpeg4", "yuv420p"),
    ("mov", "mjpeg", "yuvj420p"),
    ("mov", "png", "rgb24"),
    ("mov", "qtrle", "rgb24"),
    ("matroska", "libvpx", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("matroska", "ffv1", "yuv420p"),
    ("matroska", "rawvideo", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("avi", "rawvideo", "bgr24"),
    ("mpegts", "mpeg2video", "yuv420p"),
    ("mpeg", "mpeg2video", "yuv420p"),
    ("flv", "flv", "yuv420p"),
    ("asf", "wmv2", "yuv420p"),
)


def encoded(
    container: str, codec: str, pixels: str, *, frames: int = 6, size: tuple[int, int] = SIZE
) -> bytes:
    """A short video of moving noise."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        video = output.add_stream(codec, rate=5 if codec != "mpeg2video" else 25)
        video.width, video.height, video.pix_fmt = *size, pixels
        for number in range(frames):
            array = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3))
            array = array.astype(np.uint8).repeat(8, 0).repeat(8, 1)
            for packet in video.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                output.mux(packet)
        for packet in video.encode():
            output.mux(packet)
    return stream.getvalue()


def animated(format: str, frames: int = 5) -> bytes:
    stream = io.BytesIO()
    images = [drawn("RGBA", (16, 12), seed) for seed in range(frames)]
    images[0].save(
        stream, format, save_all=True, append_images=images[1:], duration=[100, 0, 700, 40, 9]
    )
    return stream.getvalue()


@lru_cache(maxsize=1)
def valid_files() -> list[bytes]:
    import av

    av.logging.set_level(None)
    files = []
    for container, codec, pixels in CODECS:
        with contextlib.suppress(Exception):  # not in this build
            files.append(encoded(container, codec, pixels))
    return files + [animated(format) for format in ("GIF", "WEBP", "PNG")]


# ---- inputs ----


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    draw = rng.random()
    frames = rng.choice((1, 2, 8, 8, 384))
    fps = rng.choice((2.0, 2.0, 0.1, 1000.0))
    if draw < 0.08:
        return _pair(rng, frames, fps)
    if draw < 0.085:
        return _strange_path(rng, here, around)
    files = valid_files()
    if draw < 0.10:
        data, what = rng.choice(known_files()), "picture"
    elif draw < 0.13:
        data, what = gif(rng), "gif"
    elif draw < 0.16:
        data, what = apng(rng), "apng"
    elif draw < 0.18:
        data, what = resized(rng), "another size"
    else:
        data, what = rng.choice(files), "mutated"
        if rng.random() < 0.97:
            change = some_chunks if rng.random() < 0.4 else some_bytes
            data = change(rng, data, files)
    if rng.random() < 0.03:
        what, data = "playlist", playlist(rng, data, str(around.outside))
    if rng.random() < 0.4:
        return Case(
            f"{what}, bytes",
            lambda: load_video(data, max_frames=frames, max_fps=fps),
            check(frames),
            closed=True,
        )
    name = rng.choice(ODD_NAMES) if rng.random() < 0.15 else f"a.{rng.choice(('mp4', 'gif', 'x'))}"
    path = here / name
    path.write_bytes(data)
    _neighbours(here)
    return Case(
        f"{what}, file {name[:20]!r}",
        lambda: load_video(path, max_frames=frames, max_fps=fps),
        check(frames),
        (str(path), name),
        closed=True,
    )


def _neighbours(here: Path) -> None:
    """Pictures of a loud colour, which an image sequence or a list of files would show."""
    for name in ("v1.png", "v001.mp4", "v0.png", "a", "b", "a.mp4"):
        if not (here / name).exists():
            Image.new("RGB", SIZE, LOUD).save(here / name, "PNG")


def check(most: int) -> Callable[[Any], str | None]:
    def of(video: Any) -> str | None:
        if not isinstance(video, Video) or not 1 <= len(video.frames) <= most:
            return f"gave {str(video)[:80]}, expected 1 to {most} frames"
        if video.times[-1] >= 1e10:
            return f"gave a time of {video.times[-1]} s"
        for frame in video.frames[:3]:
            mean = frame.reshape(-1, 3).mean(0)
            if np.abs(mean - LOUD).max() < 6:
                return "shows a file beside it"
        return None

    return of


def _pair(rng: random.Random, frames: int, fps: float) -> Case:
    """Frames in memory with times or a rate."""
    count = rng.choice((0, 1, 2, 5))
    images: Any = [drawn("RGB", (8, 6), seed) for seed in range(count)]
    if count and rng.random() < 0.3:
        images[-1] = rng.choice(
            (drawn("RGB", (9, 6)), None, "missing.png", "/dev/zero", b"", np.zeros((0, 3)))
        )
    numbers = (
        0,
        1,
        -1,
        0.5,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        10**400,
        True,
        None,
        "1",
        [],
    )
    times: Any = [number * 0.5 for number in range(count)]
    if rng.random() < 0.7 and count:
        times[rng.randrange(count)] = rng.choice(numbers)
    if rng.random() < 0.2:
        times = times[:-1]
    if rng.random() < 0.3:
        times = rng.choice(numbers)
    source: Any = (images, times)
    if rng.random() < 0.1:
        source = rng.choice(
            (None, 5, [], (), (1, 2), ([], [], []), {"frames": []}, ("a", 1), (None, 2))
        )
    return Case(
        f"frames {str(times)[:60]}",
        lambda: load_video(source, max_frames=frames, max_fps=fps),
        lambda video: None if source == (images, times) else f"took {source!r}",
    )


def _strange_path(rng: random.Random, here: Path, around: Surroundings) -> Case:
    fifo, link = here / "pipe.mp4", here / "link.mp4"
    os.mkfifo(fifo)
    link.symlink_to(around.outside / "secret.txt")
    source = rng.choice(
        [
            *("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/environ", "/proc/self/mem", ""),
            *(
                str(fifo),
                str(link),
                str(here),
                "missing.mp4",
                "a\0.mp4",
                "x" * 300,
                "http://a/b.mp4",
            ),
            *(
                "rtsp:a",
                "file:///dev/zero",
                "concat:a|b",
                "pipe:0",
                "\ud800.mp4",
                "~nobody-at-all/a",
            ),
            *("lavfi:testsrc", "data:video/mp4;base64,AAAA", "-i", "%d.png", "file:a.mp4"),
        ]
    )
    return Case(f"source {source[:40]!r}", lambda: load_video(source), check(384), (source,))


def gif(rng: random.Random) -> bytes:
    """A GIF with numbers of its own: many frames, large ones, frames outside, no durations."""
    sides = (0, 1, 7, 300, 13_000, 65_535)
    width, height = rng.choice(sides), rng.choice((1, 1, 7, 300, 13_000, 65_535))
    count = rng.choice((1, 2, 16, 16, 300, 20_000))
    if width * height * count > 1e7 and rng.random() < 0.9:
        width, height = 3, 2
    frame = b""
    if rng.random() < 0.8:
        duration = rng.choice((0, 1, 2, 10, 100, 65_535))
        frame += (
            b"\x21\xf9\x04" + struct.pack("<BHB", rng.choice((0, 4, 8, 12, 9)), duration, 0) + b"\0"
        )
    frame += struct.pack(
        "<BHHHHB",
        0x2C,
        rng.choice((0, 0, 1, 65_535)),
        0,
        min(width, rng.choice((1, 1, 65_535))),
        1,
        0,
    )
    frame += b"\x02\x02\x4c\x01\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + frame * count
        + b";"
    )


def apng(rng: random.Random) -> bytes:
    """An animated PNG whose control chunks lie."""
    width, height = rng.choice(((4, 3), (4, 3), (4, 3), (300, 200), (9000, 9000)))
    row = zeros(height * (1 + 4 * width))
    count = rng.choice((1, 2, 5, 40, 3000 if width == 4 else 5))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))]
    chunks.append((b"acTL", struct.pack(">II", rng.choice((count, count, 0, 1, 1 << 30)), 0)))
    sequence = 0
    for number in range(count):
        fields = [width, height, 0, 0]
        if rng.random() < 0.1:
            fields[rng.randrange(4)] = rng.choice(EXTREMES) & 0xFFFFFFFF
        numerator, denominator = rng.choice(((1, 10), (0, 0), (65_535, 1), (1, 0), (0, 1)))
        control = struct.pack(
            ">IIIIIHHBB",
            sequence,
            *fields,
            numerator,
            denominator,
            rng.choice((0, 1, 2, 9)),
            rng.choice((0, 1)),
        )
        chunks.append((b"fcTL", control))
        sequence += 1
        if number == 0:
            chunks.append((b"IDAT", row))
        else:
            chunks.append((b"fdAT", struct.pack(">I", sequence) + row))
            sequence += 1
    return write_chunks(b"\x89PNG\r\n\x1a\n", [*chunks, (b"IEND", b"")])


def resized(rng: random.Random) -> bytes:
    """A video whose container, or the pictures in it, say that they are large."""
    width, height = (rng.choice((1, 255, 4_096, 9_000, 16_384, 65_500)) for _ in range(2))
    data = bytearray(rng.choice(valid_files()))
    set_jpeg_size(data, width, height)
    for kind in (b"avc1", b"mp4v", b"jpeg", b"png ", b"rle "):  # sample descriptions of MP4
        if (place := data.find(kind)) > 0:
            struct.pack_into(">HH", data, place + 28, width, height)
    for mark in (b"\xb0\x82", b"\xb0\x81", b"\xba\x82", b"\xba\x81"):  # sides of Matroska
        if (place := data.find(mark)) > 0:
            data[place + 2 : place + 3] = bytes([rng.choice((0, 1, 127, 255))])
    if (place := data.find(b"strf")) > 0:  # AVI
        struct.pack_into("<ii", data, place + 12, width, height)
    if (place := data.find(b"IHDR")) > 0:
        struct.pack_into(">II", data, place + 4, width, height)
        checksum = zlib.crc32(data[place : place + 17])
        struct.pack_into(">I", data, place + 17, checksum)
    return bytes(data)


def playlist(rng: random.Random, data: bytes, outside: str) -> bytes:
    """Texts that FFmpeg takes for lists of other files, alone and in a file that begins well."""
    loud = f"{outside}/loud.png"
    text = rng.choice(
        [
            f"ffconcat version 1.0\nfile {loud}\n",
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{loud}\n#EXT-X-ENDLIST\n",
            f"#EXTM3U\n#EXTINF:9,\nconcat:{loud}|{loud}\n",
            f"[playlist]\nFile1={loud}\n",
            f'<?xml version="1.0"?><MPD><BaseURL>{loud}</BaseURL></MPD>',
            f"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na={loud}\n",
        ]
    ).encode()
    return rng.choice((text, b"\0\0\0\x08free" + text, data[:64] + text, text + data))


# ---- what was once found ----


def _file(data: Callable[[], bytes], name: str = "a.mp4") -> Callable[[Path, Surroundings], Case]:
    def build(here: Path, around: Surroundings) -> Case:
        path = here / name
        path.write_bytes(data())
        _neighbours(here)
        return Case("found before", lambda: load_video(path), check(384), (str(path),), closed=True)

    return build


def large_gif(side: int, count: int) -> bytes:
    """A few hundred bytes; its frames have one pixel each."""
    frame = (
        b"\x21\xf9\x04\0\x64\0\0\0"
        + struct.pack("<BHHHHB", 0x2C, 0, 0, 1, 1, 0)
        + b"\x02\x02\x4c\x01\0"
    )
    return (
        b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + frame * count + b";"
    )


def repeated(side: int, frames: int) -> bytes:
    """A MOV of one JPEG many times: large to decode, and made quickly."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="mov") as output:
        video = output.add_stream("mjpeg", rate=2)
        video.width, video.height, video.pix_fmt = side, side, "yuvj420p"
        (packet,) = video.encode(av.VideoFrame.from_image(Image.new("RGB", (side, side), "green")))
        data = bytes(packet)
        for number in range(frames):
            again = av.Packet(data)
            again.stream, again.time_base = video, packet.time_base
            again.pts = again.dts = number
            again.is_keyframe = True
            output.mux(again)
    return stream.getvalue()


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {
    "16 frames of 13,000 x 13,000": _file(lambda: large_gif(13_000, 16), "a.gif"),
    "100,000 frames of one pixel": _file(lambda: large_gif(1, 100_000), "a.gif"),
    "4,096 x 4,096": _file(lambda: repeated(4096, 40)),
    "a name with a format": _file(lambda: encoded("mov", "png", "rgb24"), "v%d.png"),
    "a playlist that begins like a video": _file(
        lambda: b"\0\0\0\x08free" + b"ffconcat version 1.0\nfile v1.png\n"
    ),
}
