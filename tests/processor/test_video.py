"""Videos: which moments are looked at, what is on screen then, and what bad files say."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanomolmo2.processor import load_image
from nanomolmo2.processor.sampling import Sampling, TooMuch
from nanomolmo2.processor.video import Video, load_video, sample_indices, sample_times

WIDTH, HEIGHT = 64, 48

# ---- the rule ----


@pytest.mark.parametrize(
    ("duration", "max_frames", "times"),
    [
        (0.0, 384, [0.0]),
        (0.04, 384, [0.0, 0.04]),
        (0.5, 384, [0.0, 0.5]),
        (1.7, 384, [0.0, 0.5, 1.0, 1.5, 1.7]),
        (2.0, 384, [0.0, 0.5, 1.0, 1.5, 2.0]),
        (2.0, 5, [0.0, 0.5, 1.0, 1.5, 2.0]),  # just within 4 steps
        (2.1, 5, [0.0, 0.525, 1.05, 1.575, 2.1]),  # just beyond
        (100.0, 3, [0.0, 50.0, 100.0]),
        (100.0, 1, [0.0]),
    ],
)
def test_sampled_times(duration, max_frames, times):
    assert sample_times(duration, max_frames, 2.0) == pytest.approx(times, abs=1e-12)


DURATIONS = st.one_of(st.integers(1, 20_000).map(lambda n: n / 8), st.floats(0.001, 100_000))


@given(DURATIONS, st.integers(2, 500), st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 7.0, 29.97]))
@settings(deadline=None)
def test_sampled_times_reach_from_end_to_end(duration, max_frames, max_fps):
    times = sample_times(duration, max_frames, max_fps)
    assert times[0] == 0 and times[-1] == duration
    assert 2 <= len(times) <= max_frames
    gaps = np.diff(times)
    assert (gaps > 0).all()
    if (max_frames - 1) / max_fps < duration:
        assert len(times) == max_frames
        np.testing.assert_allclose(gaps, duration / (max_frames - 1), rtol=1e-6)
    else:
        np.testing.assert_allclose(gaps[:-1], 1 / max_fps, rtol=1e-6)
        assert gaps[-1] <= 1 / max_fps * (1 + 1e-9)


@pytest.mark.parametrize(
    ("num_frames", "fps", "max_frames", "indices"),
    [
        (0, 30, 384, []),
        (1, 30, 384, [0]),
        (2, 30, 384, [0, 1]),
        (60, 30, 384, [0, 15, 30, 45, 59]),
        (61, 30, 384, [0, 15, 30, 45, 60]),
        (46, 30, 384, [0, 15, 30, 45]),  # the last step ends on the last frame
        (100, 10, 5, [0, 24, 49, 74, 99]),  # 24.75 is cut to 24
        (10, 3, 384, [0, 2, 3, 4, 6, 8, 9]),  # steps of 1.5, halves to the even neighbour
        (4, 1, 384, [0, 1, 2, 3]),  # slower than looked at: each once
        (9, 1, 1, [0]),
    ],
)
def test_sampled_indices(num_frames, fps, max_frames, indices):
    assert sample_indices(num_frames, fps, max_frames, 2.0) == indices


@given(st.integers(1, 20_000), st.floats(0.5, 120), st.integers(2, 500), st.floats(0.25, 10))
@settings(deadline=None)
def test_sampled_indices_reach_from_end_to_end(num_frames, fps, max_frames, max_fps):
    indices = sample_indices(num_frames, fps, max_frames, max_fps)
    assert indices[0] == 0 and indices[-1] == num_frames - 1
    assert len(indices) <= max_frames
    assert all(a < b for a, b in itertools.pairwise(indices))


def reference_indices(num_frames, fps):
    pytest.importorskip("transformers")
    from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps, duration=num_frames / fps)
    # Making one needs torchvision; the defaults stand on the class.
    return Molmo2VideoProcessor.sample_frames(Molmo2VideoProcessor, metadata).tolist()


@pytest.mark.parametrize(("num_frames", "fps"), [(60, 30), (300, 30), (100, 10), (240, 24)])
def test_sampled_indices_equal_transformers_before_the_last(num_frames, fps):
    """Whole seconds of a rate that 2 divides, at most 64 frames: the same but for the end."""
    indices = sample_indices(num_frames, fps)
    assert indices[:-1] == reference_indices(num_frames, fps)


def test_trap_13_the_last_frame_is_always_there():
    """transformers' processor takes at most 64 frames by default and never the last one.

    Ours follows Molmo2's own: up to 384, half a second apart, and the last. Frames stay uint8
    RGB here and are scaled where pictures are.
    """
    for seconds in (1, 3.25, 10, 60, 191.5, 192, 3600):
        times = sample_times(seconds)
        assert times[-1] == seconds
        assert len(times) == min(int(np.ceil(seconds * 2)) + 1, 384)
    assert len(sample_times(60)) == 121
    frames = [np.full((4, 6, 3), level, np.uint8) for level in range(200)]
    video = load_video((frames, 2.0))
    assert len(video.frames) == 200
    assert video.frames[-1].dtype == np.uint8 and video.frames[-1].max() == 199
    assert video.times[-1] == 99.5


def test_trap_13_transformers_leaves_the_last_frame_out():
    indices = reference_indices(3000, 30)
    assert len(indices) == 64 and indices[-1] < 2999
    ours = sample_indices(3000, 30)
    assert len(ours) == 201 and ours[-1] == 2999


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1.0,), "a duration of -1.0 seconds, expected 0 or more"),
        ((float("nan"),), "a duration of nan"),
        ((float("inf"),), "a duration of inf"),
        ((1.0, 0), "max_frames 0, expected 1 or more"),
        ((1.0, 8, 0.0), "max_fps 0.0, expected a positive number"),
        ((1.0, 8, float("nan")), "max_fps nan"),
    ],
)
def test_limits_that_make_no_sense(arguments, error):
    with pytest.raises(ValueError, match=error):
        sample_times(*arguments)


# ---- Video ----


def grey(level=0, width=WIDTH, height=HEIGHT):
    return np.full((height, width, 3), level, dtype=np.uint8)


def test_video_knows_its_size():
    video = Video((grey(), grey(1)), (0.0, 0.5))
    assert video.size == (WIDTH, HEIGHT)
    assert load_video(video, max_frames=1) is video


@pytest.mark.parametrize(
    ("frames", "times", "error"),
    [
        ((), (), "0 frames"),
        ((grey(),), (0.0, 1.0), "1 frames and 2 times"),
        ((grey(), grey(0, 8, 6)), (0.0, 1.0), "frame 2 is 8 x 6 pixels, the first is 64 x 48"),
        ((grey(), grey()), (1.0, 1.0), r"frame 2 is at 1\.0 s, the one before at 1\.0 s"),
        ((grey(), grey()), (-1.0, 1.0), r"times from -1\.0 to 1\.0, expected seconds from 0"),
        ((grey(), grey()), (0.0, float("nan")), "to nan"),
        ((grey().astype(np.float32),), (0.0,), "frame 1: found float32, expected .* uint8"),
        ((Image.new("RGB", (4, 4)),), (0.0,), "frame 1: found Image"),
        ((grey()[:, :, 0],), (0.0,), r"shape \(48, 64\), expected \(H, W, 3\)"),
    ],
)
def test_video_refuses_what_does_not_go_together(frames, times, error):
    with pytest.raises(ValueError, match=error) as caught:
        Video(frames, times)
    assert "\n" not in str(caught.value)


# ---- frames in memory ----


def test_frames_and_times(tmp_path):
    path = tmp_path / "frame.png"
    Image.fromarray(grey(30)).save(path)
    frames = [grey(10), Image.fromarray(grey(20)).convert("L"), path]
    video = load_video((frames, [0, 1.5, 7]))
    assert [int(frame.mean()) for frame in video.frames] == [10, 20, 30]
    assert video.times == (0.0, 1.5, 7.0) and video.size == (WIDTH, HEIGHT)
    array = np.stack([grey(10), grey(20)])
    assert load_video((array, (0.25, 0.5))).times == (0.25, 0.5)


@given(st.integers(1, 60), st.integers(1, 20))
@settings(deadline=None)
def test_too_many_frames_become_evenly_fewer(num_frames, max_frames):
    frames = [grey(level, 2, 2) for level in range(num_frames)]
    times = [level / 10 for level in range(num_frames)]
    video = load_video((frames, times), max_frames=max_frames)
    levels = [int(frame[0, 0, 0]) for frame in video.frames]
    assert len(levels) == min(num_frames, max_frames)
    assert levels[0] == 0 and (max_frames == 1 or levels[-1] == num_frames - 1)
    assert video.times == tuple(level / 10 for level in levels)
    assert np.ptp(np.diff(levels)) <= 1 if len(levels) > 1 else True


def test_frames_at_a_rate():
    video = load_video(([grey(level) for level in range(25)], 10))
    assert [int(frame[0, 0, 0]) for frame in video.frames] == [0, 5, 10, 15, 20, 24]
    assert video.times == (0.0, 0.5, 1.0, 1.5, 2.0, 2.4)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (([], []), "0 frames"),
        (([grey()], [0, 1]), "1 frames and 2 times"),
        (([grey(), b"no picture"], [0, 1]), "frame 2: the given bytes: found"),
        (([grey(), grey(0, 6, 8)], [0, 1]), "frame 2 is 6 x 8 pixels"),
        (([grey(), grey()], [1, 0]), "expected rising times"),
        (([grey()], 0), "found 0 frames a second"),
        (None, "from NoneType: give a path"),
        ([grey(), grey()], "from list: .*a tuple of two"),
        (grey(), "from ndarray"),
    ],
)
def test_frames_that_are_refused(source, error):
    with pytest.raises(ValueError, match=error) as caught:
        load_video(source)
    assert "\n" not in str(caught.value)


# ---- animated pictures, which need no extra ----


@pytest.fixture
def no_decoder(monkeypatch):
    for module in ("av", "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, module, None)


def animation(levels, durations, format="GIF", **options):
    images = [Image.fromarray(grey(level)) for level in levels]
    stream = io.BytesIO()
    if format == "WEBP":
        options["lossless"] = True
    images[0].save(
        stream, format, save_all=True, append_images=images[1:], duration=durations, **options
    )
    return stream.getvalue()


def levels_of(video):
    return [int(frame.mean()) for frame in video.frames]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_by_their_own_times(no_decoder, tmp_path, format):
    data = animation([0, 50, 100, 200], [400, 200, 1400, 500], format)
    path = tmp_path / "animation"  # no suffix: the content decides
    path.write_bytes(data)
    for source in (data, path, str(path)):
        video = load_video(source)
        assert video.times == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
        assert levels_of(video) == [0, 50, 100, 100, 200, 200]  # the last begins at 2.0
        assert video.size == (WIDTH, HEIGHT) and video.frames[0].dtype == np.uint8
    assert levels_of(load_video(data, max_frames=2)) == [0, 200]
    assert levels_of(load_video(data, max_fps=1)) == [0, 100, 200, 200]


@pytest.mark.parametrize("duration", [0, 10])
def test_a_gif_without_durations_runs_as_in_browsers(no_decoder, duration):
    video = load_video(animation(range(0, 100, 10), duration))
    assert video.times == (0.0, 0.5, 1.0)
    assert levels_of(video) == [0, 50, 90]


def test_a_gif_of_one_frame(no_decoder):
    stream = io.BytesIO()
    Image.fromarray(grey(7)).save(stream, "GIF")
    video = load_video(stream.getvalue())
    assert video.times == (0.0, 0.1) and levels_of(video) == [7, 7]


def test_gif_frames_that_change_only_a_part(no_decoder):
    """Frames of a GIF may be patches on the last one, and transparent pixels are white."""
    images = [Image.new("RGBA", (WIDTH, HEIGHT), "blue") for _ in range(3)]
    for number, image in enumerate(images):
        image.paste((255, 0, 0, 255), (number * 8, 0, number * 8 + 8, 8))
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=500, disposal=1)
    for number, frame in enumerate(load_video(stream.getvalue()).frames[:3]):
        assert (frame == np.asarray(images[number].convert("RGB"))).all()
    clear = [Image.new("RGBA", (8, 8)) for _ in range(2)]
    clear[1].paste((0, 0, 0, 255), (0, 0, 4, 8))
    stream = io.BytesIO()
    clear[0].save(stream, "GIF", save_all=True, append_images=clear[1:], duration=500, disposal=2)
    first, *_, last = load_video(stream.getvalue()).frames
    assert first.min() == 255
    assert last[:, :4].max() == 0 and last[:, 4:].min() == 255


def test_an_animated_png_may_begin_with_a_still_for_others(no_decoder):
    data = animation([250, 10, 20], [500, 500], "PNG", default_image=True)
    assert levels_of(load_video(data)) == [10, 20, 20]


def test_of_a_cut_off_animation_the_whole_frames_are_taken(no_decoder):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)) for _ in range(8)]
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=500)
    whole, cut = load_video(stream.getvalue()), load_video(stream.getvalue()[: stream.tell() // 2])
    assert 2 <= len(cut.frames) < len(whole.frames)
    assert (cut.frames[0] == whole.frames[0]).all()
    with pytest.raises(ValueError, match="no frame of the GIF can be decoded"):
        load_video(stream.getvalue()[:850])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_still_pictures_are_no_videos(no_decoder, format):
    stream = io.BytesIO()
    Image.fromarray(grey()).save(stream, format)
    with pytest.raises(ValueError, match=f"a still {format} picture, .*give it as an image"):
        load_video(stream.getvalue())
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_video(stream.getvalue()[:20])


# ---- video files ----


class StandIn:
    """torchcodec's VideoDecoder as far as it is used, for where it is not installed."""

    def __init__(self, source, *, dimension_order, num_ffmpeg_threads, seek_mode):
        assert (dimension_order, seek_mode) == ("NHWC", "exact")
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
            self.frames = [
                (
                    frame.pts * frame.time_base,
                    (frame.duration or 0) * frame.time_base,
                    torch.from_numpy(
                        np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).copy()
                    ),
                )
                for frame in container.decode(video=0)
            ]
        self.begin = float(self.frames[0][0])
        self.end = float(self.frames[-1][0] + self.frames[-1][1])
        self.metadata = SimpleNamespace(
            begin_stream_seconds_from_content=self.begin, end_stream_seconds_from_content=self.end
        )

    def __len__(self):
        return len(self.frames)

    def get_frame_at(self, index):
        return SimpleNamespace(data=self.frames[index][2])

    def get_frames_played_at(self, seconds):
        assert all(self.begin <= second < self.end for second in seconds)
        shown = [max(i for i, f in enumerate(self.frames) if f[0] <= s + 1e-6) for s in seconds]
        return SimpleNamespace(data=torch.stack([self.frames[i][2] for i in shown]))


