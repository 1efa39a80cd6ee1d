from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from nanomolmo2.emoji.clips import ClipConfig, ask_about_clip, render_clip
from nanomolmo2.emoji.clips import test_clip as draw_test_clip
from nanomolmo2.emoji.scenes import train_rng
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, Sprites
from nanomolmo2.processor.points import parse_points

SINGULAR = dict(zip(PLURALS, CATEGORIES, strict=True)) | {noun: noun for noun in CATEGORIES}


@pytest.fixture(scope="module")
def clips():
    rng, sprites = train_rng(22), Sprites.load()
    config = ClipConfig(max_frames=16)
    made = [render_clip(rng, sprites, config) for _ in range(120)]
    return [(clip, ask_about_clip(clip, rng, config)) for clip in made]


def test_frames_hold_what_the_boxes_say(clips):
    """A frame differs from one without objects only inside of the boxes."""
    lengths = set()
    for clip, _ in clips:
        frames = clip.video.frames
        lengths.add(len(frames))
        assert frames[0].shape == (192, 192, 3) and clip.video.times[1] == 0.5
        for i in range(1, len(frames)):
            moved = (frames[i] != frames[i - 1]).any(axis=2)
            for j in (i - 1, i):
                for box in (o.boxes[j] for o in clip.objects if o.boxes[j] is not None):
                    x0, y0, x1, y1 = (int(v) for v in box)
                    assert 0 <= x0 < x1 <= 192 and 0 <= y0 < y1 <= 192
                    # A faint rim, up to 4 pixels, does not count as visible.
                    moved[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = False
            assert not moved.any()
    assert min(lengths) == 8 and max(lengths) == 16
    assert any(box is None for clip, _ in clips for o in clip.objects for box in o.boxes)


def asked(clips, task):
    for clip, branches in clips:
        for branch in (b for b in branches if b.task == task):
            text, answer = (m["content"] for m in branch.messages)
            (noun,) = {SINGULAR[w] for w in re.findall("[a-z]+", text.lower()) if w in SINGULAR}
            assert branch.truth["noun"] == noun
            yield clip, text, answer, noun, branch.truth


def test_tracks_go_through_the_boxes(clips):
    absent = 0
    for clip, _, answer, noun, truth in asked(clips, "track"):
        points = parse_points(answer, [], video_size=(192, 192))
        boxes = [[o.boxes[i] for o in clip.named(noun)] for i in range(len(clip.video.frames))]
        assert len(points) == sum(box is not None for frame in boxes for box in frame)
        for time, frame, told in zip(clip.video.times, boxes, truth["frames"], strict=True):
            assert told["time"] == time
            assert told["boxes"] == [None if box is None else list(box) for box in frame]
            here = [p for p in points if p.time == time]
            for box in (box for box in frame if box is not None):
                assert any(box[0] < p.x < box[2] and box[1] < p.y < box[3] for p in here)
        if not points:
            assert answer == "No tracks available."
            absent += 1
    assert 10 < absent < 100


def test_things_appear_when_their_first_box_does(clips):
    answers = Counter()
    for clip, _, answer, noun, _ in asked(clips, "appears"):
        times = [
            time
            for time, *boxes in zip(
                clip.video.times, *(o.boxes for o in clip.named(noun)), strict=True
            )
            if any(box is not None for box in boxes)
        ]
        assert answer == (f"At {min(times)} seconds." if times else "Never.")
        answers[answer] += 1
    assert answers["Never."] > 20 and answers["At 0.0 seconds."] > 50 and len(answers) > 6


def test_points_at_a_time_lie_in_the_boxes_of_that_time(clips):
    for clip, text, answer, noun, truth in asked(clips, "video_point"):
        time = float(re.search(r"(\d+\.\d) seconds", text)[1])
        frame = clip.video.times.index(time)
        boxes = [o.boxes[frame] for o in clip.named(noun) if o.boxes[frame] is not None]
        points = parse_points(answer, [], video_size=(192, 192))
        assert len(points) == len(boxes) and all(p.time == time for p in points)
        assert truth["boxes"] == [list(box) for box in boxes] and truth["time"] == time
        for x0, y0, x1, y1 in boxes:
            assert any(x0 < p.x < x1 and y0 < p.y < y1 for p in points)


def test_test_clips_are_fixed():
    one, again = draw_test_clip(3, "openmoji"), draw_test_clip(3, "openmoji")
    assert all((a == b).all() for a, b in zip(one.video.frames, again.video.frames, strict=True))
    assert one.branches == again.branches and len(one.video.frames) == 8
    assert {b.task for b in one.branches} == {"track", "appears", "video_point"}
    assert np.abs(one.video.frames[0].astype(int) - one.video.frames[-1]).max() > 0
