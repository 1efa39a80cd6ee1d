"""The demo: the bundled model captions, counts and points on a bundled image, and finds in another.

``assets/demo/scene.json`` holds the questions and the true answers; scripts/make_demo_picture.py
makes it and the picture.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nanomolmo2.checks import save_image
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.processor import Point, load_image
from nanomolmo2.processor.draw import draw_points
from nanomolmo2.terminal import visible

DEMO = Path(__file__).parent / "assets" / "demo"
COINS = DEMO.parent / "photos" / "coins.png"
COIN, NUM_COINS = (157, 52), 24  # where one lies, pixels, and how many there are
MAX_NEW_TOKENS = 96  # six points and the words around them take about 60
ZOOM = 3  # the image is small: the overlay is drawn larger

Box = Sequence[float]  # x0, y0, x1, y1 in pixels


def run_demo(
    draw: Path,
    pipeline: Pipeline | None = None,
    console: Console | None = None,
    *,
    load: Callable[[], Pipeline] = Pipeline.from_pretrained,
) -> None:
    """Ask everything in scene.json, print the answers as they come, write the points to ``draw``.

    Then click a coin in a photograph, if the model finds.

    Args:
        pipeline: the bundled model by default, as ``load`` gives it.
        console: standard output by default.
    """
    console = console or Console(highlight=False)
    questions = json.loads((DEMO / "scene.json").read_text(encoding="utf-8"))["questions"]
    image = load_image(DEMO / "scene.png")
    start = time.perf_counter()
    pipeline = pipeline or load()
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    console.print(
        f"Model: tiny, {parameters / 1e6:.1f} M parameters, loaded in "
        f"{time.perf_counter() - start:.1f} s\nPicture: {visible(str(shown(DEMO / 'scene.png')))}, "
        f"{image.width} x {image.height} pixels; the model has never seen it\n",
        markup=False,
        soft_wrap=True,
    )
    start = time.perf_counter()
    points: list[Point] = []
    for question in questions:
        console.print(Text(question["question"], style="bold"))
        answer = pipeline.ask(
            image,
            question["question"],
            max_new_tokens=MAX_NEW_TOKENS,
            on_text=lambda text: console.print(visible(text), end="", markup=False, soft_wrap=True),
        )
        points += answer.points
        truth = question.get("truth") or hits(answer.points, question["boxes"])
        console.print(Text(f"\ntruth: {truth}\n", style="dim"))
    asked = len(questions)
    if pipeline.model.finder is not None:
        asked += 1
        where = f"Everything like what is at {COIN[0]},{COIN[1]} in {visible(str(shown(COINS)))}"
        console.print(Text(where, style="bold"), soft_wrap=True)
        console.print(f"{pipeline.find(COINS, like=[COIN]).count} found")
        console.print(Text(f"truth: {NUM_COINS} coins, in a photograph\n", style="dim"))
    seconds = time.perf_counter() - start
    large = image.resize((ZOOM * image.width, ZOOM * image.height))
    zoomed = [Point(ZOOM * p.x, ZOOM * p.y, p.image, p.id, p.label) for p in points]
    save_image(draw_points(large, zoomed), draw)
    console.print(
        Text(f"{asked} answers in {seconds:.1f} s. The points are drawn in ")
        + Text(visible(str(draw)), style="bold")
        + Text(f".\n\nTry next:\n{visible(suggestions(questions[-2]['question']))}"),
        soft_wrap=True,
    )


def hits(points: Sequence[Point], boxes: Sequence[Box]) -> str:
    """How many of the things were pointed at, and how many points hit nothing."""

    def inside(point: Point, box: Box) -> bool:
        return box[0] <= point.x < box[2] and box[1] <= point.y < box[3]

    found = sum(any(inside(p, box) for p in points) for box in boxes)
    astray = sum(not any(inside(p, box) for box in boxes) for p in points)
    return f"there are {len(boxes)}, {found} pointed at" + (f", {astray} astray" if astray else "")


def suggestions(question: str) -> str:
    """Commands to go on with, as they can be typed here."""
    folder = Path(sys.executable).parent
    on_path = str(folder) in os.environ.get("PATH", "").split(os.pathsep)
    command = "nanomolmo2" if on_path else str(shown(folder / "nanomolmo2"))
    lines = [
        f'{command} ask {shown(DEMO / "scene.png")} "{question}" --draw points.png',
        f"{command} find {shown(COINS)} --at {COIN[0]},{COIN[1]} --draw --out found",
        f"{command} info tiny",
        f"{command} --help",
    ]
    if find_spec("fastapi"):  # the extra `serve`
        lines.insert(1, f"{command} demo --serve    # ask about pictures of your own, in a browser")
    return "\n".join(f"  {line}" for line in lines)


def shown(path: Path) -> Path:
    """A path relative to the working folder, if it is inside."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