def use_torchcodec(monkeypatch, decoder_class):
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = decoder_class
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


@pytest.fixture
def pyav(monkeypatch):
    for module in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture(params=["pyav", "torchcodec"])
def decoder(request, monkeypatch):
    """Each decoder alone; the real torchcodec where it works."""
    if request.param == "pyav":
        request.getfixturevalue("pyav")
        return
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError):
        VideoDecoder = StandIn
    use_torchcodec(monkeypatch, VideoDecoder)
    # It would come to the rescue.
    monkeypatch.setattr(
        "nanomolmo2.processor.video._decode_pyav",
        lambda *_: pytest.fail("torchcodec failed on this file"),
    )


def write_video(
    target,
    levels,
    *,
    codec="libx264",
    rate=10,
    begins=None,
    tick=None,
    size=(WIDTH, HEIGHT),
    audio=False,
    format=None,
    options=None,
):
    """A video whose frames are grey, each of its own level; ``begins`` in units of ``tick``."""
    with av.open(target, "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "10"}
        tick = tick or Fraction(1, rate)
        stream.codec_context.time_base = tick
        sound = container.add_stream("aac", rate=8000) if audio else None
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(grey(level, *size), format="rgb24")
            frame.pts, frame.time_base = begins[number] if begins else number, tick
            container.mux(stream.encode(frame))
        if sound:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
        container.mux(stream.encode())
    return target


def shown(video):
    """Numbers of the frames of a video that `write_video` made with levels 0, 8, 16, ..."""
    return [round(frame.mean() / 8) for frame in video.frames]


LEVELS = range(0, 240, 8)  # 30 frames


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("a.flv", "libx264"),  # begins at 0.2 s
    ],
)
def test_containers(decoder, tmp_path, name, codec):
    path = tmp_path / name
    write_video(str(path), LEVELS, codec=codec)
    for source in (path, str(path), path.read_bytes()):
        video = load_video(source)
        assert video.times == pytest.approx((0, 0.5, 1, 1.5, 2, 2.5, 3))
        assert video.times[0] == 0
        assert shown(video) == [0, 5, 10, 15, 20, 25, 29]
        assert video.size == (WIDTH, HEIGHT)
        assert video.frames[0].dtype == np.uint8
    assert shown(load_video(path, max_frames=3)) == [0, 15, 29]
    assert shown(load_video(path, max_frames=1)) == [0]
    assert shown(load_video(path, max_fps=1)) == [0, 10, 20, 29]


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.wmv", "wmv2")])
def test_more_containers(pyav, tmp_path, name, codec):
    """Begins at 0.2 s; does not say how long its frames last."""
    path = write_video(str(tmp_path / name), LEVELS, codec=codec)
    video = load_video(path)
    assert video.times[:-1] == (0, 0.5, 1, 1.5, 2, 2.5)
    assert video.times[-1] == pytest.approx(3.0 if name == "a.ts" else 2.9)
    assert shown(video) == [0, 5, 10, 15, 20, 25, 29]


