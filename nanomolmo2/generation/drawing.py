"""Answers on their images: overlays of points, as images and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanomolmo2.checks import save_image
from nanomolmo2.processor import load_image
from nanomolmo2.processor.draw import draw_frames, draw_points, save_gif

if TYPE_CHECKING:
    from PIL.Image import Image

    from nanomolmo2.generation.answer import Answer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def draw_answer(answer: Answer, path: str | Path | None) -> Image | list[Image]:
    """See `Answer.draw`."""
    if answer.show is None or not (answer.image_sizes or answer.video_size):
        raise ValueError("the answer is about no picture: there is nothing to draw on")
    suffixes = SUFFIXES if answer.video_size is None else (".gif",)
    if path is not None and Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"cannot draw into {path}: its name must end with {', '.join(suffixes)}")
    shown = answer.show()
    if answer.video_size is not None:
        sizes = [load_image(frame).size for frame in shown.images[:1]] or [answer.video_size]
        across, down = (a / b for a, b in zip(sizes[0], answer.video_size, strict=True))
        points = [replace(p, x=p.x * across, y=p.y * down) for p in answer.points]
        frames = draw_frames(shown.images, shown.times, points)
        if path is not None:
            save_gif(frames, shown.times, path)
        return frames
    drawn = [
        draw_points(image, answer.points, number=number)
        for number, image in enumerate(shown.images, start=1)
    ]
    if path is not None:
        for image, target in zip(drawn, overlay_paths(Path(path), len(drawn)), strict=True):
            save_image(image, target)
    return drawn[0] if len(drawn) == 1 else drawn


def overlay_paths(path: Path, images: int) -> list[Path]:
    """``out.png`` for one image; ``out-1.png``, ``out-2.png``, ... for several."""
    if images == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(images)]
