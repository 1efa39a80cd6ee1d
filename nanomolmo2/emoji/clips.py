"""Short videos of moving emoji: where things go, and when they come into view.

    track        Track the dog.                   <tracks coords="0.0 1 210 455;0.5 1 230
                                                  450">dog</tracks>
    appears      When does the dog appear?        At 1.5 seconds.
    video_point  Point to the dog at 0.5 seconds. <points coords="0.5 1 230 450">dog</points>

Positions are pixels, times seconds from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.example import Branch, Example
from nanomolmo2.emoji.questions import PLURAL, exchange, with_exact_points
from nanomolmo2.emoji.scenes import (
    TEST_STREAM,
    Drawing,
    SceneConfig,
    art_of,
    choose_objects,
    draw_background,
    group_rng,
)
from nanomolmo2.emoji.sprites import CATEGORIES, Sprites, article
from nanomolmo2.emoji.wordings import Task, Wordings
from nanomolmo2.processor.points import SCALE, Point, format_points, format_tracks
from nanomolmo2.processor.video import Video

APPEARS_ANSWER = "At {at} seconds."
NEVER_ANSWER = "Never."
CLIP_STREAM = 5  # second word of test seeds
MAX_COVERED = 0.3  # shared part of two boxes in any frame, of the smaller one
NUM_PATHS = 30  # paths tried for an object before it is left out

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ClipConfig(Config):
    """What videos look like and what is asked about them.

    Attributes:
        scene: size of the frames, of the emoji, and their styles.
        min_frames, max_frames: how many frames. fps: how many a second.
        max_objects: most emoji.
        max_speed: pixels from frame to frame.
        late, early: share of the emoji that come after the first frame, and that go before the end.
        track, appears, video_point: questions a video.
        absent: share of questions about what is not in the video.
    """

    scene: SceneConfig = field(default_factory=lambda: SceneConfig(min_px=36, max_px=64))
    min_frames: int = 8
    max_frames: int = 8
    fps: float = 2.0
    max_objects: int = 3
    max_speed: float = 20
    late: float = 0.4
    early: float = 0.15
    track: int = 2
    appears: int = 3
    video_point: int = 4
    absent: float = 0.15


@dataclass(frozen=True)
class ClipObject:
    """One moving emoji: ``boxes`` around it, frame by frame; None where it is not there."""

    category: str
    style: str
    boxes: tuple[Box | None, ...]

    def center(self, frame: int) -> tuple[float, float] | None:
        box = self.boxes[frame]
        return None if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


@dataclass(frozen=True)
class Clip:
    """A video and its ground truth."""

    video: Video
    objects: tuple[ClipObject, ...] = field(default=())

    def named(self, noun: str) -> list[ClipObject]:
        return [o for o in self.objects if o.category == noun]


def render_clip(
    rng: np.random.Generator, sprites: Sprites, config: ClipConfig | None = None
) -> Clip:
    """Draw a video: emoji that glide, bounce off the borders, come and go."""
    config = config or ClipConfig()
    size = config.scene.size
    num_frames = int(rng.integers(config.min_frames, config.max_frames + 1))
    frames = np.repeat(draw_background(rng, size)[None], num_frames, axis=0)
    objects: list[ClipObject] = []
    count = int(rng.integers(1, config.max_objects + 1))
    for category, style in choose_objects(rng, sprites, config.scene, count):
        px = float(rng.uniform(config.scene.min_px, config.scene.max_px))
        drawing = Drawing.of(rng, sprites, category, style, px, config.scene)
        for _ in range(NUM_PATHS):
            boxes = _path(rng, config, num_frames, drawing.visible_size)
            if not any(_covered(boxes, other.boxes) for other in objects):
                break
        else:
            continue
        for frame, box in zip(frames, boxes, strict=True):
            if box is not None:
                drawing.paste(frame, (int(box[0]), int(box[1])))
        objects.append(ClipObject(CATEGORIES[category], style, boxes))
    times = tuple(i / config.fps for i in range(num_frames))
    return Clip(Video(tuple(frames), times), tuple(objects))


def _path(
    rng: np.random.Generator, config: ClipConfig, num_frames: int, size: tuple[int, int]
) -> tuple[Box | None, ...]:
    free = np.array([config.scene.size - size[0], config.scene.size - size[1]], float)
    place, angle = rng.uniform(0, free), rng.uniform(0, 2 * np.pi)
    step = rng.uniform(0, config.max_speed) * np.array([np.cos(angle), np.sin(angle)])
    start = int(rng.integers(1, num_frames - 1)) if rng.random() < config.late else 0
    end = num_frames
    if rng.random() < config.early and start + 2 < num_frames:
        end = int(rng.integers(start + 2, num_frames))
    boxes: list[Box | None] = []
    for i in range(num_frames):
        # A reflected path is the triangle wave of the straight one.
        x, y = (free - np.abs((place + i * step) % (2 * free + 1e-9) - free)).round()
        shown = start <= i < end
        boxes.append(
            (float(x), float(y), float(x + size[0]), float(y + size[1])) if shown else None
        )
    return tuple(boxes)


def _covered(boxes: tuple[Box | None, ...], others: tuple[Box | None, ...]) -> bool:
    for a, b in zip(boxes, others, strict=True):
        if a is None or b is None:
            continue
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
            0, min(a[3], b[3]) - max(a[1], b[1])
        )
        smaller = min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
        if shared > MAX_COVERED * smaller:
            return True
    return False


def ask_about_clip(
    clip: Clip,
    rng: np.random.Generator,
    config: ClipConfig | None = None,
    snap: int = 1,
    *,
    casual: float = 0.1,
    for_tests: bool = False,
) -> list[Branch]:
    """Questions whose ``truth`` holds ``answer``, ``noun`` and, by task:

    track: ``frames``, a list of ``time`` and ``boxes`` (of each object, None while it is away);
    appears: nothing more; video_point: ``time`` and ``boxes`` of that moment.
    """
    config = config or ClipConfig()
    wording = Wordings(rng, casual, for_tests)
    size = clip.video.size
    present = sorted({o.category for o in clip.objects})
    others = [noun for noun in CATEGORIES if noun not in present]

    def draw_noun() -> str:
        if not present or rng.random() < config.absent:
            return str(rng.choice(others))
        return str(rng.choice(present))

    def ask(task: Task, noun: str, at: float | None = None) -> str:
        return wording(task).format(a=f"{article(noun)} {noun}", one=noun, many=PLURAL[noun], at=at)

    def points(noun: str, chosen: list[int]) -> list[Point]:
        return [
            Point(*center, id=number, time=clip.video.times[frame])
            for number, o in enumerate(clip.named(noun))
            for frame in chosen
            if (center := o.center(frame)) is not None
        ]

    every = list(range(len(clip.video.frames)))
    branches = []
    for _ in range(config.track):
        noun = draw_noun()
        truth = [
            {"time": clip.video.times[i], "boxes": [_listed(o.boxes[i]) for o in clip.named(noun)]}
            for i in every
        ]
        places = points(noun, every)
        answer = with_exact_points(format_tracks(_snapped(places, size, snap), noun, size), places)
        branches.append(exchange("track", ask("track", noun), answer, noun=noun, frames=truth))
    for _ in range(config.appears):
        noun = draw_noun()
        shown = [i for i in every if any(o.boxes[i] is not None for o in clip.named(noun))]
        answer = APPEARS_ANSWER.format(at=clip.video.times[shown[0]]) if shown else NEVER_ANSWER
        branches.append(exchange("appears", ask("appears", noun), answer, noun=noun))
    for _ in range(config.video_point):
        noun, frame = draw_noun(), int(rng.integers(len(every)))
        boxes = [_listed(o.boxes[frame]) for o in clip.named(noun)]
        places = points(noun, [frame])
        answer = format_points(_snapped(places, size, snap), noun, video_size=size)
        answer = with_exact_points(answer, places)
        time = clip.video.times[frame]
        question = ask("video_point", noun, time)
        boxes = [box for box in boxes if box is not None]
        branches.append(
            exchange("video_point", question, answer, noun=noun, time=time, boxes=boxes)
        )
    return branches


def _listed(box: Box | None) -> list[float] | None:
    return None if box is None else list(box)


def _snapped(points: Sequence[Point], size: tuple[int, int], snap: int) -> list[Point]:
    step_x, step_y = (snap * side / SCALE for side in size)
    return [
        replace(p, x=round(p.x / step_x) * step_x, y=round(p.y / step_y) * step_y) for p in points
    ]


def test_clip(
    index: int,
    group: str,
    seed: int = 0,
    sprites: Sprites | None = None,
    styles: Sequence[str] = (),
) -> Example:
    """Clip number ``index`` of 8 frames of the fixed test set of an art group.

    ``styles``: see `art_of`.
    """
    scene = replace(ClipConfig().scene, styles=art_of(group, styles))
    config = ClipConfig(scene, track=1, appears=1, video_point=1)
    rng = group_rng(seed, group, index, TEST_STREAM, CLIP_STREAM)
    clip = render_clip(rng, sprites or Sprites.load(), config)
    return Example([], ask_about_clip(clip, rng, config, casual=0, for_tests=True), clip.video)