def test_sound_makes_no_difference(decoder, tmp_path):
    silent = load_video(write_video(str(tmp_path / "a.mp4"), LEVELS))
    loud = load_video(write_video(str(tmp_path / "b.mp4"), LEVELS, audio=True))
    assert silent.times == pytest.approx(loud.times)
    assert shown(silent) == shown(loud)


def test_a_slow_video_shows_frames_repeatedly(decoder, tmp_path):
    path = write_video(str(tmp_path / "a.mp4"), range(0, 32, 8), rate=1)
    video = load_video(path)
    assert video.times == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)
    assert shown(video) == [0, 0, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate(decoder, tmp_path, name):
    """On screen is the last frame that began, however long ago."""
    begins = [0, 100, 499, 500, 900, 2100, 2101, 2600]  # ms
    path = str(tmp_path / name)
    write_video(path, range(0, 64, 8), begins=begins, tick=Fraction(1, 1000))
    video = load_video(path)
    assert video.times[:6] == (0, 0.5, 1, 1.5, 2, 2.5)
    assert shown(video)[:6] == [0, 3, 4, 4, 4, 6]
    # How long the last frame lasts is up to the container.
    assert 2.6 <= video.times[-1] < 4 and shown(video)[-1] == 7


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)],
)
def test_rotation(decoder, tmp_path, matrix, turn):
    """A phone held upright writes a lying video and a matrix: (a, b, c, d) turns x and y."""
    quarters = grey()
    quarters[:24, :32], quarters[:24, 32:], quarters[24:, 32:] = 240, 160, 80
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quarters, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    upright = np.rot90(quarters, turn)
    for frame in load_video(bytes(data)).frames:
        assert frame.shape == upright.shape
        assert np.abs(frame.astype(int) - upright).mean() < 8


