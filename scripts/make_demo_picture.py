"""Draw the demo's picture and the questions about it: nanomolmo2/assets/demo/.

    python scripts/make_demo_picture.py

Nobody picks the picture: it is the first scene of a random stream of its own (neither training nor
the test sets use it) that shows at least three kinds of things, one of them several times. What a
model makes of it plays no part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install

SEED = 2025  # the test sets have seed 0
DEMO = Path(__file__).resolve().parents[1] / "nanomolmo2" / "assets" / "demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write scene.png and scene.json."""
    parser = argparse.ArgumentParser(description="Draw the demo's picture and its questions.")
    parser.add_argument(
        "--out",
        type=Path,
        default=DEMO,
        metavar="DIR",
        help="folder to write to (default: the package's assets)",
    )
    options = parser.parse_args(arguments)

    from PIL import Image

    from nanomolmo2.files import atomic_path

    image, description = make_demo()
    with atomic_path(options.out / "scene.png") as temporary:
        Image.fromarray(image).save(temporary)
    with atomic_path(options.out / "scene.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}/scene.png and scene.json ({description['source']})")
    return 0


def make_demo() -> tuple[Any, dict[str, Any]]:
    """The picture (H, W, 3) uint8, and what scene.json holds: questions with the true answers.

    Boxes are (x0, y0, x1, y1) in pixels around each thing that a question asks to point to.
    """
    from nanomolmo2.emoji.questions import caption_counts, counted
    from nanomolmo2.emoji.scenes import test_scene
    from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, article

    for index in count():
        scene = test_scene(index, "seen", seed=SEED)
        counts = caption_counts(scene)
        if len(counts) >= 3 and max(counts.values()) >= 2:
            break
    plural = dict(zip(CATEGORIES, PLURALS, strict=True))
    most = max(counts, key=lambda noun: counts[noun])
    absent = next(noun for noun in CATEGORIES if noun not in counts)
    questions: list[dict[str, Any]] = [
        {
            "question": "Describe this picture.",
            "truth": ", ".join(counted(noun, number) for noun, number in counts.items()),
        },
        {"question": f"How many {plural[most]} are there?", "truth": str(counts[most])},
    ]
    for noun in counts:
        boxes = [list(o.box) for o in scene.objects if o.category == noun]
        questions.append({"question": f"Point to the {noun}.", "boxes": boxes})
    questions.append({"question": f"Is there {article(absent)} {absent}?", "truth": "no"})
    source = f"test_scene({index}, 'seen', seed={SEED})"
    return scene.image, {"source": source, "questions": questions}


if __name__ == "__main__":
    sys.exit(main())
