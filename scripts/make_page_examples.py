"""Draw the pictures that the page offers to begin with: nanomolmo2/serve/page/examples/.

    python scripts/make_page_examples.py

Nobody picks the pictures: each is the first of a random stream of its own (neither training nor the
test sets use it) that shows what its example is about on a background that makes a small file. What
a model makes of it plays no part. They are drawn at twice the size that `tiny` sees, for people.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install

SEED = 2027  # the test sets have seed 0
SIDE = 384
MAX_BYTES = 48_000  # a picture
OUT = Path(__file__).resolve().parents[1] / "nanomolmo2" / "serve" / "page" / "examples"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures and examples.json, which lists them with their questions."""
    parser = argparse.ArgumentParser(description="Draw the page's example pictures.")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder to write to (default: the page's own)",
    )
    options = parser.parse_args(arguments)

    from nanomolmo2.files import atomic_path

    options.out.mkdir(parents=True, exist_ok=True)
    listed = []
    for make in (make_scene, make_count, make_pair, make_clip):
        example, files = make()
        listed.append(example)
        for name, content in files.items():
            with atomic_path(options.out / name) as temporary:
                temporary.write_bytes(content)
            print(f"wrote {options.out / name} ({len(content):,} bytes)")
    with atomic_path(options.out / "examples.json") as temporary:
        temporary.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return 0


def make_scene() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Some things of several kinds, to describe and to point at."""
    from nanomolmo2.emoji.questions import caption_counts

    scene, picture = first_scene(lambda kinds: len(kinds) >= 4 and max(kinds) == 2)
    nouns = caption_counts(scene)
    noun = min(nouns, key=lambda name: nouns[name])
    questions = ["Describe this picture.", f"Point to the {noun}.", "Point to everything."]
    return _example("scene", "A few things", ["scene.png"], questions), {"scene.png": picture}


def make_count() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Several of a kind, to count."""
    from nanomolmo2.emoji.questions import PLURAL, caption_counts

    scene, picture = first_scene(lambda kinds: len(kinds) >= 2 and max(kinds) >= 4)
    nouns = caption_counts(scene)
    most = max(nouns, key=lambda name: nouns[name])
    questions = [f"How many {PLURAL[most]} are there?", f"Point to the {PLURAL[most]}."]
    return _example("count", "Many of a kind", ["count.png"], questions), {"count.png": picture}


def make_pair() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Two pictures that share some things."""
    import numpy as np

    from nanomolmo2.emoji.pairs import PairConfig, render_pair
    from nanomolmo2.emoji.questions import PLURAL, caption_counts
    from nanomolmo2.emoji.sprites import Sprites

    sprites = Sprites.load()
    for index in count():
        rng = np.random.default_rng((SEED, 2, index))
        pair = render_pair(rng, sprites, PairConfig(_settings()))
        first, second = (caption_counts(scene) for scene in pair)
        files = [_png(scene.image) for scene in pair]
        differ = [noun for noun in first if first[noun] != second.get(noun, first[noun])]
        if differ and set(second) - set(first) and max(map(len, files)) <= MAX_BYTES:
            break
    names = ["pair-1.png", "pair-2.png"]
    questions = [
        "What is only in the second picture?",
        f"Which picture has more {PLURAL[differ[0]]}?",
    ]
    return _example("pair", "Two pictures", names, questions), dict(zip(names, files, strict=True))


def make_clip() -> tuple[dict[str, Any], dict[str, bytes]]:
    """A video of moving things, as an animated WebP: no browser and no server lacks its decoder."""
    import numpy as np
    from PIL import Image

    from nanomolmo2.emoji.clips import ClipConfig, render_clip
    from nanomolmo2.emoji.sprites import Sprites

    sprites = Sprites.load()
    config = ClipConfig(_settings(min_px=72, max_px=128), max_speed=40)
    for index in count():
        clip = render_clip(np.random.default_rng((SEED, 3, index)), sprites, config)
        kinds = {thing.category for thing in clip.objects}
        whole = [thing for thing in clip.objects if None not in thing.boxes]
        late = [thing for thing in clip.objects if thing.boxes[0] is None]
        if len(kinds) != 2 or not whole or not late:
            continue
        stream = io.BytesIO()
        frames = [Image.fromarray(frame) for frame in clip.video.frames]
        frames[0].save(
            stream,
            "WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / config.fps),
            quality=90,
            method=6,
            loop=0,
        )
        if len(stream.getvalue()) <= 2 * MAX_BYTES:
            break
    questions = [f"Track the {whole[0].category}.", f"When does the {late[0].category} appear?"]
    example = _example("clip", "A short video", ["clip.webp"], questions, kind="video")
    return example, {"clip.webp": stream.getvalue()}


def first_scene(wanted: Callable[[list[int]], bool]) -> tuple[Any, bytes]:
    """The first scene whose numbers of things of a kind are wanted, with its PNG file."""
    from nanomolmo2.emoji.questions import caption_counts

    for scene in _scenes():
        if wanted(list(caption_counts(scene).values())):
            picture = _png(scene.image)
            if len(picture) <= MAX_BYTES:
                return scene, picture
    raise AssertionError("the stream of scenes has no end")


def _scenes() -> Iterator[Any]:
    from nanomolmo2.emoji.scenes import test_scene

    for index in count():
        yield test_scene(index, "seen", seed=SEED, config=_settings())


def _settings(min_px: float = 60, max_px: float = 144) -> Any:
    from nanomolmo2.emoji.scenes import SceneConfig

    return SceneConfig(size=SIDE, min_px=min_px, max_px=max_px)


def _png(image: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _example(
    name: str, title: str, files: list[str], questions: list[str], *, kind: str = "image"
) -> dict[str, Any]:
    """One entry of examples.json; files are named as the page finds them.

    ``image`` is the picture to show of it, which is the first one; ``images`` has all of several.
    """
    paths = [f"/page/examples/{file}" for file in files]
    several = {"images": paths} if len(paths) > 1 else {}
    moving = {"video": paths[0]} if kind == "video" else {}
    return {
        "name": name,
        "title": title,
        "image": paths[0],
        **several,
        **moving,
        "questions": questions,
    }


if __name__ == "__main__":
    sys.exit(main())