def test_length_from_the_frames_where_the_header_is_silent(decoder, tmp_path):
    """A recording that was streamed to disk never got its header completed."""
    stream = io.BytesIO()
    stream.seekable = lambda: False
    options = {"live": "1"}
    write_video(stream, LEVELS, codec="libvpx-vp9", format="webm", options=options)
    data = stream.getvalue()
    with av.open(io.BytesIO(data)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    video = load_video(data)
    assert video.times[-2] == 2.5 and 2.9 <= video.times[-1] <= 3.0
    assert shown(video) == [0, 5, 10, 15, 20, 25, 29]


def test_frame_sizes_that_change_on_the_way(pyav):
    parts = []
    for size, begin in ((WIDTH, HEIGHT), 0), ((WIDTH * 2, HEIGHT * 2), 30):
        stream = io.BytesIO()
        begins = range(begin, begin + 30)
        write_video(stream, LEVELS, format="mpegts", size=size, begins=begins)
        parts.append(stream.getvalue())
    video = load_video(b"".join(parts))
    assert video.size == (WIDTH, HEIGHT)
    assert video.times[-1] > 5.5
    assert {frame.shape for frame in video.frames} == {(HEIGHT, WIDTH, 3)}


def faststart(tmp_path, levels=range(240)):
    path = tmp_path / "faststart.mp4"
    write_video(str(path), levels, options={"movflags": "faststart"})
    return path.read_bytes()


def test_of_a_cut_off_file_the_frames_that_decode_are_taken(pyav, tmp_path):
    """Also where the header promises more; the last of them is the last frame."""
    data = faststart(tmp_path)
    video = load_video(data[: len(data) * 3 // 4])
    assert 4 < video.times[-1] < 24 and len(video.frames) == len(sample_times(video.times[-1]))
    for frame, time in zip(video.frames, video.times, strict=True):
        assert abs(frame.mean() - min(time, video.times[-1] - 0.1) * 10) < 8
    stream = io.BytesIO()
    write_video(stream, range(240), format="matroska")
    video = load_video(stream.getvalue()[: len(stream.getvalue()) // 2])
    assert 4 < video.times[-1] < 24


def test_what_torchcodec_refuses_pyav_may_read(monkeypatch, tmp_path):
    class Refuses:
        def __init__(self, *_, **__):
            raise RuntimeError("Could not load libtorchcodec.\nLikely causes: ...")

    path = write_video(str(tmp_path / "a.mp4"), LEVELS)
    use_torchcodec(monkeypatch, Refuses)
    assert shown(load_video(path)) == [0, 5, 10, 15, 20, 25, 29]
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"a\.mp4: cannot be decoded \(Could not load .*Likely"):
        load_video(path)


def test_without_a_decoder_the_error_names_the_extra(no_decoder, tmp_path):
    data = faststart(tmp_path, levels=range(5))
    with pytest.raises(ValueError, match=r"pip install 'nanomolmo2\[video\]'") as caught:
        load_video(data)
    assert caught.value.__suppress_context__ and "\n" not in str(caught.value)


# ---- bad input: one clear error ----


def only_sound():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return stream.getvalue()


def no_frames(format):
    stream = io.BytesIO()
    with av.open(stream, "w", format=format) as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    return stream.getvalue()


def header_at_the_end():
    stream = io.BytesIO()
    write_video(stream, LEVELS, format="mp4")
    return stream.getvalue()[:-1500]


BAD_FILES = {
    "empty.mp4": (b"", r"found an empty file \(0 bytes\)"),
    "text.mp4": (b"Once upon a time there was a film.\n", "found text, expected a video"),
    "list.m3u8": (
        b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/a.ts\n",
        "found text, expected a video",
    ),
    "list.txt": (b"ffconcat version 1.0\nfile 'a.mp4'\n", "found text, expected a video"),
    "noise.mp4": (b"\x00\x01\x02\x03\xff\xfe" * 100, "found unknown data, expected"),
    "start.mp4": (b"\x00\x00\x00\x20ftypisom" + b"\x00" * 50, "cannot be decoded"),
    "start.mkv": (b"\x1aE\xdf\xa3" + b"\x00" * 50, "cannot be decoded|no video track"),
    "start.avi": (b"RIFF\x00\x00\x00\x00AVI LIST", "cannot be decoded"),
    "sound.wav": (b"RIFF\x00\x00\x00\x00WAVEfmt " + b"\x00" * 50, "found unknown data"),
    "sound.m4a": (only_sound, "found only sound"),
    "cut.mp4": (header_at_the_end, "cannot be decoded .Invalid data"),
    "none.mkv": (lambda: no_frames("matroska"), "no frame can be decoded|cannot be decoded"),
    "none.mp4": (lambda: no_frames("mp4"), "no frame can be decoded|cannot be decoded|no video"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(pyav, tmp_path, capfd, name):
    data, error = BAD_FILES[name]
    data = data() if callable(data) else data
    path = tmp_path / name
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ValueError, match=error) as caught:
            load_video(source)
        assert type(caught.value) is ValueError
        assert "\n" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        assert str(caught.value).startswith(str(path) if source is path else "the given bytes")
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    options = {"movflags": "faststart"}
    write_video(str(path), LEVELS, codec="mpeg4", size=(32, 32), options=options)
    return path.read_bytes()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_damaged_files_give_frames_or_a_clear_error(small_file, draw):
    data = bytearray(small_file)
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(4, len(data) - 1))] = draw.draw(st.integers(0, 255))
    if draw.draw(st.booleans()):
        del data[draw.draw(st.integers(8, len(data))) :]
    try:
        video = load_video(data, max_frames=4)
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error)
    else:
        assert 1 <= len(video.frames) <= 4


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.mp4"):
        load_video(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match=r"is a folder: .*\(frames, times\)"):
        load_video(tmp_path)
    with pytest.raises(ValueError, match="is not a regular file"):
        load_video("/dev/zero")
    with pytest.raises(ValueError, match="cannot be read"):
        load_video("x" * 5000)
    with pytest.raises(ValueError, match="found the address"):
        load_video("https://example.com/a.mp4")


@pytest.mark.parametrize("options", [{"max_frames": 0}, {"max_fps": 0}, {"max_fps": float("nan")}])
def test_limits_are_checked_before_anything_is_read(options):
    with pytest.raises(ValueError, match=f"found {next(iter(options))}"):
        load_video("no file", **options)


# ---- mirrored and turned ----

MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
MATRICES += [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def with_matrix(data, matrix):
    """The same MP4 shown otherwise: a stored (x, y) is shown at (ax + cy, bx + dy)."""
    data = bytearray(data)
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


def as_ffmpeg_turns(frame, matrix):
    """What the program ffmpeg inserts before its filters (``-autorotate``), by their names.

    It takes the angle of the matrix, then looks at single signs for what is mirrored.
    """
    a, b, c, d = matrix
    angle = round(-np.degrees(np.arctan2(b, a))) % 360  # counter-clockwise, as stored
    theta = -angle % 360
    filters = {0: ["vflip"] * (d < 0), 180: ["hflip"] * (a < 0) + ["vflip"] * (d < 0)}
    filters[90] = ["cclock_flip" if c > 0 else "clock"]
    filters[270] = ["clock_flip" if c < 0 else "cclock"]
    does = {
        "hflip": lambda x: x[:, ::-1],
        "vflip": lambda x: x[::-1],
        "clock": lambda x: np.rot90(x, -1),
        "cclock": np.rot90,
        "cclock_flip": lambda x: x.swapaxes(0, 1),
        "clock_flip": lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    }
    for name in filters[theta]:
        frame = does[name](frame)
    return frame


@pytest.fixture(scope="module")
def quarters_file(tmp_path_factory):
    """Four quarters of different grey, so that no two of the eight ways look alike."""
    quarters = grey()
    quarters[:24, :32], quarters[:24, 32:], quarters[24:, 32:] = 240, 160, 80
    path = tmp_path_factory.mktemp("quarters") / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quarters, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes(), quarters


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_ways_that_a_video_is_shown(decoder, quarters_file, matrix):
    """Selfies are mirrored, then turned; only the angle of the matrix was looked at."""
    data, stored = quarters_file
    expected = as_ffmpeg_turns(stored, matrix)
    a, b, c, d = matrix
    for y, x in ((5, 5), (5, 60), (40, 5), (40, 60)):  # and as the matrix says
        shown_x, shown_y = a * x + c * y, b * x + d * y
        height, width = expected.shape[:2]
        shown_x += width - 1 if min(a, c) < 0 else 0
        shown_y += height - 1 if min(b, d) < 0 else 0
        assert expected[shown_y, shown_x, 0] == stored[y, x, 0]
    for frame in load_video(with_matrix(data, matrix)).frames:
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 8


# ---- kinds by content ----


def test_kinds_are_told_by_content(pyav, tmp_path):
    """Whatever the name is, and where a transport stream was cut off its beginning."""
    kinds = {"mpeg": "mpeg2video", "mpeg1video": "mpeg1video", "asf": "wmv2", "flv": "libx264"}
    kinds |= {"mpegts": "libx264", "avi": "mpeg4", "matroska": "libx264", "ogg": "libtheora"}
    for format, codec in kinds.items():
        if codec not in av.codecs_available:
            continue
        stream = io.BytesIO()
        rate = 25 if codec.startswith("mpeg") and codec != "mpeg4" else 10
        write_video(stream, LEVELS, codec=codec, format=format, rate=rate)
        for data in (stream.getvalue(), *([stream.getvalue()[70:]] if format == "mpegts" else [])):
            path = tmp_path / "a.jpg"
            path.write_bytes(data)
            assert load_video(path).size == (WIDTH, HEIGHT), format
            with pytest.raises(ValueError, match=r"found a video or sound \(.*give a video as a"):
                load_image(path)


def test_packets_of_a_camera(pyav):
    stream = io.BytesIO()
    write_video(stream, LEVELS, format="mpegts", options={"mpegts_m2ts_mode": "1"})
    data = stream.getvalue()
    assert data[4] == data[196] == ord("G")
    assert shown(load_video(data))[:6] == [0, 5, 10, 15, 20, 25]


def test_an_mp4_that_begins_with_a_segment(pyav):
    stream = io.BytesIO()
    write_video(
        stream,
        LEVELS,
        format="mp4",
        options={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    )
    styp = struct.pack(">I", 24) + b"stypmsdh\0\0\0\0msdhmsix"
    assert shown(load_video(styp + stream.getvalue())) == [0, 5, 10, 15, 20, 25, 29]
    only_segment = styp + struct.pack(">I", 16) + b"moof" + bytes(8)
    with pytest.raises(ValueError, match=r"found a video \(MP4 or MOV\) .*convert it to MP4"):
        load_video(only_segment)


# ---- names and sources ----


@pytest.mark.parametrize("name", ["v%d.png", "v%03d.png", "-", "concat:a|b", "file,a", "pipe:0"])
def test_a_name_says_nothing_to_ffmpeg(decoder, tmp_path, monkeypatch, name):
    """``v%d.png`` is a pattern of other files for it; here the opened file is read."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.fromarray(grey(number)).save(tmp_path / f"v{number}.png")
    write_video("a.mp4", LEVELS)
    (tmp_path / "a.mp4").rename(tmp_path / name)
    assert shown(load_video(name)) == [0, 5, 10, 15, 20, 25, 29]


def test_a_playlist_inside_of_a_video_is_not_followed(pyav, tmp_path):
    (tmp_path / "a.ts").write_bytes(b"")
    playlist = b'<MPD profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><BaseURL>a.ts</BaseURL>'
    for start in (b"\0\0\0\x10ftypisom\0\0\0\0", b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"FLV\1"):
        with pytest.raises(ValueError, match=r"found a video \(|no video track"):
            load_video(start + playlist)


def test_addresses_and_open_files(decoder, tmp_path):
    path = tmp_path / "a b%.mp4"
    write_video(str(path), LEVELS)
    expected = [0, 5, 10, 15, 20, 25, 29]
    assert shown(load_video(path.as_uri())) == expected
    with path.open("rb") as stream:
        stream.seek(7)
        assert shown(load_video(stream)) == shown(load_video(stream)) == expected
        assert stream.tell() == 7 and not stream.closed
    held = io.BytesIO(animation([0, 50, 100], 400))
    held.seek(0, 2)
    assert levels_of(load_video(held)) == [0, 50, 100, 100]
    assert held.tell() == len(held.getvalue())
    with pytest.raises(ValueError, match="found an empty name, expected the path of a video"):
        load_video("")


@pytest.mark.parametrize("times", [[0.0, []], [None], ["x"], 10**400])
def test_times_that_are_no_numbers(times):
    with pytest.raises(ValueError, match="beside 2 frames, expected their times in seconds"):
        load_video(([grey(), grey()], times))
    with pytest.raises(ValueError, match="found 5 in place of frames"):
        load_video((5, times))


# ---- more than is looked at ----


def gif(width, height, count):
    """A GIF of few bytes with frames of any size."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\4\0\x0a\0\0\0,\0\0\0\0" + struct.pack("<HHB", width, height, 0)
    return head + (frame + b"\2\2\x4c\1\0") * count + b";"


def apng(width, height, count):
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]
    parts.append(chunk(b"acTL", struct.pack(">II", count, 0)))
    pixels = zlib.compress(bytes(2))
    for number in range(count):
        place = struct.pack(">IIIIIHHBB", 2 * number, 1, 1, 0, 0, 1, 2, 0, 0)
        parts.append(chunk(b"fcTL", place))
        body = struct.pack(">I", 2 * number + 1) + pixels if number else pixels
        parts.append(chunk(b"fdAT" if number else b"IDAT", body))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IEND", b"")])


def webp(width, height, count):
    size = b"".join(struct.pack("<I", value - 1)[:3] for value in (width, height))
    body = b"VP8X" + struct.pack("<II", 10, 2) + size + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = b"ANMF" + struct.pack("<I", 16) + bytes(6) + bytes(6) + b"\x64\0\0\0"
    data = b"WEBP" + body + frame * count
    return b"RIFF" + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("make", [gif, apng, webp])
@pytest.mark.parametrize(
    ("size", "error"),
    [
        ((13_000, 13_000, 16), "frame of 13000 x 13000 pixels to look at, expected at most"),
        ((5000, 5000, 30), "found 30 frames of 5000 x 5000 pixels, expected at most 20000 frames"),
        ((1, 1, 100_000), "found too many frames of 1 x 1 pixels, expected at most 20000 frames"),
    ],
)
def test_animations_are_measured_before_they_are_decoded(monkeypatch, make, size, error):
    """These took up to 59 seconds and 9.9 GB."""
    data = make(*size)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=error) as caught:
        load_video(data)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", ["MAX_FRAME_PIXELS", "MAX_KEPT_PIXELS"])
def test_videos_are_measured_before_they_are_decoded(decoder, monkeypatch, tmp_path, limit):
    path = write_video(str(tmp_path / "a.mp4"), LEVELS)
    monkeypatch.setattr(f"nanomolmo2.processor.sampling.{limit}", 3 * WIDTH * HEIGHT - 1)
    if limit == "MAX_KEPT_PIXELS":
        assert len(load_video(path, max_frames=2).frames) == 2
        error = "found 7 frames of 64 x 48 .*take at most 2 frames"
    else:
        monkeypatch.setattr(f"nanomolmo2.processor.sampling.{limit}", WIDTH * HEIGHT - 1)
        error = "found 7 frames of 64 x 48 pixels to look at, expected at most 3071 pixels each"
    with pytest.raises(ValueError, match=error) as caught:
        load_video(path)
    assert type(caught.value) is ValueError


def test_too_many_stored_frames(pyav, monkeypatch, tmp_path):
    path = write_video(str(tmp_path / "a.mp4"), LEVELS)
    monkeypatch.setattr("nanomolmo2.processor.video.MAX_STORED_FRAMES", 29)
    with pytest.raises(ValueError, match="more than 29 stored frames"):
        load_video(path)


@pytest.mark.parametrize("source", ["file", "animation", "frames"])
def test_frames_that_would_not_fit_are_made_smaller_as_they_come(
    decoder, monkeypatch, tmp_path, source
):
    if source == "file":
        source = write_video(str(tmp_path / "a.mp4"), LEVELS)
    elif source == "animation":
        source = animation(LEVELS, 100)
    else:
        source = [grey(level) for level in LEVELS], 10
    whole = load_video(source)
    assert whole.size == (WIDTH, HEIGHT)
    monkeypatch.setattr("nanomolmo2.processor.video.MAX_VIDEO_BYTES", 7 * 3 * WIDTH * HEIGHT // 4)
    small = load_video(source)
    assert small.size == (WIDTH // 2, HEIGHT // 2) and small.times == whole.times
    assert np.abs(np.subtract(shown(small), shown(whole))).max() == 0


PEAK = """
import resource, sys
from nanomolmo2.processor.video import load_video
import av
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
video = load_video(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *video.size, len(video.frames))
"""


@pytest.mark.slow
def test_memory_of_large_frames(tmp_path):
    """60 frames of 4096 x 4096 took 3 GB."""
    pytest.importorskip("resource")
    path = str(tmp_path / "a.mp4")
    write_video(path, range(60), codec="mpeg4", rate=2, size=(4096, 4096))
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, width, height, count = map(int, done.stdout.split())
    assert peak * 1024 < 1.5e9 and count == 61 and width == height < 4096


def test_a_duration_that_only_a_damaged_file_has() -> None:
    sampling = Sampling(lambda *_: lambda frame: frame, 8, 2.0)
    assert sampling.times(9e6)[-1] == 9e6
    with pytest.raises(TooMuch, match=r"9.22e\+15 seconds, expected at most 10,000,000"):
        sampling.times(9223372032559808.0)
