"""Draw what `tiny` sees in five test scenes: docs/images/scenes.png.

    python scripts/make_screenshots.py

Nobody picks the scenes: they are the first five of a test set of their own seed, from the three art
groups in turn. Points are the answer to "Point to everything.", the words below that to "Describe
this picture."; what is wrong stays in.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install

SEED = 2026  # the test sets have seed 0
NUM_SCENES = 5
ZOOM = 2
CAPTION_PX = 84  # room for the words below a scene
OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "scenes.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Draw what a model sees in five test scenes.")
    parser.add_argument("--model", default="tiny", help="a folder, or tiny")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="PNG to write")
    options = parser.parse_args(arguments)

    from PIL import Image, ImageDraw, ImageFont

    from nanomolmo2.emoji.scenes import TEST_GROUPS, test_scene
    from nanomolmo2.files import atomic_path
    from nanomolmo2.generation.pipeline import Pipeline
    from nanomolmo2.processor import Point
    from nanomolmo2.processor.draw import draw_points

    pipeline = Pipeline.from_pretrained(options.model)
    side = 192 * ZOOM
    sheet = Image.new("RGB", (NUM_SCENES * side, side + CAPTION_PX), "white")
    words, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i in range(NUM_SCENES):
        group = TEST_GROUPS[i % len(TEST_GROUPS)]
        picture = Image.fromarray(test_scene(i, group, seed=SEED).image)
        found = pipeline.ask(picture, "Point to everything.", max_new_tokens=96).points
        caption = pipeline.ask(picture, "Describe this picture.", max_new_tokens=96).text
        zoomed = [Point(ZOOM * p.x, ZOOM * p.y, p.image, p.id) for p in found]
        sheet.paste(draw_points(picture.resize((side, side)), zoomed), (i * side, 0))
        lines = "\n".join(textwrap.wrap(f"{group}: {caption}", 50))
        words.text((i * side + 6, side + 6), lines, fill="black", font=font)
    with atomic_path(options.out) as temporary:
        sheet.save(temporary)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
